"""What a codec is: how one position's distribution becomes a few columns of fixed width, and comes back.

A codec knows nothing of files. The writer lays its fields out as columns and the reader hands them back, so that a new
codec is one file here and one line in ``CODECS``. Shapes: N positions, V classes.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from distill_jobs.store.signal import TeacherSignal

Columns = dict[str, Tensor]

FLOOR = -60_000.0
"""The least log-probability that is stored: near fp16's least finite value, and exp(FLOOR / T) is 0 at every T."""


@dataclass(frozen=True)
class Field:
    """One column of a codec: ``width`` values of ``dtype`` (a numpy name) for each position."""

    dtype: str
    width: int

    @property
    def bytes(self) -> int:
        """Bytes a position."""
        return np.dtype(self.dtype).itemsize * self.width


class Codec(Protocol):
    """How the teacher's distribution is stored."""

    name: str

    def arguments(self) -> dict[str, Any]:
        """What made this codec, in plain values; ``CODECS[name](**arguments)`` makes it again."""

    def fields(self, classes: int) -> dict[str, Field]:
        """The columns, by name."""

    def encode(self, logits: Tensor, gold: Tensor, uniforms: Tensor | None = None) -> Columns:
        """Encode on the device of ``logits``.

        Args:
            logits: [N, V] of any float type, real classes only (no padding columns).
            gold: [N] int64, the right class; negative where there is none.
            uniforms: [N] float64 in [0, 1), from ``store.draws``: what a codec with draws takes its chances from.

        Returns:
            [N, width] for each field.

        Raises:
            CaptureError: a row holds NaN or +inf, or nothing but -inf.
        """

    def decode(self, columns: Columns, classes: int) -> TeacherSignal:
        """The signal from [N, width] tensors, on whatever device they are."""

    def check(self, columns: Columns, classes: int) -> None:
        """Refuse values that no encoder writes and that would lead a loss astray: ids that are no class, no numbers.

        Raises:
            StoreError: naming the field.
        """


def bytes_per_position(codec: Codec, classes: int) -> int:
    """Stored bytes of one position's soft target and statistics."""
    return sum(field.bytes for field in codec.fields(classes).values())
