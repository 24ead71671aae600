"""Attempts at a part: killed at any boundary, several at once, and one after another."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from commit_cases import part

from cluster.files import Folder
from distill_jobs.data.commits import Commits
from distill_jobs.data.table import MANIFEST, adopted, read_record, record_name

_WRITER = """
import sys, time
import pyarrow as pa
from cluster.files import Folder
from distill_jobs.data.table import commit_part
folder, at = Folder(sys.argv[1]), sys.argv[2]
schema = pa.schema([("n", pa.int64())])
def stop(here):
    if here == at:
        print(here, flush=True)
        time.sleep(60)
def batches():
    stop("before the write")
    for i in range(3):
        yield pa.record_batch([pa.array([i])], schema=schema)
        if i == 1:
            stop("in the middle of it")
def beside():
    stop("between part and record")
    return {}
commit_part(folder, 0, schema, batches(), inputs="x", beside=beside)
stop("after the record")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "table"))


@pytest.mark.parametrize(
    "at", ["before the write", "in the middle of it", "between part and record", "after the record"]
)
def test_a_writer_killed_at_any_boundary(folder: Folder, at: str) -> None:
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, folder.uri, at], stdout=subprocess.PIPE)
    assert writer.stdout is not None and writer.stdout.readline().decode().strip() == at
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    commits = Commits.open(folder, 1, "x")
    assert (0 in commits) == (at == "after the record")
    commits.add(part(folder, 0))
    commits.manifest()
    assert set(folder.scan()) == {MANIFEST, record_name(0), commits.file(0)} and commits.rows == (
        3 if at == "after the record" else 2
    )


def test_of_many_attempts_at_once_one_counts(folder: Folder) -> None:
    """Four processes commit the same parts at the same time: all are told the same record of each."""
    code = (
        "import sys, json, pyarrow as pa; from cluster.files import Folder;"
        "from distill_jobs.data.table import commit_part; s = pa.schema([('n', pa.int64())]);"
        "sys.stdin.readline();"
        "print(json.dumps([commit_part(Folder(sys.argv[1]), p, s, [pa.record_batch([pa.array([1])], schema=s)],"
        " inputs='x').file for p in range(20)]))"
    )
    racers = [
        subprocess.Popen([sys.executable, "-c", code, folder.uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    told = []
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write(b"go\n")
        racer.stdin.flush()
    for racer in racers:
        assert racer.stdout is not None
        told.append(json.loads(racer.stdout.read()))
        assert racer.wait() == 0
    assert all(each == told[0] for each in told)
    # The losers have cleaned up after themselves.
    assert sorted(folder.names()) == sorted([*told[0], *(record_name(p) for p in range(20))])


def test_rivals_in_one_process_write_a_name_once(folder: Folder) -> None:
    won = []
    start = threading.Barrier(8)

    def race(number: int) -> None:
        start.wait()
        if folder.write_json("name", number, once=True):
            won.append(number)

    threads = [threading.Thread(target=race, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and folder.read_json("name") == won[0] and list(folder.scan()) == ["name"]


def test_a_record_that_stands_for_nothing_is_replaced(folder: Folder) -> None:
    first = part(folder, 0)
    assert part(folder, 0) == first and adopted(folder, 0, "x") == first
    other = part(folder, 0, inputs="y")
    assert other.inputs == "y" and read_record(folder, 0) == other and adopted(folder, 0, "x") is None
    folder.write(record_name(0), b"{}")
    assert adopted(folder, 0, "y") is None
    again = part(folder, 0, inputs="y")
    assert again == read_record(folder, 0) != other
    folder.remove(str(again.file))
    assert adopted(folder, 0, "y") is None and part(folder, 0, inputs="y").file != again.file


def test_two_that_both_wrote_are_told_apart_by_the_record_that_stayed(folder: Folder) -> None:
    """An object store lets two attempts both write their record: the driver may know the one that did not stay."""
    commits = Commits.open(folder, 2, "x")
    commits.add(part(folder, 1, rows=1))
    lost = part(folder, 0, rows=3)
    shutil.copy(folder.path(str(lost.file)), folder.path("kept"))
    folder.remove(record_name(0))
    stayed = part(folder, 0, rows=2)
    shutil.move(folder.path("kept"), folder.path(str(lost.file)))
    commits.add(lost)
    assert commits.rows == 4
    told = commits.manifest()
    assert told["rows"] == 3 and folder.read_json(MANIFEST)["part_files"][0] == stayed.file
    assert not folder.exists(str(lost.file)) and folder.exists(str(stayed.file))
