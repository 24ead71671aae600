"""Real positions that nothing was trained on: which ones, and what the teacher and the students say there.

Shapes: N positions of a chunk, V classes, L positions of a row.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.files import Folder
from distill_jobs.data.batch import IGNORED, make_batch
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.reader import TableReader
from distill_jobs.errors import DataError
from distill_jobs.models.scorer import Scorer
from distill_jobs.store.draws import uniforms

_TOKENS_A_POSITION = 4
_CHUNK = 32

RANDOM = "random"
"""The student of fresh logits."""


@dataclass(frozen=True)
class Chunk:
    """A few positions, never a whole data set.

    Attributes:
        logits: the teacher's, [N, V].
        gold: [N] int64.
        uniforms: [N] float64, what the store's codec draws from there.
        students: logits [N, V] by name; ``random`` is standard normal noise.
        slices: for each slice column the values [N] as text.
    """

    logits: Tensor
    gold: Tensor
    uniforms: Tensor
    students: dict[str, Tensor]
    slices: dict[str, np.ndarray]


@dataclass(frozen=True)
class HeldBack:
    """Scored positions spread evenly over the validation split, or over the training split where there is no other.

    Attributes:
        positions: how many are wanted at most.
        seed: the store's, for the draws.
    """

    data: Folder
    facts: DataFacts
    positions: int
    seed: int

    @property
    def split(self) -> str:
        """The split that the positions come from."""
        rows = {split: sizes.get("rows", 0) for split, sizes in self.facts.splits.items()}
        found = next((split for split in ("validation", "train") if rows.get(split)), None)
        if found is None:
            raise DataError(f"{self.data} has no rows to measure on")
        return found

    @torch.inference_mode()
    def chunks(self, teacher: Scorer, students: dict[str, Scorer], device: str, rows_at_once: int) -> Iterator[Chunk]:
        """The positions in chunks. Every model takes whole rows, ``rows_at_once`` at a time."""
        table = TableReader(self.data / self.split)
        length = self.facts.positions_per_row
        # Neighbouring positions are much alike: more rows than would do, and a quarter of each.
        rows = min(table.rows, math.ceil(self.positions * min(_TOKENS_A_POSITION, length) / length))
        numbers = np.unique(np.linspace(0, table.rows - 1, rows).round().astype(np.int64))
        each = math.ceil(self.positions / len(numbers))
        generator = torch.Generator().manual_seed(self.seed)
        left = self.positions
        for start in range(0, len(numbers), rows_at_once):
            columns = table.take(numbers[start : start + rows_at_once])
            batch = make_batch(columns, self.facts).to(device)
            chosen = _chosen(batch.labels.reshape(batch.rows, -1), each)[:left]
            left -= len(chosen)
            said = {name: _at(model, batch.inputs, chosen, self.facts) for name, model in students.items()}
            logits, gold = _at(teacher, batch.inputs, chosen, self.facts), batch.labels.flatten()[chosen]
            chances = uniforms(self.seed, batch.sample_ids, length)[chosen]
            row = (chosen // length).cpu().numpy()
            slices = {
                name.removeprefix("slice."): np.asarray(values)[row].astype(str)
                for name, values in columns.items()
                if name.startswith("slice.")
            }
            for first in range(0, len(chosen), _CHUNK):
                piece = torch.arange(first, min(first + _CHUNK, len(chosen)), device=chosen.device)
                noise = torch.randn(len(piece), logits.shape[1], generator=generator).to(device)
                yield Chunk(
                    logits[piece],
                    gold[piece],
                    chances[piece],
                    {RANDOM: noise, **{name: values[piece].float() for name, values in said.items()}},
                    {name: values[piece.cpu().numpy()] for name, values in slices.items()},
                )


def _chosen(labels_RL: Tensor, each: int) -> Tensor:
    """Flat numbers of at most ``each`` scored positions a row, evenly spaced."""
    found = []
    for number, labels in enumerate(labels_RL):
        scored = (labels != IGNORED).nonzero().flatten()
        if len(scored):
            picks = torch.linspace(0, len(scored) - 1, min(each, len(scored)), device=labels.device).round().long()
            found.append(scored[picks] + number * labels_RL.shape[1])
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=labels_RL.device)


def _at(model: Scorer, inputs: dict[str, Tensor], chosen: Tensor, facts: DataFacts) -> Tensor:
    logits: Tensor = model(**inputs)
    return logits.flatten(0, -2)[chosen, : facts.targets]
