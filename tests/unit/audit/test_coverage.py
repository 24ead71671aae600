"""Intervals and labels under repetition: how often the truth lies inside, and how often noise alone earns a label.

``pytest -m slow -s`` prints the figures; nominal is 95% everywhere.
"""

import numpy as np
import pytest
from audit_cases import classified, noisy

from distill_jobs.audit.bias import Bias
from distill_jobs.audit.calibration import ece
from distill_jobs.audit.intervals import folded, ratio
from distill_jobs.audit.labels import NONE
from distill_jobs.audit.measures import Measures
from distill_jobs.audit.resample import Resampler, paired_gain
from distill_jobs.spec.audit import Audit

Generator = np.random.Generator


def rows_and_seeds(seeds: int, rows: int, of_seed: float, of_row: float, generator: Generator) -> np.ndarray:
    """Differences [seeds, rows] of mean 0; ``of_seed`` counts in standard errors of one seed's mean over rows."""
    both = generator.normal(size=(seeds, rows))
    return both + of_row * generator.normal(size=rows) + of_seed * generator.normal(size=(seeds, 1)) / np.sqrt(rows)


def covered(repeats: int, seeds: int, rows: int, of_seed: float, of_row: float) -> float:
    generator, held = np.random.default_rng(1), 0
    for repeat in range(repeats):
        values = rows_and_seeds(seeds, rows, of_seed, of_row, generator)
        resampler = Resampler(rows, draws=200, seed=repeat)
        low, high = resampler.ratio(values.T, np.ones(rows)).interval()
        held += low <= 0 <= high
    return held / repeats


def percentiles(repeats: int, seeds: int, rows: int, of_seed: float, of_row: float) -> float:
    """The same of the bootstrap that draws rows and seeds with replacement, and takes percentiles."""
    generator, held = np.random.default_rng(1), 0
    for _ in range(repeats):
        values = rows_and_seeds(seeds, rows, of_seed, of_row, generator)
        counts = generator.poisson(1.0, size=(400, rows))
        arms = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=400) / seeds
        drawn = ((counts @ values.T) * arms).sum(1) / counts.sum(1)
        low, high = np.percentile(drawn, [2.5, 97.5])
        held += low <= 0 <= high
    return held / repeats


def test_the_interval_covers_with_three_seeds() -> None:
    """Quick: 200 repetitions, where seeds vary as much as anything; 90% is four standard errors below the nominal."""
    assert covered(200, 3, 60, of_seed=2.0, of_row=0.5) >= 0.89


def test_a_paired_gain_of_nothing_is_found_to_be_nothing() -> None:
    generator, held = np.random.default_rng(2), 0
    for _ in range(150):
        shared = generator.random((1, 300)) < 0.8
        flips = generator.random((2, 3, 300)) < 0.1
        student, baseline = (np.where(flip, ~shared, shared).astype(float) for flip in flips)
        low, high = paired_gain(student, baseline, np.ones(300)).interval()
        held += low <= 0 <= high
    assert held / 150 >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_coverage_of_the_mean(seeds: int) -> None:
    print(f"\n{seeds} seeds; coverage here, and of percentiles over rows and seeds")
    worst = 1.0
    for of_row in (0.0, 0.5, 2.0):
        for of_seed in (0.0, 1.0, 2.0, 5.0):
            ours = covered(2000, seeds, 100, of_seed, of_row)
            theirs = percentiles(1000, seeds, 100, of_seed, of_row)
            print(f"  seed effect {of_seed:g}, row effect {of_row:g}: {ours:.3f} {theirs:.3f}")
            worst = min(worst, ours)
    assert worst >= {2: 0.86, 3: 0.91, 5: 0.925}[seeds]


@pytest.mark.slow
@pytest.mark.parametrize("documents", [30, 100, 400])
def test_coverage_over_documents(documents: int) -> None:
    """Documents of very different lengths, whose losses are alike within."""
    generator, held = np.random.default_rng(3), 0
    for repeat in range(1000):
        lengths = np.ceil(generator.lognormal(4.0, 1.0, documents))
        means = generator.normal(3.0, 0.5, (3, documents)) + generator.normal(0, 0.05, (3, 1))
        low, high = Resampler(documents, draws=200, seed=repeat).ratio((means * lengths).T, lengths).interval()
        held += low <= 3.0 <= high
    print(f"\n{documents} documents: {held / 1000:.3f}")
    assert held / 1000 >= (0.88 if documents == 30 else 0.915)


@pytest.mark.slow
@pytest.mark.parametrize("effect", [0.0, 3.0])
def test_coverage_of_the_gap_closed(effect: float) -> None:
    """Half of a gap of 8 standard errors; where the gap is not shown, no interval is told."""
    generator, held, told = np.random.default_rng(4), 0, 0
    for repeat in range(1000):
        rows = generator.normal(size=400)
        teacher = (rows + 0.4 + 0.5 * generator.normal(size=400))[None]
        base, student = (
            rows + mean + 0.5 * generator.normal(size=(3, 400)) + effect * generator.normal(size=(3, 1)) / 40
            for mean in (0.0, 0.2)
        )
        resampler = Resampler(400, draws=200, seed=repeat)
        t, b, s = (resampler.ratio(values.T, np.ones(400)) for values in (teacher, base, student))
        found = ratio(s - b, t - b, "no gap")
        if found["low"] is not None:
            told += 1
            held += found["low"] <= 0.5 <= found["high"]
    print(f"\nseed effect {effect:g}: {held / told:.3f} of {told} told")
    assert held / told >= 0.92


@pytest.mark.slow
@pytest.mark.parametrize("off", [0.0, 0.1])
def test_coverage_of_the_calibration_error(off: float) -> None:
    """A model that is sure by ``off`` too much everywhere; its true ECE is ``off``."""
    generator, held = np.random.default_rng(5), 0
    for repeat in range(500):
        confidence = generator.uniform(0.55, 0.95, 1000)
        correct = generator.random(1000) < confidence - off
        at = np.minimum(14, np.ceil(confidence * 15).astype(int) - 1)
        bins = np.zeros((3, 1000, 15, 1))
        bins[:, np.arange(1000), at, 0] = np.stack([np.ones(1000), confidence, correct])
        found, _ = ece(bins, np.ones(1000), Resampler(1000, draws=200, seed=repeat))
        held += found["low"] <= off <= found["high"]
    print(f"\nECE {off:g}: {held / 500:.3f}")
    assert held / 500 >= 0.91


@pytest.mark.slow
@pytest.mark.parametrize("apart", [0.0, 0.1])
def test_coverage_of_the_largest_difference(apart: float) -> None:
    """Four groups of rates that are all alike, or of which one is ``apart``."""
    generator, held = np.random.default_rng(7), 0
    for repeat in range(500):
        group = generator.integers(0, 4, 1600)
        said = (generator.random((1600, 3)) < 0.4 + apart * (group == 0)[:, None]).astype(float)
        resampler = Resampler(1600, draws=200, seed=repeat)
        each = [resampler.ratio(said * (group == g)[:, None], (group == g).astype(float)) for g in range(4)]
        point, drawn = np.stack([e.point for e in each]), np.stack([e.drawn for e in each], axis=1)
        mean = point.mean(axis=0)
        found = folded(lambda values: np.ptp(values, axis=-2), point - mean, drawn - mean, 1600)
        held += found["low"] <= apart <= found["high"]
    print(f"\nlargest of four groups' differences {apart:g}: {held / 500:.3f}")
    assert held / 500 >= 0.91


@pytest.mark.slow
def test_noise_alone_earns_no_label() -> None:
    """All groups alike: any label but *no gap shown* in at most 5% of audits."""
    generator, labelled = np.random.default_rng(6), 0
    for repeat in range(200):
        label = generator.integers(0, 2, 800)
        groups = {"g": np.array(list("abcd"))[generator.integers(0, 4, 800)]}
        names = ["teacher", *(f"{arm}/{seed}" for arm in ("student", "baseline") for seed in range(3))]
        scores = classified(label, {name: noisy(label, 0.2, generator) for name in names}, groups)
        measures = Measures(scores, Resampler(800, draws=200, seed=repeat), ("g",), positive=1)
        labelled += any(gap["label"] != NONE for gap in Bias(measures, Audit()).gaps())
    print(f"\nlabelled by noise: {labelled / 200:.3f} of audits of 16 gaps")
    assert labelled / 200 <= 0.09
