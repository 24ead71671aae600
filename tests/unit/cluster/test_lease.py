"""One owner at a time in a folder, and none for ever: against living, killed and stopped processes, on disk and S3."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster import lease
from cluster.errors import LeaseError
from cluster.files import Folder
from cluster.lease import Hold, holder

HOLDER = """
import sys, time
from cluster.files import Folder
from cluster.lease import Hold
with Hold(Folder(sys.argv[1]), job=sys.argv[2]):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def another(folder: Folder, job: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process of its own that holds the lease."""
    running = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), job], stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None and running.stdout.readline() == "held\n"
    try:
        yield running
    finally:
        running.kill()
        running.wait()


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here the process of a lease can't be looked for, as on another machine."""
    numbers = itertools.count()
    monkeypatch.setattr(lease, "_host", lambda: f"machine {next(numbers)}")


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that run out soon."""
    monkeypatch.setattr(lease, "SECONDS", 1.0)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(lease, "_LOOK_SECONDS", 0.05)


def test_the_second_is_refused_with_the_id_of_the_first(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "run"))
    with another(folder, "adult-1"):
        found = holder(folder)
        assert found is not None and found.job == "adult-1" and found.seen_alive
        with pytest.raises(LeaseError, match=r"Ray job adult-1 since .* \(`distill jobs stop adult-1`\)"), Hold(folder):
            pass
    with Hold(folder) as mine, pytest.raises(LeaseError, match=rf"process {os.getpid()} on .*"), Hold(folder):
        pass
    assert mine.lost == "" and holder(folder) is None and not folder.exists(lease.NAME)


def test_a_killed_process_leaves_no_lease(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    with another(folder) as running:
        running.kill()
        running.wait()
        assert folder.exists(lease.NAME) and holder(folder) is None
        began = time.monotonic()
        with Hold(folder):
            assert time.monotonic() - began < lease.SECONDS / 4


@pytest.mark.usefixtures("elsewhere", "hasty")
def test_another_machine_is_watched_until_it_renews_or_runs_out(tmp_path: Path) -> None:
    folder, said = Folder(str(tmp_path)), []
    with Hold(folder, "living") as first:
        with pytest.raises(LeaseError, match="Ray job living"), Hold(folder, say=said.append):
            pass
        assert "was last worked on by Ray job living" in said[0]
        # Of a machine that is gone nothing is renewed any more.
        first._end.set()
        with Hold(folder) as second:
            assert second.lost == ""


@pytest.mark.usefixtures("elsewhere")
def test_the_lease_of_an_owner_known_to_be_gone_is_taken_at_once(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    with Hold(folder, "failed") as first:
        first._end.set()
        first._renewing.join()
        token = json.loads((tmp_path / lease.NAME).read_text())["token"]
        began = time.monotonic()
        with Hold(folder, "resubmitted", dead=token):
            assert time.monotonic() - began < 2
            assert holder(folder).job == "resubmitted"  # type: ignore[union-attr]


@pytest.mark.usefixtures("elsewhere", "hasty")
def test_who_has_lost_the_lease_is_told_and_leaves_the_new_owner_alone(tmp_path: Path) -> None:
    told = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        folder = Folder(str(tmp_path))
        with Hold(folder, "late") as mine:
            record = json.loads((tmp_path / lease.NAME).read_text())
            folder.write_json(lease.NAME, {**record, "token": "x", "owner": "Ray job new", "job": "new"})
            end = time.monotonic() + 10
            while not told.is_set():
                assert time.monotonic() < end
                time.sleep(0.05)
        assert "Ray job new" in mine.lost
        assert json.loads((tmp_path / lease.NAME).read_text())["job"] == "new"
    finally:
        signal.signal(signal.SIGTERM, before)


def _race(folder: Folder, count: int) -> list[str]:
    """How many at once fare: "held" or the refusal."""
    gate = threading.Barrier(count)
    done = threading.Event()

    def take(i: int) -> str:
        gate.wait()
        try:
            with Hold(folder, f"job-{i}"):
                done.wait(20)
                return "held"
        except LeaseError as error:
            return str(error)

    with ThreadPoolExecutor(count) as pool:
        found = [pool.submit(take, i) for i in range(count)]
        end = time.monotonic() + 20
        while sum(each.done() for each in found) < count - 1 and time.monotonic() < end:
            time.sleep(0.02)
        done.set()
        return [each.result() for each in found]


def test_of_many_at_the_same_moment_one_gets_it_on_disk(tmp_path: Path) -> None:
    for i in range(5):
        found = _race(Folder(str(tmp_path / str(i))), 6)
        assert found.count("held") == 1, found


@pytest.mark.usefixtures("hasty")
def test_of_many_at_the_same_moment_one_gets_it_in_an_object_store(
    s3: Callable[[str], Folder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "SECONDS", 30.0)
    found = _race(s3("leases") / "run", 4)
    assert found.count("held") == 1, found


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"owner": "me"}'])
def test_a_damaged_lease_is_nobodys(tmp_path: Path, damage: str) -> None:
    (tmp_path / lease.NAME).write_text(damage)
    folder = Folder(str(tmp_path))
    assert holder(folder) is None
    with Hold(folder):
        assert holder(folder) is not None


def test_a_storage_that_fails_for_a_while_costs_no_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.1)
    folder, fails = Folder(str(tmp_path)), 3
    with Hold(folder) as mine:
        plain = Folder.write_json

        def write(self: Folder, *args: Any, **more: Any) -> bool:
            nonlocal fails
            fails -= 1
            if fails >= 0:
                raise LeaseError("the storage is away")
            return plain(self, *args, **more)

        monkeypatch.setattr(Folder, "write_json", write)
        renewed = json.loads((tmp_path / lease.NAME).read_text())["renewed"]
        end = time.monotonic() + 10
        while json.loads((tmp_path / lease.NAME).read_text())["renewed"] == renewed:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert mine.lost == ""
