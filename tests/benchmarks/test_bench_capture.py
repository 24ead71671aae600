"""Capture against its floor, the teacher's bare forward of the same batches, interleaved in one run.

A model of SmolLM2-135M's shape (30 layers, hidden size 576, 49,152 tokens) with random weights costs what the real one
costs. The bare forward makes the logits of every position, as the model's own does; beside it stands what capture can't
do without: the layers, and the output head over the scored positions. Prints the medians, where capture's time went,
and the most memory that each took in a process of its own; asserts only that all were measured.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.files import Folder
from distill_jobs.capture.batches import Group, groups, windows
from distill_jobs.capture.worker import CaptureTask, CaptureWorker
from distill_jobs.data.commits import Commits
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.table import commit_part, sample_id
from distill_jobs.models.build import build_model
from distill_jobs.models.files import save_model
from distill_jobs.models.head import split_head
from distill_jobs.spec import Model
from distill_jobs.store.codecs import HybridCodec
from distill_jobs.store.plan import PARTS, StorePlan

VOCABULARY, LENGTH, BATCH_TOKENS, REPEATS = 49_152, 256, 1024, 3
WAYS = ("bare", "floor", "capture")
# Configuration, and rows: as many as make a pass take seconds.
SHAPES: dict[str, tuple[dict[str, int], int]] = {
    "tiny (2 layers of 64)": (
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
        16,
    ),
    "SmolLM2-135M (30 layers of 576)": (
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
        },
        8,
    ),
}


def make_job(folder: Folder, name: str) -> None:
    """Data of random tokens, a saved teacher of random weights, and the plan of a store."""
    shape, rows = SHAPES[name]
    facts = DataFacts(
        task="causal_lm",
        features="documents",
        fingerprint="benchmark",
        sequence_length=LENGTH,
        vocabulary=VOCABULARY,
        tokenizer_sha="none",
        pad_id=0,
        packing="documents",
        splits={"train": {"rows": rows, "tokens": rows * LENGTH, "parts": 1}},
    )
    ids = np.random.default_rng(0).integers(VOCABULARY, size=(rows, LENGTH), dtype=np.int32)
    wide = pa.list_(pa.int32(), LENGTH)
    schema = pa.schema([("sample_id", pa.int64()), ("input_ids", wide), ("segments", wide), ("tokens", pa.int32())])
    batches = [
        pa.RecordBatch.from_pylist(
            [{"sample_id": sample_id(0, row), "input_ids": ids[row], "segments": np.ones(LENGTH), "tokens": LENGTH}],
            schema,
        )
        for row in range(rows)
    ]
    commit_part(folder / "data" / "train", 0, schema, batches, inputs="benchmark", tokens=rows * LENGTH)
    Commits.open(folder / "data" / "train", 1, "benchmark").manifest(rows_per_batch=1)
    facts.save(folder / "data")
    teacher = build_model(Model(config={"model_type": "llama", "tie_word_embeddings": True, **shape}), facts, seed=0)
    save_model(teacher, folder / "teacher", facts, folder / "data")
    StorePlan.make(facts, HybridCodec(), "benchmark", teacher.outputs).save(folder / "store")


def ways(folder: Folder) -> tuple[CaptureWorker, dict[str, Callable[[], object]]]:
    """The worker, and the three ways to go once over the part with its teacher."""
    task = CaptureTask(
        folder / "teacher", folder / "data", folder / "store", BATCH_TOKENS, "fp32", torch.get_num_threads(), 0
    )
    worker = CaptureWorker(task)
    batches = list(_batches(worker))
    split = split_head(worker.teacher, worker.facts)
    assert split is not None

    @torch.inference_mode()
    def bare() -> None:
        for group in batches:
            worker.teacher(**group.batch.inputs)

    @torch.inference_mode()
    def floor() -> None:
        for group in batches:
            hidden = split.hidden(group.batch.inputs).flatten(0, 1)[group.scored]
            for some in hidden.split(worker.sizes.chunk):
                split.logits(some, VOCABULARY)

    def capture() -> None:
        (folder / "store" / PARTS).clear()
        worker.run(0)

    return worker, {"bare": bare, "floor": floor, "capture": capture}


def _batches(worker: CaptureWorker) -> Iterator[Group]:
    for window in windows(worker.table.batches(0), worker.facts, worker.tools.fields):
        yield from groups(window, lambda: BATCH_TOKENS, worker.tools.trim)


def peak(folder: str, way: str) -> None:
    """Print the MiB of this process with the teacher loaded, and at most, after two passes of one way."""
    _, all_ways = ways(Folder(folder))
    loaded = _status("VmRSS")
    for _ in range(2):
        all_ways[way]()
    # Not ru_maxrss, which a process takes over from the one that started it.
    print(f"{loaded} {_status('VmHWM')}")


def _status(name: str) -> int:
    """A figure of this process in MiB, as Linux tells it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) // 1024


def _peak_apart(folder: Path, way: str) -> tuple[int, int]:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_bench_capture as b"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; b.peak({str(folder)!r}, {way!r})"],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded, most = map(int, done.stdout.split()[-2:])
    return loaded, most


@pytest.mark.benchmark
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SHAPES)
def test_capture_against_the_bare_forward(tmp_path: Path, name: str) -> None:
    make_job(Folder(str(tmp_path)), name)
    worker, all_ways = ways(Folder(str(tmp_path)))
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    before: dict[str, float] = {}
    for repeat in range(REPEATS + 1):
        for way in WAYS:
            started = time.perf_counter()
            all_ways[way]()
            if repeat:
                times[way].append(time.perf_counter() - started)
        before = before or worker.watch.seconds
    tokens = SHAPES[name][1] * LENGTH
    pace = {way: tokens / median(times[way]) for way in WAYS}
    spent = {part: seconds - before.get(part, 0.0) for part, seconds in worker.watch.seconds.items()}
    busy = spent.pop("busy")
    rest = busy - sum(spent.values())
    shares = ", ".join(f"{part} {seconds / busy:.1%}" for part, seconds in {**spent, "other": rest}.items())
    print(
        f"\n{name}, {tokens:,} tokens: bare forward {pace['bare']:,.0f} tokens/s, layers and head over the scored "
        f"positions {pace['floor']:,.0f}, capture with hybrid 48 + 16 {pace['capture']:,.0f}: "
        f"{pace['capture'] / pace['bare']:.3f} and {pace['capture'] / pace['floor']:.3f} of them"
    )
    print(f"capture's time: {shares}")
    for way in ("bare", "capture"):
        loaded, most = _peak_apart(tmp_path, way)
        print(f"{way}: {loaded:,} MiB with the teacher loaded, {most:,} MiB at most")
    assert all(pace.values())
