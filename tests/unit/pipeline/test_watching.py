"""What a running command says of itself, and what ``distill status`` makes of it: running, waiting, ended, killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console as Rich

from cluster.errors import FileError, ResourceError
from cluster.files import Folder
from cluster.lease import Hold
from cluster.standing import FAULTS, STANDING, in_words
from distill_jobs import live, watching
from distill_jobs.console import Console
from distill_jobs.errors import NotReadyError, TrainingError
from distill_jobs.live import LIVE, Live
from distill_jobs.progress import Progress
from distill_jobs.stage import StageRecord
from distill_jobs.watching import look, status

SPEC = {
    "name": "small",
    "task": "classification",
    "data": {"train": "rows.parquet", "label": "y", "features": {"tabular": {"numeric": ["x"]}}},
    "teacher": {"model": {"mlp": {"hidden": [8]}}, "train": {"epochs": 1, "batch_size": 8, "learning_rate": 0.1}},
    "student": {"model": {"mlp": {"hidden": [4]}}, "train": {"epochs": 1, "batch_size": 8, "learning_rate": 0.1}},
    "seeds": [0, 1],
}


@pytest.fixture
def workdir(tmp_path: Path) -> Folder:
    folder = Folder(str(tmp_path / "run"))
    folder.write("spec.yaml", yaml.safe_dump({**SPEC, "workdir": folder.uri}).encode())
    return folder


class Running:
    """A command at work in a workdir: the lease, and what it says of itself."""

    def __init__(self, workdir: Folder, *more: Any) -> None:
        self.lease, self.live = Hold(workdir), Live("small", workdir, *(more or (lambda: 0.0,)))
        self.lease.__enter__()
        self.live.__enter__()

    def end(self, error: BaseException | None = None) -> None:
        self.live.ended(error)
        self.live.__exit__(None, None, None)
        self.lease.__exit__(None, None, None)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(live, "_EVERY_SECONDS", 0.05)
    monkeypatch.setattr(live, "_EVERY_SECONDS_REMOTE", 0.05)
    yield
    STANDING.waiting, STANDING.stage = None, ""


def done(folder: Folder, stage: str) -> None:
    StageRecord(stage, "d", {}, {}, {"wall_seconds": 2.5}, 1.0, 3.5).commit(folder)


def wait_for(workdir: Folder, what: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    end = time.monotonic() + 60
    while (page := live.read(workdir)) is None or not what(page):
        assert time.monotonic() < end, workdir.find(LIVE)
        time.sleep(0.01)
    return look(workdir)


def shown(workdir: Folder) -> str:
    out = StringIO()
    status(workdir.uri, None, Console(Rich(file=out, width=200)))
    return out.getvalue().replace("\u00a0", " ")


def test_pace_and_end_follow_what_this_attempt_does() -> None:
    clock = [0.0]
    progress = Progress("capture", 100.0, lambda: clock[0])
    clock[0] = 30.0
    assert progress.rate is None and progress.left == 70.0, "predicted, until something moves"
    progress.advance(500, 1000)  # an earlier run's
    clock[0] = 40.0
    progress.advance(600, 1000, "ten a second")
    assert progress.rate == 10.0 and progress.left == 40.0
    progress.advance(550, 1000)  # a gang goes on from its last checkpoint
    assert progress.rate is None
    clock[0] = 50.0
    progress.advance(560, 1000)
    assert progress.rate == 1.0 and progress.left == 440.0
    clock[0] = 1e6
    assert Progress("train", 5.0, lambda: 0.0).left == 5.0
    late = Progress("train", 5.0, lambda: clock[0])
    clock[0] += 6.0
    assert late.left is None, "nobody knows once it is overdue"


def test_the_pace_is_that_of_the_last_minutes() -> None:
    clock = [0.0]
    progress = Progress("train", None, lambda: clock[0])
    for step in range(2000):
        clock[0] += 1.0 if step < 1000 else 2.0
        progress.advance(step, 2000)
    assert progress.rate == pytest.approx(0.5, rel=0.01)


def test_a_running_stage_is_told_with_its_end_money_and_faults(workdir: Folder) -> None:
    console, spent = Console(Rich(file=StringIO())), 0.5
    running = Running(workdir, lambda: spent, 2.0, lambda: {"capture": 10.0, "train": 20.0, "report": 3.0})
    console.on_stage = running.live.follow
    done(workdir / "data", "prepare")
    with console.bar("capture", 10.0, "not done yet") as advance:
        advance(10, 100)
        STANDING.survived("actors_lost", 2)
        time.sleep(0.1)
        advance(20, 100, "two actors")
        found = wait_for(workdir, lambda page: page.get("done") == 20)
        assert (found["state"], found["stage"], found["total"], found["unit"]) == ("running", "capture", 100, "rows")
        assert found["usd"] == 0.5 and found["faults"] == {"actors_lost": 2}
        assert 0 < found["rate"] < 200 and found["ends"] == pytest.approx(found["stage_ends"] + 23.0)
        states = {stage["stage"]: stage["state"] for stage in found["stages"]}
        assert states["prepare"] == "done" and states["capture"] == "begun" and states["student/1"] == "open"
        text = shown(workdir)
        assert "running: capture, 20 of 100 rows (20 %)" in text and "two actors" in text
        assert "spent: $0.50 of $2.00" in text and "survived: 2 actors lost" in text
        assert f"process {os.getpid()}" in text
    running.end()
    found = look(workdir)
    assert found["state"] == "finished" and found["stage"] is None
    assert "still to do: teacher, capture, student/0, baseline/0, student/1, baseline/1 and 3 more" in shown(workdir)


def test_an_end_is_told_by_its_kind_and_faults_of_a_broken_run_are_kept(workdir: Folder) -> None:
    def ended(error: BaseException | None, faults: int) -> str:
        running = Running(workdir)
        running.live.follow(Progress("train"))
        STANDING.survived("gang_restarts", faults)
        running.end(error)
        return shown(workdir)

    text = ended(TrainingError("student/0: the loss is nan; lower the learning rate"), 1)
    assert "failed" in text and "at train" in text and "the loss is nan; lower the learning rate" in text
    assert "survived: 1 gangs started again" in text
    text = ended(KeyboardInterrupt(), 2)
    assert "stopped" in text and "run the same command to go on" in text and "3 gangs started again" in text
    assert "the last command has finished" in ended(None, 0)
    assert "no faults" in ended(ValueError("a surprise"), 0) and "ValueError: a surprise" in shown(workdir)


def test_waiting_for_a_cluster_is_told_apart(workdir: Folder) -> None:
    running = Running(workdir)
    STANDING.waiting = "capture asks for 8 workers of 1 GPU, but the cluster has 0"
    found = wait_for(workdir, lambda page: page["state"] == "waiting")
    assert found["why"].startswith("capture asks for 8")
    assert "waiting for the cluster to grow: capture asks for 8 workers" in shown(workdir)
    STANDING.waiting = None
    wait_for(workdir, lambda page: page["state"] == "running")
    running.end(ResourceError("nobody can work"))
    assert look(workdir)["state"] == "failed"


KILLED = """
import sys, time
from cluster.files import Folder
from cluster.lease import Hold
from distill_jobs.live import Live
from distill_jobs.progress import Progress
folder = Folder(sys.argv[1])
Hold(folder).__enter__()
live = Live("small", folder, lambda: 0.25)
live.__enter__()
progress = Progress("capture")
live.follow(progress)
progress.advance(3, 9)
live._wake.set()
time.sleep(60)
"""


def test_a_killed_process_is_told_apart(workdir: Folder) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, workdir.uri])
    try:
        assert wait_for(workdir, lambda page: page.get("total") == 9)["state"] == "running"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    page = look(workdir)
    assert page["state"] == "killed"
    assert "stopped or killed after" in shown(workdir) and "at capture, 3 of 9 rows (33 %)" in shown(workdir)


def test_trouble_with_the_file_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").write_text("no folder")
    running = Live("small", Folder(str(tmp_path / "run")), lambda: 0.0)
    running.__enter__()
    for _ in range(5):
        running._wake.set()
        time.sleep(0.02)
    running.__exit__(None, None, None)
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "can't be written" in caplog.text


def test_in_an_object_store(s3: Callable[[str], Folder]) -> None:
    workdir = s3("status") / "run"
    running = Running(workdir)
    running.live.follow(Progress("teacher"))
    assert wait_for(workdir, lambda page: page["stage"] == "teacher")["state"] == "running"
    running.end()
    assert look(workdir)["state"] == "finished"


def test_what_can_not_be_told_is_one_sentence(tmp_path: Path, workdir: Folder) -> None:
    console = Console(Rich(file=StringIO()))
    with pytest.raises(NotReadyError, match="nothing has run in"):
        status(workdir.uri, None, console)
    with pytest.raises(NotReadyError, match=r"no workdir and no spec .*nowhere; give a folder"):
        status(str(tmp_path / "nowhere"), None, console)


def test_a_damaged_file_is_one_sentence(workdir: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_READ_PAUSE_SECONDS", 0.0)
    for text, words in (
        (b"{", "not valid JSON"),
        (b"[]", "not of this version"),
        (b'{"schema_version": 9}', "version"),
    ):
        workdir.write(LIVE, text)
        with pytest.raises(FileError, match=words):
            look(workdir)


def test_json_and_what_no_command_speaks_for(workdir: Folder) -> None:
    done(workdir / "data", "prepare")
    workdir.write("ledger.json", b"{")
    out = StringIO()
    status(workdir.uri, None, Console(Rich(file=out, width=80, soft_wrap=True)), as_json=True)
    found = json.loads(out.getvalue())
    assert found["state"] == "quiet" and found["usd"] is None and "is damaged" in found["ledger"]
    assert "is damaged" in shown(workdir)


def test_watching_ends_with_the_command(workdir: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_LOOK_SECONDS", 0.05)
    running, out, printed = Running(workdir), StringIO(), StringIO()
    wait_for(workdir, lambda page: page["state"] == "running")
    threading.Timer(0.5, running.end).start()
    status(workdir.uri, None, Console(Rich(file=printed, width=200)), watch=True)
    assert "the last command has finished" in printed.getvalue()
    status(workdir.uri, None, Console(Rich(file=out, soft_wrap=True)), as_json=True, watch=True)
    assert [json.loads(line)["state"] for line in out.getvalue().splitlines()] == ["finished"]


def test_every_fault_has_its_words() -> None:
    assert in_words(dict.fromkeys(FAULTS, 1)).count(", ") == len(FAULTS) - 1
    with pytest.raises(AssertionError):
        STANDING.survived("bad luck")
