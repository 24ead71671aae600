"""What of a batch is summed up together: a classified row, or the piece of one document within a packed row.

Shapes: B rows, L positions of a row, N scored positions, U pieces.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from distill_jobs.data.batch import Batch

BINS = 15
"""Confidence bins of equal width between 0 and 1, as in Guo et al. (2017)."""


@dataclass(frozen=True)
class Pieces:
    """The pieces of a batch that have scored positions.

    Attributes:
        of_position: [N] int64, the piece of each scored position, in row-major order; on the batch's device.
        row: [U], the row of each piece.
        segment: [U], its number within the row, from 1 (0 where rows are not packed).
        positions: [U], its scored positions.
    """

    of_position: Tensor
    row: np.ndarray
    segment: np.ndarray
    positions: np.ndarray

    @classmethod
    def of(cls, batch: Batch) -> Self:
        """The pieces of a batch, in the order of rows and segments."""
        keep = batch.keep
        rows = torch.arange(batch.rows, device=keep.device)[:, None].expand_as(keep)
        segments = batch.inputs.get("segments", torch.zeros_like(keep, dtype=torch.int64))
        width = int(segments.max()) + 1 if segments.numel() else 1
        key, of_position, counts = torch.unique(
            (rows * width + segments)[keep], return_inverse=True, return_counts=True
        )
        known = key.cpu().numpy()
        return cls(of_position, known // width, known % width, counts.cpu().numpy())

    def sums(self, values: Tensor) -> np.ndarray:
        """Values of positions [N] summed by piece, [U] float64."""
        zero = torch.zeros(len(self.row), dtype=torch.float64, device=values.device)
        return np.asarray(zero.index_add_(0, self.of_position, values.double()).cpu().numpy())

    def documents(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """A name of each piece's document, [U] of text, from the columns of the rows.

        Where a row names its first document only (naive packing, data of an earlier release), a piece behind it goes
        by the row and its place.
        """
        named = []
        for row, segment in zip(self.row.tolist(), self.segment.tolist(), strict=True):
            known = str(columns["documents"][row]).split("\n") if "documents" in columns else []
            first = str(columns["source"][row]).partition(" (+")[0]
            otherwise = first if segment <= 1 else f"{columns['sample_id'][row]}/{segment}"
            named.append(known[segment - 1] if 0 < segment <= len(known) else otherwise)
        return np.array(named, dtype=object)

    def histogram(self, confidence: Tensor, correct: Tensor) -> dict[str, np.ndarray]:
        """Confidences [N] in bins by piece: ``bin_count``, ``bin_confidence`` and ``bin_correct`` (sums), [U, BINS]."""
        at = self.of_position * BINS + bin_of(confidence)
        found = {}
        for name, values in (
            ("bin_count", torch.ones_like(confidence)),
            ("bin_confidence", confidence),
            ("bin_correct", correct),
        ):
            zero = torch.zeros(len(self.row) * BINS, dtype=torch.float64, device=values.device)
            summed = zero.index_add_(0, at, values.double()).view(-1, BINS)
            found[name] = summed.float().cpu().numpy()
        return found


def bin_of(confidence: Tensor) -> Tensor:
    """The bin of each confidence: bin b holds those in (b / BINS, (b + 1) / BINS]."""
    return ((confidence.double() * BINS).ceil().long() - 1).clamp(0, BINS - 1)
