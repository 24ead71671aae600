"""Rows that the teacher could not score: left out of the store, named in the quarantine, and missed by nobody."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from store_cases import LENGTH, VOCABULARY, lm_facts, make_data, make_store, table_facts, write
from typer.testing import CliRunner

from cluster.files import Folder
from distill_jobs.cli_store import store as commands
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.reader import TableReader
from distill_jobs.data.table import read_record, record_name, sample_id
from distill_jobs.errors import StoreError
from distill_jobs.store.archive import archive, restore
from distill_jobs.store.codecs import Codec
from distill_jobs.store.codecs.dense import DenseCodec
from distill_jobs.store.codecs.hybrid import HybridCodec
from distill_jobs.store.codecs.topk import TopKCodec
from distill_jobs.store.exchange.export import export_store
from distill_jobs.store.inspect import describe, render
from distill_jobs.store.mixture import MixedStore
from distill_jobs.store.plan import StorePlan
from distill_jobs.store.quarantine import Quarantined, read_quarantine, write_quarantine
from distill_jobs.store.reader import LogitStore
from distill_jobs.store.verify import verify
from distill_jobs.store.writer import finish, start, write_part
from distill_jobs.training.source import store_source

PARTS, EACH = 4, 6
# Holes at the start, in the middle and at the end of a part, one after another, a whole part, and none.
OUT = [sample_id(0, 0), sample_id(0, 3), sample_id(0, 5), *(sample_id(1, row) for row in range(EACH)), sample_id(2, 2)]
OUT += [sample_id(2, 3)]
KINDS = [
    pytest.param(lm_facts(PARTS, PARTS * EACH), HybridCodec(6, 4), id="documents"),
    pytest.param(table_facts("tabular", PARTS, PARTS * EACH), DenseCodec(), id="tabular"),
    pytest.param(table_facts("image", PARTS, PARTS * EACH), TopKCodec(3), id="image"),
]


def made(root: Path, facts: DataFacts, codec: Codec, name: str = "store", without: list[int] = OUT) -> Folder:
    folder, data = Folder(str(root / name)), Folder(str(root / "data"))
    if not data.exists("manifest.json"):
        make_data(data, facts)
    make_store(folder, facts, data, codec, without=without)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    made(root, lm_facts(PARTS, PARTS * EACH), HybridCodec(6, 4))
    return root


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Folder:
    shutil.copytree(whole, tmp_path / "w")
    return Folder(str(tmp_path / "w" / "store"))


def data_of(store: Folder) -> Folder:
    return Folder(str(store.path().parent / "data"))


@pytest.mark.parametrize(("facts", "codec"), KINDS)
def test_the_kept_rows_are_those_of_a_store_without_holes(tmp_path: Path, facts: DataFacts, codec: Codec) -> None:
    data = Folder(str(tmp_path / "data"))
    full = LogitStore.open(made(tmp_path, facts, codec, "full", []), data)
    folder = made(tmp_path, facts, codec)
    assert verify(folder, data) == verify(folder) == []
    holed = LogitStore.open(folder, data)
    assert holed.rows == full.rows - len(OUT) and holed.manifest["quarantined"] == len(OUT)

    ids = full.take(np.arange(full.rows))["sample_id"]
    kept = ids[~np.isin(ids, OUT)]
    rng = np.random.default_rng(0)
    for some in (kept, rng.permutation(kept), kept[[3]], kept[[-1, 0, 0]]):
        rows = holed.rows_of(some)
        found, expected = holed.take(rows), full.take(full.rows_of(some))
        assert list(found) == list(expected)
        for name, values in expected.items():
            assert np.array_equal(found[name], values), name
    for lost in [*OUT, sample_id(2, EACH), sample_id(PARTS, 0), -1]:
        with pytest.raises(StoreError, match="has no sample"):
            holed.rows_of(np.array([kept[0], lost]))


def test_training_mixing_exporting_and_archiving(store: Folder, tmp_path: Path) -> None:
    data = data_of(store)
    source = store_source(store, data, soft=True)
    assert source.rows == PARTS * EACH - len(OUT)
    batch, signal = source.load(source.order(0).take(0, source.rows), "cpu")
    assert signal is not None and len(signal) == batch.positions
    assert not np.isin(batch.sample_ids.numpy(), OUT).any() and len(set(batch.sample_ids.tolist())) == source.rows

    opened = LogitStore.open(store)
    mixed = MixedStore([opened, opened])
    assert (
        mixed.take(np.arange(mixed.rows))["sample_id"].tolist()
        == 2 * opened.take(np.arange(opened.rows))["sample_id"].tolist()
    )

    index = export_store(store, Folder(str(tmp_path / "out")), "parquet", data)
    assert index["rows"] == opened.rows
    before = {path: path.read_bytes() for path in store.path().rglob("*.*")}
    archive(store)
    restore(store)
    assert {path: path.read_bytes() for path in store.path().rglob("*.*")} == before
    assert verify(store, data) == []


def test_images_are_mixed_with_their_own_pixels(tmp_path: Path) -> None:
    stores = []
    for number, without in enumerate((OUT, [])):
        root = tmp_path / str(number)
        facts = table_facts("image", PARTS, PARTS * EACH)
        make_data(Folder(str(root / "data")), facts, seed=number)
        folder = made(root, facts, TopKCodec(3), without=without)
        stores.append(LogitStore.open(folder, Folder(str(root / "data"))))
    taken = MixedStore(stores).take(np.arange(stores[0].rows + stores[1].rows))
    for number, (first, rows) in enumerate(((0, stores[0].rows), (stores[0].rows, stores[1].rows))):
        data = TableReader(Folder(str(tmp_path / str(number) / "data")) / "train")
        ids = taken["sample_id"][first : first + rows]
        assert np.array_equal(taken["pixels"][first : first + rows], data.take(data.rows_of(ids))["pixels"])


def test_what_a_person_is_told(store: Folder) -> None:
    text = render(describe(store))
    assert "quarantine    11 rows that the teacher could not score (45.83% of the data's)" in text
    assert "sample 0 (part0.jsonl:0): said NaN" in text and "and 6 more" in text
    told = CliRunner().invoke(commands, ["verify", str(store)])
    assert told.exit_code == 0, told.output
    assert "by the data beside it: of 24 rows 13 are there once, 11 in quarantine" in told.output
    shutil.rmtree(data_of(store).path())
    told = CliRunner().invoke(commands, ["verify", str(store)])
    assert told.exit_code == 0 and "no data beside it" in told.output


def record_of(store: Folder, part: int):
    found = read_record(store / "parts", part)
    assert found is not None
    return found


def quarantine_path(store: Folder, part: int) -> Path:
    return store.path("quarantine") / record_of(store, part).extra["quarantine_file"]


def test_a_file_that_is_lost_cut_or_another_parts_is_named(store: Folder) -> None:
    path, other = quarantine_path(store, 0), quarantine_path(store, 2)
    good = path.read_bytes()
    for content, message in [
        (None, "the quarantine of part 0: .* is missing"),
        (good[:-1], "is not the file that was written"),
        (other.read_bytes(), "is not the file that was written"),
    ]:
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        found = verify(store, data_of(store))
        assert len(found) == 1
        with pytest.raises(StoreError, match=message):
            raise StoreError(found[0])
        with pytest.raises(StoreError):
            describe(store)
        path.write_bytes(good)
    assert verify(store, data_of(store)) == []


def again(store: Folder, part: int, without: list[int], quarantined: list[Quarantined]) -> list[str]:
    """Make a part again, every checksum right, without some rows and with these in quarantine; what verify says."""
    plan, table = StorePlan.load(store), TableReader(data_of(store) / "train")
    (store / "parts").remove(record_name(part))
    commits = start(store, plan, table.facts["part_sha256"])
    kept = [batch for batch in table.batches(part) if batch.column("sample_id")[0].as_py() not in without]
    logits = [torch.randn(LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(1)) for _ in kept]
    uniform = torch.full((LENGTH,), 0.5, dtype=torch.float64)
    gold = [next_of(batch) for batch in kept]
    targets = [plan.make_codec().encode(z, y, uniform) for z, y in zip(logits, gold, strict=True)]
    sha = table.facts["part_sha256"][part]
    record = write_part(store, plan, part, kept, targets, data_sha256=sha, quarantined=lambda: quarantined)
    commits.add(record)
    finish(store, plan, commits)
    without_data = verify(store)
    found = verify(store, data_of(store))
    assert bool(without_data) == bool(found), (without_data, found)
    return found


def next_of(batch: pa.RecordBatch) -> torch.Tensor:
    ids = torch.from_numpy(np.array(batch.column("input_ids").flatten())).long()
    segments = np.array(batch.column("segments").flatten())
    inside = np.append(segments[1:], 0) == segments
    return torch.where(torch.from_numpy(inside & (segments > 0)), ids.roll(-1), -100)


def row(part: int, number: int) -> Quarantined:
    return Quarantined(sample_id(part, number), "here", "why")


@pytest.mark.parametrize(
    ("without", "quarantined", "message"),
    [
        ([sample_id(3, 1)], [row(3, 1)], None),
        ([], [], None),
        ([sample_id(3, 1)], [], "the plan is of data with 24 rows, but 23"),
        ([], [row(3, 1)], "the plan is of data with 24 rows, but 25"),
        ([sample_id(3, 1)], [row(3, 2)], "1 rows of part 3 are neither .* the first is sample 12884901889"),
        ([sample_id(3, 1)], [row(3, 2)], "1 rows of part 3 are in the store and in the quarantine"),
        ([sample_id(3, 1), sample_id(3, 2)], [row(3, 1)], "24 rows, but 23"),
        ([sample_id(3, 5)], [row(3, 4)], "1 rows of part 3 are neither"),
    ],
)
def test_every_row_is_in_one_place(
    store: Folder, without: list[int], quarantined: list[Quarantined], message: str | None
) -> None:
    found = again(store, 3, without, quarantined)
    if message is None:
        assert found == []
    else:
        with pytest.raises(StoreError, match=message):
            raise StoreError(" / ".join(found))


def test_what_no_quarantine_may_hold_is_never_written(tmp_path: Path) -> None:
    for rows in ([row(3, 1), row(3, 1)], [row(2, 1)]):
        with pytest.raises(StoreError, match="twice, or a row of another part"):
            write_quarantine(Folder(str(tmp_path)), 3, rows)
    assert write_quarantine(Folder(str(tmp_path)), 3, []) == {} and not list(tmp_path.iterdir())


def test_reasons_are_one_short_line(tmp_path: Path) -> None:
    store = made(tmp_path, lm_facts(1, 3), TopKCodec(4), without=[])
    long = Quarantined(sample_id(0, 1), "a\nsource\u2028of \u00e9 \U0001f600", "first\nsecond " + "x" * 10_000)
    said = write_quarantine(store, 0, [long, row(0, 0)])
    record = record_of(store, 0)
    record = type(record)(**{**vars(record), "quarantined": said.pop("quarantined"), "extra": said})
    first, second = read_quarantine(store, record)
    assert first == row(0, 0) and second.source == long.source
    assert second.reason.startswith("first second xxx") and len(second.reason) == 500
    lines = (store / "quarantine").read(said["quarantine_file"]).decode().splitlines()
    assert [json.loads(line)["sample_id"] for line in lines] == [0, 1]


def test_the_first_of_two_attempts_stays_with_its_quarantine(store: Folder) -> None:
    plan, table = StorePlan.load(store), TableReader(data_of(store) / "train")
    before, record = set((store / "quarantine").names()), record_of(store, 2)
    batches = list(table.batches(2))
    logits = [torch.randn(LENGTH, VOCABULARY) for _ in batches]
    late = write(store, plan, 2, batches, logits, table.facts["part_sha256"][2], [sample_id(2, 4)])
    assert late == record and set((store / "quarantine").names()) == before
    assert verify(store, data_of(store)) == []


def test_what_dead_attempts_left_is_swept(store: Folder) -> None:
    plan, shas = StorePlan.load(store), TableReader(data_of(store) / "train").facts["part_sha256"]
    names = set((store / "quarantine").names())
    place = store.path("quarantine")
    write_quarantine(store, 0, [row(0, 1)])
    write_quarantine(store, 3, [row(3, 1)])
    write_quarantine(store, 7, [row(7, 1)])
    (place / ".part-00000.abcd.jsonl.tmp").write_text("half")
    (place / "notes.txt").write_text("somebody's own")
    assert verify(store, data_of(store)) == [], "they count for nothing"
    finish(store, plan, start(store, plan, shas))
    assert {path.name for path in place.iterdir()} == names | {"notes.txt"}
    assert verify(store, data_of(store)) == []


def test_a_part_whose_quarantine_is_gone_is_made_again(store: Folder) -> None:
    plan, shas = StorePlan.load(store), TableReader(data_of(store) / "train").facts["part_sha256"]
    assert not len(start(store, plan, shas).missing())
    quarantine_path(store, 1).unlink()
    assert start(store, plan, shas).missing().tolist() == [1]
