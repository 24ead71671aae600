"""Which parts are committed: the same answer with and without the index, after kills, damage and rivals."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commit_cases import part
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.files import Folder, json_bytes, sha256
from distill_jobs.data import commits as module
from distill_jobs.data.commits import Commits
from distill_jobs.data.table import MANIFEST, adopted, read_record, record_name
from distill_jobs.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "table"))


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AT_LEAST", 3)


def committed(folder: Folder, parts: int, inputs: str | Callable[[int], str] = "x") -> list[int]:
    return sorted(set(range(parts)) - set(Commits.open(folder, parts, inputs).missing().tolist()))


def pieces(folder: Folder) -> list[str]:
    return (folder / "commits").names()


def forget(folder: Folder) -> None:
    (folder / "commits").clear()


def test_a_table_from_nothing_to_its_manifest(folder: Folder) -> None:
    commits = Commits.open(folder, 7, "x")
    assert len(commits) == 0 and commits.missing().tolist() == list(range(7)) and not folder.exists("commits")
    rows = [2, 0, 5, 1, 0, 3, 4]
    records = [part(folder, i, n, extra={"i": i}, tokens=lambda n=n: 10 * n) for i, n in enumerate(rows)]
    for record in records:
        commits.add(record)
        commits.add(record)
    assert len(commits) == 7 and 3 in commits and len(pieces(folder)) == 2
    assert (commits.rows, commits.tokens, commits.bytes) == (15, 150, sum(r.bytes for r in records))
    assert [commits.file(r.part) for r in records] == [r.file for r in records]
    assert list(commits.records()) == records
    told = commits.manifest(rows_per_batch=1, nested={"b": [1], "a": None})
    assert not folder.exists("commits") and pieces(folder) == []
    whole = {
        **told,
        "part_rows": rows,
        "part_sha256": [r.sha256 for r in records],
        "part_files": [r.file for r in records],
    }
    assert told == {"rows_per_batch": 1, "nested": {"b": [1], "a": None}, "parts": 7, "rows": 15, "tokens": 150} | {
        "bytes": commits.bytes
    }
    # Streamed, and yet the very bytes that writing it whole would give.
    assert folder.read(MANIFEST) == json_bytes(whole)
    assert all(sha256(folder, r.file) == r.sha256 and folder.size(r.file) == r.bytes for r in records if r.file)


def test_quarantined_rows_are_counted_and_listed(folder: Folder) -> None:
    commits = Commits.open(folder, 2, "x")
    for number in range(2):
        commits.add(part(folder, number, 3 * number, beside=lambda n=number: {"quarantined": 5 * (1 - n), "mark": n}))
    assert commits.quarantined == 5 and [commits.quarantined_of(i) for i in range(2)] == [5, 0]
    assert [r.extra["mark"] for r in commits.records()] == [0, 1]
    assert Commits.open(folder, 2, "x").manifest()["quarantined"] == 5
    assert folder.read_json(MANIFEST)["part_quarantined"] == [5, 0]


_step = st.tuples(
    st.sampled_from(["commit", "commit", "commit", "remake", "drop file", "drop record", "flip", "inputs", "index"]),
    st.integers(0, 11),
    st.integers(0, 3),
)


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(_step, max_size=30))
def test_the_index_never_says_anything_but_the_records(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]
) -> None:
    """Whatever happens to a table between two runs, opening it with its index gives what reading all records gives."""
    folder, inputs = Folder(str(tmp_path_factory.mktemp("t") / "table")), "x"
    commits = Commits.open(folder, 12, inputs)
    for what, number, rows in steps:
        if what == "commit" and number not in commits:
            commits.add(part(folder, number, rows, inputs))
        elif what == "remake":
            folder.remove(record_name(number))
            commits = Commits.open(folder, 12, inputs)
            part(folder, number, rows, inputs)  # noted by nobody: the driver was killed
        elif what == "drop file" and number in commits and commits.file(number):
            folder.remove(str(commits.file(number)))
        elif what == "drop record":
            folder.remove(record_name(number))
        elif what == "inputs":
            inputs = "y" if inputs == "x" else "x"
        elif what == "index" and pieces(folder):
            name = pieces(folder)[number % len(pieces(folder))]
            path = (folder / "commits").path(name)
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        if what not in ("commit", "index"):
            commits = Commits.open(folder, 12, inputs)
            commits.flush()
    fast = Commits.open(folder, 12, inputs)
    forget(folder)
    slow = Commits.open(folder, 12, inputs)
    assert fast.missing().tolist() == slow.missing().tolist()
    there = [number for number in range(12) if number in slow]
    assert [fast.file(n) for n in there] == [slow.file(n) for n in there]
    assert (fast.rows, fast.tokens, fast.bytes, len(fast)) == (slow.rows, slow.tokens, slow.bytes, len(slow))
    truth = [n for n in range(12) if adopted(folder, n, inputs) is not None]
    assert there == truth


def test_opening_reads_no_record_that_the_index_covers(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = Commits.open(folder, 40, "x")
    for number in range(35):
        commits.add(part(folder, number))
    left = 35 - sum(len(p) for p, _, _ in module.commit_index.read(folder))
    asked: list[int] = []
    plain = module.adopted
    monkeypatch.setattr(module, "adopted", lambda f, n, i: (asked.append(n), plain(f, n, i))[1])
    assert committed(folder, 40) == list(range(35)) and len(asked) == left < 5
    asked.clear()
    commits.flush()
    assert committed(folder, 40) == list(range(35)) and asked == []


def test_inputs_of_each_part_and_old_inputs_that_come_back(folder: Folder) -> None:
    for number in range(4):
        part(folder, number, inputs=f"v{number}")
    Commits.open(folder, 4, lambda n: f"v{n}").flush()
    assert committed(folder, 4, lambda n: f"v{n}") == [0, 1, 2, 3]
    assert committed(folder, 4, "v2") == [2]
    # Made anew from other inputs, without rows and noted by nobody: the file that the old inputs gave is still there.
    part(folder, 0, rows=0, inputs="v2")
    assert committed(folder, 4, lambda n: f"v{n}") == [1, 2, 3]


def test_a_table_may_grow_and_shrink(folder: Folder) -> None:
    commits = Commits.open(folder, 5, "x")
    for number in range(5):
        commits.add(part(folder, number))
    assert committed(folder, 3) == [0, 1, 2] and committed(folder, 9) == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="has 5 parts, but a commit record speaks of part 5"):
        commits.add(part(folder, 5))
    with pytest.raises(DataError, match=r"4 of 9 parts of .* are missing \(5, 6, 7, 8\)"):
        folder.remove(record_name(5))
        Commits.open(folder, 9, "x").manifest()


def test_what_dead_attempts_left_is_swept(folder: Folder) -> None:
    kept = [part(folder, number) for number in range(3)]
    for name in ("part-00001.00000000.arrow", "part-00007.json", "part-9.x", ".part-00001.abc.tmp", ".x.tmp", "other"):
        folder.write(name, b"left over")
    Commits.open(folder, 3, "x").manifest()
    assert set(folder.scan()) == {MANIFEST, "other", *(r.file for r in kept), *(record_name(n) for n in range(3))}


def test_every_flipped_bit_of_a_record_is_noticed(folder: Folder) -> None:
    record = part(folder, 0, extra={"why": "é", "share": 0.1, "left": None})
    assert read_record(folder, 0) == record
    path = folder.path(record_name(0))
    good = path.read_bytes()
    for at, bit in itertools.product(range(0, len(good), 3), range(8)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
        with pytest.raises(DataError, match=r"part-00000\.json is not a valid commit record"):
            read_record(folder, 0)
    for cut in range(0, len(good), 9):
        path.write_bytes(good[:cut])
        with pytest.raises(DataError):
            read_record(folder, 0)
    for other in (good + b" ", b"[" * 100_000, b"1" * 5000, b"null", good.replace(b"\n ", b"\n  ", 1)):
        path.write_bytes(other)
        with pytest.raises(DataError):
            read_record(folder, 0)


def test_in_an_object_store(s3: Callable[[str], Folder]) -> None:
    folder = s3("commits") / "table"
    commits = Commits.open(folder, 12, "x")
    for number in range(11):
        commits.add(part(folder, number))
    folder.write("part-00001.00000000.arrow", b"left over")
    again = Commits.open(folder, 12, "x")
    assert again.missing().tolist() == [11] and again.rows == 22
    again.add(part(folder, 11, rows=0))
    assert not folder.write_json(record_name(11), {}, once=True)
    assert part(folder, 11).rows == 0
    told = again.manifest(rows_per_batch=2)
    assert told["rows"] == 22 and pieces(folder) == [] and "part-00001.00000000.arrow" not in folder.names()
    assert np.array_equal(folder.read_json(MANIFEST)["part_rows"], [2] * 11 + [0])
