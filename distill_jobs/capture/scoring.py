"""The teacher over one batch, and its codec over the scored positions, a chunk of them at a time.

No [tokens x vocabulary] tensor is made: the model runs up to its output head, and the head on a few hundred or thousand
scored positions at once, which are encoded before the next are made. Shapes: B rows, L tokens of a row, H hidden width,
N scored positions, V classes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor

from distill_jobs.capture.batches import Group
from distill_jobs.capture.watch import Watch
from distill_jobs.data.facts import DataFacts
from distill_jobs.errors import CaptureError
from distill_jobs.models.head import SplitHead
from distill_jobs.models.scorer import Scorer
from distill_jobs.models.taps import Taps, widths
from distill_jobs.store.codecs import Codec
from distill_jobs.store.draws import uniforms
from distill_jobs.store.features import FeatureCoding

BROKEN = "the teacher's logits are not finite (NaN, +inf, or nothing but -inf)"

_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}


@dataclass
class Encoded:
    """The targets of one group.

    Attributes:
        columns: [N, width] for each field, on the device.
        bad: why rows of the window, by their numbers there, can't be stored; their targets mean nothing.
    """

    group: Group
    columns: dict[str, Tensor]
    bad: dict[int, str] = field(default_factory=dict)


class Scoring:
    """The teacher with its codec.

    Args:
        split: splits the teacher's head off, proved on a batch's inputs; None where it has none that can be split off:
            then the teacher's own forward makes all logits of a batch.
        chunk: positions whose logits are encoded at once, asked before each batch.
        features: what is kept of the teacher's layers beside the codec's columns; None for nothing.
    """

    def __init__(
        self,
        teacher: Scorer,
        split: Callable[[dict[str, Tensor]], SplitHead | None],
        codec: Codec,
        *,
        targets: int,
        seed: int,
        device: str,
        chunk: Callable[[], int],
        watch: Watch,
        features: FeatureCoding | None = None,
    ) -> None:
        self.features = features
        self._taps = Taps(teacher, features.layers if features else (), "capture.features.layers")
        self.teacher, self.codec = teacher, codec
        self._make_split, self._split, self._proved = split, cast(SplitHead | None, None), False
        self.targets, self.seed, self.device, self.chunk, self.watch = targets, seed, device, chunk, watch

    def check(self, facts: DataFacts) -> None:
        """Raise SpecError or ModelError where the teacher's layers don't give what is to be kept of them."""
        if self.features is not None:
            self.features.check_widths(widths(self.teacher, self._taps, facts))

    @torch.inference_mode()
    def __call__(self, group: Group) -> Encoded:
        """Score and encode; exceptions of the model and the codec come through as they are."""
        batch = group.batch.to(self.device, non_blocking=True)
        self._prove(batch.inputs)
        scored = group.scored.to(self.device, non_blocking=True)
        gold = batch.labels.flatten()[scored]
        chances = uniforms(self.seed, batch.sample_ids, group.positions_per_row)[scored]
        encoded = Encoded(group, {})
        # Around all of it, so that autocast converts each weight once.
        with self.teacher.casting(), self._taps.listening(batch.inputs, partial(self._keep, scored)) as heard:
            if self._split is not None:
                with self.watch("teacher"):
                    every_NH = self._split.hidden(batch.inputs).flatten(0, 1)
                    # A teacher that is spread over devices gives them where its last layer is.
                    hidden_NH = every_NH[scored.to(every_NH.device)].to(self.device)
            else:
                with self.watch("teacher"):
                    every_BLV = self.teacher(**batch.inputs).flatten(0, -2)
            pieces = []
            for some in self._chunks(len(scored)):
                if self._split is not None:
                    with self.watch("head"):
                        logits_NV = self._split.logits(hidden_NH[some], self.targets)
                else:
                    logits_NV = every_BLV[scored[some], : self.targets]
                with self.watch("encode"), torch.autocast(_kind(self.device), enabled=False):
                    pieces.append(self._encode(logits_NV, gold[some], chances[some], some.start, encoded))
        encoded.columns = {name: _joined([piece[name] for piece in pieces]) for name in pieces[0]}
        self._add_features(encoded, heard)
        return encoded

    def ask(self, inputs: dict[str, Tensor], chosen: Tensor) -> Tensor:
        """The teacher's logits [n, V] at the flat positions ``chosen`` [n] of a batch, not encoded."""
        self._prove(inputs)
        if self._split is None:
            logits: Tensor = self.teacher(**inputs)
            return logits.flatten(0, -2)[chosen, : self.targets]
        every_NH = self._split.hidden(inputs).flatten(0, 1)
        # A teacher that is spread over devices gives them where its last layer is.
        return self._split.logits(every_NH[chosen.to(every_NH.device)].to(self.device), self.targets)

    def _keep(self, scored: Tensor, layer: str, rows: Tensor) -> dict[str, Tensor]:
        """While the teacher's forward runs: nothing of a layer is held but what will be stored."""
        assert self.features is not None
        # A teacher that is spread over devices gives each layer where that lies.
        columns = self.features.encode(layer, rows[scored.to(rows.device)])
        return {name: values.to(self.device) for name, values in columns.items()}

    def _add_features(self, encoded: Encoded, heard: dict[str, dict[str, Tensor]]) -> None:
        for layer, columns in heard.items():
            assert self.features is not None
            encoded.columns |= columns
            broken = self.features.broken(layer, columns).nonzero().flatten().cpu()
            for row in encoded.group.rows_of(broken).tolist():
                encoded.bad.setdefault(row, f"what the teacher's layer {layer} gives is not finite")

    def _prove(self, inputs: dict[str, Tensor]) -> None:
        """At the first batch, where real inputs are at hand."""
        if not self._proved:
            self._split, self._proved = self._make_split(inputs), True

    def _chunks(self, count: int) -> list[slice]:
        """Even pieces of at most ``chunk`` positions; an empty one where there are none."""
        number = max(1, -(-count // max(1, self.chunk())))
        size = max(1, -(-count // number))
        return [slice(start, min(start + size, count)) for start in range(0, max(1, count), size)]

    def _encode(
        self, logits_NV: Tensor, gold: Tensor, chances: Tensor, start: int, encoded: Encoded
    ) -> dict[str, Tensor]:
        try:
            return self.codec.encode(logits_NV, gold, chances)
        except CaptureError:
            broken = ~torch.isfinite(logits_NV.amax(dim=-1))
            if not bool(broken.any()):
                raise
        for row in encoded.group.rows_of(start + broken.nonzero().flatten().cpu()).tolist():
            encoded.bad[row] = BROKEN
        # The other rows of the chunk are as good as they were; what is put here for the broken ones is left out.
        return self.codec.encode(logits_NV.masked_fill(broken[:, None], 0.0), gold, chances)


def chunk_for(device: str, targets: int, dtype: torch.dtype) -> int:
    """Positions through the head at once where the spec doesn't say: few enough for little memory, many for speed."""
    return max(1, _CHUNK_BYTES[_kind(device)] // (max(1, targets) * dtype.itemsize))


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _kind(device: str) -> str:
    return "cuda" if device.startswith("cuda") else "cpu"
