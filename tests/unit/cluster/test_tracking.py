"""Runs, metrics and models against a real MLflow on SQLite; what goes to it, and what is refused at the start."""

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import TrackingError
from cluster.files import Folder
from cluster.logged import flatten, key_for, tags_for
from cluster.run_book import RUNS, is_pending
from cluster.standing import STANDING
from cluster.tracking import Run, Tracker, owes
from cluster.tracking_server import open_command, server


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(str(tmp_path_factory.mktemp("home with space")))


@pytest.fixture
def opened(home: Folder, tmp_path: Path) -> Iterator[Callable[[], Tracker]]:
    """Opens trackers of one workdir, each as a command of its own would, and closes the earlier one before."""
    trackers: list[Tracker] = []

    def again() -> Tracker:
        if trackers:
            assert not trackers[-1].close(10.0)
        trackers.append(Tracker(None, "census", home, Folder(str(tmp_path / "work"))))
        return trackers[-1]

    yield again
    trackers[-1].close(10.0)


@pytest.fixture
def tracker(opened: Callable[[], Tracker]) -> Tracker:
    return opened()


def stored(run: Run) -> Any:
    run.tracker.outbox.drain(10.0)
    return run.tracker.client.get_run(run.run_id)


def test_importing_the_tracker_does_not_import_mlflow() -> None:
    code = "import sys, cluster.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_parent_and_nested_runs_open_at_once(tracker: Tracker, home: Folder) -> None:
    parent = tracker.parent("census", {"distill": {"alpha": 0.9}, "seeds": [0, 1]}, {"digest": "abc"})
    first, second = parent.child("teacher"), parent.child("student/0", {"seed": "0"})
    for step in range(5):
        first.metrics({"train/loss": 1.0 / (step + 1), "train/gradient_norm": None}, step)
        second.metrics({"train/loss": 2.0}, step)
    for run in (first, second, parent):
        run.end()
    assert stored(parent).data.params == {"distill.alpha": "0.9", "seeds": "[0, 1]"}
    assert stored(parent).data.tags["digest"] == "abc"
    assert stored(second).data.tags["mlflow.parentRunId"] == parent.run_id
    assert stored(second).info.run_name == "student/0"
    assert stored(first).info.status == "FINISHED"
    history = tracker.client.get_metric_history(first.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(i, 1.0 / (i + 1)) for i in range(5)]
    assert home.exists("mlflow.db")
    assert not tracker.close(10.0) and not owes(tracker.workdir)
    assert tracker.workdir.read_json(RUNS)["student/0"] == second.run_id


def test_metrics_are_sent_together(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tracker.parent("batched", {}, {})
    calls: list[int] = []
    send = tracker.client.log_batch

    def count(run_id: str, metrics: Any) -> None:
        calls.append(len(metrics))
        send(run_id, metrics=metrics)

    monkeypatch.setattr(tracker.client, "log_batch", count)
    for step in range(300):
        run.metrics({"a": step, "b": math.nan if step == 7 else 1.0}, step)
    run.end()
    tracker.outbox.drain(10.0)
    assert sum(calls) == 600 and len(calls) <= 3
    history = tracker.client.get_metric_history(run.run_id, "b")
    assert len(history) == 300 and math.isnan(history[7].value)


def test_resuming_reopens_the_run(opened: Callable[[], Tracker]) -> None:
    one = opened().parent("again", {"alpha": 0.5}, {})
    stage = one.child("teacher")
    stage.end("KILLED")
    one.end("FAILED")
    two = opened().parent("again", {"alpha": 0.5}, {"resumed": "yes"})
    assert two.run_id == one.run_id and stored(two).info.status == "RUNNING"
    assert two.child("teacher").run_id == stage.run_id
    two.params({"alpha": 0.7, "beta": 1})
    assert stored(two).data.params == {"alpha": "0.5", "beta": "1"}
    changed = opened().parent("again", {"alpha": 0.6}, {})
    other = changed.child("teacher")
    assert stored(other).data.tags["mlflow.parentRunId"] == changed.run_id not in (None, one.run_id)
    changed.tracker.client.delete_run(changed.run_id)
    anew = opened().parent("again", {"alpha": 0.6}, {})
    assert stored(anew).info.run_id not in (changed.run_id, one.run_id)


def test_a_nested_run_that_was_deleted_is_made_again(opened: Callable[[], Tracker]) -> None:
    one = opened().parent("deleted", {}, {})
    stage = one.child("teacher")
    stored(stage)
    gone = stage.run_id
    one.tracker.client.delete_run(gone)
    stage = opened().parent("deleted", {}, {}).child("teacher")
    stage.metrics({"a": 1.0})
    assert stored(stage).info.run_id != gone and stored(stage).data.metrics == {"a": 1.0}


def test_artifacts(tracker: Tracker) -> None:
    tracker.workdir.write("report.html", b"<p>first</p>")
    tracker.workdir.write("costs/ledger.json", b"{}")
    run = tracker.parent("files", {}, {})
    run.artifact("report.html")
    # What is logged is the file as it was then.
    tracker.workdir.write("report.html", b"<p>second</p>")
    run.artifact("costs/ledger.json", "costs")
    run.end()
    tracker.outbox.drain(10.0)
    assert [f.path for f in tracker.client.list_artifacts(run.run_id)] == ["costs", "report.html"]
    assert [f.path for f in tracker.client.list_artifacts(run.run_id, "costs")] == ["costs/ledger.json"]
    assert Path(tracker.client.download_artifacts(run.run_id, "report.html")).read_text() == "<p>first</p>"


LOADER = """
from pathlib import Path

def load(folder):
    factor = float((Path(folder) / "weights.txt").read_text())
    def predict(rows, params):
        rows = rows.copy()
        rows["y"] = rows["x"] * factor + (params or {}).get("bias", 0.0)
        return rows[["y"]]
    return predict
"""


def test_a_logged_model_loads_and_predicts(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import mlflow
    import pandas

    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "toy_loader.py").write_text(LOADER)
    tracker.workdir.write("weights/weights.txt", b"3")
    monkeypatch.syspath_prepend(tmp_path / "code")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = tracker.parent("served", {}, {})
    for _ in range(2):
        run.model(
            "weights",
            "student",
            "census-student",
            loader="toy_loader:load",
            packages=["torch", "distill-jobs"],
            parameters={"bias": 0.0},
        )
    run.end()
    assert not tracker.close(10.0) and not caplog.records
    # MLflow's global client, were it used, would leave a database of its own where the command runs.
    assert not list((tmp_path / "here").iterdir())
    (first, _) = stored(run).outputs.model_outputs
    logged = tracker.client.get_logged_model(first.model_id)
    assert logged.name == "student" and logged.status == "READY" and logged.source_run_id == run.run_id
    requirements = Path(logged.artifact_location.removeprefix("file://").replace("%20", " ")) / "requirements.txt"
    assert "torch==" in requirements.read_text() and "+" not in requirements.read_text()
    mlflow.set_tracking_uri(tracker.uri)
    try:
        for address in (f"models:/{first.model_id}", "models:/census-student/2"):
            served = mlflow.pyfunc.load_model(address)
            assert list(served.predict(pandas.DataFrame({"x": [1.0, 2.0]}))["y"]) == [3.0, 6.0]
            assert list(served.predict(pandas.DataFrame({"x": [1.0]}), params={"bias": 4.0})["y"]) == [7.0]
    finally:
        mlflow.set_tracking_uri(None)  # also takes it out of the environment


def test_a_loader_that_is_not_there_is_one_sentence() -> None:
    from cluster.served_model import resolve

    for wrong in ("nowhere:load", "math:nothing", "math", "math:pi", ":x"):
        with pytest.raises(TrackingError, match="can't be imported"):
            resolve(wrong)


def test_an_unreachable_server_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.tracking._PAUSE_SECONDS", 0.01)
    work = Folder(str(tmp_path))
    with pytest.raises(TrackingError, match=r"check tracking\.uri") as caught:
        Tracker("http://user:hunter2@127.0.0.1:9/x", "e", work, work)
    assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(TrackingError):
        Tracker("nonsense://x", "e", work, work)
    with pytest.raises(TrackingError, match=r"give tracking\.uri"):
        Tracker(None, "e", Folder("s3://bucket/run"), work)


def test_a_deleted_experiment_is_said(tracker: Tracker, home: Folder, tmp_path: Path) -> None:
    gone = Tracker(None, "gone", home, Folder(str(tmp_path / "gone")))
    tracker.client.delete_experiment(gone.experiment_id)
    with pytest.raises(TrackingError, match="was deleted"):
        Tracker(None, "gone", home, Folder(str(tmp_path / "gone")))


def test_a_workdir_of_before_is_gone_on_with(opened: Callable[[], Tracker]) -> None:
    one = opened().parent("older", {"alpha": 0.5}, {})
    stage = one.child("teacher")
    stored(stage)
    one.tracker.workdir.write_json(RUNS, {"pipeline": one.run_id, "teacher": stage.run_id})
    two = opened().parent("older", {"alpha": 0.5}, {})
    assert two.run_id == one.run_id and two.child("teacher").run_id == stage.run_id
    two.tracker.close(10.0)
    two.tracker.workdir.write(RUNS, b"[1")
    assert is_pending(opened().parent("older", {"alpha": 0.5}, {}).handle)


def test_outages_are_counted(tracker: Tracker) -> None:
    before = STANDING.faults().get("tracking_outages", 0)
    for error in (ConnectionError("away"), ConnectionError("away still"), None, ConnectionError("away again"), None):
        tracker._trouble(error)
    assert STANDING.faults()["tracking_outages"] - before == 2


def test_flattening() -> None:
    found = flatten(
        {
            "data": {"train": ("a", "b"), "label": None, "capture": {"batch_tokens": 5, "tokenizer": "bytes"}},
            "tracking": {"uri": "postgresql://me:pw@host/db", "api_key": "k", "token": "t"},
            "long": "x" * 9000,
        }
    )
    assert found["data.train"] == '["a", "b"]' and "data.label" not in found
    assert found["data.capture.batch_tokens"] == "5" and found["data.capture.tokenizer"] == "bytes"
    assert found["tracking.uri"] == "postgresql://***@host/db"
    assert found["tracking.api_key"] == found["tracking.token"] == "(not logged)"
    assert len(found["long"]) == 6000
    assert key_for("bias/sex/Fe<male>\n") == "bias/sex/Fe_male__" and key_for("../..//x") == "x"
    assert tags_for({"a b": {"c": 1}}) == {"a b": '{"c": 1}'}


def test_open_command(tmp_path: Path) -> None:
    home = Folder(str(tmp_path / "a b"))
    assert open_command(None, home).endswith(f"mlflow ui --backend-store-uri 'sqlite:///{tmp_path}/a b/mlflow.db'")
    assert open_command("http://u:p@host", home).endswith("-m webbrowser 'http://***@host'")


def test_the_environment_names_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert server(None) is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert server(None) == "http://tracker:5000" and server("http://given") == "http://given"
