"""Every model's verdict on every held-out row: one actor, one part of the split at a time.

What is kept is per piece (a classified row, or what a packed row holds of one document) and per model, as sums over its
scored positions, so that any mean, slice or bootstrap can be taken later without running a model again. The columns,
beside ``sample_id``, ``positions`` and ``slice.<name>``:

- of every model ``<model>.<sum>`` for each of ``SUMS``: negative log-likelihood of the right class (nats), first
  choices that are right, first choices that are the teacher's, KL(teacher ‖ model) at T = 1, entropy;
- classification: ``label``, ``<model>.predicted``, ``<model>.confidence`` (probability of the first choice); the
  probability of the right class is exp(-nll);
- language models: ``document``; ``mistakes``, positions where the teacher is confidently wrong; of every model
  ``agree_right`` (agreement where the teacher is right), ``repeats`` (where it is confidently wrong, the model's first
  choice being the teacher's), and its confidences in bins (see ``Pieces.histogram``).
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cluster.files import Folder
from cluster.meter import Meter
from distill_jobs.audit.pieces import Pieces
from distill_jobs.audit.speed import measure_speed
from distill_jobs.data.batch import IGNORED, Batch, make_batch
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.reader import TableReader
from distill_jobs.data.table import commit_part
from distill_jobs.errors import DataError
from distill_jobs.models.place import device_for, load_placed
from distill_jobs.models.scorer import Scorer

SUMS = ("nll", "correct", "agree", "kl", "entropy")
COLUMNS = 2
"""Version of the columns: an evaluation of another one is made again."""
_BLOCK = 256


@dataclass(frozen=True)
class ScoreTask:
    """Which models to score on which data. ``models`` maps names to saved folders; ``teacher`` is among them.

    A language model's teacher is confidently wrong where its entropy is at most ``low_entropy`` nats and it gives the
    right token at most the probability ``tiny_gold``.
    """

    data: Folder
    out: Folder
    models: dict[str, Folder]
    batch_tokens: int
    latency_repeats: int
    precision: str
    inputs: str
    cores: float
    devices: float
    low_entropy: float = 0.0
    tiny_gold: float = 0.0


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
        batch, packed = make_batch(columns, self.facts).to(self.device), self.facts.features == "documents"
        pieces = Pieces.of(batch)
        ids, gold = columns["sample_id"], batch.labels[batch.labels != IGNORED]
        out: dict[str, np.ndarray] = {"sample_id": ids[pieces.row], "positions": pieces.positions}
        out |= {name: values[pieces.row] for name, values in columns.items() if name.startswith("slice.")}
        log_probs = self._log_probs(self.models["teacher"], batch)
        teacher = Verdicts.of(log_probs, log_probs, gold)
        mistaken = teacher.mistaken(self.task.low_entropy, self.task.tiny_gold)
        if packed:
            out |= {"document": pieces.documents(columns), "mistakes": pieces.sums(mistaken)}
        else:
            out["label"] = columns["label"][pieces.row]
        for name, model in self.models.items():
            own = teacher if name == "teacher" else Verdicts.of(self._log_probs(model, batch), log_probs, gold)
            _refuse_broken(name, own, pieces, columns)
            for what in SUMS:
                out[f"{name}.{what}"] = pieces.sums(own.sum_of(what, teacher))
            if packed:
                agree = own.sum_of("agree", teacher)
                out[f"{name}.agree_right"] = pieces.sums(agree * teacher.right)
                out[f"{name}.repeats"] = pieces.sums(agree * mistaken)
                found = pieces.histogram(own.confidence, own.right.float())
                out |= {f"{name}.{what}": values for what, values in found.items()}
            else:
                out[f"{name}.predicted"] = own.guess.to(torch.int32).cpu().numpy()
                out[f"{name}.confidence"] = own.confidence.cpu().numpy()
        return pa.table({name: _arrow(values) for name, values in out.items()})

    def _log_probs(self, model: Scorer, batch: Batch) -> Tensor:
        """Log-probabilities over the real classes at the scored positions, fp32 [positions, classes]."""
        logits = model(**batch.inputs).flatten(0, -2)[batch.keep.flatten()]
        return torch.log_softmax(logits[:, : self.facts.targets].float(), dim=-1)


def _refuse_broken(name: str, own: "Verdicts", pieces: Pieces, columns: dict[str, np.ndarray]) -> None:
    """Nothing can be averaged over what is not finite: say which model and row it is."""
    broken = (~torch.isfinite(own.gold_logprob + own.kl)).nonzero().flatten()
    if len(broken):
        row = pieces.row[int(pieces.of_position[broken[0]])]
        raise DataError(
            f"{name} can't be scored on the held-out row {columns['source'][row]}: what it gives is NaN, or rules out "
            f"the right class or one that the teacher holds possible; mend the model, or leave the row out of data.test"
        )


@dataclass(frozen=True)
class Verdicts:
    """What one model says at N scored positions: [N] each; ``right`` of bool, logarithms in nats."""

    guess: Tensor
    right: Tensor
    confidence: Tensor
    gold_logprob: Tensor
    entropy: Tensor
    kl: Tensor

    @classmethod
    def of(cls, own: Tensor, teacher: Tensor, gold: Tensor) -> Self:
        """From log-probabilities [N, classes] of the model and the teacher, and the right classes [N]."""
        best, guess = own.max(dim=-1)
        kl, entropy = torch.zeros_like(best), torch.zeros_like(best)
        for start in range(0, len(gold), _BLOCK):
            # In blocks: a [positions × vocabulary] product for the whole batch would double the peak.
            at = slice(start, start + _BLOCK)
            kl[at] = _expected(teacher[at], teacher[at] - own[at])
            entropy[at] = -_expected(own[at], own[at])
        return cls(
            guess,
            guess == gold,
            best.exp(),
            own.gather(1, gold[:, None])[:, 0],
            entropy.clamp_min(0),
            kl.clamp_min(0),
        )

    def mistaken(self, low_entropy: float, tiny_gold: float) -> Tensor:
        """[N] of bool: sure of itself, and all but ruling out what came; one text is only one sample of many."""
        return (self.entropy <= low_entropy) & (self.gold_logprob.exp() <= tiny_gold) & ~self.right

    def sum_of(self, what: str, teacher: "Verdicts") -> Tensor:
        """One of ``SUMS`` at each position, [N]."""
        found = {
            "nll": -self.gold_logprob,
            "correct": self.right,
            "agree": self.guess == teacher.guess,
            "kl": self.kl,
            "entropy": self.entropy,
        }
        return found[what]


def _expected(log_probs: Tensor, values: Tensor) -> Tensor:
    """The mean of ``values`` [n, classes] by probabilities; a class that is ruled out (-inf) plays no part, [n]."""
    return (log_probs.exp() * values.masked_fill(log_probs == -torch.inf, 0.0)).sum(-1)


def _arrow(values: np.ndarray) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
