"""How fast a run goes, and how much of its time is spent waiting for data."""

from dataclasses import dataclass

from torch import nn

from cluster.meter import peak_memory_bytes
from cluster.peak import peak_of
from distill_jobs.data.facts import DataFacts


def flops_per_token(module: nn.Module, facts: DataFacts) -> float | None:
    """What training takes for a token (or a row of features): 6 operations for each parameter that is multiplied with.

    Two in the forward pass and two for the gradient of the layer's input, and two more where the parameter is trained
    (Kaplan et al. 2020, "Scaling Laws for Neural Language Models"). Attention's own products and what is computed
    twice to save memory are left out, and embeddings, which are looked up. None for images, where parameters are used
    more than once.
    """
    if facts.features == "image":
        return None
    used = {
        id(parameter): parameter
        for layer in module.modules()
        if not isinstance(layer, nn.Embedding)
        for parameter in layer.parameters(recurse=False)
    }
    # Under ZeRO-3 a parameter is empty here, and its size with DeepSpeed.
    return float(sum(getattr(p, "ds_numel", p.numel()) * (6 if p.requires_grad else 4) for p in used.values()))


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

    def __post_init__(self) -> None:
        self._peak = peak_of(self.device, self.precision)

    def add(self, positions: float, tokens: float, seconds: float, waited: float) -> None:
        """A step: scored positions and tokens of all ranks, its time, and how much of it this rank waited for data."""
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
            "waiting": self.waited / seconds,
            "memory_bytes": float(memory_of(self.device)),
        }
        if self.flops is not None and self._peak is not None:
            found["mfu"] = self.flops * found["tokens_per_second"] / (self._peak * self.ranks)
        self.positions = self.tokens = self.seconds = self.waited = 0.0
        return found


def memory_of(device: str) -> int:
    """The most bytes that this process has held: on its GPU, or on a CPU in all."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    return peak_memory_bytes()
