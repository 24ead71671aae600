"""Reading rows: the store's reader beside a raw memory map and a plain Arrow loop, and what opening costs.

All that is compared runs by turns in one process, so that whatever else the machine does slows all alike. CPU seconds
of the one reading thread are printed beside wall seconds. Sizes: BENCH_READER_PARTS, BENCH_READER_ROWS (rows a part).
"""

import dataclasses
import itertools
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.files import Folder, sha256, store_folder
from distill_jobs.data.cache import PartCache
from distill_jobs.data.commits import Commits
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.reader import TableReader, as_array
from distill_jobs.data.table import MANIFEST, commit_part, sample_id
from distill_jobs.store.codecs.hybrid import HybridCodec
from distill_jobs.store.plan import PARTS, StorePlan
from distill_jobs.store.reader import LogitStore, as_tensor
from distill_jobs.store.writer import SEAL, contract, finish, seal, start, write_part
from distill_jobs.training.feed import Order

pytestmark = pytest.mark.benchmark
POSITIONS, CLASSES = 1024, 49152
PART_COUNT = int(os.environ.get("BENCH_READER_PARTS", "4"))
ROWS = int(os.environ.get("BENCH_READER_ROWS", "256"))
ROUNDS = 41
NAMES = ["sample_id", "input_ids", "segments"]
Batch = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Rows of 1,024 positions, ``hybrid`` 48 + 16; the same soft targets in every row."""
    root = Folder(str(tmp_path_factory.mktemp("reader")))
    return make_store(root, PART_COUNT, ROWS, POSITIONS)


def make_store(root: Folder, parts: int, rows: int, positions: int) -> Folder:
    train = {"rows": parts * rows, "tokens": parts * rows * positions, "parts": parts}
    facts = DataFacts(
        "causal_lm", "documents", "data", positions, vocabulary=CLASSES, pad_id=0, splits={"train": train}
    )
    rng, data, folder = np.random.default_rng(0), root / "data", root / "store"
    for part in range(parts):
        batches = [_row(part, row, positions, rng) for row in range(rows)]
        commit_part(data / "train", part, batches[0].schema, batches, inputs="")
    Commits.open(data / "train", parts, "").manifest(rows_per_batch=1)
    facts.save(data)
    codec = HybridCodec(48, 16)
    torch.manual_seed(0)
    logits, gold = 3 * torch.randn(positions, CLASSES), torch.randint(0, CLASSES, (positions,))
    encoded = codec.encode(logits, gold, torch.rand(positions, dtype=torch.float64))
    plan = StorePlan.make(facts, codec, "teacher", CLASSES)
    commits = start(folder, plan)
    table = TableReader(data / "train")
    for part in range(parts):
        commits.add(write_part(folder, plan, part, table.batches(part), itertools.repeat(encoded, rows)))
    finish(folder, plan, commits)
    return folder


def _row(part: int, row: int, positions: int, rng: np.random.Generator) -> pa.RecordBatch:
    lists = [rng.integers(0, CLASSES, positions, dtype=np.int32), np.ones(positions, np.int32)]
    ids, segments = (pa.FixedSizeListArray.from_arrays(pa.array(values), positions) for values in lists)
    # Text of unequal length, so that rows don't lie at even distances.
    texts = [pa.array([f"file-{part}.jsonl:{row}"]), pa.array(["prose" if row % 3 else "v"])]
    first, last = pa.array([sample_id(part, row)], pa.int64()), pa.array([positions], pa.int32())
    return pa.record_batch(
        [first, *texts, ids, segments, last],
        ["sample_id", "source", "slice.style", "input_ids", "segments", "tokens"],
    )


@pytest.fixture(scope="module")
def raw(store: Folder, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, np.ndarray], list[Path]]:
    """The same columns, each one raw file of fixed-width rows."""
    root, opened = tmp_path_factory.mktemp("raw"), LogitStore.open(store, verify=False)
    maps, files = {}, []
    for name, values in opened.take(np.array([0]), columns=NAMES).items():
        files.append(root / name)
        with files[-1].open("wb") as sink:
            for row in range(opened.rows):
                sink.write(opened.table.take(np.array([row]), [name])[name].tobytes())
        maps[name] = np.memmap(files[-1], values.dtype, "r", shape=(opened.rows, *values.shape[1:]))
    return maps, files


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_shuffled_rows_warm(store: Folder, raw: tuple[dict[str, np.ndarray], list[Path]]) -> None:
    opened, maps = LogitStore.open(store), raw[0]
    opened.take(np.arange(opened.rows)[:: max(1, ROWS // 4)])
    arrow = _arrow(store)
    row_bytes = sum(m[0].nbytes for m in maps.values())
    ways: dict[str, Callable[[np.ndarray], Batch]] = {
        "raw memory map": lambda rows: {name: torch.from_numpy(m[rows]) for name, m in maps.items()},
        "store": lambda rows: _tensors(opened.take(rows, columns=NAMES)),
        "plain Arrow loop": arrow,
    }
    for way in ways.values():
        way(np.arange(opened.rows) % min(opened.rows, 512))
    print(f"\n{opened.rows:,} rows of {row_bytes:,} bytes in {PART_COUNT} parts")
    rng = np.random.default_rng(0)
    for batch in (1, 8, 64):
        wall: dict[str, list[float]] = {name: [] for name in ways}
        cpu: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            rows = rng.integers(0, opened.rows, batch)
            for name, way in ways.items():
                before, before_cpu = time.perf_counter(), time.thread_time()
                way(rows)
                cpu[name].append(time.thread_time() - before_cpu)
                wall[name].append(time.perf_counter() - before)
        for name in ways:
            seconds, own = (sorted(times[name])[ROUNDS // 2] for times in (wall, cpu))
            base, base_own = (sorted(times["raw memory map"])[ROUNDS // 2] for times in (wall, cpu))
            ratios = f"{base / seconds:.2f} of the raw map by wall time, {base_own / own:.2f} by CPU time"
            print(f"batches of {batch:2}: {name:17} {_speed(batch, row_bytes, seconds)}; {ratios}")


def test_first_opening_and_cold_reads(store: Folder, raw: tuple[dict[str, np.ndarray], list[Path]]) -> None:
    files = sorted((store / PARTS).path().glob("*.arrow"))
    size, rows = sum(f.stat().st_size for f in files), PART_COUNT * ROWS
    order = np.random.default_rng(1).permutation(rows)
    print()
    for name, verify in (("checked (SHA-256 and codec)", True), ("trusted", False)):
        opened = LogitStore.open(store, verify=verify)
        before = time.perf_counter()
        for part in range(PART_COUNT):
            opened.take(np.array([part * ROWS]), columns=NAMES)
        seconds = time.perf_counter() - before
        print(
            f"opening {PART_COUNT} warm parts, {name}: {1e3 * seconds / PART_COUNT:.1f} ms a part, "
            f"{size / seconds / 1e6:,.0f} MB/s"
        )
        del opened
    maps, paths = raw
    row_bytes = sum(m[0].nbytes for m in maps.values())
    for turn in range(3):
        told = []
        for name, verify in (("checked", True), ("trusted", False)):
            # A map that is held keeps its pages: each turn maps anew what was dropped.
            _drop(files)
            opened = LogitStore.open(store, verify=verify)
            seconds = _seconds(lambda rows, o=opened: _tensors(o.take(rows, columns=NAMES)), order)
            told.append(f"{name} {_speed(rows, row_bytes, seconds)}")
            del opened
        _drop(paths)
        again = {n: np.memmap(p, maps[n].dtype, "r", shape=maps[n].shape) for n, p in zip(maps, paths, strict=True)}
        seconds = _seconds(lambda rows, a=again: {n: torch.from_numpy(m[rows]) for n, m in a.items()}, order)
        print(f"cold, turn {turn}: {'; '.join(told)}; raw map {_speed(rows, row_bytes, seconds)}")


def test_reads_from_an_object_store(store: Folder, tmp_path: Path, s3: Callable[[str], Folder]) -> None:
    remote = s3("bench") / "store"
    store_folder(store.path(), remote)
    size = sum(f.stat().st_size for f in (store / PARTS).path().glob("*.arrow"))
    names = (remote / PARTS).names(".arrow")
    before = time.perf_counter()
    for name in names:
        (remote / PARTS).read(name)
    plain = time.perf_counter() - before
    opened = LogitStore.open(remote, cache=PartCache(tmp_path / "cache"), verify=False)
    order = np.arange(opened.rows)
    first, second = (_seconds(lambda rows: _tensors(opened.take(rows, columns=NAMES)), order) for _ in range(2))
    told = [f"{opened.rows / seconds:,.0f} rows/s" for seconds in (first, second)]
    fetched = f"{size / first / 1e6:,.0f} MB/s"
    print(f"\nfrom S3 (moto, this machine): {told[0]}, {fetched} with fetching; {told[1]} from the cache")
    print(f"plain GETs of the same objects: {size / plain / 1e6:,.0f} MB/s")


def test_a_hundred_thousand_parts(tmp_path: Path) -> None:
    """Simulated: a manifest of 100,000 parts, all of them one and the same file. Opened in a process of its own."""
    folder, count, rows = make_store(Folder(str(tmp_path)), 1, 4, 8), 100_000, 4
    table = (folder / PARTS).read_json(MANIFEST)
    many = {name: value * count if isinstance(value, list) else value for name, value in table.items()}
    totals = {name: table[name] * count for name in ("parts", "rows", "tokens", "bytes")}
    (folder / PARTS).write_json(MANIFEST, {**many, **totals})
    plan = dataclasses.replace(StorePlan.load(folder), parts=count)
    plan.save(folder)
    manifest = {**contract(plan), "table_sha256": sha256(folder / PARTS, MANIFEST), **totals, "quarantined": 0}
    folder.write_json(MANIFEST, {**manifest, SEAL: seal(manifest)})
    code = f"""
import psutil, time, numpy as np
from cluster.files import Folder
from distill_jobs.store.reader import LogitStore, as_tensor
held = lambda: psutil.Process().memory_info().rss / 1e6
before, start = held(), time.perf_counter()
store = LogitStore.open(Folder({str(folder)!r}))
seconds = time.perf_counter() - start
print(f"{{store.table.parts:,}} parts opened in {{seconds:.2f}} s, {{held() - before:.0f}} MB more held")
start = time.perf_counter()
store.take(np.random.default_rng(0).integers(0, store.rows, 1000), columns=["input_ids"])
print(f"1,000 rows of as many parts, each opened and checked: {{time.perf_counter() - start:.2f}} ms a part")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    print("\n" + done.stdout, end="")
    assert rows * count == LogitStore.open(folder).rows


def test_the_order_of_a_hundred_million_rows() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    order, start = Order(100_000_000, 0), time.perf_counter()
    for step in range(200):
        order.take(step * 512, 512)
    seconds = (time.perf_counter() - start) / 200
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    print(f"\norder of 100,000,000 rows: {1e3 * seconds:.2f} ms for a batch of 512, {grown:.0f} MB held")


def _arrow(store: Folder) -> Callable[[np.ndarray], Batch]:
    """Arrow's own reader, one batch a row, by the loop that one writes first."""
    files = (store / PARTS).read_json(MANIFEST)["part_files"]
    readers = [pa.ipc.open_file(pa.memory_map(str((store / PARTS).path(name)))) for name in files]

    def take(rows: np.ndarray) -> Batch:
        out: dict[str, np.ndarray] = {}
        for at, row in enumerate(rows.tolist()):
            batch = readers[row // ROWS].get_batch(row % ROWS)
            for name in batch.schema.names:
                if name in NAMES or name.startswith("t."):
                    values = as_array(batch.column(name))
                    out.setdefault(name, np.empty((len(rows), *values.shape[1:]), values.dtype))[at] = values[0]
        return _tensors(out)

    return take


def _tensors(columns: dict[str, np.ndarray]) -> Batch:
    return {name: as_tensor(values) for name, values in columns.items()}


def _speed(rows: int, row_bytes: int, seconds: float) -> str:
    return f"{rows / seconds:9,.0f} rows/s {rows * row_bytes / seconds / 1e6:7,.0f} MB/s"


def _seconds(take: Callable[[np.ndarray], object], order: np.ndarray) -> float:
    before = time.perf_counter()
    for first in range(0, len(order), 8):
        take(order[first : first + 8])
    return time.perf_counter() - before


def _drop(files: list[Path]) -> None:
    """Have the kernel forget the pages of files (that nobody has mapped)."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
