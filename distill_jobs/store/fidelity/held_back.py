"""Real positions that nothing was trained on: which ones, and what the teacher and the students say there.

Shapes: N positions of a chunk, V classes, L positions of a row.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from cluster.files import Folder
from distill_jobs.data.batch import IGNORED, Batch, make_batch
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.reader import TableReader
from distill_jobs.errors import DataError
from distill_jobs.models.faults import Fault, fault_of
from distill_jobs.models.scorer import Scorer, flat
from distill_jobs.models.unscorable import unscorable
from distill_jobs.store.draws import uniforms

_TOKENS_A_POSITION = 4
_CHUNK = 32

RANDOM = "random"
"""The student of fresh logits."""

Columns = dict[str, np.ndarray]
Ask = Callable[[dict[str, Tensor], Tensor], Tensor]
"""What a model says of a batch's inputs at the flat positions [N]: logits [N, V]."""


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
        left_out: rows that the teacher could not score, each with its reason; filled by ``chunks``.
    """

    data: Folder
    facts: DataFacts
    positions: int
    seed: int
    left_out: list[str] = field(default_factory=list)

    @property
    def split(self) -> str:
        """The split that the positions come from."""
        rows = {split: sizes.get("rows", 0) for split, sizes in self.facts.splits.items()}
        found = next((split for split in ("validation", "train") if rows.get(split)), None)
        if found is None:
            raise DataError(f"{self.data} has no rows to measure on")
        return found

    @torch.inference_mode()
    def chunks(
        self,
        teacher: Scorer,
        students: dict[str, Scorer],
        device: str,
        rows_at_once: int,
        ask: Ask | None = None,
    ) -> Iterator[Chunk]:
        """The positions in chunks. Every model takes whole rows, ``rows_at_once`` at a time.

        Args:
            ask: asks the teacher; by default its own forward, whose logits of all positions exist for a moment.
        """
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
            bad = unscorable(columns, teacher, self.facts)
            columns = self._without(columns, bad)
            for scored in self._scored(columns, ask or _whole(teacher, self.facts), device, each):
                if not left:
                    return
                scored = scored.first(left)
                left -= len(scored.chosen)
                yield from self._pieces(scored, students, generator)

    def _scored(self, columns: Columns, ask: Ask, device: str, each: int) -> Iterator["_Scored"]:
        """Rows with what the teacher says of them; those of which it says nothing that can be used are left out."""
        waiting = [columns]
        while waiting:
            some = waiting.pop()
            rows = len(some["sample_id"])
            if not rows:
                continue
            batch = make_batch(some, self.facts).to(device)
            chosen = _chosen(batch.labels.reshape(rows, -1), each)
            logits: Tensor | None = None
            try:
                logits = ask(batch.inputs, chosen)
            except Exception as error:
                fault, said = fault_of(error), f"{type(error).__name__}: {flat(error)}"
                if fault not in (Fault.ROW, Fault.MEMORY) or (fault is Fault.MEMORY and rows == 1):
                    raise
            if logits is not None:
                broken = ~torch.isfinite(logits.amax(dim=-1))
                wrong = torch.unique(chosen[broken] // self.facts.positions_per_row).tolist()
                if not wrong:
                    yield _Scored(some, batch, chosen, logits)
                else:
                    waiting.append(self._without(some, dict.fromkeys(wrong, "the teacher's logits are not finite")))
            elif rows == 1:
                self._without(some, {0: said})
            else:
                halves = (slice(rows // 2, None), slice(rows // 2))
                waiting += [{name: values[half] for name, values in some.items()} for half in halves]

    def _without(self, columns: Columns, bad: dict[int, str]) -> Columns:
        if not bad:
            return columns
        for row in sorted(bad):
            source = f" ({columns['source'][row]})" if "source" in columns else ""
            self.left_out.append(f"sample {int(columns['sample_id'][row])}{source}: {bad[row]}")
        keep = np.ones(len(columns["sample_id"]), dtype=bool)
        keep[list(bad)] = False
        return {name: values[keep] for name, values in columns.items()}

    def _pieces(self, scored: "_Scored", students: dict[str, Scorer], generator: torch.Generator) -> Iterator[Chunk]:
        batch, chosen, logits, length = scored.batch, scored.chosen, scored.logits, self.facts.positions_per_row
        said = {name: _whole(model, self.facts)(batch.inputs, chosen) for name, model in students.items()}
        gold = batch.labels.flatten()[chosen]
        chances = uniforms(self.seed, batch.sample_ids, length)[chosen]
        row = (chosen // length).cpu().numpy()
        slices = {
            name.removeprefix("slice."): np.asarray(values)[row].astype(str)
            for name, values in scored.columns.items()
            if name.startswith("slice.")
        }
        for first in range(0, len(chosen), _CHUNK):
            piece = torch.arange(first, min(first + _CHUNK, len(chosen)), device=chosen.device)
            noise = torch.randn(len(piece), logits.shape[1], generator=generator).to(chosen.device)
            yield Chunk(
                logits[piece],
                gold[piece],
                chances[piece],
                {RANDOM: noise, **{name: values[piece].float() for name, values in said.items()}},
                {name: values[piece.cpu().numpy()] for name, values in slices.items()},
            )


@dataclass(frozen=True)
class _Scored:
    """Some rows, the flat positions [N] chosen among theirs, and the teacher's logits [N, V] there."""

    columns: Columns
    batch: Batch
    chosen: Tensor
    logits: Tensor

    def first(self, count: int) -> "_Scored":
        return replace(self, chosen=self.chosen[:count], logits=self.logits[:count])


def _chosen(labels_RL: Tensor, each: int) -> Tensor:
    """Flat numbers of at most ``each`` scored positions a row, evenly spaced."""
    found = []
    for number, labels in enumerate(labels_RL):
        scored = (labels != IGNORED).nonzero().flatten()
        if len(scored):
            picks = torch.linspace(0, len(scored) - 1, min(each, len(scored)), device=labels.device).round().long()
            found.append(scored[picks] + number * labels_RL.shape[1])
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=labels_RL.device)


def _whole(model: Scorer, facts: DataFacts) -> Ask:
    """By the model's own forward, which makes logits of all positions."""

    def ask(inputs: dict[str, Tensor], chosen: Tensor) -> Tensor:
        logits: Tensor = model(**inputs)
        return logits.flatten(0, -2)[chosen, : facts.targets]

    return ask
