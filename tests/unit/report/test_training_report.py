"""The report's tables of how training went."""

from pathlib import Path
from typing import Any

from report_cases import finished

from distill_jobs.report import html
from distill_jobs.report.training import bad_steps, paces


def logged(step: int, **more: float) -> dict[str, Any]:
    rates = {"positions_per_second": 900.0, "tokens_per_second": 1000.0, "waiting": 0.002, "memory_bytes": 2e9}
    return {"step": step, "loss": 1.0, "hard": 1.0, "soft": 0.0, **rates, **more}


HISTORY = [
    logged(1, tokens_per_second=10.0),
    {"step": 7, "bad": "loss", "action": "skip", "samples": list(range(11))},
    logged(8),
    {"step": 9, "bad": "spike", "action": "rollback", "samples": [], "loss": 12.25, "back_to": 4},
    logged(12, memory_bytes=3e9),
    {"step": 12, "validation": 0.5},
]


def test_the_pace_is_told_by_medians() -> None:
    table = paces({"student/0": HISTORY, "baseline/0": [logged(5)], "teacher": [{"step": 1, "hard": 1.0}]})
    assert table is not None and "of peak FLOPs" not in table.headings, "no device here tells its peak"
    baseline, student = ([cell.replace("\u00a0", " ") for cell in row] for row in table.rows)
    assert student == ["student/0", "12", "1,000", "900", "0.20 %", "3.00 GB", "2"]
    assert baseline[0] == "baseline/0" and baseline[-1] == "–"
    known = paces({"student/0": [logged(5, mfu=0.41)]})
    assert known is not None and "41.0" in known.rows[0][known.headings.index("of peak FLOPs")]
    assert paces({"teacher": [{"step": 1, "hard": 1.0}]}) is None


def test_bad_steps_name_their_samples() -> None:
    table = bad_steps({"student/0": HISTORY})
    assert table is not None
    assert table.rows == [
        ["student/0", "7", "loss not finite", "–", "0, 1, 2, 3, 4, 5, 6, 7, and 3 more", "left out"],
        ["student/0", "9", "loss far above the recent ones", "12.25", "–", "back to step 4"],
    ]
    assert bad_steps({"student/0": [logged(1)]}) is None


def test_they_are_on_the_page(tmp_path: Path) -> None:
    workdir = finished(tmp_path)
    assert "Steps that went wrong" not in html.render(workdir)
    workdir.write_json("student/0/history.json", HISTORY)
    page = html.render(workdir)
    assert "Steps that went wrong" in page and "waiting for data" in page and "back to step 4" in page
