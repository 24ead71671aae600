"""Stores written out: what other tools read there is what the store says, and a half-written export is none."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_cases import CLASSES, LENGTH, lm_facts, make_data, make_store, table_facts

from cluster.files import Folder
from distill_jobs.data.facts import DataFacts
from distill_jobs.errors import StoreError
from distill_jobs.store.codecs import CODECS
from distill_jobs.store.exchange import export
from distill_jobs.store.exchange.export import export_store
from distill_jobs.store.reader import LogitStore

LM = [
    pytest.param(lm_facts(), CODECS["topk"](k=6), id="topk"),
    pytest.param(lm_facts(), CODECS["hybrid"](head=5, draws=3), id="hybrid"),
    pytest.param(lm_facts(), CODECS["sampled"](), id="sampled"),
    pytest.param(lm_facts(), CODECS["dense"](), id="dense"),
]
TABLES = [
    pytest.param(table_facts(), CODECS["dense"](), id="tabular"),
    pytest.param(table_facts("image"), CODECS["topk"](k=2), id="image"),
    pytest.param(table_facts(parts=2, rows=2200), CODECS["topk"](k=2), id="many rows"),
]


def made(tmp_path: Path, facts: DataFacts, codec) -> tuple[Folder, Folder]:
    folder, data = Folder(str(tmp_path / "store")), Folder(str(tmp_path / "data"))
    make_data(data, facts)
    make_store(folder, facts, data, codec)
    return folder, data


def read_parquet(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("*.parquet"))])


def check(table: pa.Table, folder: Folder, data: Folder) -> None:
    """Every column of the export against the store."""
    store = LogitStore.open(folder, data)
    columns = store.table.take(np.arange(store.rows))
    positions = store.plan.positions_per_row
    signal = store.signal(columns, "cpu")
    assert table.num_rows == store.rows
    for name, values in columns.items():
        if not name.startswith("t."):
            assert table.column(name).to_pylist() == values.tolist(), name

    def of(name: str) -> np.ndarray:
        return np.array(table.column(name).to_pylist()).reshape(store.rows * positions, -1)

    np.testing.assert_allclose(of("logprobs"), signal.at(1.0)[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(of("gold_rank")[:, 0], signal.gold_rank)
    np.testing.assert_allclose(of("gold_logprob")[:, 0], signal.gold_logprob)
    np.testing.assert_allclose(of("entropy")[:, 0], signal.entropy)
    mass = np.exp(of("logprobs").astype(np.float64)).sum(axis=1)
    if signal.head_ids is not None:
        np.testing.assert_array_equal(of("ids"), signal.head_ids)
    if signal.tail_nodes is not None:
        mass = mass + np.exp(of("tail_logmass")[:, 0])
        np.testing.assert_allclose(of("tail_nodes"), signal.tail_nodes)
    np.testing.assert_allclose(mass, 1.0, atol=1e-5)
    if signal.draw_ids is not None:
        np.testing.assert_array_equal(of("draw_ids"), signal.draw_ids)
        drawn = np.exp(of("draw_logweights").astype(np.float64)).sum(axis=1)
        np.testing.assert_allclose(drawn, np.exp(of("tail_logmass")[:, 0]), atol=1e-4)


@pytest.mark.parametrize(("facts", "codec"), LM + TABLES)
def test_parquet_says_what_the_store_says(tmp_path: Path, facts: DataFacts, codec) -> None:
    folder, data = made(tmp_path, facts, codec)
    told = []
    index = export_store(folder, Folder(str(tmp_path / "out")), data=data, on_progress=lambda *now: told.append(now))
    table = read_parquet(tmp_path / "out")
    check(table, folder, data)
    assert told == [(n + 1, facts.splits["train"]["parts"]) for n in range(len(told))] and told
    assert index["rows"] == table.num_rows and json.loads((tmp_path / "out" / "export.json").read_text()) == index
    assert index["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.parquet"))
    about = json.loads(table.schema.metadata[b"distill_jobs"])
    assert about == index["store"] and about["codec"]["name"] == codec.name and about["classes"] == facts.targets
    assert not (tmp_path / "out.unfinished").exists()


def test_labels_mark_what_is_scored(tmp_path: Path) -> None:
    folder, data = made(tmp_path, lm_facts(), CODECS["topk"](k=6))
    export_store(folder, Folder(str(tmp_path / "out")), data=data)
    table = read_parquet(tmp_path / "out")
    ids = table.column("input_ids").to_pylist()[0]
    assert table.column("labels").to_pylist()[0] == [ids[1], ids[2], -100, ids[4], ids[5], -100, -100, -100]
    assert len(table.column("ids").to_pylist()[0]) == LENGTH


def test_classification_has_no_level_of_positions(tmp_path: Path) -> None:
    folder, _ = made(tmp_path, table_facts(), CODECS["dense"]())
    export_store(folder, Folder(str(tmp_path / "out")))
    table = read_parquet(tmp_path / "out")
    assert table.schema.field("logprobs").type == pa.list_(pa.float32())
    assert table.schema.field("gold_rank").type == pa.int32() and "labels" not in table.schema.names
    assert len(table.column("logprobs").to_pylist()[0]) == CLASSES


@pytest.mark.parametrize(("facts", "codec"), LM[1:2] + TABLES[:1])
def test_the_layout_of_datasets(tmp_path: Path, facts: DataFacts, codec) -> None:
    folder, data = made(tmp_path, facts, codec)
    index = export_store(folder, Folder(str(tmp_path / "out")), "datasets", data)
    state = json.loads((tmp_path / "out" / "state.json").read_text())
    assert [file["filename"] for file in state["_data_files"]] == index["files"]
    tables = [pa.ipc.open_stream(tmp_path / "out" / name).read_all() for name in index["files"]]
    table = pa.concat_tables(tables)
    check(table, folder, data)
    features = json.loads((tmp_path / "out" / "dataset_info.json").read_text())["features"]
    assert list(features) == table.schema.names and features["sample_id"] == {"dtype": "int64", "_type": "Value"}


READ = """
import json, sys, datasets
one = datasets.load_from_disk(sys.argv[1])
two = datasets.load_dataset("parquet", data_dir=sys.argv[2], split="train", cache_dir=sys.argv[3])
assert one.column_names == two.column_names and one[:] == two[:], "they differ"
print(json.dumps({"rows": len(one), "first": one[0]}))
"""


@pytest.mark.slow
def test_the_real_library_opens_it(tmp_path: Path) -> None:
    if subprocess.run([sys.executable, "-c", "import datasets"], capture_output=True).returncode:
        pytest.skip("the datasets library is not installed")
    folder, _ = made(tmp_path, lm_facts(), CODECS["hybrid"](head=5, draws=3))
    export_store(folder, Folder(str(tmp_path / "hf")), "datasets")
    export_store(folder, Folder(str(tmp_path / "pq")), "parquet")
    places = [str(tmp_path / name) for name in ("hf", "pq", "cache")]
    run = subprocess.run([sys.executable, "-c", READ, *places], capture_output=True, text=True, env=os.environ)
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout)
    row = pq.read_table(sorted((tmp_path / "pq").glob("*.parquet"))[0]).slice(0, 1).to_pylist()[0]
    assert said == {"rows": 6, "first": row}


def test_a_half_written_export_is_none(tmp_path: Path, monkeypatch) -> None:
    folder, _ = made(tmp_path, lm_facts(), CODECS["topk"](k=6))
    out, whole = Folder(str(tmp_path / "out")), export.batches_of_part

    def stops(store: LogitStore, part: int):
        yield from whole(store, part)
        if part == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(export, "batches_of_part", stops)
    for form in ("parquet", "datasets"):
        with pytest.raises(KeyboardInterrupt):
            export_store(folder, out, form)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.unfinished" / "state.json").exists()
    monkeypatch.undo()
    assert export_store(folder, out)["rows"] == 6
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".json", ".parquet", ".parquet"]


def test_what_is_refused(tmp_path: Path) -> None:
    folder, _ = made(tmp_path, lm_facts(), CODECS["topk"](k=6))
    (tmp_path / "taken").mkdir()
    export_store(folder, Folder(str(tmp_path / "taken")))
    with pytest.raises(StoreError, match="exists already"):
        export_store(folder, Folder(str(tmp_path / "taken")))
    with pytest.raises(StoreError, match="exists already"):
        export_store(folder, Folder(str(tmp_path / "taken" / "export.json")))
    part = next((tmp_path / "store" / "parts").glob("*.arrow"))
    part.write_bytes(part.read_bytes()[:-200])
    with pytest.raises(StoreError):
        export_store(folder, Folder(str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(StoreError, match="no logit store"):
        export_store(folder, Folder(str(tmp_path / "out")))
