"""Capture against its floor, the teacher's bare forward of the same batches, interleaved in one run.

A model of SmolLM2-135M's shape (30 layers, hidden size 576, 49,152 tokens) with random weights costs what the real one
costs. Prints the medians; asserts only that both were measured.
"""

import time
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.files import Folder
from distill_jobs.capture.worker import CaptureTask, CaptureWorker
from distill_jobs.data.batch import make_batch
from distill_jobs.data.commits import Commits
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.table import commit_part, sample_id
from distill_jobs.models.build import build_model
from distill_jobs.models.files import save_model
from distill_jobs.spec import Model
from distill_jobs.store.codecs import HybridCodec
from distill_jobs.store.plan import StorePlan

VOCABULARY, LENGTH, ROWS, REPEATS = 49_152, 256, 8, 5
SHAPES = {
    "tiny (2 layers of 64)": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    "SmolLM2-135M (30 layers of 576)": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}


def make_job(folder: Folder, shape: dict[str, int]) -> CaptureTask:
    """Data of random tokens, a saved teacher of random weights, and the plan of a store."""
    facts = DataFacts(
        task="causal_lm",
        features="documents",
        fingerprint="benchmark",
        sequence_length=LENGTH,
        vocabulary=VOCABULARY,
        tokenizer_sha="none",
        pad_id=0,
        packing="documents",
        splits={"train": {"rows": ROWS, "tokens": ROWS * LENGTH, "parts": 1}},
    )
    ids = np.random.default_rng(0).integers(VOCABULARY, size=(ROWS, LENGTH), dtype=np.int32)
    wide = pa.list_(pa.int32(), LENGTH)
    schema = pa.schema([("sample_id", pa.int64()), ("input_ids", wide), ("segments", wide), ("tokens", pa.int32())])
    batches = [
        pa.RecordBatch.from_pylist(
            [{"sample_id": sample_id(0, row), "input_ids": ids[row], "segments": np.ones(LENGTH), "tokens": LENGTH}],
            schema,
        )
        for row in range(ROWS)
    ]
    commit_part(folder / "data" / "train", 0, schema, batches, inputs="benchmark", tokens=ROWS * LENGTH)
    Commits.open(folder / "data" / "train", 1, "benchmark").manifest(rows_per_batch=1)
    facts.save(folder / "data")
    teacher = build_model(Model(config={"model_type": "llama", "tie_word_embeddings": True, **shape}), facts, seed=0)
    save_model(teacher, folder / "teacher", facts, folder / "data")
    StorePlan.make(facts, HybridCodec(), "benchmark", teacher.outputs).save(folder / "store")
    return CaptureTask(folder / "teacher", folder / "data", folder / "store", 1024, "fp32", 2, 0)


@pytest.mark.benchmark
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SHAPES)
def test_capture_against_the_bare_forward(tmp_path: Path, name: str) -> None:
    worker = CaptureWorker(make_job(Folder(str(tmp_path)), SHAPES[name]))
    rows = worker.rows_at_once
    batches = [make_batch(worker.table.take(np.arange(s, s + rows)), worker.facts) for s in range(0, ROWS, rows)]

    @torch.inference_mode()
    def bare() -> None:
        for batch in batches:
            worker.teacher(**batch.inputs)

    times: dict[str, list[float]] = {"bare": [], "capture": []}
    for repeat in range(REPEATS + 1):
        for what, work in (("bare", bare), ("capture", lambda: worker.run(0))):
            started = time.perf_counter()
            work()
            if repeat:
                times[what].append(time.perf_counter() - started)
    forward, capture = (ROWS * LENGTH / median(times[what]) for what in ("bare", "capture"))
    print(
        f"\n{name}: bare forward {forward:,.0f} tokens/s, capture with hybrid 48 + 16 {capture:,.0f} tokens/s: "
        f"{capture / forward:.3f} of it"
    )
    assert forward > 0 and capture > 0
