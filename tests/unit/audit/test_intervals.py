"""Intervals against closed formulas, and ratios whose denominator is near nothing."""

import math

import numpy as np
import pytest
from scipy import stats

from distill_jobs.audit.intervals import Estimate, folded, ratio
from distill_jobs.audit.resample import Resampler, paired_gain


def crossed(seeds: int, rows: int, of_seed: float, generator: np.random.Generator) -> np.ndarray:
    """Values [seeds, rows] with effects of seeds, of rows, and of both."""
    both = generator.normal(size=(seeds, rows)) + generator.normal(size=rows)
    return both + of_seed * generator.normal(size=(seeds, 1))


def anova(values: np.ndarray) -> tuple[float, float]:
    """Standard error and degrees of freedom of the grand mean, from mean squares in float64."""
    seeds, rows = values.shape
    by_seed, by_row, mean = values.mean(1), values.mean(0), values.mean()
    of_seeds = by_seed.var(ddof=1) / seeds
    of_rows = by_row.var(ddof=1) / rows
    rest = values - by_seed[:, None] - by_row + mean
    of_both = (rest**2).sum() / ((seeds - 1) * (rows - 1)) / (seeds * rows)
    whole = max(of_seeds + of_rows - of_both, of_rows)
    terms = of_seeds**2 / (seeds - 1) + of_rows**2 / (rows - 1) + of_both**2 / ((seeds - 1) * (rows - 1))
    return math.sqrt(whole), max(whole**2 / terms, seeds - 1)


@pytest.mark.parametrize("of_seed", [0.0, 0.1, 2.0])
def test_the_bootstrap_finds_the_variances_of_the_crossed_design(of_seed: float) -> None:
    values = crossed(3, 300, of_seed, np.random.default_rng(1))
    found = Resampler(300, draws=20_000).ratio(values.T, np.ones(300))
    error, freedom = found.spread()
    expected, degrees = anova(values)
    assert error == pytest.approx(expected, rel=0.03)
    assert freedom == pytest.approx(degrees, rel=0.15)
    low, high = found.interval()
    half = stats.t.ppf(0.975, freedom) * error
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half))
    assert found.p_value() == pytest.approx(2 * stats.t.sf(abs(values.mean()) / error, freedom))


def test_one_seed_gives_the_t_interval_of_rows() -> None:
    values = np.random.default_rng(2).normal(size=200)
    found = Resampler(200, draws=20_000).ratio(values[:, None], np.ones(200))
    expected = stats.t.interval(0.95, 199, values.mean(), stats.sem(values))
    assert found.interval() == pytest.approx(expected, abs=0.01)


def test_documents_are_drawn_whole() -> None:
    """Rows of one document are alike: as units of their own they would look like more evidence than they are."""
    generator = np.random.default_rng(3)
    documents = np.repeat([f"d{i}" for i in range(50)], 20)
    values = np.repeat(generator.normal(size=50), 20)[:, None]
    own, whole = (Resampler(1000, units, draws=4000).ratio(values, np.ones(1000)) for units in (None, documents))
    assert whole.spread()[0] == pytest.approx(own.spread()[0] * math.sqrt(20), rel=0.1)
    assert whole.value == pytest.approx(own.value) and whole.units == 50


def test_longer_documents_weigh_more() -> None:
    weights, sums = np.array([1.0, 9.0]), np.array([[1.0], [0.0]])
    assert Resampler(2).ratio(sums, weights).value == pytest.approx(0.1)


def test_what_arms_share_cancels() -> None:
    generator = np.random.default_rng(4)
    shared = generator.normal(size=(3, 400)) * 10
    student, baseline = shared + 0.1 + 0.01 * generator.normal(size=(3, 400)), shared
    found = paired_gain(student, baseline, np.ones(400))
    low, high = found.interval()
    assert 0 < low < 0.1 < high < 0.2


def test_blocks_and_order_do_not_matter_to_the_sums() -> None:
    generator = np.random.default_rng(5)
    values = generator.normal(size=(9000, 2))
    found = Resampler(9000, draws=200).sums(values)
    np.testing.assert_allclose(found.whole, values.sum(0))
    # Each resample draws n units in the mean, each 1 ± 1 times.
    assert found.drawn.mean(0) == pytest.approx(values.sum(0), abs=4 * math.sqrt(9000 / 200))
    assert found.drawn.var(0) == pytest.approx((values**2).sum(0), rel=0.3)


def estimate(mean: float, error: float, generator: np.random.Generator) -> Estimate:
    return Estimate(np.array([mean]), mean + error * generator.normal(size=(2000, 1)), 1000)


def test_fieller_agrees_with_its_closed_form() -> None:
    generator = np.random.default_rng(6)
    above, below = estimate(1.0, 0.1, generator), estimate(2.0, 0.2, generator)
    found = ratio(above, below, "")
    scale = 1000 / 999
    covariance = np.cov(above.drawn[:, 0], below.drawn[:, 0]) * scale
    t = stats.t.ppf(0.975, 999) ** 2
    roots = np.roots([4 - t * covariance[1, 1], -2 * (2 - t * covariance[0, 1]), 1 - t * covariance[0, 0]])
    assert (found["low"], found["high"]) == pytest.approx(tuple(sorted(roots.real)), rel=1e-6)
    assert found["value"] == 0.5


def test_no_ratio_is_told_of_a_gap_that_is_not_there() -> None:
    generator = np.random.default_rng(7)
    found = ratio(estimate(1.0, 0.1, generator), estimate(0.1, 0.1, generator), "no gap")
    assert (found["value"], found["low"], found["why"]) == (None, None, "no gap")


def test_a_ratio_far_from_one_and_one_without_noise() -> None:
    generator = np.random.default_rng(8)
    found = ratio(estimate(-50.0, 1.0, generator), estimate(1.0, 0.1, generator), "")
    assert found["low"] < -50 < found["high"] < 0
    exact = Estimate(np.array([1.0]), np.ones((200, 1)), 100)
    assert ratio(exact, exact * 2.0, "")["low"] == ratio(exact, exact * 2.0, "")["high"] == 0.5


def test_noise_is_taken_off_what_cannot_be_negative() -> None:
    generator = np.random.default_rng(9)

    def distance(parts: np.ndarray) -> np.ndarray:
        return np.asarray(np.abs(parts).sum(axis=-2))

    for truth in (0.0, 1.0):
        point = truth + 0.1 * generator.normal(size=(12, 1))
        found = folded(distance, point, point + 0.1 * generator.normal(size=(2000, 12, 1)), 500)
        assert found["value"] == pytest.approx(np.abs(point).sum())
        assert found["debiased"] == pytest.approx(12 * truth, abs=0.7)
        assert found["low"] <= 12 * truth <= found["high"]
    assert found["debiased"] == pytest.approx(found["value"], abs=0.02)  # Far from 0 noise adds nothing.


def test_a_few_documents_have_an_interval() -> None:
    """Some resamples of six documents are empty; they are left out."""
    values = np.random.default_rng(10).normal(3.0, 1.0, (6, 1))
    found = Resampler(6, draws=4000).ratio(values, np.ones(6))
    assert not np.isfinite(found.drawn).all()
    low, high = found.interval()
    half = stats.t.ppf(0.975, 5) * values.std(ddof=1) / math.sqrt(6)
    assert high - low == pytest.approx(2 * half, rel=0.35)


def test_a_rate_of_all_or_none_is_not_certain() -> None:
    """195 of 195: Clopper and Pearson's lower end."""
    found = Resampler(195).ratio(np.ones((195, 3)), np.ones(195)).as_dict(least=0.0, most=1.0)
    assert (found["value"], found["high"]) == (1.0, 1.0)
    assert found["low"] == pytest.approx(stats.binomtest(195, 195).proportion_ci(0.95).low)
    none = Resampler(195).ratio(np.zeros((195, 1)), np.ones(195)).as_dict(least=0.0, most=1.0)
    assert none["low"] == 0 and none["high"] == pytest.approx(stats.binomtest(0, 195).proportion_ci(0.95).high)


def test_too_few_units_give_no_bounds_and_say_so() -> None:
    found = Resampler(1).ratio(np.array([[1.0]]), np.ones(1)).as_dict()
    assert found["value"] == 1.0 and found["low"] is None and "too few" in found["why"]
    spans = folded(lambda parts: np.ptp(parts, axis=-2), np.ones((2, 1)), np.full((200, 2, 1), np.nan), 1)
    assert spans["low"] is None and spans["why"]
    nothing = Resampler(5).ratio(np.zeros((5, 1)), np.zeros(5)).as_dict()
    assert nothing["value"] is None and nothing["why"]
