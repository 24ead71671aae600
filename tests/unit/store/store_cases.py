"""Small stores of every kind of codec and task, made on the spot from random teachers."""

from collections.abc import Collection, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cluster.files import Folder
from distill_jobs.data.batch import batch_columns, make_batch
from distill_jobs.data.commits import Commits
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.reader import TableReader, as_array
from distill_jobs.data.table import PartRecord, commit_part, sample_id
from distill_jobs.store.codecs import Codec
from distill_jobs.store.draws import uniforms
from distill_jobs.store.plan import StorePlan
from distill_jobs.store.quarantine import Quarantined
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
    commits = Commits.open(folder / "train", train["parts"], "x")
    for part in range(train["parts"]):
        rows = train["rows"] // train["parts"]
        whole = pa.RecordBatch.from_pydict(_columns(facts, part, rows, rng))
        size = facts.rows_per_batch
        batches = [whole.slice(i, size) for i in range(0, rows, size)]
        commits.add(commit_part(folder / "train", part, whole.schema, batches, inputs="x"))
    commits.manifest(rows_per_batch=facts.rows_per_batch)
    facts.save(folder)


def make_store(
    folder: Folder, facts: DataFacts, data: Folder, codec: Codec, seed: int = 0, without: Collection[int] = ()
) -> dict[int, Tensor]:
    """A complete store over ``data``; returns the teacher's logits [rows · positions, targets] of each part.

    Args:
        without: sample ids of rows that go into the quarantine.
    """
    torch.manual_seed(seed)
    plan = StorePlan.make(facts, codec, teacher="teacher-1", outputs=facts.targets + 3)
    table = TableReader(data / "train")
    shas = table.facts["part_sha256"]
    commits = start(folder, plan, shas)
    made = {}
    for part in range(plan.parts):
        batches = list(table.batches(part))
        logits = [3 * torch.randn(b.num_rows * facts.positions_per_row, facts.targets) for b in batches]
        made[part] = torch.cat(logits)
        commits.add(write(folder, plan, part, batches, logits, shas[part], without))
    finish(folder, plan, commits)
    return made


def write(
    folder: Folder,
    plan: StorePlan,
    part: int,
    batches: Sequence[pa.RecordBatch],
    logits: Sequence[Tensor],
    data_sha256: str,
    without: Collection[int] = (),
) -> PartRecord:
    """Write one part as a capture does: the rows that are kept, and those of ``without`` into the quarantine."""
    facts, codec = plan.make_facts(), plan.make_codec()
    kept, encoded, out = [], [], []
    for batch, said in zip(batches, logits, strict=True):
        ids = np.asarray(batch.column("sample_id"))
        keep = ~np.isin(ids, list(without))
        sources = batch.column("source").to_pylist()
        out += [Quarantined(i, sources[n], "said NaN") for n, i in enumerate(ids.tolist()) if not keep[n]]
        if keep.any():
            kept.append(batch.filter(pa.array(keep)))
            columns = {name: as_array(batch.column(name))[keep] for name in batch_columns(facts)}
            labels = make_batch(columns, facts).labels.flatten()
            chances = uniforms(plan.seed, torch.from_numpy(columns["sample_id"]), facts.positions_per_row)
            positions = np.repeat(keep, facts.positions_per_row)
            encoded.append(codec.encode(said[torch.from_numpy(positions)], labels, chances))
    return write_part(folder, plan, part, kept, encoded, data_sha256=data_sha256, quarantined=lambda: out)


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
