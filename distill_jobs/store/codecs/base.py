"""What a codec is: how one position's distribution becomes a few columns of fixed width, and comes back.

A codec knows nothing of files. The writer lays its fields out as columns and the reader hands them back, so that a new
codec is one file here and one line in ``CODECS``. Shapes: N positions, V classes.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from distill_jobs.errors import CaptureError
from distill_jobs.store.signal import TeacherSignal

FLOOR = -60_000.0
"""The least log-probability that is stored: near fp16's least finite value, and exp(FLOOR / T) is 0 at every T."""


@dataclass(frozen=True)
class Field:
    """One column of a codec: ``width`` values of ``dtype`` (a numpy name) for each position.

    ``below``, where given, is a bound that every value has to stay under: readers refuse what doesn't.
    """

    dtype: str
    width: int
    below: int | None = None

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

    def encode(self, logits: Tensor, gold: Tensor) -> dict[str, Tensor]:
        """Encode on the device of ``logits``.

        Args:
            logits: [N, V] of any float type, real classes only (no padding columns).
            gold: [N] int64, the right class; negative where there is none.

        Returns:
            [N, width] for each field.

        Raises:
            CaptureError: a row holds NaN or +inf, or nothing but -inf.
        """

    def decode(self, columns: dict[str, Tensor], classes: int) -> TeacherSignal:
        """The signal from [N, width] tensors, on whatever device they are."""


def bytes_per_position(codec: Codec, classes: int) -> int:
    """Stored bytes of one position's soft target and statistics."""
    return sum(field.bytes for field in codec.fields(classes).values())


def id_type(classes: int) -> str:
    """The narrowest unsigned type that holds every class id."""
    return "uint16" if classes <= 1 << 16 else "uint32"


def rank_type(classes: int) -> str:
    """The narrowest unsigned type for a gold rank; its largest value says that there is no gold class."""
    return "uint16" if classes < 1 << 16 else "uint32"


def statistics(classes: int) -> dict[str, Field]:
    """The columns that every codec has beside the distribution itself."""
    return {
        "gold_logprob": Field("float32", 1),
        "gold_rank": Field(rank_type(classes), 1),
        "entropy": Field("float32", 1),
    }


def encode_rank(rank: Tensor, has_gold: Tensor, classes: int) -> Tensor:
    """[N] ranks to their stored form [N, 1]."""
    none = np.iinfo(rank_type(classes)).max
    return torch.where(has_gold, rank, none).to(getattr(torch, rank_type(classes)))[:, None]


def decode_rank(stored: Tensor, classes: int) -> Tensor:
    """The stored form [N, 1] to [N] int64 ranks, -1 where there is no gold class."""
    rank = stored[:, 0].long()
    return rank.masked_fill(rank == np.iinfo(rank_type(classes)).max, -1)


def refuse_broken(largest: Tensor) -> None:
    """Raise CaptureError unless the largest logit [N] of every row is finite (a NaN counts as largest)."""
    broken = (~torch.isfinite(largest)).nonzero().flatten().tolist()
    if broken:
        few = ", ".join(map(str, broken[:8])) + (", ..." if len(broken) > 8 else "")
        raise CaptureError(
            f"the teacher's logits are not finite (NaN, +inf, or nothing but -inf) at {len(broken)} of {len(largest)} "
            f"positions: {few}; check the teacher's weights, or capture in fp32"
        )
