"""The tail of a distribution at any temperature, from a few stored numbers.

f(β) = log Σ_tail p^β, with β = 1/T, is smooth and convex. It is stored at ``TAIL_BETAS`` and interpolated between.
Shapes: N positions, M nodes.
"""

import math

import torch
from torch import Tensor

TAIL_BETAS = (0.1, 0.15, 0.25, 0.45, 1.0, 1.1, 2.0)
"""The inverse temperatures at which a tail's log-partition is stored: they span T from 10 down to 0.5.

These, and ``SHIFT``, were chosen by search on real positions of a language model (see FORMAT.md), all multiples of 0.05
so that one exponential a class yields every power.
"""

SHIFT = 0.4
"""The polynomial is one in log(β + SHIFT): f bends most at small β, and there its nodes lie close."""

NO_TAIL = -1e30
"""Stored in place of minus infinity where a tail holds no mass at all."""

_NODES = (torch.tensor(TAIL_BETAS, dtype=torch.float64) + SHIFT).log()


def log_partition(nodes: Tensor, beta: float) -> Tensor:
    """f(β) at any β in [0.1, 2], from its values [N, M] at ``TAIL_BETAS``: [N], -inf for an empty tail.

    The polynomial in log(β + 0.4) through all nodes (Lagrange), kept between the bounds that convexity gives: f lies
    under the chord of its interval and above its neighbours' chords drawn on into the interval. On smooth tails the
    polynomial rules; on tails with a wide gap inside, where it would swing, the bounds do.

    Raises:
        ValueError: β lies outside the nodes.
    """
    right = _right_node(beta)

    def chord(left: int) -> Tensor:
        share = (beta - TAIL_BETAS[left]) / (TAIL_BETAS[left + 1] - TAIL_BETAS[left])
        return torch.lerp(nodes[:, left], nodes[:, left + 1], share)

    value = _weighted(nodes, _lagrange(beta))
    value = torch.minimum(value, chord(right - 1))
    if right >= 2:
        value = torch.maximum(value, chord(right - 2))
    if right < len(TAIL_BETAS) - 1:
        value = torch.maximum(value, chord(right))
    return value.masked_fill(is_empty(nodes), -torch.inf)


def log_partition_below(nodes: Tensor, beta: float) -> Tensor:
    """f(β) for any β up to 2, [N]: below the first node by the first chord drawn on, which a convex f lies above."""
    if beta >= TAIL_BETAS[0]:
        return log_partition(nodes, beta)
    slope = (nodes[:, 1] - nodes[:, 0]) / (TAIL_BETAS[1] - TAIL_BETAS[0])
    return nodes[:, 0] - slope * (TAIL_BETAS[0] - beta)


def mean_logprob(nodes: Tensor, beta: float) -> Tensor:
    """f'(β) [N]: the mean of log p over the tail softened to p^β. 0 for an empty tail.

    The derivative of the same polynomial, kept between the slopes of the neighbouring chords (f is convex).
    """
    right = _right_node(beta)
    slopes = (nodes[:, 1:] - nodes[:, :-1]) / torch.tensor(TAIL_BETAS, device=nodes.device).diff()
    value = _weighted(nodes, _lagrange_slopes(beta))
    # On a node itself the chord that ends there lies below, and the one that begins there above.
    low = slopes[:, max(0, right - 1 if beta == TAIL_BETAS[right] else right - 2)]
    high = slopes[:, min(slopes.shape[1] - 1, right)]
    return torch.minimum(torch.maximum(value, low), high).masked_fill(is_empty(nodes), 0.0)


def is_empty(nodes: Tensor) -> Tensor:
    """[N] of bool: the tail holds no mass."""
    return nodes.amin(dim=-1) <= NO_TAIL / 10


def _right_node(beta: float) -> int:
    low, high = TAIL_BETAS[0], TAIL_BETAS[-1]
    if not low - 1e-9 <= beta <= high + 1e-9:
        raise ValueError(f"temperature {1 / beta:g} lies outside [{1 / high:g}, {1 / low:g}]")
    return next((i for i, node in enumerate(TAIL_BETAS) if i > 0 and beta <= node), len(TAIL_BETAS) - 1)


def _weighted(nodes: Tensor, weights: list[float]) -> Tensor:
    # In float64 the weights (up to about 10, of both signs) cost no digits of the stored numbers.
    return (nodes.double() @ torch.tensor(weights, dtype=torch.float64, device=nodes.device)).to(nodes.dtype)


def _lagrange(beta: float) -> list[float]:
    at = math.log(beta + SHIFT)
    weights = []
    for j in range(len(TAIL_BETAS)):
        others = torch.cat([_NODES[:j], _NODES[j + 1 :]])
        weights.append(float(((at - others) / (_NODES[j] - others)).prod()))
    return weights


def _lagrange_slopes(beta: float) -> list[float]:
    """The derivatives of the weights by β: for each, the sum over the factors of its product, one factor left out."""
    at = math.log(beta + SHIFT)
    slopes = []
    for j in range(len(TAIL_BETAS)):
        others = torch.cat([_NODES[:j], _NODES[j + 1 :]])
        factors = (at - others) / (_NODES[j] - others)
        left_out = torch.stack([torch.cat([factors[:i], factors[i + 1 :]]).prod() for i in range(len(others))])
        slopes.append(float((left_out / (_NODES[j] - others)).sum()) / (beta + SHIFT))
    return slopes
