"""Gangs of two real ranks over gloo: what they report and return, and what is said when one of them fails."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from cluster import logs
from cluster.errors import GangError, NonFiniteError, ResourceError
from cluster.gang import Gang, Rank, run_gang
from cluster.session import Session


class Refused(ValueError):
    """Stands for an error of the package above."""


def talk(rank: Rank, argument: list[float]) -> dict[str, Any]:
    rank.report({"rank": rank.rank, "unsendable": threading.Lock()})  # must neither raise nor arrive
    for step in range(5):
        rank.report({"rank": rank.rank, "step": step})
    total = torch.tensor(argument) * (rank.rank + 1)
    torch.distributed.all_reduce(total)
    places = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {
        "total": total,
        "device": rank.device,
        "threads": torch.get_num_threads(),
        "env": places,
        "cwd": os.getcwd(),
    }


def fail(rank: Rank, what: str) -> None:
    rank.report({"alive": rank.rank})
    if rank.rank == 1:
        time.sleep(0.5)
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "refuse":
            raise Refused("the third row is no row")
        if what == "cluster":
            raise NonFiniteError("the loss is not finite")
        raise ZeroDivisionError("oh")
    torch.distributed.barrier()  # left hanging by rank 1


def wait_forever(rank: Rank, mark: Path) -> None:
    rank.report({"pid": os.getpid()})
    mark.touch()
    time.sleep(600)


def test_reports_and_results(
    session: Session, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILL_LOG", "json")
    monkeypatch.setattr(logs, "_bound", {"stage": "talk"})
    before = set(Path(os.environ.get("TMPDIR", "/tmp")).glob("gang-*"))
    reports: list[dict[str, Any]] = []
    threads: set[str] = set()

    def on_report(values: dict[str, Any]) -> None:
        reports.append(values)
        threads.add(threading.current_thread().name)

    handler = signal.getsignal(signal.SIGINT)
    value, usage = run_gang(session, talk, [1.0, 2.0], Gang(workers=2), on_report)
    assert signal.getsignal(signal.SIGINT) is handler
    assert reports == [{"rank": 0, "step": step} for step in range(5)]
    assert threads == {threading.current_thread().name}
    assert value["total"].tolist() == [3.0, 6.0]
    assert (value["device"], value["threads"], value["cwd"]) == ("cpu", 1, os.getcwd())
    assert value["env"] == {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    assert usage.core_seconds == pytest.approx(2 * usage.wall_seconds)
    assert usage.cpu_seconds > 0 and usage.device_seconds == 0
    assert set(Path(os.environ.get("TMPDIR", "/tmp")).glob("gang-*")) <= before
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")
    folder = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    lines = [line for path in folder.glob("worker-*.err") for line in path.read_text().splitlines()]
    found = [json.loads(line) for line in lines if '"stage": "talk"' in line]
    assert sorted((line["rank"], line["message"]) for line in found) == [(n, f"rank {n} of 2 begins") for n in (0, 1)]


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("refuse", Refused, "^the third row is no row$"),
        pytest.param("cluster", NonFiniteError, "^the loss is not finite$", marks=pytest.mark.slow),
        pytest.param(
            "divide",
            GangError,
            r"^training failed on rank 1: ZeroDivisionError: oh \(test_gang.py:\d+\)$",
            marks=pytest.mark.slow,
        ),
        ("kill", GangError, "^training failed: the process of rank 1 died"),
    ],
)
def test_the_cause_is_told(session: Session, what: str, kind: type[Exception], message: str) -> None:
    reports: list[dict[str, Any]] = []
    with pytest.raises(kind, match=message):
        run_gang(session, fail, what, Gang(workers=2), reports.append, fatal=(Refused,))
    assert reports == [{"alive": 0}]


@pytest.mark.slow
def test_an_interrupt_ends_the_ranks(session: Session, tmp_path: Path) -> None:
    pids: list[int] = []

    def on_report(values: dict[str, Any]) -> None:
        pids.append(values["pid"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_gang(session, wait_forever, tmp_path / "mark", Gang(workers=1), on_report)
    deadline = time.time() + 30
    while Path(f"/proc/{pids[0]}").exists() and time.time() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{pids[0]}").exists()
    while ray.available_resources().get("CPU", 0) < 2 and time.time() < deadline:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == 2


def test_a_gang_that_does_not_fit(session: Session) -> None:
    with pytest.raises(ResourceError, match="training asks for 3 workers of 1 CPU"):
        run_gang(session, talk, [], Gang(workers=3), print)
