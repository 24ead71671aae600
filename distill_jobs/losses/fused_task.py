"""What the fused kernel is asked to do: a head, the targets at some positions, and how many of them at once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill_jobs.losses.kinds import SoftLoss
from distill_jobs.store.signal import TeacherSignal

# Rows of a chunk, at most: more don't make the products faster. Bytes of its buffer, at most.
_ROWS = {"cpu": 512}
_MANY_ROWS = 4096
_BUFFER = {"cpu": 256 << 20}
_LARGE_BUFFER = 512 << 20
# A loss that goes through autograd makes several tensors of the buffer's size.
_COPIES = 6


@dataclass(frozen=True)
class OutputHead:
    """A model's last layer and what becomes of its output: ``softcap · tanh(scale · (h Wᵀ + b) / softcap)``.

    Attributes:
        weight: [V, H], perhaps the embedding's own.
        bias: [V] or None.
        scale: 1 for most models.
        softcap: None for no cap.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class FusedTask:
    """What the function gets beside the tensors that have gradients."""

    head: OutputHead
    labels: Tensor
    signal: TeacherSignal | None
    alpha: float
    temperature: float
    soft: SoftLoss
    classes: int
    chunk: int | None
    dtype: torch.dtype
    compiled: bool = False

    @property
    def by_hand(self) -> bool:
        return self.signal is None or self.soft.is_forward_kl

    @property
    def gated(self) -> bool:
        return self.signal is not None and not self.soft.gate.stands_open

    @property
    def share(self) -> float:
        # In fp16 a gradient of 1/N of a position would be too small a number; there it is divided at the end.
        return 1.0 if self.dtype == torch.float16 else 1.0 / max(1, len(self.labels))

    @property
    def rows(self) -> int:
        """Positions of a chunk."""
        device = self.labels.device.type
        width = max(1, self.classes) * self.dtype.itemsize * (1 if self.by_hand else _COPIES)
        most = min(_ROWS.get(device, _MANY_ROWS), _BUFFER.get(device, _LARGE_BUFFER) // width)
        # Few classes: as many rows as fill a chunk of many classes.
        most = max(most, (1 << 24) // width, 16)
        return max(1, min(self.chunk or most, len(self.labels)))
