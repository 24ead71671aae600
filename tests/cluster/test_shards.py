"""A map over real Ray actors: they are killed, they raise, and every shard still comes back once or the reason does."""

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster import logs, notice
from cluster.errors import ClusterError, FileError, ResourceError, ShardError
from cluster.session import Session
from cluster.shards import Crew, PoolReport, map_shards
from cluster.standing import STANDING


class Refused(ValueError):
    """Stands for an error of the package above, of which cluster knows nothing."""


class Square:
    def run(self, shard: int) -> tuple[int, int, str]:
        return shard * shard, os.getpid(), os.environ["OMP_NUM_THREADS"]


class Faulty:
    """Does ``what`` to itself on the first attempts at the shards it is told; files count attempts across processes."""

    def __init__(self, what: str, folder: Path, bad: dict[int, int]) -> None:
        self.what, self.folder, self.bad = what, folder, bad

    def run(self, shard: int) -> int:
        attempts = len(list(self.folder.glob(f"{shard}.*")))
        (self.folder / f"{shard}.{attempts}").touch()
        if attempts < self.bad.get(shard, 0):
            if self.what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.what == "refuse":
                raise Refused(f"no row {shard}")
            if self.what == "file":
                raise FileError("the disk is full")
            if self.what == "unsendable":
                return threading.Lock()  # type: ignore[return-value]
            raise KeyError(f"odd {shard}")
        return shard


def collect(
    session: Session, make: Callable[[], Any], shards: list[Any], most: int, **more: Any
) -> tuple[dict[Any, Any], PoolReport]:
    found: list[tuple[Any, Any]] = []
    crew = Crew(make, most=most, least=most)
    report = map_shards(session, crew, shards, lambda shard, value: found.append((shard, value)), **more)
    assert all(times == 1 for times in Counter(shard for shard, _ in found).values())
    return dict(found), report


def free_cpus(session: Session) -> float:
    deadline = time.time() + 30
    while ray.available_resources().get("CPU", 0) < session.resources()["CPU"] and time.time() < deadline:
        time.sleep(0.1)
    return float(ray.available_resources().get("CPU", 0))


def test_each_shard_once(session: Session) -> None:
    found, report = collect(session, Square, list(range(9)), 2)
    assert {shard: value[0] for shard, value in found.items()} == {n: n * n for n in range(9)}
    assert len({value[1] for value in found.values()}) <= 2
    assert {value[2] for value in found.values()} == {"1"}
    assert (report.retried, report.lost_actors) == (0, 0)
    usage = report.usage
    assert 0 < usage.core_seconds <= 2 * usage.wall_seconds
    assert report.by_crew == {"actors": usage}
    assert usage.device_seconds == 0
    assert usage.cpu_seconds > 0
    assert 0 < report.startup_seconds <= usage.wall_seconds + 1


def test_never_more_actors_than_shards(session: Session) -> None:
    found, report = collect(session, Square, [5], 2)
    assert found[5][0] == 25
    assert 0 < report.usage.core_seconds <= report.usage.wall_seconds


def test_no_shards(session: Session) -> None:
    found, report = collect(session, Square, [], 2)
    assert found == {} and report.usage.wall_seconds == 0


def test_killed_actors_are_replaced(session: Session, tmp_path: Path) -> None:
    before = Counter(STANDING.faults())
    found, report = collect(session, lambda: Faulty("kill", tmp_path, {1: 1, 3: 2}), list(range(6)), 2)
    assert found == {n: n for n in range(6)}
    assert (report.retried, report.lost_actors) == (3, 3)
    survived = Counter(STANDING.faults()) - before
    assert survived - Counter(stragglers_duplicated=9) == {"actors_lost": 3, "shards_retried": 3}
    assert free_cpus(session) == 2


class Surviving:
    """Gets over a fault of the storage at each shard."""

    def run(self, shard: int) -> int:
        STANDING.survived("storage_faults", shard)
        return shard


def test_what_actors_survive_is_counted_here(session: Session) -> None:
    before = Counter(STANDING.faults())
    collect(session, Surviving, [0, 1, 2, 3], 2)
    assert (Counter(STANDING.faults()) - before)["storage_faults"] == 6


def test_actors_log_their_shards(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_LOG", "json")
    monkeypatch.setattr(logs, "_bound", {"pipeline": "logged", "stage": "capture"})
    collect(session, Square, [70], 1)
    folder = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    lines = [line for path in folder.glob("worker-*.err") for line in path.read_text().splitlines()]
    found = [json.loads(line) for line in lines if '"pipeline": "logged"' in line]
    assert [line["message"] for line in found] == ["shard begun", "shard done"]
    assert {(line["shard"], line["stage"], line["level"], line["rank"]) for line in found} == {
        ("70", "capture", "INFO", None)
    }
    assert found[1]["seconds"] >= 0 and found[1]["pid"] and found[1]["node"]


class Leaving:
    """Waits at shard 0, the first time, until its process is told to go; then hands back, or has to be killed."""

    def __init__(self, folder: Path, stubborn: bool) -> None:
        self.folder, self.stubborn = folder, stubborn

    def run(self, shard: int) -> int:
        notice.tell(begun=1.0)
        if shard == 0 and not (self.folder / "pid").exists():
            (self.folder / "pid.new").write_text(str(os.getpid()))
            (self.folder / "pid.new").rename(self.folder / "pid")
            while self.stubborn or not notice.leaving():
                time.sleep(0.02)
            assert notice.seconds_left() is None
            raise notice.HandBack
        return os.getpid()


@pytest.mark.parametrize("stubborn", [False, True])
def test_an_actor_that_is_told_to_go_costs_no_retry(session: Session, tmp_path: Path, stubborn: bool) -> None:
    pids: list[int] = []

    def send() -> None:
        deadline = time.time() + 60
        while not (tmp_path / "pid").exists() and time.time() < deadline:
            time.sleep(0.02)
        pids.append(int((tmp_path / "pid").read_text()))
        os.kill(pids[0], signal.SIGTERM)
        if stubborn:
            time.sleep(1.0)
            os.kill(pids[0], signal.SIGKILL)

    told: list[float] = []
    sender = threading.Thread(target=send)
    sender.start()
    found, report = collect(
        session,
        lambda: Leaving(tmp_path, stubborn),
        list(range(3)),
        1,
        retries=0,
        on_progress=lambda progress: told.append(progress.told.get("begun", 0.0)),
    )
    sender.join()
    assert (report.handed_back, report.retried, report.lost_actors) == (1, 0, int(stubborn))
    assert found.keys() == {0, 1, 2} and found[0] != pids[0]
    assert told[-1] == 2.0


def test_a_shard_that_raises_is_tried_again(session: Session, tmp_path: Path) -> None:
    found, report = collect(session, lambda: Faulty("raise", tmp_path, {0: 2, 2: 1}), list(range(4)), 1)
    assert found == {n: n for n in range(4)}
    assert (report.retried, report.lost_actors) == (3, 0)


@pytest.mark.parametrize(
    ("what", "cause"),
    [("raise", r"KeyError: 'odd 2' \(test_shards.py:\d+\)"), ("kill", "its actor died"), ("unsendable", "pickle")],
)
def test_a_hopeless_shard_is_named(session: Session, tmp_path: Path, what: str, cause: str) -> None:
    with pytest.raises(ShardError, match=rf"(?s)capture: shard 2 failed 2 times.*{cause}"):
        collect(session, lambda: Faulty(what, tmp_path, {2: 99}), list(range(4)), 2, retries=1, what="capture")
    assert free_cpus(session) == 2


def test_fatal_errors_come_as_themselves_and_at_once(session: Session, tmp_path: Path) -> None:
    for what, kind in (("refuse", Refused), ("file", FileError)):
        folder = tmp_path / what
        folder.mkdir()
        with pytest.raises(kind):
            collect(session, partial(Faulty, what, folder, {0: 99}), list(range(4)), 1, fatal=(Refused,))
        assert len(list(folder.glob("0.*"))) == 1
    assert issubclass(FileError, ClusterError)


def test_a_worker_that_can_not_be_made(session: Session) -> None:
    def make() -> Square:
        raise OSError("no such model")

    with pytest.raises(ShardError, match="OSError: no such model"):
        collect(session, make, [1, 2], 1, retries=0)


def test_actors_end_when_the_driver_fails(session: Session) -> None:
    def on_result(_shard: Any, _value: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        map_shards(session, Crew(Square, most=2), list(range(50)), on_result)
    assert free_cpus(session) == 2


def test_a_pool_that_does_not_fit(session: Session) -> None:
    with pytest.raises(ResourceError, match=r"capture asks for 3 workers of 1 CPU \(3 in all\), but the cluster has 2"):
        collect(session, Square, [1, 2, 3], 3, what="capture")
    with pytest.raises(ResourceError, match="1 worker of 1 GPU"):
        map_shards(session, Crew(Square, gpus=1), [1], print)
    assert session.accelerator() is None and session.embedded
