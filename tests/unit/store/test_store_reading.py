"""What training reads: from local stores, from an object store through a bounded cache, and from several mixed."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from store_cases import LENGTH, lm_facts, make_data, make_store, table_facts

from cluster.errors import FileError
from cluster.files import Folder, store_folder
from distill_jobs.data.cache import PartCache, Wanted
from distill_jobs.data.reader import TableReader
from distill_jobs.errors import DataError, SpecError, StoreError
from distill_jobs.inputs import inputs_of
from distill_jobs.spec import parse_job
from distill_jobs.spec.reading import Mix, Reading
from distill_jobs.store.codecs.dense import DenseCodec
from distill_jobs.store.codecs.hybrid import HybridCodec
from distill_jobs.store.codecs.topk import TopKCodec
from distill_jobs.store.mixture import MixedStore
from distill_jobs.store.reader import LogitStore, as_tensor
from distill_jobs.training.source import split_source, store_source

PARTS, ROWS = 5, 20


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local store of five parts of four rows, and another with other rows."""
    root = tmp_path_factory.mktemp("source")
    for name, seed in (("one", 0), ("two", 1)):
        facts = lm_facts(parts=PARTS, rows=ROWS)
        make_data(Folder(str(root / name / "data")), facts, seed)
        store = Folder(str(root / name / "store"))
        make_store(store, facts, Folder(str(root / name / "data")), HybridCodec(6, 2), seed)
    return root


@pytest.fixture(scope="module")
def bucket(made: Path, s3: Callable[[str], Folder]) -> Folder:
    folder = s3("stores")
    store_folder(made / "one", folder / "one")
    return folder


def local(made: Path, name: str) -> tuple[Folder, Folder]:
    return Folder(str(made / name / "store")), Folder(str(made / name / "data"))


def test_rows_by_sample_id(made: Path) -> None:
    store = LogitStore.open(local(made, "one")[0])
    numbers = np.array([7, 19, 0])
    ids = store.take(numbers, soft=False)["sample_id"]
    assert store.rows_of(ids).tolist() == numbers.tolist()
    with pytest.raises(StoreError, match="has no sample"):
        store.rows_of(np.array([9 << 32]))


@pytest.mark.filterwarnings("error")
def test_one_row_reaches_torch_without_a_copy(made: Path) -> None:
    store = LogitStore.open(local(made, "one")[0])
    columns = store.take(np.array([6]))
    tensors = {name: as_tensor(values) for name, values in columns.items() if values.dtype != object}
    assert all(np.shares_memory(tensor.numpy(), columns[name]) for name, tensor in tensors.items())
    once, again = store.signal(columns, "cpu"), store.signal(columns, "cpu")
    assert torch.equal(once.head_logprob, again.head_logprob) and torch.equal(once.tail_nodes, again.tail_nodes)


def test_training_reads_no_text(made: Path) -> None:
    source = store_source(*local(made, "one"), soft=True)
    columns = source._take(np.array([3, 11]))
    assert {name for name in columns if not name.startswith("t.")} == {"sample_id", "input_ids", "segments"}
    batch, signal = source.load(np.array([3, 11]), "cpu")
    assert batch.rows == 2 and signal is not None and len(signal) == batch.positions


def test_an_object_store_is_read_through_a_small_cache(bucket: Folder, made: Path, tmp_path: Path) -> None:
    size = max(f.stat().st_size for f in (made / "one" / "store" / "parts").glob("*.arrow"))
    reading = Reading(cache_dir=str(tmp_path / "cache"), cache_gb=4.2 * size / 1e9, window_parts=2)
    remote = store_source(bucket / "one" / "store", bucket / "one" / "data", True, reading)
    here = store_source(*local(made, "one"), soft=True)
    order = remote.order(4)
    seen: list[int] = []
    for consumed in range(0, 2 * ROWS, 4):
        numbers = order.take(consumed, 4)
        seen += numbers.tolist()
        (batch, signal), (same, expected) = (source.load(numbers, "cpu") for source in (remote, here))
        assert torch.equal(batch.inputs["input_ids"], same.inputs["input_ids"])
        assert torch.equal(signal.head_logprob, expected.head_logprob)
        assert _held(tmp_path / "cache") <= 4.2 * size
    assert sorted(seen[:ROWS]) == sorted(seen[ROWS:]) == list(range(ROWS))
    assert np.array_equal(store_source(*_remote(bucket), True, reading).order(4).take(6, 9), seen[6:15])


def test_a_store_of_one_window_is_read_in_the_order_of_a_local_one(bucket: Folder, made: Path, tmp_path: Path) -> None:
    for window, same in ((PARTS, True), (PARTS - 1, False)):
        reading = Reading(cache_dir=str(tmp_path), window_parts=window)
        far, near = store_source(*_remote(bucket), True, reading), store_source(*local(made, "one"), soft=True)
        orders = [source.order(3).take(7, 2 * ROWS) for source in (far, near)]
        assert np.array_equal(*orders) is same


def _held(cache: Path) -> int:
    """Bytes of the parts in a cache; what is fetched ahead has others go meanwhile."""
    total = 0
    for part in cache.glob("*.part"):
        with suppress(FileNotFoundError):
            total += part.stat().st_size
    return total


def _remote(bucket: Folder) -> tuple[Folder, Folder]:
    return bucket / "one" / "store", bucket / "one" / "data"


def test_what_does_not_fit_the_cache_is_said_before_training(bucket: Folder, tmp_path: Path) -> None:
    reading = Reading(cache_dir=str(tmp_path), cache_gb=1e-6, window_parts=3)
    with pytest.raises(StoreError, match=r"raise it .*lower reading\.window_parts"):
        store_source(*_remote(bucket), False, reading).order(0)
    table = TableReader(bucket / "one" / "store" / "parts", StoreError, cache=PartCache(tmp_path, 1000))
    with pytest.raises(StoreError, match=r"raise reading\.cache_gb"):
        table.take(np.array([0]))
    with pytest.raises(FileError, match=r"set reading\.cache_dir"):
        PartCache(Path("/proc/nowhere"))


def test_a_part_is_fetched_once_whoever_asks(bucket: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    copy = PartCache._copy

    def counted(cache: PartCache, wanted: Wanted, *more: Any) -> None:
        fetched.append(wanted.name)
        copy(cache, wanted, *more)

    monkeypatch.setattr(PartCache, "_copy", counted)
    tables = [TableReader(bucket / "one" / "data" / "train", cache=PartCache(tmp_path)) for _ in range(3)]
    threads = [threading.Thread(target=table.take, args=(np.arange(ROWS),)) for table in tables]
    tables[0].prefetch([0, 1, 2], [])
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == PARTS == len(set(fetched))


def test_reading_ahead_spares_what_is_read(bucket: Folder, tmp_path: Path) -> None:
    table = TableReader(bucket / "one" / "data" / "train")
    size = table.folder.size(table.facts["part_files"][0])
    cache = PartCache(tmp_path, int(2.5 * size))
    table = TableReader(table.folder, cache=cache)
    table.prefetch([0, 1, 2], [0])
    [first, second, third] = table.wanted([0, 1, 2])
    until = time.monotonic() + 20
    while not cache.has(second) and time.monotonic() < until:
        time.sleep(0.01)
    assert cache.has(first) and cache.has(second) and not cache.has(third)


def test_a_damaged_download_is_refused_and_not_kept(bucket: Folder, tmp_path: Path) -> None:
    table = TableReader(bucket / "one" / "data" / "train", cache=PartCache(tmp_path))
    name = table.facts["part_files"][0]
    good = table.folder.read(name)
    middle = len(good) // 2
    table.folder.write(name, good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
    with pytest.raises(DataError, match="SHA-256"):
        table.take(np.array([0]))
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob("*.tmp"))
    table.folder.write(name, good)
    assert table.take(np.array([0]), ["sample_id"])["sample_id"].tolist() == [0]


def test_a_cached_part_that_was_damaged_is_fetched_anew(bucket: Folder, tmp_path: Path) -> None:
    rows, name = np.array([0, 2]), "input_ids"
    folder = bucket / "one" / "data" / "train"
    expected = TableReader(folder, cache=PartCache(tmp_path)).take(rows, [name])[name]
    [cached] = tmp_path.glob("*.part")
    cached.write_bytes(bytes(cached.stat().st_size))
    with pytest.raises(DataError, match="SHA-256"):
        TableReader(folder, cache=PartCache(tmp_path)).take(rows, [name])
    assert np.array_equal(TableReader(folder, cache=PartCache(tmp_path)).take(rows, [name])[name], expected)


def test_images_come_from_the_data_beside_the_store(tmp_path: Path) -> None:
    facts, store, data = table_facts("image"), Folder(str(tmp_path / "store")), Folder(str(tmp_path / "data"))
    make_data(data, facts)
    make_store(store, facts, data, DenseCodec())
    batch, signal = store_source(store, data, soft=True).load(np.array([4, 1]), "cpu")
    expected = TableReader(data / "train").take(np.array([4, 1]), ["pixels"])["pixels"]
    assert np.array_equal(batch.inputs["pixels"].reshape(2, -1).numpy(), expected)
    assert signal is not None and len(signal) == 2


def test_a_mixture_gives_each_store_its_rows(made: Path) -> None:
    stores = [LogitStore.open(local(made, name)[0]) for name in ("one", "two")]
    mixed = MixedStore(stores)
    numbers = np.array([ROWS + 3, 1, ROWS, 19])
    columns = mixed.take(numbers, columns=["input_ids", "segments"])
    for row, (which, number) in enumerate([(1, 3), (0, 1), (1, 0), (0, 19)]):
        own = stores[which].take(np.array([number]))
        assert all(np.array_equal(values[row], own[name][0]) for name, values in columns.items())
    signal = mixed.signal(columns, "cpu")
    assert len(signal) == 4 * LENGTH
    with pytest.raises(IndexError):
        mixed.take(np.array([2 * ROWS]))


def test_training_from_a_mixture(made: Path) -> None:
    other = Mix(store=str(made / "two" / "store"), share=0.25)
    source = store_source(*local(made, "one"), soft=True, mix=[other])
    assert source.rows == round(ROWS / 0.75)
    numbers = source.order(0).take(0, 4096)
    assert (numbers >= ROWS).sum() == 1024
    assert set(numbers.tolist()) == set(range(2 * ROWS))
    batch, signal = source.load(numbers[:6], "cpu")
    assert batch.rows == 6 and signal is not None


def test_stores_that_do_not_fit_are_refused(made: Path, tmp_path: Path) -> None:
    facts, data = lm_facts(), Folder(str(tmp_path / "data"))
    make_data(data, facts)
    make_store(Folder(str(tmp_path / "store")), facts, data, TopKCodec(6))
    with pytest.raises(StoreError, match=r"can't be mixed .* their codec differ"):
        store_source(*local(made, "one"), soft=True, mix=[Mix(store=str(tmp_path / "store"), share=0.5)])
    facts, data = table_facts(), Folder(str(tmp_path / "data2"))
    make_data(data, facts)
    make_store(Folder(str(tmp_path / "store2")), facts, data, HybridCodec(6, 2))
    with pytest.raises(StoreError, match="their classes differ"):
        store_source(*local(made, "one"), soft=True, mix=[Mix(store=str(tmp_path / "store2"), share=0.5)])
    with pytest.raises(StoreError, match="there is no logit store"):
        store_source(*local(made, "one"), soft=True, mix=[Mix(store=str(tmp_path), share=0.5)])


def test_the_data_themselves_need_no_store(made: Path) -> None:
    source = split_source(local(made, "one")[1], "train")
    batch, signal = source.load(source.order(1).take(0, 5), "cpu")
    assert batch.rows == 5 and signal is None and source.rows == ROWS


def test_the_spec_of_a_mixture(made: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a b c"}\n' * 40)
    config = {"model_type": "llama", "hidden_size": 8}
    train = {"steps": 1}

    def job(**distill: object) -> object:
        return parse_job(
            {
                "name": "mixed",
                "task": "causal_lm",
                "workdir": str(tmp_path / "run"),
                "data": {"train": str(tmp_path / "a.jsonl"), "features": {"documents": {"tokenizer": "bytes"}}},
                "teacher": {"model": {"config": config}, "train": train},
                "student": {"model": {"config": config}, "train": train},
                "distill": distill,
                "reading": {"cache_gb": 1.5, "window_parts": 4, "verify": False},
            }
        )

    with pytest.raises(SpecError, match="shares in mix"):
        job(mix=({"store": "a", "share": 0.5}, {"store": "b", "share": 0.5}))
    plain = inputs_of(job())
    one, two = (inputs_of(job(mix=[{"store": str(made / n / "store"), "share": 0.5}])) for n in ("one", "two"))
    for arm in ("student/0", "baseline/0"):
        assert len({str(inputs[arm]) for inputs in (plain, one, two)}) == 3
    assert plain["capture"] == one["capture"]
