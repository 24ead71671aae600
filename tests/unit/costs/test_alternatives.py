"""The alternatives against numbers worked out by hand, and what must hold for any."""

from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jobs.costs import alternatives as priced
from distill_jobs.costs.alternatives import Measured

M = Measured(
    capture_usd=100.0,
    capture_row_usd=0.001,
    month_usd=2.0,
    months=5.0,
    student_usd=20.0,
    baseline_usd=15.0,
    rows_per_run=50_000.0,
    students=4,
    teacher_usd=900.0,
    machine_second_usd=0.001,
    request_positions=10.0,
    teacher_throughput=100.0,
    student_throughput=1000.0,
)
some = st.builds(Measured, **{f.name: st.integers(1, 100) if f.name == "students" else st.floats(0.01, 1e6)
                              for f in fields(Measured)})  # fmt: skip


def test_store_or_live_by_hand() -> None:
    assert priced.store_usd(M, 4) == 100 + 2 * 5 + 4 * 20
    assert priced.live_usd(M, 4) == 4 * (20 + 50)
    assert priced.break_even_students(M) == pytest.approx(110 / 50)
    # Four live teachers would have cost 200 beside the training: 100 more than the capture, or 50 months of storage.
    assert priced.break_even_months(M) == pytest.approx(50)
    assert priced.break_even_months(replace(M, students=1)) == 0.0
    assert priced.break_even_months(replace(M, month_usd=0.0)) is None
    assert priced.break_even_students(replace(M, capture_row_usd=0.0)) is None


def test_distil_or_alone_by_hand() -> None:
    assert priced.extra_usd(M) == 110 + 5
    gain = {"mean": 0.02, "low": 0.01, "high": 0.04, "level": 0.95}
    found = priced.usd_per_point(M, gain, "accuracy", "higher")
    assert (found["value"], found["low"], found["high"]) == (pytest.approx(57.5), pytest.approx(28.75), 115.0)
    doubtful = priced.usd_per_point(M, {**gain, "low": -0.01}, "accuracy", "higher")
    assert doubtful["high"] is None and "may be nothing" in doubtful["why"]
    assert priced.usd_per_point(M, {**gain, "mean": -0.02}, "accuracy", "higher")["value"] is None
    unknown = priced.usd_per_point(M, {"mean": 0.02, "low": None, "high": None, "why": "few"}, "accuracy", "higher")
    assert unknown["value"] is None and unknown["why"] == "the gain has no interval: few"
    lower = priced.usd_per_point(M, {"mean": -2.0, "low": -4.0, "high": -1.0}, "perplexity", "lower")
    assert (lower["value"], lower["low"], lower["high"]) == (57.5, 28.75, 115.0)


def test_distil_or_serve_by_hand() -> None:
    assert priced.request_usd(M, 100.0) == pytest.approx(1e-4) and priced.request_usd(M, 1000.0) == pytest.approx(1e-5)
    assert priced.break_even_requests(M) == pytest.approx(130 / 9e-5)
    assert priced.break_even_requests(M, with_teacher=True) == pytest.approx(1030 / 9e-5)
    assert priced.break_even_requests(replace(M, student_throughput=50.0)) is None
    assert priced.serve_alone_usd(M, 1e6) == pytest.approx(15 + 10)


@settings(deadline=None)
@given(some)
def test_the_options_cost_the_same_where_they_break_even(m: Measured) -> None:
    if (students := priced.break_even_students(m)) is not None:
        assert priced.store_usd(m, students) == pytest.approx(priced.live_usd(m, students))
    if months := priced.break_even_months(m):
        assert priced.store_usd(m, m.students, months) == pytest.approx(priced.live_usd(m, m.students))
    requests = priced.break_even_requests(m)
    if requests is not None and requests < 1e9:
        assert priced.serve_student_usd(m, requests) == pytest.approx(priced.serve_teacher_usd(m, requests), rel=1e-5)


@settings(deadline=None)
@given(some)
def test_curves_reach_beyond_their_break_even(m: Measured) -> None:
    for curve in priced.curves(m):
        assert len(curve["at"]) == len(next(iter(curve["lines"].values()))) and curve["at"][0] == 0
        assert not curve["break_even"] or curve["at"][-1] >= curve["break_even"]


def test_curves_are_the_formulas_at_their_points() -> None:
    requests, students, months = priced.curves(M)
    at = students["at"][3]
    assert students["lines"]["store once"][3] == priced.store_usd(M, at)
    assert requests["lines"]["serve the teacher"][-1] == priced.serve_teacher_usd(M, requests["at"][-1])
    assert set(months["lines"]["live teacher in every run"]) == {priced.live_usd(M, 4)}
