"""The other ways to the same goal, priced from the same measurements: plain arithmetic, with formula and unit each.

Three questions: the teacher's answers stored once, or a live teacher in every run; distillation, or the student trained
alone; distillation, or the teacher served as it is. US dollars throughout; a function's name says what it gives.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Line = Callable[[float], float]
_POINTS = 41


@dataclass(frozen=True)
class Measured:
    """What this job has measured, as money.

    Attributes:
        capture_usd: the teacher over every training row, into the store.
        capture_row_usd: the same for one row, without the actors' start-up and waiting.
        month_usd: for keeping the store for a month.
        months: for which it is kept.
        student_usd, baseline_usd: training one, its share of the gang's start-up included; means over the seeds.
        rows_per_run: rows that a student's training takes, all epochs together.
        students: trained from the store so far, trials of a tuning included.
        teacher_usd: training the teacher, or this job's share of what one that was brought is said to have cost.
        machine_second_usd: for what a model was served on when its throughput was measured.
        request_positions: scored positions of a request: one row of the held-out split.
        teacher_throughput, student_throughput: scored positions a second, whole batches.
    """

    capture_usd: float
    capture_row_usd: float
    month_usd: float
    months: float
    student_usd: float
    baseline_usd: float
    rows_per_run: float
    students: int
    teacher_usd: float
    machine_second_usd: float
    request_positions: float
    teacher_throughput: float
    student_throughput: float


def store_usd(m: Measured, students: float, months: float | None = None) -> float:
    """Store once: capture + month × months + students × (training of one). The teacher runs once, whatever comes."""
    kept = m.months if months is None else months
    return m.capture_usd + m.month_usd * kept + students * m.student_usd


def live_usd(m: Measured, students: float) -> float:
    """A live teacher: students × (training of one + rows of its training × the teacher's answer to one).

    At its cheapest: as if the teacher's machines were held only while they answer.
    """
    return students * (m.student_usd + m.rows_per_run * m.capture_row_usd)


def break_even_students(m: Measured) -> float | None:
    """From how many students on the store is cheaper: (capture + month × months) / (rows of a run × answer to one).

    None where a live teacher's answers cost nothing.
    """
    live = m.rows_per_run * m.capture_row_usd
    return (m.capture_usd + m.month_usd * m.months) / live if live else None


def break_even_months(m: Measured) -> float | None:
    """For how many months the store may be kept before live teachers would have been cheaper, for ``m.students``.

    (students × rows of a run × answer to one − capture) / month. 0 where it never was cheaper, None where keeping it
    costs nothing.
    """
    saved = m.students * m.rows_per_run * m.capture_row_usd - m.capture_usd
    if saved <= 0:
        return 0.0
    return saved / m.month_usd if m.month_usd else None


def extra_usd(m: Measured) -> float:
    """What one student costs more than the same student trained alone: capture + month × months + (student − baseline).

    The teacher's own cost is not in it: it is ``m.teacher_usd``, and counts where the teacher was made for this.
    """
    return m.capture_usd + m.month_usd * m.months + m.student_usd - m.baseline_usd


def request_usd(m: Measured, throughput: float) -> float:
    """A request served: (positions of a request / positions a second) × (machine, a second); fully loaded."""
    return m.request_positions / throughput * m.machine_second_usd


def serve_teacher_usd(m: Measured, requests: float) -> float:
    """No distillation: requests × (teacher's request)."""
    return requests * request_usd(m, m.teacher_throughput)


def serve_student_usd(m: Measured, requests: float) -> float:
    """Distil, then serve the student: capture + month × months + (training of one) + requests × (student's request)."""
    return store_usd(m, 1) + requests * request_usd(m, m.student_throughput)


def serve_alone_usd(m: Measured, requests: float) -> float:
    """Train the student alone, then serve it: (baseline's training) + requests × (student's request)."""
    return m.baseline_usd + requests * request_usd(m, m.student_throughput)


def break_even_requests(m: Measured, with_teacher: bool = False) -> float | None:
    """From how many requests on distilling has paid against serving the teacher; None where the student is not cheaper.

    (capture + month × months + student [+ teacher]) / (teacher's request − student's request).
    """
    saved = request_usd(m, m.teacher_throughput) - request_usd(m, m.student_throughput)
    spent = store_usd(m, 1) + (m.teacher_usd if with_teacher else 0.0)
    return spent / saved if saved > 0 else None


def usd_per_point(m: Measured, gain: dict[str, Any], metric: str, better: str) -> dict[str, Any]:
    """``extra_usd`` / (the student's gain over the baseline), for a percentage point, or one of perplexity.

    The bounds are those of the gain: its low end makes the dear one. Null where the gain may be nothing.
    """
    if gain["low"] is None:
        return estimate(None, f"the gain has no interval: {gain['why']}")
    sign, unit = (1.0 if better == "higher" else -1.0), (100.0 if metric == "accuracy" else 1.0)
    ends = sorted(sign * unit * gain[name] for name in ("low", "high"))
    mean, extra = sign * unit * gain["mean"], extra_usd(m)
    if mean <= 0:
        return estimate(None, "there was no gain")
    low = extra / ends[1]
    why = None if ends[0] > 0 else "the gain may be nothing, and a point then has no price"
    return {
        "value": extra / mean,
        "low": low,
        "high": extra / ends[0] if ends[0] > 0 else None,
        "level": gain.get("level", 0.95),
        **({"why": why} if why else {}),
    }


def estimate(value: float | None, why: str) -> dict[str, Any]:
    """A figure without an interval, and why there is none."""
    return {"value": value, "low": None, "high": None, "level": 0.95, "why": why}


def curve(name: str, x: str, lines: dict[str, Line], most: float, break_even: float | None) -> dict[str, Any]:
    """Points of each of ``lines`` from 0 to ``most``: ``{"name", "x", "y", "at": [x …], "lines": {name: [y …]}}``."""
    at = [most * i / (_POINTS - 1) for i in range(_POINTS)]
    drawn = {line: [usd(where) for where in at] for line, usd in lines.items()}
    return {"name": name, "x": x, "y": "US dollars", "at": at, "lines": drawn, "break_even": break_even}


def curves(m: Measured) -> list[dict[str, Any]]:
    """Money against requests served, students trained, and months for which the store is kept."""
    students, months, requests = break_even_students(m), break_even_months(m), break_even_requests(m)
    return [
        curve(
            "requests",
            "requests served",
            {
                "serve the teacher": lambda n: serve_teacher_usd(m, n),
                "distil, serve the student": lambda n: serve_student_usd(m, n),
                "train alone, serve that": lambda n: serve_alone_usd(m, n),
            },
            _reach([requests], 1e6),
            requests,
        ),
        curve(
            "students",
            "students trained",
            {"store once": lambda n: store_usd(m, n), "live teacher in every run": lambda n: live_usd(m, n)},
            _reach([students, m.students], 10.0),
            students,
        ),
        curve(
            "months",
            f"months for which the store is kept ({m.students} students)",
            {
                "store once": lambda n: store_usd(m, m.students, n),
                "live teacher in every run": lambda _: live_usd(m, m.students),
            },
            _reach([months], 12.0),
            months,
        ),
    ]


def _reach(points: Sequence[float | None], without: float) -> float:
    """Twice as far as the farthest point."""
    known = [point for point in points if point]
    return 2.0 * max(known) if known else without
