"""Sums over held-out units and over resamples of them, as products of matrices.

Shapes: P pieces, n units, R resamples, K columns.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import poisson

from distill_jobs.audit.intervals import Estimate

DRAWS = 1000
_BLOCK = 4096
_KEPT_BYTES = 256 << 20
# How often a unit occurs in a resample, by a random number of 16 bits: much faster than a generator's own Poisson.
_COUNTS = np.repeat(
    np.arange(9, dtype=np.uint8),
    np.diff(np.round(np.concatenate([[0], poisson.cdf(range(8), 1), [1]]) * 65536)).astype(int),
)


@dataclass(frozen=True)
class Sums:
    """Sums of K columns: over all units [K], over each resample [R, K]; and the units where a column is not 0, [K]."""

    whole: np.ndarray
    drawn: np.ndarray
    units: np.ndarray

    def ratio(self, above: slice | list[int], below: int) -> Estimate:
        """The seeds' columns ``above`` over the column ``below`` that they share."""
        with np.errstate(divide="ignore", invalid="ignore"):
            point = self.whole[above] / self.whole[below]
            drawn = self.drawn[:, above] / self.drawn[:, [below]]
        return Estimate(point, drawn, int(self.units[below]))


class Resampler:
    """The same R resamples for whatever is summed, so that all estimates are paired.

    Each unit occurs in a resample a Poisson(1) number of times (the Poisson bootstrap, Hanley & MacGibbon 2006): as
    good as drawing n of n for ratios of sums, and it goes block by block, in flat memory. The weights of a block depend
    on ``seed`` and the block's number alone.
    """

    def __init__(self, pieces: int, units: np.ndarray | None = None, draws: int = DRAWS, seed: int = 0) -> None:
        """``units`` [P] names the unit of each piece; None makes each piece one of its own."""
        self.draws, self.seed = draws, seed
        self._kept: dict[int, np.ndarray] = {}
        self._order: np.ndarray | None = None
        self.units = pieces
        if units is not None:
            _, number = np.unique(units.astype(str), return_inverse=True)
            self._order = np.argsort(number, kind="stable")
            self._starts = np.flatnonzero(np.diff(number[self._order], prepend=-1))
            self.units = len(self._starts)

    def sums(self, values: np.ndarray) -> Sums:
        """Sum the columns of ``values`` [P, K]."""
        if self._order is not None:
            values = np.add.reduceat(values[self._order], self._starts, axis=0)
        drawn = np.zeros((self.draws, values.shape[1]))
        for number, start in enumerate(range(0, self.units, _BLOCK)):
            block = np.asarray(values[start : start + _BLOCK], dtype=np.float64)
            drawn += self._counts(number, len(block)).astype(np.float64) @ block
        return Sums(values.sum(axis=0, dtype=np.float64), drawn, np.count_nonzero(values, axis=0))

    def _counts(self, number: int, size: int) -> np.ndarray:
        """How often each unit of a block occurs in each resample, [R, size] uint8."""
        if number in self._kept:
            return self._kept[number]
        random = np.random.default_rng([self.seed, number])
        counts: np.ndarray = _COUNTS[random.integers(0, 65536, size=(self.draws, size), dtype=np.uint16)]
        if (len(self._kept) + 1) * counts.nbytes <= _KEPT_BYTES:
            self._kept[number] = counts
        return counts

    def ratio(self, above: np.ndarray, below: np.ndarray) -> Estimate:
        """Σ above / Σ below with ``above`` [P, S] by seed and ``below`` [P] shared."""
        sums = self.sums(np.column_stack([above, below]))
        return sums.ratio(slice(0, -1), -1)


def paired_gain(
    student: np.ndarray, baseline: np.ndarray, weights: np.ndarray, units: np.ndarray | None = None
) -> Estimate:
    """The student's mean minus the baseline's, paired over units and seeds.

    Args:
        student, baseline: sums per seed and piece, [S, P].
        weights: scored positions of each piece, [P].
        units: the unit of each piece, [P]; None makes each piece one of its own.
    """
    return Resampler(len(weights), units).ratio((student - baseline).T, weights.astype(np.float64))
