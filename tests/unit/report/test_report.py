"""The page: what it says, that it holds together without its parts, and that nothing on it runs or loads."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from report_cases import HOSTILE, STATISTICS, evaluation, finished

from cluster.files import Folder
from distill_jobs.costs.ledger import Ledger
from distill_jobs.report import charts, html
from distill_jobs.report.artifacts import collect
from distill_jobs.report.findings import finding
from distill_jobs.words import model_name


class _Reader(HTMLParser):
    """Tags with their attributes, and whether they nest."""

    VOID = {"meta", "br", "img", "link", "input", "hr"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return html.render(finished(tmp_path_factory.mktemp("finished")))


def test_a_finished_run_is_all_there(page: str) -> None:
    text = page.replace("\u00a0", " ")
    for words in (
        "MLP 16 distilled from MLP 512×512",
        "Learning from the teacher helped",
        "held-out accuracy is 85.41 %",
        "+0.52",
        "182×",
        "fewer parameters than the teacher",
        "Asian-Pac-Islander",
        "14 bytes a position",
        "$0.04 a core-hour",
        "yours for cpu_hour",
        "ab12cd34ef56ab78",
        "hidden:",
        "rows: train 26,049",
    ):
        assert words in text, words
    assert "yet." not in page and "Left out" not in page
    assert page.count("<svg") == 7


def test_nothing_runs_and_nothing_is_fetched(page: str) -> None:
    reader = _Reader(page)
    tags = {tag for tag, _ in reader.found}
    assert not tags & {"script", "iframe", "object", "embed", "link", "img", "form"}
    for _, attributes in reader.found:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action", "data"):
                assert (value or "").startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", page))
    assert "@import" not in page


def test_ids_are_unique_and_every_picture_has_words(page: str) -> None:
    reader = _Reader(page)
    ids = [value for _, attributes in reader.found for name, value in attributes.items() if name == "id"]
    assert len(ids) == len(set(ids))
    pictures = [attributes for tag, attributes in reader.found if tag == "svg"]
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert set(str(attributes["aria-labelledby"]).split()) <= set(ids)


def test_pictures_follow_the_theme(page: str) -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.S))
    assert "var(--student)" in drawn and "currentColor" in drawn
    assert not re.findall(r"#[0-9a-f]{6}\b", drawn)
    assert "font-family" not in drawn and "DejaVu" not in drawn


def test_hostile_names_stay_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slices = {HOSTILE: {HOSTILE: (10, 0.1), "$a_b$ \\frac": (5, 0.2), "\x00\x1b\ud800": (5, 0.2)}}
    workdir = finished(tmp_path, name=HOSTILE)
    broken = evaluation(slices=slices)
    (tmp_path / "evaluation.json").write_text(json.dumps(broken))
    sample = {**STATISTICS["samples"][0], "gold": HOSTILE, "source": HOSTILE, "likely": [(HOSTILE, 0.5)]}  # type: ignore[index]
    monkeypatch.setattr(html, "_statistics", lambda *_: {**STATISTICS, "samples": [sample]})
    page = html.render(workdir)
    assert "<script" not in page and "&lt;script&gt;" in page
    assert {tag for tag, _ in _Reader(page).found}.isdisjoint({"script"})
    assert "$a_b$" in page
    page.encode()
    for picture in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(picture)


def test_passwords_in_addresses_are_not_shown(page: str) -> None:
    assert "hunter2" not in page and "***@tracker" in page


@pytest.mark.parametrize(
    "gone",
    [
        ["evaluation.json"],
        ["ledger.json"],
        ["spec.yaml"],
        ["store/manifest.json", "store/plan.json"],
        ["data/manifest.json"],
        ["teacher/history.json", "student/0/history.json", "student/0/stage.json"],
    ],
)
def test_what_is_missing_is_said(tmp_path: Path, gone: list[str]) -> None:
    workdir = finished(tmp_path)
    for name in gone:
        (tmp_path / name).unlink()
    page = html.render(workdir)
    _Reader(page)
    if gone[0] in ("evaluation.json", "ledger.json", "store/manifest.json"):
        assert "yet. <code>distill" in page
    if gone[0] == "evaluation.json":
        assert "Not evaluated yet" in page


def test_a_job_with_a_live_teacher_lacks_no_store(tmp_path: Path) -> None:
    workdir = finished(tmp_path)
    for name in ("manifest", "plan", "stage"):
        (tmp_path / "store" / f"{name}.json").unlink()
    assert "has not been captured yet" in html.render(workdir)
    spec = (tmp_path / "spec.yaml").read_text()
    (tmp_path / "spec.yaml").write_text(f"{spec}\ndistill: {{soft_labels: live}}\n")
    page = html.render(workdir)
    assert "has not been captured yet" not in page and "The logit store" not in page


def test_an_empty_workdir_gives_a_page(tmp_path: Path) -> None:
    page = html.render(Folder(str(tmp_path / "none")))
    _Reader(page)
    assert page.count("yet.") == 4 and "Not evaluated yet" in page


@pytest.mark.parametrize(
    "damage", ["{", "[]", "{}", '{"metric": 3, "models": []}', '{"stage": 1, "ended": "x"}', "null"]
)
def test_damaged_files_are_named_not_fatal(tmp_path: Path, damage: str) -> None:
    workdir = finished(tmp_path, seeds=(0,))
    files = sorted(tmp_path.rglob("*.json"))
    for file in files:
        file.write_text(damage)
    page = html.render(workdir)
    _Reader(page)
    assert "Left out, because it can't be read" in page or damage == "null"
    if damage == "{":
        assert all(str(file.relative_to(tmp_path)) in page for file in files)


def test_the_finding() -> None:
    assert finding(evaluation()).verdict == "helped"
    nothing = finding(evaluation(reach=1.2))
    assert nothing.verdict == "nothing" and "not distinguishable from nothing" in nothing.sentence
    assert "one seed" in finding(evaluation(seeds=(0,))).sentence
    language = finding(evaluation(metric="perplexity"))
    assert language.verdict == "helped" and "−3.60 perplexity" in language.sentence
    worse: dict[str, Any] = evaluation()
    worse["better"] = "lower"
    assert finding(worse).verdict == "hurt"


def test_a_gain_without_an_interval(tmp_path: Path) -> None:
    workdir = finished(tmp_path)
    few = workdir.read_json("evaluation.json")
    few["summary"]["gain"] |= {"low": None, "high": None, "why": "too few units", "distinguishable": False}
    assert finding(few).verdict == "nothing" and "No interval can be had" in finding(few).sentence
    workdir.write_json("evaluation.json", few)
    page = html.render(workdir)
    assert "too few units" in page and "Left out, because it can't be read" not in page


def test_many_slices_keep_the_largest() -> None:
    rows = {f"v{i}": {"rows": i, "teacher": 0.9, "student": 0.8, "baseline": 0.7} for i in range(100)}
    picture = charts.slices("accuracy", {"s": rows})
    assert picture.count("s: v") == charts.MOST_SLICES and "s: v99<" in picture


def test_collecting_without_a_spec_finds_arms_in_the_ledger(tmp_path: Path) -> None:
    workdir = finished(tmp_path)
    (tmp_path / "spec.yaml").unlink()
    assert set(collect(workdir).histories) >= {"teacher", "student/0", "baseline/2"}


def test_the_audit_and_gate_arms_are_among_the_stages(tmp_path: Path) -> None:
    workdir = finished(tmp_path)
    ledger = Ledger(workdir)
    for stage in ("audit", "gate-drop/0"):
        ledger.enter(replace(ledger.entries()[0], stage=stage))
        workdir.write_json(f"{stage}/stage.json", workdir.read_json("data/stage.json"))
    workdir.write_json("gate-drop/0/history.json", workdir.read_json("student/0/history.json"))
    found = collect(workdir)
    assert {"audit", "gate-drop/0"} <= found.stages.keys() and "gate-drop/0" in found.histories


def test_a_teacher_of_another_job_is_named_without_the_way_there() -> None:
    for path in ("runs/damaged/teacher/model", "/home/me/runs/damaged/teacher/model/"):
        assert model_name({"saved": path}) == "damaged/teacher"
