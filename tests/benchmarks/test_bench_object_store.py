"""What an object store costs beside a local disk: the same capture and the same training on both, by turns in one run.

The server is moto's, in a process of its own on this machine, and is slow itself: beside each ratio stands the floor,
the seconds that pyarrow alone needs to move the same bytes through it. The cache of parts is empty at the start of each
round. Sizes: BENCH_OBJECT_PARTS, BENCH_OBJECT_ROWS (rows a part).
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from object_server import KEYS, moto
from pyarrow import fs
from test_bench_loop import CONFIG, Quiet, alone
from test_bench_reader import CLASSES, make_store

from cluster.engine import Engine
from cluster.files import Folder, store_folder
from distill_jobs.capture.worker import CaptureTask, CaptureWorker
from distill_jobs.data.facts import DataFacts
from distill_jobs.losses.fused_head import fused_head
from distill_jobs.models.build import build_model
from distill_jobs.models.files import save_model
from distill_jobs.spec import Model, Train
from distill_jobs.spec.reading import Reading
from distill_jobs.store.codecs import HybridCodec
from distill_jobs.store.plan import PARTS, StorePlan
from distill_jobs.training.loop import Loop
from distill_jobs.training.source import Source, store_source
from distill_jobs.training.task import Arm

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(0)]
PART_COUNT = int(os.environ.get("BENCH_OBJECT_PARTS", "8"))
ROWS = int(os.environ.get("BENCH_OBJECT_ROWS", "16"))
LENGTH, BATCH, WINDOW, ROUNDS = 128, 8, 2, 3
STEPS = PART_COUNT * ROWS // BATCH
Ways = dict[str, Folder]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ways]:
    """Data, teacher and store of one job, on a disk and in a bucket."""
    disk = Folder(str(tmp_path_factory.mktemp("disk")))
    store = make_store(disk, PART_COUNT, ROWS, LENGTH)
    facts = DataFacts.load(disk / "data")
    save_model(build_model(Model(config=CONFIG), facts, seed=0), disk / "teacher", facts, disk / "data")
    with moto() as endpoint, pytest.MonkeyPatch.context() as patch:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": endpoint}.items():
            patch.setenv(name, value)
        patch.setenv("DISTILL_NODE_CACHE", str(tmp_path_factory.mktemp("node")))
        system = fs.S3FileSystem(endpoint_override=endpoint[7:], scheme="http", allow_bucket_creation=True)
        system.create_dir("bench")
        store_folder(disk.path(), Folder("s3://bench/job"))
        assert store.exists("manifest.json")
        yield {"disk": disk, "object store": Folder("s3://bench/job")}


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def bare(endpoint: str) -> fs.S3FileSystem:
    return fs.S3FileSystem(endpoint_override=endpoint.removeprefix("http://"), scheme="http", allow_delayed_open=True)


def told(what: str, times: dict[str, list[float]], floor: list[float], size: int) -> str:
    disk, far, least = (median(each) for each in (times["disk"], times["object store"], floor))
    pairs = sorted(f / d for d, f in zip(times["disk"], times["object store"], strict=True))
    return (
        f"{what}: {disk:.2f} s on the disk, {far:.2f} s with the object store: {median(pairs):.3f} times "
        f"({pairs[0]:.3f} to {pairs[-1]:.3f}); moving its {size / 1e6:.1f} MB by pyarrow alone takes {least:.2f} s"
    )


def test_capture(places: Ways, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = bare(os.environ["AWS_ENDPOINT_URL"])
    for folder in places.values():
        facts = DataFacts.load(folder / "data")
        StorePlan.make(facts, HybridCodec(), "teacher", CLASSES).save(folder / "captured")
    times: dict[str, list[float]] = {way: [] for way in places}
    floor, parts = [], places["disk"] / "captured" / PARTS
    for number in range(ROUNDS + 1):
        monkeypatch.setenv("DISTILL_PART_CACHE", str(tmp_path / f"capture-{number}"))
        for way, folder in places.items():
            (folder / "captured" / PARTS).clear()
            task = CaptureTask(folder / "teacher", folder / "data", folder / "captured", 1024, "fp32", 1, 0)
            worker = CaptureWorker(task)

            def capture(worker: CaptureWorker = worker) -> None:
                for part in range(PART_COUNT):
                    worker.run(part)

            taken = seconds(capture)
            if number:
                times[way].append(taken)
        content = [parts.read(name) for name in parts.names(".arrow")]

        def write(content: list[bytes] = content) -> None:
            for part, data in enumerate(content):
                with system.open_output_stream(f"bench/floor/{part}") as sink:
                    sink.write(data)

        floor.append(seconds(write))
    print("\n" + told(f"capture of {PART_COUNT} parts", times, floor, sum(map(len, content))))


@pytest.fixture
def one_rank() -> Iterator[None]:
    with alone():
        yield


@pytest.mark.usefixtures("one_rank")
def test_training(places: Ways, tmp_path: Path) -> None:
    system = bare(os.environ["AWS_ENDPOINT_URL"])
    train = Train.model_validate({"steps": STEPS, "batch_size": BATCH, "precision": "fp32", "evaluate_every": 10**6})
    model = Model.model_validate({"config": CONFIG})
    arm = Arm("student", 0, Folder(str(tmp_path)), model, train, 0.5, 2.0, "digest", {})
    facts = DataFacts.load(places["disk"] / "data")
    scorer = build_model(model, facts, seed=0)
    engine = Engine(scorer, train.engine(10**6, 1, "fp32"), "cpu")
    head, size = fused_head(scorer, facts), 0
    first: dict[str, list[float]] = {way: [] for way in places}
    again: dict[str, list[float]] = {way: [] for way in places}
    waits: dict[str, list[float]] = {"disk": [], "object store": [], "object store, cached": []}
    hits, floor = [], []

    def epoch(source: Source) -> tuple[float, float]:
        loop = Loop(arm, engine, source, Source(facts, 0, lambda _: {}), Quiet(), STEPS, head)
        loop.log_every = STEPS
        taken = seconds(loop.run)
        return taken, loop._reader.waited / taken

    for number in range(ROUNDS + 1):
        for way, folder in places.items():
            reading = Reading(cache_dir=str(tmp_path / f"train-{number}"), window_parts=WINDOW)
            source = store_source(folder / "store", folder / "data", True, reading)
            (cold, waited), (warm, waited_again) = epoch(source), epoch(source)
            if not number:
                continue
            first[way].append(cold)
            again[way].append(warm)
            waits[way].append(waited)
            if way != "disk":
                waits["object store, cached"].append(waited_again)
                tally = source._take.func.__self__.table._cache.tally  # type: ignore[attr-defined]
                hits.append(1 - tally.missed / tally.mapped)
        parts = places["object store"] / "store" / PARTS
        names = parts.names(".arrow")

        def read(parts: Folder = parts, names: list[str] = names) -> None:
            for name in names:
                with system.open_input_file(f"{parts.uri.removeprefix('s3://')}/{name}") as source:
                    source.read()

        size = parts.total_bytes()
        floor.append(seconds(read))
    engine.close()
    print(f"\n{STEPS} steps of {BATCH} × {LENGTH} tokens, {CLASSES:,} classes, windows of {WINDOW} parts")
    print(told("first epoch", first, floor, size))
    print(told("second epoch, from the cache", again, floor, size))
    shares = ", ".join(f"{way} {np.mean(each):.2%}" for way, each in waits.items())
    print(f"waiting for the reader: {shares}; parts that were there when they were first needed: {np.mean(hits):.0%}")
