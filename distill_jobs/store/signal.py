"""The teacher's signal: what a loss may ask of the teacher, wherever and however it was stored.

Shapes: N positions, K head entries, M tail nodes.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

TAIL_BETAS = (0.1, 0.2, 0.4, 0.8, 1.0, 1.6, 2.0)
"""The inverse temperatures at which a tail's log-partition is stored: they span T from 10 down to 0.5."""

NO_TAIL = -1e30
"""Stored in place of minus infinity where a tail holds no mass at all."""

_NODES = torch.tensor(TAIL_BETAS, dtype=torch.float64)


@dataclass(frozen=True)
class TeacherSignal:
    """What the teacher said at N positions, right at any temperature in [0.5, 10].

    Attributes:
        head_ids: [N, K] int64, the classes of the head, no class twice; None when the head is every class in order.
        head_logprob: [N, K] float32, their log-probabilities at T = 1.
        tail_nodes: [N, M] float32, log Σ_tail p^β at each of ``TAIL_BETAS``; None when there is no tail.
        gold_logprob: [N] float32, log-probability of the right class (0 where there is none).
        gold_rank: [N] int64, classes that are likelier than the right one (-1 where there is none).
        entropy: [N] float32, of the whole distribution at T = 1, in nats.
        classes: number of classes that the teacher told apart.
    """

    head_ids: Tensor | None
    head_logprob: Tensor
    tail_nodes: Tensor | None
    gold_logprob: Tensor
    gold_rank: Tensor
    entropy: Tensor
    classes: int

    def __len__(self) -> int:
        return len(self.head_logprob)

    @property
    def top1(self) -> Tensor:
        """[N] int64, the teacher's likeliest class."""
        best = self.head_logprob.argmax(dim=-1)
        return best if self.head_ids is None else self.head_ids.gather(1, best[:, None]).squeeze(1)

    def at(self, temperature: float) -> tuple[Tensor, Tensor | None]:
        """The distribution softened by ``temperature``: p^(1/T) / Σ p^(1/T).

        Returns:
            head log-probabilities [N, K] and the log of the tail's whole mass [N] (None when there is no tail). Both
            together are normalised; a head alone is never renormalised.
        """
        beta = 1.0 / temperature
        head = self.head_logprob * beta
        if self.tail_nodes is None:
            return torch.log_softmax(head, dim=-1), None
        tail = self.tail_at(temperature)
        total = torch.logaddexp(torch.logsumexp(head, dim=-1), tail)
        return head - total[:, None], tail - total

    def tail_at(self, temperature: float) -> Tensor:
        """[N], log Σ_tail p^(1/T): at T = 1 the log of the tail's mass. Only where there is a tail."""
        assert self.tail_nodes is not None
        return tail_log_partition(self.tail_nodes, 1.0 / temperature)

    def to(self, device: torch.device | str) -> "TeacherSignal":
        """The same signal on another device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def tail_log_partition(nodes: Tensor, beta: float) -> Tensor:
    """log Σ_tail p^β at any β in [0.1, 2], from its values [N, M] at ``TAIL_BETAS``: [N], -inf for an empty tail.

    The polynomial through all nodes (Lagrange), kept between the bounds that convexity gives: log Σ exp(β·ℓ) is convex
    in β, so it lies under the chord of its interval and above its neighbours' chords drawn on into the interval. On
    smooth tails the polynomial rules; on tails with a wide gap inside, where it would swing, the bounds do.

    Raises:
        ValueError: β lies outside the nodes.
    """
    low, high = TAIL_BETAS[0], TAIL_BETAS[-1]
    if not low - 1e-9 <= beta <= high + 1e-9:
        raise ValueError(f"temperature {1 / beta:g} lies outside [{1 / high:g}, {1 / low:g}]")
    right = next((i for i, node in enumerate(TAIL_BETAS) if i > 0 and beta <= node), len(TAIL_BETAS) - 1)

    def chord(left: int) -> Tensor:
        share = (beta - TAIL_BETAS[left]) / (TAIL_BETAS[left + 1] - TAIL_BETAS[left])
        return torch.lerp(nodes[:, left], nodes[:, left + 1], share)

    # In float64 the weights (up to about 10, of both signs) cost no digits of the stored float32.
    weights = torch.tensor(_lagrange(beta), dtype=torch.float64, device=nodes.device)
    value = (nodes.double() @ weights).to(nodes.dtype)
    value = torch.minimum(value, chord(right - 1))
    if right >= 2:
        value = torch.maximum(value, chord(right - 2))
    if right < len(TAIL_BETAS) - 1:
        value = torch.maximum(value, chord(right))
    return value.masked_fill(nodes.amin(dim=-1) <= NO_TAIL / 10, -torch.inf)


def _lagrange(beta: float) -> list[float]:
    weights = []
    for j in range(len(TAIL_BETAS)):
        others = torch.cat([_NODES[:j], _NODES[j + 1 :]])
        weights.append(float(((beta - others) / (_NODES[j] - others)).prod()))
    return weights
