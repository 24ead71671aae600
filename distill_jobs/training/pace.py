"""How fast a run goes, and how much of its time is spent waiting for data."""

from dataclasses import dataclass

from cluster.meter import peak_memory_bytes
from cluster.peak import peak_of


@dataclass
class Pace:
    """Sums over the steps since ``take`` was last called.

    Args:
        device, ranks: what the run trains on.
        precision: as resolved.
        flops: of a token, None where that isn't known.
    """

    device: str
    ranks: int
    precision: str
    flops: float | None = None
    positions: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
    steps: int = 0

    def __post_init__(self) -> None:
        self._peak = peak_of(self.device, self.precision)

    def add(self, positions: float, tokens: float, seconds: float, waited: float) -> None:
        """A step: scored positions and tokens of all ranks, its time, and how much of it this rank waited for data."""
        self.steps += 1
        self.positions += positions
        self.tokens += tokens
        self.seconds += seconds
        self.waited += waited

    def take(self) -> dict[str, float]:
        """Rates of all ranks together, and begin anew. ``mfu`` is there where the device's peak is known."""
        seconds = max(self.seconds, 1e-9)
        found = {
            "positions_per_second": self.positions / seconds,
            "tokens_per_second": self.tokens / seconds,
            "step_seconds": seconds / max(1, self.steps),
            "waiting": self.waited / seconds,
            "memory_bytes": float(memory_of(self.device)),
        }
        if self.flops is not None and self._peak is not None:
            found["mfu"] = self.flops * found["tokens_per_second"] / (self._peak * self.ranks)
        self.positions = self.tokens = self.seconds = self.waited = 0.0
        self.steps = 0
        return found


def memory_of(device: str) -> int:
    """The most bytes that this process has held: on its GPU, or on a CPU in all."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    return peak_memory_bytes()
