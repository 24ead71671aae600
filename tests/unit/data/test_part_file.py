"""Reading past Arrow: views and copies are what Arrow would give, and a hostile file is Damage and nothing else."""

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.files import Folder
from distill_jobs.data.commits import Commits
from distill_jobs.data.reader import TableReader
from distill_jobs.data.table import commit_part, sample_id
from distill_jobs.errors import DataError

SCHEMA = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("source", pa.string()),
        ("ids", pa.list_(pa.uint16(), 40)),
        ("nothing", pa.list_(pa.float32(), 0)),
        ("code", pa.uint8()),
        ("half", pa.list_(pa.float16(), 3)),
    ]
)


def rows_of(part: int, rows: int) -> pa.RecordBatch:
    n = np.arange(rows)

    def lists(width: int, kind: str) -> pa.Array:
        values = (n[:, None] * 7 + np.arange(width) + part).astype(kind)
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width)

    nothing = pa.FixedSizeListArray.from_buffers(
        SCHEMA.field("nothing").type, rows, [None], children=[pa.array([], pa.float32())]
    )
    arrays = [
        pa.array([sample_id(part, i) for i in n.tolist()], pa.int64()),
        pa.array([f"zeile ü {part}:{'x' * i}" for i in n.tolist()]),
        lists(40, "uint16"),
        nothing,
        pa.array(n.astype(np.uint8)),
        lists(3, "float16"),
    ]
    return pa.record_batch(arrays, schema=SCHEMA)


def make_table(folder: Folder, per_batch: int, part_rows: tuple[int, ...] = (5, 0, 3)) -> pa.Table:
    whole = []
    for part, rows in enumerate(part_rows):
        batch = rows_of(part, rows)
        pieces = [batch.slice(at, per_batch) for at in range(0, rows, per_batch)]
        commit_part(folder, part, SCHEMA, pieces, inputs="x")
        whole.append(batch)
    Commits.open(folder, len(part_rows), "x").manifest(rows_per_batch=per_batch)
    return pa.Table.from_batches(whole)


def reseal(folder: Folder, part: int, data: bytes) -> None:
    """Replace a part's file and make the manifest agree, as somebody hostile would."""
    facts = folder.read_json("manifest.json")
    folder.write(facts["part_files"][part], data)
    facts["part_sha256"][part] = hashlib.sha256(data).hexdigest()
    folder.write_json("manifest.json", facts)


@pytest.mark.parametrize("per_batch", [1, 2, 1024])
@given(st.lists(st.integers(0, 7), max_size=12))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_are_what_arrow_gives(
    tmp_path_factory: pytest.TempPathFactory, per_batch: int, indices: list[int]
) -> None:
    folder = Folder(str(tmp_path_factory.getbasetemp() / f"rows{per_batch}"))
    if not folder.exists("manifest.json"):
        make_table(folder, per_batch)
    whole = pa.Table.from_batches([rows_of(0, 5), rows_of(2, 3)])
    taken = TableReader(folder).take(np.array(indices, dtype=np.int64))
    expected = whole.take(pa.array(indices, pa.int64()))
    for name in SCHEMA.names:
        assert taken[name].tolist() == expected.column(name).to_pylist(), name
    assert taken["nothing"].shape == (len(indices), 0) and taken["half"].dtype == np.float16


def test_one_row_is_a_view_that_nobody_can_write_to(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    make_table(folder, 2)
    reader = TableReader(folder)
    one, neighbours, apart = (reader.take(np.array(i), ["ids"])["ids"] for i in ([3], [2, 3], [1, 2]))
    assert one.base is not None and neighbours.base is not None and apart.base is None
    assert np.shares_memory(neighbours, one)
    with pytest.raises(ValueError, match="read-only"):
        one[:] = 9


def test_rows_by_sample_id(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    make_table(folder, 2)
    reader = TableReader(folder)
    ids = np.array([sample_id(2, 2), sample_id(0, 0), sample_id(0, 4)])
    assert reader.rows_of(ids).tolist() == [7, 0, 4]
    assert reader.take(reader.rows_of(ids), ["sample_id"])["sample_id"].tolist() == ids.tolist()
    for missing in (sample_id(0, 5), sample_id(1, 0), sample_id(3, 0), -1):
        with pytest.raises(DataError, match="has no sample"):
            reader.rows_of(np.array([missing]))


def test_a_changed_file_is_noticed_unless_it_is_trusted(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    make_table(folder, 1)
    name = folder.read_json("manifest.json")["part_files"][0]
    data = bytearray(folder.read(name))
    at = data.find(np.arange(7, 47, dtype=np.uint16).tobytes())
    data[at] ^= 1
    folder.write(name, bytes(data))
    with pytest.raises(DataError, match="SHA-256"):
        TableReader(folder).take(np.array([1]))
    assert TableReader(folder, verify=False).take(np.array([1]), ["ids"])["ids"][0, 0] == 6
    assert TableReader(folder).take(np.array([6]), ["code"])["code"].tolist() == [1]


def written(schema: pa.Schema, batch: pa.RecordBatch, **options: object) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_compressed_bodies_are_refused_unread(tmp_path: Path, compression: str) -> None:
    folder = Folder(str(tmp_path))
    make_table(folder, 1024, (5,))
    reseal(folder, 0, written(SCHEMA, rows_of(0, 5), compression=compression))
    with pytest.raises(DataError, match="compressed"):
        TableReader(folder).take(np.array([0]))


def test_columns_that_no_part_has_are_refused(tmp_path: Path) -> None:
    n = pa.array([1, 2, 3, 4, 5])
    cases = {
        "dictionaries": pa.record_batch([pa.array(list("abcab")).dictionary_encode()], ["a"]),
        "is bool": pa.record_batch([pa.array([True] * 5)], ["a"]),
        "is list": pa.record_batch([pa.array([[1]] * 5)], ["a"]),
        "has nulls": pa.record_batch([pa.array([1, None, 2, 3, 4])], ["a"]),
        "twice": pa.record_batch([n, n], ["a", "a"]),
        "don't add up": pa.record_batch([n.slice(1)], ["a"]),
        "are not those": pa.record_batch([n], ["a"]),
    }
    for number, (words, batch) in enumerate(cases.items()):
        folder = Folder(str(tmp_path / str(number)))
        make_table(folder, 1024, (3, 5))
        reseal(folder, 1, written(batch.schema, batch))
        with pytest.raises(DataError, match=words):
            TableReader(folder).take(np.array([3]))


def test_no_change_to_a_sealed_file_does_more_than_raise(tmp_path: Path) -> None:
    """Hostile bytes with matching checksums: DataError, or arrays of the right type and shape."""
    folder = Folder(str(tmp_path))
    make_table(folder, 2, (5,))
    name = folder.read_json("manifest.json")["part_files"][0]
    good = folder.read(name)
    rng = np.random.default_rng(0)
    outcomes = {True: 0, False: 0}
    for number in range(600):
        data = bytearray(good)
        # Numbers that overflow sums, that are negative, or that are merely wrong, mostly at the end: the footer.
        at = int(rng.integers(len(data) // 2 if number % 2 else 0, len(data) - 8))
        wild = [(2**63 - 1), 2**31 - 1, 2**32 - 1, 2**63, 0, int(rng.integers(0, 2**62))][number % 6]
        width = (1, 4, 8)[number % 3]
        data[at : at + width] = (wild % 2 ** (8 * width)).to_bytes(width, "little")
        (tmp_path / name).write_bytes(data)
        try:
            # The schema has no checksum but the file's: names and types may change, rows and their number may not.
            taken = TableReader(folder, verify=False).take(np.array([4, 0, 1]))
            assert all(len(values) == 3 and values.dtype.kind in "iufO" for values in taken.values())
            outcomes[True] += 1
        except DataError as error:
            assert "\n" not in str(error)
            outcomes[False] += 1
    assert min(outcomes.values()) > 20


def test_cut_files_are_refused_wherever_they_are_cut(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    make_table(folder, 2, (5,))
    name = folder.read_json("manifest.json")["part_files"][0]
    good = folder.read(name)
    for length in itertools.chain(range(0, 40), range(40, len(good), 97)):
        (tmp_path / name).write_bytes(good[:length])
        with pytest.raises(DataError):
            TableReader(folder, verify=False).take(np.array([0]))
