"""Reading rows back: the same as were written, in any order; and damage told in one sentence."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.files import Folder
from distill_jobs.data.commits import Commits
from distill_jobs.data.reader import TableReader
from distill_jobs.data.table import commit_part
from distill_jobs.errors import StoreError

PART_ROWS = [5, 0, 3, 4]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = Folder(str(tmp_path_factory.mktemp("table")))
    schema = pa.schema([("n", pa.int64()), ("name", pa.string()), ("wide", pa.list_(pa.float16(), 3))])
    start = 0
    for part, rows in enumerate(PART_ROWS):
        n = np.arange(start, start + rows)
        wide = pa.FixedSizeListArray.from_arrays(pa.array(np.repeat(n, 3).astype(np.float16)), 3)
        whole = pa.record_batch([pa.array(n), pa.array([f"row {i}" for i in n]), wide], schema=schema)
        batches = [whole.slice(at, 2) for at in range(0, rows, 2)]
        commit_part(folder, part, schema, batches, inputs="x")
        start += rows
    Commits.open(folder, len(PART_ROWS), "x").manifest(rows_per_batch=2)
    return folder


@given(st.lists(st.integers(0, sum(PART_ROWS) - 1), max_size=30))
@settings(max_examples=50, deadline=None)
def test_take_returns_what_was_asked_for(table, indices):
    taken = TableReader(table).take(np.array(indices, dtype=np.int64))
    assert taken["n"].tolist() == indices
    assert taken["name"].tolist() == [f"row {i}" for i in indices]
    assert taken["wide"].shape == (len(indices), 3)
    assert taken["wide"].dtype == np.float16
    assert (taken["wide"] == np.array(indices, np.float16).reshape(-1, 1)).all()


def test_parts_and_batches(table):
    reader = TableReader(table)
    assert [reader.part_of(i) for i in (0, 4, 5, 8, 11)] == [0, 0, 2, 3, 3]
    assert reader.part_range(2) == range(5, 8)
    assert [b.num_rows for b in reader.batches(0)] == [2, 2, 1]
    assert list(reader.batches(1)) == []
    with pytest.raises(IndexError):
        reader.take(np.array([12]))
    with pytest.raises(StoreError, match="no column x; it has n, name, wide"):
        TableReader(table, StoreError).take(np.array([0]), ["x"])


@pytest.mark.parametrize("damage", ["cut", "missing", "manifest", "garbled", "short"])
def test_damage_is_told_in_one_sentence(table, tmp_path, damage):
    folder = Folder(str(tmp_path))
    for name in table.names():
        folder.write(name, table.read(name))
    manifest = folder.read_json("manifest.json")
    file = manifest["part_files"][0]
    if damage == "cut":
        folder.write(file, folder.read(file)[:-100])
    elif damage == "missing":
        folder.remove(file)
    elif damage == "garbled":
        folder.write(file, bytes(len(folder.read(file))))
    elif damage == "short":
        manifest["part_rows"][0] = 4
        folder.write_json("manifest.json", manifest)
    else:
        folder.write("manifest.json", b"{}")
    with pytest.raises(StoreError) as caught:
        TableReader(folder, StoreError).take(np.arange(3))
    assert "\n" not in str(caught.value)
