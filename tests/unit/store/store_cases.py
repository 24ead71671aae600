"""Small stores of every kind of codec and task, made on the spot from random teachers."""

import itertools

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cluster.files import Folder
from distill_jobs.data.batch import make_batch
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.reader import TableReader, as_array
from distill_jobs.data.table import commit_manifest, commit_part, sample_id
from distill_jobs.store.codecs import Codec
from distill_jobs.store.draws import uniforms
from distill_jobs.store.plan import StorePlan
from distill_jobs.store.writer import finish, start, write_part

LENGTH, VOCABULARY, CLASSES = 8, 50, 5


def lm_facts(parts: int = 2, rows: int = 6, vocabulary: int = VOCABULARY) -> DataFacts:
    return DataFacts(
        task="causal_lm",
        features="documents",
        fingerprint="data-1",
        sequence_length=LENGTH,
        vocabulary=vocabulary,
        tokenizer_sha="tok-1",
        pad_id=0,
        packing="documents",
        slices=("style",),
        splits={"train": {"rows": rows, "tokens": rows * LENGTH, "parts": parts}},
    )


def table_facts(features: str = "tabular", parts: int = 2, rows: int = 6) -> DataFacts:
    return DataFacts(
        task="classification",
        features=features,
        fingerprint="data-1",
        feature_width=3 if features == "tabular" else 4,
        image_shape=None if features == "tabular" else (1, 2, 2),
        classes=tuple(f"class {i}" for i in range(CLASSES)),
        splits={"train": {"rows": rows, "tokens": rows, "parts": parts}},
    )


def make_data(folder: Folder, facts: DataFacts, seed: int = 0) -> None:
    """A prepared ``data/`` with a training split of as many rows as ``facts`` says."""
    rng = np.random.default_rng(seed)
    train = facts.splits["train"]
    records = {}
    for part in range(train["parts"]):
        rows = train["rows"] // train["parts"]
        whole = pa.RecordBatch.from_pydict(_columns(facts, part, rows, rng))
        size = facts.rows_per_batch
        batches = [whole.slice(i, size) for i in range(0, rows, size)]
        records[part] = commit_part(folder / "train", part, whole.schema, batches, inputs="x")
    commit_manifest(folder / "train", records, rows_per_batch=facts.rows_per_batch)
    facts.save(folder)


def make_store(folder: Folder, facts: DataFacts, data: Folder, codec: Codec, seed: int = 0) -> dict[int, Tensor]:
    """A complete store over ``data``; returns the teacher's logits [rows · positions, targets] of each part."""
    torch.manual_seed(seed)
    plan = StorePlan.make(facts, codec, teacher="teacher-1", outputs=facts.targets + 3)
    table = TableReader(data / "train")
    shas = table.facts["part_sha256"]
    start(folder, plan, shas)
    made = {}
    for part in range(plan.parts):
        batches = list(table.batches(part))
        logits = [3 * torch.randn(b.num_rows * facts.positions_per_row, facts.targets) for b in batches]
        starts = np.cumsum([0, *(b.num_rows for b in batches)]) + table.part_range(part).start
        labels = [
            make_batch(table.take(np.arange(a, b)), facts).labels.flatten() for a, b in itertools.pairwise(starts)
        ]
        ids = [torch.from_numpy(as_array(b.column("sample_id")).copy()) for b in batches]
        chances = [uniforms(plan.seed, some, facts.positions_per_row) for some in ids]
        encoded = (codec.encode(z, y, u) for z, y, u in zip(logits, labels, chances, strict=True))
        write_part(folder, plan, part, batches, encoded, data_sha256=shas[part])
        made[part] = torch.cat(logits)
    finish(folder, plan, shas)
    return made


def _columns(facts: DataFacts, part: int, rows: int, rng: np.random.Generator) -> dict[str, pa.Array]:
    columns: dict[str, pa.Array] = {
        "sample_id": pa.array([sample_id(part, row) for row in range(rows)], pa.int64()),
        "source": pa.array([f"part{part}.jsonl:{row}" for row in range(rows)]),
    }
    if facts.features == "documents":
        ids = rng.integers(0, VOCABULARY, (rows, LENGTH), dtype=np.int32)
        segments = np.tile(np.array([1, 1, 1, 2, 2, 2, 0, 0], dtype=np.int32), (rows, 1))
        return columns | {
            "slice.style": pa.array(["verse"] * rows),
            "input_ids": pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), LENGTH),
            "segments": pa.FixedSizeListArray.from_arrays(pa.array(segments.reshape(-1)), LENGTH),
            "tokens": pa.array([6] * rows, pa.int32()),
        }
    name, width = ("features", 3) if facts.features == "tabular" else ("pixels", 4)
    values = rng.random(rows * width, dtype=np.float32)
    return columns | {
        name: pa.FixedSizeListArray.from_arrays(pa.array(values), width),
        "label": pa.array(rng.integers(0, CLASSES, rows), pa.int64()),
    }
