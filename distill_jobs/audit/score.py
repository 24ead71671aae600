"""Every model's verdict on every held-out row: one actor, one part of the split at a time.

What is kept is per row and per model, as sums over the row's scored positions, so that any mean, slice or bootstrap
can be taken later without running a model again.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cluster.files import Folder
from cluster.meter import Meter
from distill_jobs.audit.speed import measure_speed
from distill_jobs.data.batch import Batch, make_batch
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.reader import TableReader
from distill_jobs.data.table import commit_part
from distill_jobs.models.place import device_for, load_placed
from distill_jobs.models.scorer import Scorer

SUMS = ("nll", "correct", "agree", "kl")


@dataclass(frozen=True)
class ScoreTask:
    """Which models to score on which data. ``models`` maps names to saved folders; ``teacher`` is among them."""

    data: Folder
    out: Folder
    models: dict[str, Folder]
    batch_tokens: int
    latency_repeats: int
    precision: str
    inputs: str
    cores: float
    devices: float


class ScoreWorker:
    """Holds all the models and scores parts of the held-out split, or times one model."""

    def __init__(self, task: ScoreTask) -> None:
        self.task = task
        self.facts = DataFacts.load(task.data)
        self.table = TableReader(task.data / "test")
        self.device = device_for(task.devices)
        self.models = {n: load_placed(f, self.device, task.precision) for n, f in task.models.items()}
        self.rows_per_batch = max(1, task.batch_tokens // self.facts.positions_per_row)

    def run(self, shard: tuple[str, Any]) -> dict[str, Any]:
        """A shard is ``("part", number)`` or ``("speed", model name)``."""
        kind, what = shard
        if kind == "speed":
            rows = np.arange(min(self.rows_per_batch, self.table.rows))
            batch = make_batch(self.table.take(rows), self.facts).to(self.device)
            return measure_speed(self.models[what], batch, self.task.latency_repeats)
        return self._score_part(int(what))

    def _score_part(self, part: int) -> dict[str, Any]:
        numbers = np.asarray(self.table.part_range(part))
        pieces = []
        with Meter(self.task.cores, self.task.devices) as meter, torch.inference_mode():
            for start in range(0, len(numbers), self.rows_per_batch):
                columns = self.table.take(numbers[start : start + self.rows_per_batch])
                pieces.append(self._score_rows(columns))
        table = pa.concat_tables(pieces).combine_chunks() if pieces else None
        tokens = int(np.sum(table["positions"].to_numpy())) if table else 0
        schema = table.schema if table else pa.schema([("sample_id", pa.int64())])
        record = commit_part(
            self.task.out,
            part,
            schema,
            table.to_batches() if table else [],
            inputs=self.task.inputs,
            tokens=tokens,
            usage=meter.usage,
        )
        return {"rows": record.rows, "tokens": record.tokens}

    def _score_rows(self, columns: dict[str, np.ndarray]) -> pa.Table:
        batch = make_batch(columns, self.facts).to(self.device)
        keep = (batch.labels != -100).reshape(len(batch.labels), -1)
        out: dict[str, Any] = {"sample_id": columns["sample_id"], "positions": keep.sum(1).cpu().numpy()}
        out.update({name: values for name, values in columns.items() if name.startswith("slice.")})
        teacher = self._log_probs(self.models["teacher"], batch, keep)
        for name, model in self.models.items():
            student = teacher if name == "teacher" else self._log_probs(model, batch, keep)
            for what, values in zip(SUMS, _sums(student, teacher, batch, keep), strict=True):
                out[f"{name}.{what}"] = values
            if self.facts.features != "documents":
                out[f"{name}.predicted"] = student.argmax(-1).to(torch.int32).cpu().numpy()
        return pa.table(out)

    def _log_probs(self, model: Scorer, batch: Batch, keep: torch.Tensor) -> torch.Tensor:
        """Log-probabilities over the real classes at the scored positions, fp32 [positions, classes]."""
        logits = model(**batch.inputs).flatten(0, -2)[keep.flatten()]
        return torch.log_softmax(logits[:, : self.facts.targets].float(), dim=-1)


def _sums(student: torch.Tensor, teacher: torch.Tensor, batch: Batch, keep: torch.Tensor) -> list[np.ndarray]:
    gold = batch.labels.flatten()[keep.flatten()]
    rows = torch.arange(len(keep), device=keep.device).repeat_interleave(keep.sum(1))
    guess = student.argmax(-1)
    kl = torch.zeros_like(gold, dtype=torch.float32)
    for start in range(0, len(gold), 256):
        # In blocks: a [positions × vocabulary] product for the whole batch would double the peak.
        t, s = teacher[start : start + 256], student[start : start + 256]
        kl[start : start + 256] = (t.exp() * (t - s)).sum(-1)
    per_position = [
        -student.gather(1, gold[:, None])[:, 0],
        (guess == gold).float(),
        (guess == teacher.argmax(-1)).float(),
        kl.clamp_min(0),
    ]
    zero = torch.zeros(len(keep), dtype=torch.float64, device=keep.device)
    return [zero.clone().index_add_(0, rows, values.double()).cpu().numpy() for values in per_position]
