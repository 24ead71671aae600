"""Uniform numbers that belong to a position, and to nothing else.

The draws of a position depend on (store seed, sample id, position) alone: not on the batch, the actor or the attempt.
"""

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 2^64 / φ as int64, the increment of SplitMix64.


def uniforms(seed: int, sample_ids: Tensor, positions: int) -> Tensor:
    """One number in [0, 1) for each position of each row.

    A counter-based generator: SplitMix64's finaliser (Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number
    Generators") over seed, sample and position in turn; integer arithmetic, so the same on every device.

    Args:
        seed: the store's.
        sample_ids: [R] int64.
        positions: P, positions in a row.

    Returns:
        [R · P] float64, row by row.
    """
    where = torch.arange(positions, dtype=torch.int64, device=sample_ids.device)
    state = _mixed(torch.full_like(sample_ids, _signed(seed)) + _GOLDEN)
    state = _mixed((state ^ sample_ids) + _GOLDEN)
    state = _mixed((state[:, None] ^ where) + _GOLDEN)
    return _shifted(state, 11).double().mul_(2.0**-53).flatten()


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * -4658895280553007687
    x = (x ^ _shifted(x, 27)) * -7723592293110705685
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits with zeros moving in: torch's own shift copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
