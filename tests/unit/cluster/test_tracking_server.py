"""The tracker against a real server: PostgreSQL, artifacts on the S3 protocol, logins; and with faults on the way."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow_server
import pytest
from mlflow_server import PASSWORD, Team

from cluster import outbox, tracking
from cluster.errors import TrackingError
from cluster.files import Folder
from cluster.run_book import RUNS, is_pending
from cluster.tracking import Run, Tracker, owes

pytestmark = pytest.mark.slow  # the server takes a quarter of a minute to start


@pytest.fixture(scope="module")
def running(s3: Callable[[str], Folder], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    with mlflow_server.team(tmp_path_factory.mktemp("mlflow"), s3("artifacts")) as team:
        yield team


@pytest.fixture
def team(running: Team, monkeypatch: pytest.MonkeyPatch) -> Team:
    running.proxy.clear()
    monkeypatch.setattr(outbox, "GATHER_SECONDS", 0.1)
    monkeypatch.setattr(outbox, "KEEP_SECONDS", 0.3)
    monkeypatch.setattr(outbox, "PAUSES", (0.1, 0.5))
    monkeypatch.setattr(tracking, "_PAUSE_SECONDS", 0.1)
    return running


def connect(team: Team, folder: Path, name: str = "census") -> Tracker:
    return Tracker(team.proxy.endpoint, name, Folder(str(folder)), Folder(str(folder)))


def steps_of(run: Run, key: str = "train/loss") -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in run.tracker.client.get_metric_history(run.run_id, key)]


def log_all(tracker: Tracker, steps: int = 20) -> tuple[Run, Run]:
    """Everything that a pipeline logs, once."""
    tracker.workdir.write("report.html", b"<p>whole</p>")
    if not tracker.workdir.exists("model/weights.txt"):
        tracker.workdir.write("model/weights.txt", b"3")
    parent = tracker.parent("digits", {"distill": {"alpha": 0.5}}, {"distill.task": "classification"})
    stage = parent.child("student/0", {"distill.stage": "student/0"})
    for step in range(steps):
        stage.metrics({"train/loss": 1.0 / (step + 1)}, step)
    stage.model("model", "student", f"student of {tracker.workdir.path().name}", loader="math:sqrt")
    stage.model_tags({"distill.verdict": "distil"})
    stage.end()
    parent.metrics({"quality/gain": 0.1, "cost/usd": 2.0})
    parent.artifact("report.html")
    parent.end("KILLED")
    return parent, stage


def check_all(parent: Run, stage: Run, steps: int = 20, within: tuple[float, float] | None = None) -> None:
    """That each of it is there, and once; ``within``: seconds between which the runs were begun and ended."""
    client = parent.tracker.client
    runs = client.search_runs([parent.tracker.experiment_id], "params.`distill.alpha` = '0.5'")
    assert [run.info.run_id for run in runs] == [parent.run_id]
    nested = client.search_runs([parent.tracker.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.run_id}'")
    assert [run.info.run_id for run in nested] == [stage.run_id] and nested[0].info.run_name == "student/0"
    assert (runs[0].info.status, nested[0].info.status) == ("KILLED", "FINISHED")
    assert runs[0].data.metrics == {"quality/gain": 0.1, "cost/usd": 2.0}
    assert runs[0].data.tags["distill.task"] == "classification"
    assert steps_of(stage) == [(step, 1.0 / (step + 1)) for step in range(steps)]
    assert [each.path for each in client.list_artifacts(parent.run_id)] == ["report.html"]
    [version] = client.search_model_versions(f"run_id = '{stage.run_id}'")
    assert version.tags["distill.verdict"] == "distil"
    models = client.search_logged_models([parent.tracker.experiment_id])
    [model] = [each for each in models if each.source_run_id == stage.run_id]
    assert model.status == "READY" and model.artifact_location == version.source
    if within is not None:
        for info in (runs[0].info, nested[0].info):
            assert within[0] * 1000 - 1 <= info.start_time <= info.end_time <= within[1] * 1000 + 1
        assert all(m.timestamp <= within[1] * 1000 + 1 for m in client.get_metric_history(stage.run_id, "train/loss"))


def test_everything_arrives_in_postgres_and_the_bucket(team: Team, tmp_path: Path) -> None:
    tracker = connect(team, tmp_path)
    parent, stage = log_all(tracker)
    assert not tracker.close(30.0) and not owes(tracker.workdir)
    check_all(parent, stage)
    stored = [info for info in _objects(team.bucket) if info.endswith(("report.html", "weights.txt"))]
    assert len(stored) == 2, stored
    # The server's own log of requests shows no login in an address, and the workdir holds none.
    assert PASSWORD not in (tmp_path / RUNS).read_text()


def _objects(bucket: Folder) -> list[str]:
    from pyarrow import fs

    from cluster.files import filesystem

    system, root = filesystem(bucket.uri)
    return [info.path for info in system.get_file_info(fs.FileSelector(root, recursive=True))]


def test_a_wrong_login_is_one_sentence_at_the_start(
    team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(team, tmp_path).close(10.0)  # one that was used before changes nothing
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    for folder in (tmp_path, tmp_path / "other"):
        with pytest.raises(TrackingError, match="refuses the login: give MLFLOW_TRACKING_USERNAME") as caught:
            connect(team, folder)
        assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)


def test_who_may_only_read_is_told_so_before_anything_is_spent(
    team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.server import get_app_client

    connect(team, tmp_path).close(10.0)
    get_app_client("basic-auth", tracking_uri=team.proxy.endpoint).create_user("reader", "only reading is allowed")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "reader")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "only reading is allowed")
    tracker = connect(team, tmp_path)
    with pytest.raises(TrackingError, match="who may write there"):
        tracker.parent("digits", {}, {})


FAULTS = {
    "the answer is lost": ["lose"],
    "refused": ["refuse", "refuse"],
    "cut in the middle": ["cut"],
    "500": [(500, "broken"), (503, "busy")],
    "silent for longer than is waited": [5.0],
    "slow": [0.3],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_request_changes_nothing(
    team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Each request of a whole pipeline's is answered right only at the second or third try, or late."""
    if fault.startswith("silent"):
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "4")
    tracker = connect(team, tmp_path, f"faults: {fault}")
    seen: Counter[str] = Counter()

    class EachOnce(list[Any]):
        """Faults for a request when it is made for the first time."""

        def pop(self, _: Any = 0) -> Any:
            request = team.proxy.seen[-1]
            seen[request] += 1
            return FAULTS[fault][seen[request] - 1] if seen[request] <= len(FAULTS[fault]) else None

        def __bool__(self) -> bool:
            return True

    team.proxy.faults = EachOnce()
    began = time.time()
    parent, stage = log_all(tracker)
    ended = time.time()
    # A model is some ten requests, of which each fails at first.
    assert ended - began < 8.0 and not tracker.close(120.0)
    team.proxy.clear()
    check_all(parent, stage, within=(began, ended))
    assert len(seen) > 10
    print(f"{fault}: {sum(min(n, len(FAULTS[fault])) for n in seen.values())} faults at {len(seen)} requests")


def test_away_to_the_end_and_delivered_by_the_next_command(team: Team, tmp_path: Path) -> None:
    began = time.time()
    tracker = connect(team, tmp_path, "away")
    team.proxy.always = "refuse"
    parent, stage = log_all(tracker)
    ended = time.time()
    assert is_pending(parent.handle) and parent.run_id is None
    assert "waits in" in tracker.close(0.5) and time.time() - ended < 5.0
    assert owes(tracker.workdir)
    kept = b"".join(path.read_bytes() for path in (tmp_path / "outbox").iterdir())
    assert PASSWORD.encode() not in kept
    # One more in vain, which goes on with the same runs; a workdir that hasn't used the server yet is refused.
    again = connect(team, tmp_path, "away")
    assert again.away and again.parent("digits", {"distill": {"alpha": 0.5}}, {}).handle == parent.handle
    assert again.close(0.2)
    with pytest.raises(TrackingError, match="can't use MLflow"):
        connect(team, tmp_path / "fresh", "away")
    team.proxy.clear()
    last = connect(team, tmp_path, "away")
    last.outbox.start()
    assert not last.close(30.0) and not owes(tracker.workdir)
    known = Folder(str(tmp_path)).read_json(RUNS)
    assert known["student/0"] == Run(last, stage.handle).run_id
    # The one in vain has opened the pipeline's run again.
    last.client.set_terminated(known["pipeline"], "KILLED", int(ended * 1000))
    check_all(Run(last, known["pipeline"]), Run(last, known["student/0"]), within=(began, ended))


def test_a_model_that_has_changed_since_is_not_sent(
    team: Team, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = connect(team, tmp_path, "changed")
    team.proxy.always = "refuse"
    _, stage = log_all(tracker)
    tracker.close(0.2)
    tracker.workdir.write("model/weights.txt", b"4")
    team.proxy.clear()
    last = connect(team, tmp_path, "changed")
    assert not last.close(30.0)
    assert "model has changed since" in caplog.text
    assert not last.client.search_model_versions(f"run_id = '{Run(last, stage.handle).run_id}'")


def test_what_was_for_another_server_stays(team: Team, tmp_path: Path) -> None:
    tracker = connect(team, tmp_path, "moved")
    team.proxy.always = "refuse"
    log_all(tracker)
    tracker.close(0.2)
    other = Tracker(None, "moved", Folder(str(tmp_path)), Folder(str(tmp_path)))
    other.parent("digits", {"distill": {"alpha": 0.5}}, {}).end()
    assert "belong to another server" in other.close(5.0) and owes(other.workdir)
    team.proxy.clear()
    # The same server under another address.
    back = Tracker(team.server.uri, "moved", Folder(str(tmp_path)), Folder(str(tmp_path)))
    assert not back.close(30.0) and not owes(back.workdir)
    assert len(back.client.search_runs([back.experiment_id])) == 2


def train(tracker: Tracker, change: Callable[[int], None], steps: int = 60) -> tuple[Run, float]:
    """Logs steps as a training does, with ``change`` called at each; returns the longest that one took."""
    run, longest = tracker.parent("digits", {}, {}).child("student/0"), 0.0
    for step in range(steps):
        change(step)
        began = time.monotonic()
        run.metrics({"train/loss": 1.0 / (step + 1), "train/rate": 0.1}, step)
        longest = max(longest, time.monotonic() - began)
        time.sleep(0.05)
    return run, longest


def test_the_server_is_killed_in_a_training_and_comes_back(team: Team, tmp_path: Path) -> None:
    tracker = connect(team, tmp_path, "killed")

    def change(step: int) -> None:
        if step == 15:
            team.server.kill()
        if step == 45:
            team.server.start()

    run, longest = train(tracker, change)
    assert longest < 0.05
    assert not tracker.close(30.0)
    for key in ("train/loss", "train/rate"):
        assert [step for step, _ in steps_of(run, key)] == list(range(60))


def test_the_database_stops_while_the_server_stays(team: Team, tmp_path: Path) -> None:
    tracker = connect(team, tmp_path, "no database")

    def change(step: int) -> None:
        if step == 15:
            team.postgres.stop()
        if step == 45:
            assert (tmp_path / "outbox").exists()
            team.postgres.start()

    run, longest = train(tracker, change)
    assert longest < 0.05
    assert not tracker.close(30.0)
    assert [step for step, _ in steps_of(run)] == list(range(60))
