"""What isn't taken waits, in order and on disk: against carriers that fail as they are told, and processes that die."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import outbox
from cluster.files import Folder
from cluster.outbox import Outbox
from cluster.outbox_batch import ElsewhereError, Entry, RefusedError

PLACE = {"id": "1", "created": 5}


class Book:
    """A carrier that writes what it is brought into a list; ``faults`` come first, one for each try."""

    def __init__(self, *faults: Exception | None) -> None:
        self.faults, self.taken, self.again = list(faults), [], []
        self.away, self.no_files, self.place = threading.Event(), threading.Event(), PLACE

    def arrive(self, place: Any) -> None:
        if place != self.place:
            raise ElsewhereError

    def answers(self) -> bool:
        return not self.away.is_set()

    def deliver(self, entry: Entry, again: bool) -> None:
        if self.no_files.is_set() and "upload" in entry:
            raise ConnectionError("no bucket")
        if self.away.is_set():
            raise ConnectionError("away")
        if self.faults and (fault := self.faults.pop(0)) is not None:
            raise fault
        self.taken.append(dict(entry))
        self.again.append(again)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("GATHER_SECONDS", 0.05), ("KEEP_SECONDS", 0.1), ("_TICK", 0.02), ("PAUSES", (0.02, 0.1))):
        monkeypatch.setattr(outbox, name, value)


def box(folder: Path, carrier: Book, heard: list[Any] | None = None) -> Outbox:
    told = heard if heard is not None else []
    return Outbox(Folder(str(folder)), carrier, PLACE, lambda: None, told.append)


def tag(i: int, run: str = "r") -> Entry:
    return {"do": "tags", "run": run, "values": {"n": i}}


def numbers(carrier: Book) -> list[int]:
    return [entry["values"]["n"] for entry in carrier.taken]


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_everything_comes_in_order_and_leaves_nothing(tmp_path: Path) -> None:
    carrier = Book()
    one = box(tmp_path / "box", carrier)
    for i in range(300):
        one.post(tag(i))
    assert one.drain(5.0) == 0 and numbers(carrier) == list(range(300)) and not any(carrier.again)
    one.close()
    assert not (tmp_path / "box").exists()


def test_points_of_a_run_travel_together(tmp_path: Path) -> None:
    carrier = Book()
    one = box(tmp_path, carrier)
    for step in range(50):
        for run in "ab":
            one.post({"do": "metrics", "run": run, "points": [["loss", "1.0", 0, step]]})
    one.post(tag(1, "a"))
    one.post({"do": "metrics", "run": "a", "points": [["loss", "1.0", 0, 50]]})
    one.drain(5.0)
    assert sum(len(e.get("points", ())) for e in carrier.taken) == 101 and len(carrier.taken) < 20


def test_an_outage_is_outlasted_and_told(tmp_path: Path) -> None:
    carrier, heard = Book(), []
    one = box(tmp_path, carrier, heard)
    one.post(tag(0))
    one.drain(5.0)
    carrier.away.set()
    started = time.monotonic()
    for i in range(1, 200):
        one.post(tag(i))
    assert time.monotonic() - started < 0.5  # nobody waits for the server
    until(lambda: len(list(tmp_path.glob("*.json"))) > 0)
    carrier.away.clear()
    assert one.drain(5.0) == 0 and numbers(carrier) == list(range(200))
    assert heard[-1] is None and all(isinstance(each, ConnectionError) for each in heard[:-1]) and len(heard) > 1
    until(lambda: not list(tmp_path.iterdir()))
    # Only what was tried when the server went away may have been done before.
    assert sum(carrier.again) == 1
    one.close()


def test_what_is_left_the_next_process_sends(tmp_path: Path) -> None:
    away = Book()
    away.away.set()
    one = box(tmp_path, away)
    one.post({"do": "artifact", "run": "r", "name": "a", "data": b"\x00\xff", "values": {"n": -1}})
    for i in range(5):
        one.post(tag(i))
    started = time.monotonic()
    assert one.drain(0.3) >= 1 and 0.2 < time.monotonic() - started < 2.0
    one.close()
    assert {path.suffix for path in tmp_path.iterdir()} == {".bin", ".json"}
    carrier = Book()
    two = box(tmp_path, carrier)
    assert two.waiting() >= 1
    two.post(tag(5))
    assert two.drain(5.0) == 0 and numbers(carrier) == [-1, 0, 1, 2, 3, 4, 5]
    assert carrier.again == [True] * 6 + [False]
    assert carrier.taken[0]["data"].endswith(".bin")
    until(lambda: not list(tmp_path.iterdir()))
    two.close()


def test_files_that_find_no_place_hold_nothing_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    carrier, upload = Book(), {"do": "artifact", "run": "r", "data": b"x", "upload": True}
    carrier.no_files.set()
    one = box(tmp_path, carrier)
    one.post({**upload, "values": {"n": 100}})
    one.post({**tag(101), "after": True})
    one.post({**tag(0, "other"), "after": True})
    for i in range(1, 50):
        one.post(tag(i))
    until(lambda: numbers(carrier) == list(range(50)))
    assert one.drain(0.3) == 1
    carrier.no_files.clear()
    assert one.drain(5.0) == 0 and numbers(carrier)[50:] == [100, 101]
    carrier.no_files.set()
    one.post({**upload, "values": {"n": 100}})
    one.post({**tag(101), "after": True})
    assert one.drain(0.3) == 1
    one.close()
    assert caplog.text.count("takes no files (no bucket)") == 1
    late = Book()
    two = box(tmp_path, late)
    assert two.drain(5.0) == 0 and numbers(late) == [100, 101]
    two.close()
    until(lambda: not list(tmp_path.iterdir()))


def test_a_refused_entry_is_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    carrier = Book(None, RefusedError("no such run"))
    one = box(tmp_path, carrier)
    for i in range(4):
        one.post(tag(i))
    assert one.drain(5.0) == 0 and numbers(carrier) == [0, 2, 3]
    assert "a run's tags (no such run)" in caplog.text
    one.close()


def test_what_is_another_servers_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Folder(str(tmp_path)).write_json("00000007-aaaaaa.json", {"place": {"id": "9"}, "entries": [tag(0)]})
    (tmp_path / "00000008-aaaaaa.json").write_text('{"place": 1')
    (tmp_path / "00000009-aaaaaa.json").write_text('{"place": 1, "entries": [{"do": "tags"}, 3]}')
    carrier = Book()
    one = box(tmp_path, carrier)
    one.post(tag(1))
    assert one.drain(5.0) == 3 == one.held() and numbers(carrier) == [1]
    one.close()
    assert len(list(tmp_path.glob("*.json"))) == 3 and caplog.text.count("stays as it is") == 2
    carrier.place = {"id": "9"}
    two = box(tmp_path, carrier)
    two.drain(5.0)
    two.close()
    assert numbers(carrier) == [1, 0] and len(list(tmp_path.glob("*.json"))) == 2


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "box").write_text("a file, not a folder")
    carrier = Book()
    one = Outbox.__new__(Outbox)
    monkeypatch.setattr(Folder, "names", lambda *_: [])
    one.__init__(Folder(str(tmp_path / "box")), carrier, PLACE, lambda: None, lambda _: None)  # type: ignore[misc]
    carrier.away.set()
    for i in range(3):
        one.post(tag(i))
    until(lambda: "can't be written" in caplog.text)
    carrier.away.clear()
    assert one.drain(5.0) == 0 and numbers(carrier) == [0, 1, 2]
    one.close()


@settings(max_examples=25, deadline=None)
@given(faults=st.lists(st.sampled_from(["fine", "away", "stop"]), max_size=12), entries=st.integers(1, 9))
def test_whatever_fails_nothing_is_missing_and_the_order_holds(
    tmp_path_factory: pytest.TempPathFactory, faults: list[str], entries: int
) -> None:
    folder, taken, i = tmp_path_factory.mktemp("box"), [], 0
    while True:
        stops = "stop" in faults
        part = faults[: faults.index("stop")] if stops else faults
        faults = faults[len(part) + 1 :] if stops else []
        carrier = Book(*[None if fault == "fine" else TimeoutError() for fault in part])
        if stops:
            carrier.faults += [TimeoutError()] * 1000
        one = box(folder, carrier)
        for _ in range(entries):
            one.post(tag(i))
            i += 1
        one.drain(0.02 if stops else 5.0)
        one.close()
        taken += numbers(carrier)
        if not stops:
            break
    assert list(dict.fromkeys(taken)) == list(range(i))


DYING = """
import sys, time
from cluster import outbox
from cluster.files import Folder

outbox.GATHER_SECONDS, outbox.KEEP_SECONDS, outbox._TICK = 0.05, 0.1, 0.02

class Away:
    def arrive(self, place): pass
    def deliver(self, entry, again): raise ConnectionError("away")

box = outbox.Outbox(Folder(sys.argv[1]), Away(), {"id": "1", "created": 5}, lambda: None, lambda error: None)
for i in range(100000):
    box.post({"do": "tags", "run": "r", "values": {"n": i}})
    print(i, flush=True)
    time.sleep(0.001)
"""


def test_a_sudden_death_loses_the_last_moment_at_most(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", DYING, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    last = -1
    for line in child.stdout:
        last = int(line)
        if last >= 600:
            break
    child.send_signal(signal.SIGKILL)
    child.wait()
    carrier = Book()
    one = box(tmp_path, carrier)
    assert one.drain(5.0) == 0
    one.close()
    got = numbers(carrier)
    assert got == list(range(len(got))) and last - 450 < len(got)
    assert not list(tmp_path.glob("*.json"))


def test_nothing_is_pickled_and_what_is_kept_is_readable(tmp_path: Path) -> None:
    away = Book()
    away.away.set()
    one = box(tmp_path, away)
    one.post({"do": "metrics", "run": "r", "points": [["loss", "nan", 7, 1], ["loss", "0.5", 8, 2]]})
    one.drain(0.05)
    one.close()
    [kept] = tmp_path.glob("*.json")
    assert json.loads(kept.read_text()) == {
        "place": PLACE,
        "entries": [{"do": "metrics", "run": "r", "points": [["loss", "nan", 7, 1], ["loss", "0.5", 8, 2]]}],
    }


@pytest.fixture
def bucket(s3: Callable[[str], Folder]) -> Iterator[Folder]:
    yield s3("outbox")


def test_it_keeps_in_an_object_store(bucket: Folder) -> None:
    away = Book()
    away.away.set()
    one = Outbox(bucket / "w" / "outbox", away, PLACE, lambda: None, lambda _: None)
    one.post({"do": "artifact", "run": "r", "name": "a", "data": b"\x00", "values": {"n": 0}})
    one.post(tag(1))
    one.drain(0.05)
    one.close()
    carrier = Book()
    two = Outbox(bucket / "w" / "outbox", carrier, PLACE, lambda: None, lambda _: None)
    assert two.drain(5.0) == 0 and numbers(carrier) == [0, 1]
    two.close()
    until(lambda: not list((bucket / "w" / "outbox").scan()))
