"""Several pipelines side by side: the front, what differs, and reading them back from a real MLflow."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from reckoning_cases import audit, estimate, reckoned, verdict
from report_cases import HOSTILE, finished
from rich.console import Console as Rich

from cluster.errors import TrackingError
from cluster.files import Folder
from cluster.tracked import TrackedRun, read_run
from cluster.tracking import Run, Tracker
from distill_jobs import words
from distill_jobs.comparing import compare, named_apart, pipeline_of
from distill_jobs.console import Console
from distill_jobs.costs.ledger import Ledger
from distill_jobs.errors import NotReadyError
from distill_jobs.judged import intervals_of, tags_of
from distill_jobs.outcome import log_outcome
from distill_jobs.report.compare import Pipeline, Point, findings, front, page, settings_that_differ

USD = {"prepare": 1.0, "teacher": 10.0, "capture": 2.0, "student/0": 3.0, "student/1": 5.0, "baseline/0": 2.0,
       "baseline/1": 2.0, "train/start-up": 4.0, "evaluate": 7.0}  # fmt: skip

LOGGED = {stage: USD[stage] for stage in ("teacher", "student/0", "baseline/0")}


def pipeline(name: str, student: float, reach: float = 0.01, **changes: object) -> Pipeline:
    quality = {"teacher": estimate(0.9, 0.001), "student": estimate(student, reach), "baseline": estimate(0.8, 0.001)}
    known = Pipeline(name, f"{name}-id", "accuracy", "higher", quality, estimate(0.01), {"student": 0.1}, USD)
    return replace(known, **changes)  # type: ignore[arg-type]


def test_a_model_costs_what_it_needs() -> None:
    some = pipeline("a", 0.85)
    assert some.made_for("teacher") == 11.0
    assert some.made_for("baseline") == 1.0 + 2.0 + 1.0, "data, training, and a fourth of the gang's start-up"
    assert some.made_for("student") == 1.0 + 10.0 + 2.0 + 4.0 + 1.0
    assert some.total_usd == 36.0
    brought = pipeline("b", 0.85, usd={"prepare": 1.0, "teacher/declared": 100.0, "student/0": 3.0})
    assert brought.made_for("teacher") == 101.0 and brought.made_for("student") == 104.0


def test_the_front_holds_what_nothing_beats() -> None:
    points = [Point(pipeline("p", 0.0), "student", cost, {"value": value}) for cost, value in
              ((1, 0.7), (2, 0.6), (3, 0.8), (3, 0.75), (4, 0.8), (5, 0.9))]  # fmt: skip
    assert [(p.cost, p.quality["value"]) for p in front(points, "higher")] == [(1, 0.7), (3, 0.8), (5, 0.9)]
    assert [p.quality["value"] for p in front(points, "lower")] == [0.7, 0.6]


def test_what_is_no_better_than_noise_is_said() -> None:
    said = findings([pipeline("a", 0.89, 0.02), pipeline("b", 0.85)])
    assert "the Pareto front, cheapest first: a, baseline" in said[0]
    assert not any("overlaps" in each for each in findings([pipeline("a", 0.85, 0.001)]))
    close = pipeline("c", 0.91, 0.02)
    assert "overlaps that of c, teacher, which cost less" in findings([close])[1]
    assert findings([replace(close, quality={}, metric="")]) == ["Not evaluated yet: c."]


def test_only_settings_that_differ_are_shown() -> None:
    one = {"distill.alpha": "0.9", "distill.temperature": "2", "workdir": "x", "tracking.uri": "x", "name": "a"}
    two = {**one, "distill.alpha": "0.5", "workdir": "y", "name": "b", "student.lora.rank": "4"}
    found = settings_that_differ([pipeline("a", 0.8, settings=one), pipeline("b", 0.8, settings=two)])
    assert found == {"distill.alpha": ["0.9", "0.5"], "student.lora.rank": ["", "4"]}


def test_the_page_is_whole() -> None:
    settings = {"distill.alpha": HOSTILE}
    other = pipeline("other", 30.0, 1.0, metric="perplexity", better="lower")
    told = {"verdict": "distil", "sentence": HOSTILE, "audit": "1 inherited"}
    text = page([pipeline(HOSTILE, 0.85, settings=settings, **told), pipeline("b", 0.86), other])
    body = text[: text.index('id="plotly"')]
    assert re.findall(r'<section id="(\w+)">', body) == [
        "accuracy",
        "perplexity",
        "verdicts",
        "settings",
        "costs",
        "runs",
    ]
    assert "Left out" not in text and "alert(1)</script>" not in body and text.count('class="live"') == 5


def test_pipelines_of_one_name_are_told_apart() -> None:
    names = [
        p.name for p in named_apart([pipeline("a", 0.8, run_id="1234567"), pipeline("a", 0.8), pipeline("b", 0.8)])
    ]
    assert names == ["a 123456", "a a-id", "b"]


def test_tags_say_what_was_found() -> None:
    tags = tags_of(verdict(), audit())
    assert tags["distill.verdict"] == "train the student alone" and tags["distill.goal"] == "accuracy"
    assert tags["distill.audit"] == "1 inherited, 1 amplified, 1 no gap shown"
    assert tags["distill.max_gap"] == "exceeded: equalized_odds_difference over sex 0.1000"
    assert tags["distill.negative_transfer"] == "1.300 (95 % interval 1.200 to 1.400)"
    assert tags_of(None, None) == {} and intervals_of(None) == {}
    assert intervals_of(audit())["quality/student_accuracy_low"] == pytest.approx(0.84)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(str(tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="module")
def logged(home: Folder) -> Callable[[str, float], Run]:
    """Logs a pipeline as one that has ended does, and leaves its workdir."""

    def log(name: str, alpha: float) -> Run:
        tracker = Tracker(None, "compared", home, home / name)
        parent = tracker.parent("census", {"distill": {"alpha": alpha}}, {"distill.task": "classification"})
        for stage, usd in LOGGED.items():
            run = parent.child(stage, {"distill.stage": stage})
            run.metrics({"cost/usd": usd, "quality/latency_ms": 0.2 if "student" in stage else None})
            run.end()
        trial = parent.child("tune/student-1", {"distill.stage": "tune/student-1"})
        trial.metrics({"cost/usd": 99.0})
        trial.end()
        parent.metrics({f"quality/{role}_accuracy": 0.8 for role in ("teacher", "student", "baseline")})
        parent.metrics({"quality/gain": 0.01, "quality/gain_low": -0.01, "quality/gain_high": 0.03})
        parent.metrics(intervals_of(audit()))
        parent.tags(tags_of(verdict(), audit()))
        parent.end()
        assert not tracker.close(10.0)
        (home / name).write("spec.yaml", yaml.safe_dump({"name": "census", "tracking": {"uri": None}}).encode())
        return parent

    return log


def test_pipelines_are_read_back_from_mlflow(
    logged: Callable[[str, float], Run], home: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = logged("one", 0.9), logged("two", 0.5)
    read = pipeline_of(read_run(one.tracker.uri, str(one.run_id)))
    assert read.usd == LOGGED and read.latency_ms == {"student": 0.2} and read.settings == {"distill.alpha": "0.9"}
    assert read.quality["student"]["low"] == pytest.approx(0.84) and read.verdict == "train the student alone"
    told = Rich(width=200, record=True)
    out = tmp_path / "made" / "compare.html"
    compare([str(home / "one"), str(two.run_id), str(home / "one") + "/"], str(out), one.tracker.uri, Console(told))
    text = out.read_text()
    assert f"census {str(one.run_id)[:6]}" in text and "distill.alpha" in text and "2 pipelines compared" in text
    printed = told.export_text()
    assert "train the student alone" in printed and f"page: {out}" in printed
    compare([str(home / "one"), str(two.run_id)], f"{tmp_path}/other/", one.tracker.uri, Console(told))
    assert (tmp_path / "other" / "compare.html").exists() and "other/compare.html" in told.export_text()
    with pytest.raises(NotReadyError, match="two pipelines at least"):
        compare([str(home / "one"), str(one.run_id)], str(out), one.tracker.uri, Console(told))
    with pytest.raises(NotReadyError, match="not that of a pipeline"):
        pipeline_of(read_run(one.tracker.uri, read_run(one.tracker.uri, str(one.run_id)).nested[0].run_id))
    with pytest.raises(TrackingError, match="can't read run 0000"):
        read_run(one.tracker.uri, "0" * 32)
    with pytest.raises(NotReadyError, match="neither the id of an MLflow run nor the workdir"):
        compare(["nowhere", str(one.run_id)], str(out), None, Console(told))
    monkeypatch.chdir((home / "one").path())
    compare([".", "../two"], str(out), None, Console(told))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(NotReadyError, match="Give --tracking"):
        compare([str(one.run_id), str(two.run_id)], str(out), None, Console(told))


def test_what_a_run_lacks_is_left_out() -> None:
    run = TrackedRun("0" * 32, "p", {}, {"quality/student_accuracy": 0.8}, {"distill.task": "classification"})
    read = pipeline_of(run)
    assert read.quality.keys() == {"student"} and read.gain is None and read.total_usd == 0.0
    assert "p, student" in page([read, pipeline("q", 0.9)])


def test_the_outcome_goes_to_mlflow(home: Folder, tmp_path: Path) -> None:
    workdir = reckoned(finished(tmp_path, seeds=(0,)))
    tracker = Tracker(None, "outcome", home, workdir)
    parent = tracker.parent("adult", {}, {"distill.task": "classification"})
    runs: dict[str, Run] = {}

    def tracked(name: str) -> Run:
        if name not in runs:
            runs[name] = parent.child(name, {"distill.stage": name})
        return runs[name]

    tracked("student/0")
    tracker.outbox.drain(10.0)
    tracker.client.create_registered_model("adult-student")
    tracker.client.create_model_version("adult-student", str(tmp_path), run_id=tracked("student/0").run_id)
    workdir.write("report.html", b"page")
    job: Any = SimpleNamespace(distill=SimpleNamespace(soft_labels="store"))
    context: Any = SimpleNamespace(workdir=workdir, job=job, parent=parent, tracked=tracked, ledger=Ledger(workdir))
    log_outcome(context)
    parent.end()
    assert not tracker.close(10.0)
    version = tracker.client.get_model_version("adult-student", "1")
    assert version.tags["distill.verdict"] == "train the student alone"
    assert version.tags["distill.audit"] == "1 inherited, 1 amplified, 1 no gap shown"
    note = tracker.client.get_run(str(parent.run_id)).data.tags["mlflow.note.content"]
    assert note.startswith("**train the student alone**: ") and "| student | 85.29 % | " in note, note
    assert f"| money | {words.money(context.ledger.totals().usd)} |" in note and "\u00a0" not in note
    there = tracker.client.list_artifacts(str(parent.run_id))
    assert {"report.html", "audit.json", "alternatives.json", "verdict.json", "tune", "store"} <= {
        a.path for a in there
    }
    tuned = {each.path for each in tracker.client.list_artifacts(str(parent.run_id), "tune")}
    assert tuned == {"tune/trials.json", "tune/surface.json", "tune/importance.json"}
    read = pipeline_of(read_run(tracker.uri, str(parent.run_id)))
    assert read.quality["student"]["low"] == pytest.approx(0.84) and read.latency_ms["student"] == 0.09
    assert "train/start-up" in read.usd and read.total_usd == pytest.approx(context.ledger.totals().usd)
    assert not [each.name for each in read_run(tracker.uri, str(parent.run_id)).nested if not each.ended]
