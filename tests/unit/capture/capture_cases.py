"""Small captures made on the spot: rows of many lengths, real teachers, and teachers that fail on purpose."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from cluster.files import Folder
from distill_jobs.capture.worker import CaptureTask, CaptureWorker
from distill_jobs.data.commits import Commits
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.table import commit_part, sample_id
from distill_jobs.models.build import build_model
from distill_jobs.models.files import save_model
from distill_jobs.models.scorer import Scorer
from distill_jobs.spec import Model
from distill_jobs.spec.model import Mlp
from distill_jobs.store.codecs import Codec
from distill_jobs.store.codecs.dense import DenseCodec
from distill_jobs.store.features import FeatureCoding
from distill_jobs.store.plan import StorePlan

LENGTH, VOCABULARY, CLASSES, WIDTH = 24, 60, 4, 3
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
}


def lm_facts(rows: int, parts: int = 1) -> DataFacts:
    return DataFacts(
        task="causal_lm",
        features="documents",
        fingerprint="data-1",
        sequence_length=LENGTH,
        vocabulary=VOCABULARY,
        tokenizer_sha="tok-1",
        pad_id=0,
        packing="documents",
        splits={"train": {"rows": rows, "tokens": rows * LENGTH, "parts": parts}},
    )


def table_facts(rows: int, parts: int = 1) -> DataFacts:
    return DataFacts(
        task="classification",
        features="tabular",
        fingerprint="data-1",
        feature_width=WIDTH,
        classes=tuple(f"class {i}" for i in range(CLASSES)),
        splits={"train": {"rows": rows, "tokens": rows, "parts": parts}},
    )


def text_facts(rows: int, parts: int = 1) -> DataFacts:
    return DataFacts(
        task="classification",
        features="text",
        fingerprint="data-1",
        sequence_length=LENGTH,
        vocabulary=VOCABULARY,
        tokenizer_sha="tok-1",
        pad_id=0,
        classes=tuple(f"class {i}" for i in range(CLASSES)),
        splits={"train": {"rows": rows, "tokens": rows * LENGTH, "parts": parts}},
    )


def columns_of(facts: DataFacts, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random rows: documents of 1 to 3 pieces, or texts, of any length up to ``LENGTH``."""
    rng = np.random.default_rng(seed)
    if facts.features == "tabular":
        features = rng.normal(size=(rows, WIDTH)).astype(np.float32)
        return {"features": features, "label": rng.integers(0, CLASSES, rows)}
    lengths = rng.integers(2, LENGTH + 1, rows)
    ids = np.where(np.arange(LENGTH) < lengths[:, None], rng.integers(1, VOCABULARY, (rows, LENGTH)), 0)
    tokens = {"input_ids": ids.astype(np.int32), "tokens": lengths.astype(np.int32)}
    if facts.features == "text":
        return {**tokens, "label": rng.integers(0, CLASSES, rows)}
    cuts = np.sort(rng.integers(1, LENGTH, (rows, 2)), axis=1)
    pieces = 1 + (np.arange(LENGTH) >= cuts[:, :1]) + (np.arange(LENGTH) >= cuts[:, 1:])
    return {**tokens, "segments": np.where(np.arange(LENGTH) < lengths[:, None], pieces, 0).astype(np.int32)}


def write_data(folder: Folder, facts: DataFacts, columns: dict[str, np.ndarray]) -> None:
    """A prepared ``data/`` of these rows, dealt out evenly to the parts."""
    train = facts.splits["train"]
    each = train["rows"] // train["parts"]
    commits = Commits.open(folder / "train", train["parts"], "x")
    for part in range(train["parts"]):
        some = {name: values[part * each : (part + 1) * each] for name, values in columns.items()}
        whole = pa.RecordBatch.from_pydict(
            {
                "sample_id": pa.array([sample_id(part, row) for row in range(each)], pa.int64()),
                "source": pa.array([f"part{part}.jsonl:{row}" for row in range(each)]),
                **{name: _arrow(values) for name, values in some.items()},
            }
        )
        size = facts.rows_per_batch
        batches = [whole.slice(i, size) for i in range(0, each, size)]
        commits.add(commit_part(folder / "train", part, whole.schema, batches, inputs="x"))
    commits.manifest(rows_per_batch=facts.rows_per_batch)
    facts.save(folder)


def make_task(
    root: Path,
    facts: DataFacts,
    columns: dict[str, np.ndarray],
    codec: Codec | None = None,
    *,
    teacher: Scorer | None = None,
    batch_tokens: int = 64,
    features: FeatureCoding | None = None,
    **more: Any,
) -> CaptureTask:
    """Data, teacher and plan on disk, and the task of an actor."""
    folder = Folder(str(root))
    write_data(folder / "data", facts, columns)
    teacher = teacher or teacher_of(facts)
    save_model(teacher, folder / "teacher", facts, folder / "data")
    plan = StorePlan.make(facts, codec or DenseCodec(), "teacher-1", outputs=teacher.outputs, features=features)
    plan.save(folder / "store")
    return CaptureTask(
        folder / "teacher", folder / "data", folder / "store", batch_tokens, "fp32", cores=1, devices=0, **more
    )


def teacher_of(facts: DataFacts, seed: int = 0) -> Scorer:
    if facts.features == "tabular":
        return build_model(Model(mlp=Mlp(hidden=(8,))), facts, seed=seed)
    if facts.features == "text":
        config = {**LLAMA, "model_type": "bert"}
        return build_model(Model(config=config), facts, seed=seed)
    return build_model(Model(config=LLAMA), facts, seed=seed)


class Fails(nn.Module):
    """A teacher's core that does something of its own to batches in which a feature of some row is large."""

    def __init__(self, core: nn.Module, fail: Any) -> None:
        super().__init__()
        self.core, self.fail = core, fail
        self.calls: list[int] = []

    def forward(self, values: Tensor) -> Tensor:
        self.calls.append(len(values))
        logits = self.core(values)
        wrong = values[:, 0] > 90
        return self.fail(logits, wrong) if bool(wrong.any()) else logits


def fail_with(worker: CaptureWorker, fail: Any) -> Fails:
    """Let the worker's teacher fail on rows whose first feature is above 90: ``fail(logits, rows [B] of bool)``."""
    core = Fails(worker.teacher.core, fail)
    worker.teacher.core = core
    return core


def raises(error: Exception) -> Any:
    def fail(logits: Tensor, rows: Tensor) -> Tensor:  # noqa: ARG001
        raise error

    return fail


def gives(value: float) -> Any:
    return lambda logits, rows: torch.where(rows[:, None], value, logits)


def _arrow(values: np.ndarray) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
