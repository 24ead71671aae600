"""The fidelity of a store as tables and pictures, and what becomes of a page that is damaged."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from report_cases import finished
from rich.console import Console

from distill_jobs.report import fidelity, fidelity_text, html


def gradient(error: float | None) -> dict[str, Any]:
    return {"error": error, "angle": 0.5, "median_error": 0.02, "median_angle": 1.0, "summed_error": 0.004}


def means(error: float | None, kl: float | None = 2.5e-5) -> dict[str, Any]:
    found = {"kl": kl, "total_variation": 0.01, "ece": 0.03}
    return {**found, "gradient_random": gradient(error), "gradient_student/0": gradient(error)}


def coding(family: str, size: str, count: float, error: float, own: bool = False) -> dict[str, Any]:
    kl = None if "renormalised" in family else 2.5e-5
    at = {"1": means(error, kl)}
    entry: dict[str, Any] = {
        "family": family,
        "name": f"{family} {size}",
        "bytes": count,
        "own": own,
        "top1_kept": 1.0,
        "gold_rank_kept": 0.75,
        "gold_logprob_off": None if "renormalised" in family else 0.0002,
        "log_partition_off": {"p50": 0.0003, "p99": 0.0041, "max": 0.009},
        "at": {**at, "2": means(error), "4": means(error)} if own else at,
    }
    if own:
        entry["slices"] = {"style": {"verse": {"positions": 12, "at": at}}}
    return entry


def page() -> dict[str, Any]:
    codings = [
        coding("hybrid", "48+16", 215, 0.012, own=True),
        coding("hybrid", "12+4", 71, 0.05),
        coding("topk", "51", 224, 0.02),
        coding("top-k renormalised", "56", 224, 0.064),
    ]
    known = {"version": 1, "plan": "p", "split": "validation", "positions": 512, "classes": 49152}
    return {**known, "students": ["random", "student/0"], "codings": codings}


def test_tables_say_what_was_measured() -> None:
    told = fidelity.sentence(page()).replace("\u00a0", " ")
    assert "hybrid 48+16" in told and "1.20 %" in told and "trained student" in told and "512 validation" in told
    own = fidelity.own(page())
    assert own.headings == ["", "T = 1", "T = 2", "T = 4"] and len(own.rows) == 3 + 2 * 5
    assert [row[0] for row in fidelity.slices(page()).rows] == ["style: verse"]
    compared = fidelity.compared(page())
    assert [row[0] for row in compared.rows] == [
        "hybrid 12+4", "hybrid 48+16 (this)", "topk 51", "top-k renormalised 56",
    ]  # fmt: skip
    assert compared.rows[-1][2:] == ["75.0\u00a0%", "6.4\u00a0%", "0.4\u00a0%"]
    for table in (own, compared, fidelity.slices(page())):
        assert all(len(row) == len(table.headings) for row in table.rows)
    train = {**page(), "split": "train"}
    assert "none held back" in fidelity.sentence(train)


def test_pictures_are_drawn() -> None:
    image = Image.open(io.BytesIO(fidelity.picture(page())))
    assert image.format == "PNG" and image.width > 600
    for which in fidelity.ERRORS:
        svg = fidelity.curve(page(), which)
        assert svg.startswith("<svg") and "hybrid: 71 bytes" in svg


def test_the_report_shows_it_and_survives_damage(tmp_path: Path) -> None:
    workdir = finished(tmp_path)
    assert "What it keeps of the teacher" not in html.render(workdir)
    workdir.write_json("store/fidelity.json", page())
    text = html.render(workdir)
    assert "What it keeps of the teacher" in text and text.count("<svg") == 9
    broken = copy.deepcopy(page())
    del broken["codings"][0]["at"]
    workdir.write_json("store/fidelity.json", broken)
    assert "store/fidelity.json" in html.render(workdir)
    workdir.write("store/fidelity.json", b"{")
    assert "store/fidelity.json" in html.render(workdir)


def test_the_terminal_shows_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(fidelity_text, "Console", lambda **_: Console(file=out, width=80))
    fidelity_text.print_page(page())
    assert "hybrid 48+16 (this)" in out.getvalue() and "style: verse" in out.getvalue()
    assert "…" not in out.getvalue(), "80 columns are enough"
