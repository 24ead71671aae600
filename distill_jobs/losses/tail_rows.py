"""The tail's log-partition at a temperature of each position's own.

The same curve as ``store.tail.log_partition``, which takes one temperature for all. Shapes: N positions, M nodes.
"""

import torch
from torch import Tensor

from distill_jobs.store.tail import SHIFT, TAIL_BETAS, is_empty


def log_partition(nodes: Tensor, beta: Tensor) -> Tensor:
    """f(β) at β [N] in [0.1, 2], from its values [N, M] at ``TAIL_BETAS``: [N], -inf for an empty tail."""
    at = torch.tensor(TAIL_BETAS, dtype=torch.float64, device=nodes.device)
    value = (nodes.double() * _lagrange((at + SHIFT).log(), (beta.double() + SHIFT).log())).sum(dim=-1)
    last = len(TAIL_BETAS) - 1
    right = torch.searchsorted(at, beta.double()).clamp(1, last)

    def chord(left: Tensor) -> Tensor:
        share = (beta - at[left]) / (at[left + 1] - at[left])
        low, high = (nodes.gather(1, (left + i)[:, None]).squeeze(1).double() for i in (0, 1))
        return low + share * (high - low)

    value = torch.minimum(value, chord(right - 1))
    value = torch.where(right >= 2, torch.maximum(value, chord((right - 2).clamp(min=0))), value)
    value = torch.where(right < last, torch.maximum(value, chord(right.clamp(max=last - 1))), value)
    return value.to(nodes.dtype).masked_fill(is_empty(nodes), -torch.inf)


def _lagrange(nodes: Tensor, at: Tensor) -> Tensor:
    """[N, M], the weights of the nodes' values [M] in the polynomial's value at each of ``at`` [N]."""
    count = len(nodes)
    apart = nodes[:, None] - nodes[None, :]
    factors = (at[:, None, None] - nodes) / apart.masked_fill(torch.eye(count, dtype=torch.bool, device=at.device), 1.0)
    return factors.masked_fill(torch.eye(count, dtype=torch.bool, device=at.device), 1.0).prod(dim=-1)
