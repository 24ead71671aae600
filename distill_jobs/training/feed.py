"""Which rows a step trains on: a shuffle fixed by (seed, epoch) alone, whatever the number of ranks.

The state of a run is one integer, the samples consumed so far. Step ``s`` takes the samples ``s·B`` to ``(s+1)·B - 1``
of an endless sequence of shuffled epochs; each rank takes its share of every micro-batch, so that one rank or eight
see the same global batches in the same order. Any sample's row is computed on its own: no order is held in memory.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from distill_jobs.training.permutation import Permutation

# What a permutation is for: the same seed gives unrelated permutations to different uses.
_ROWS, _PARTS, _WINDOW, _MIXING = range(4)
BLOCK = 4096
"""Samples after which a mixture has its shares exactly."""


class Order:
    """An endless sequence of rows: each epoch is a shuffle of all of them."""

    def __init__(self, rows: int, seed: int) -> None:
        assert rows > 0
        self.rows, self.seed = rows, seed

    def take(self, consumed: int, count: int) -> np.ndarray:
        """The row numbers of samples ``consumed`` to ``consumed + count - 1``, int64 [count]."""
        return self.at(np.arange(consumed, consumed + count, dtype=np.int64))

    def at(self, samples: np.ndarray) -> np.ndarray:
        """The row numbers [n] of the samples ``samples`` [n] of the sequence."""
        epoch, offset = np.divmod(samples, self.rows)
        return _by_group(epoch, lambda number, some: self._epoch(number, offset[some]))

    def _epoch(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        return Permutation(self.rows, _ROWS, self.seed, epoch)(offsets)


class WindowOrder(Order):
    """For parts that are fetched whole: their order is shuffled, and then the rows of each ``window`` of them.

    Args:
        part_rows: [parts] rows of each part.
        ahead: told, when a window is entered, the parts of it and of the one after it, and those of it alone.
    """

    def __init__(
        self,
        part_rows: np.ndarray,
        seed: int,
        window: int,
        ahead: Callable[[list[int], list[int]], None] | None = None,
    ) -> None:
        super().__init__(int(part_rows.sum()), seed)
        self._part_rows, self._window, self._ahead = part_rows, window, ahead
        self._starts = np.cumsum(part_rows) - part_rows
        self._filled = np.flatnonzero(part_rows)
        self._entered = (-1, -1)
        self._parts_of = lru_cache(maxsize=4)(self._shuffled)

    def _epoch(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        parts, ends = self._parts_of(epoch)
        # The last row of every window, and where it starts.
        last = ends[np.minimum(np.arange(self._window - 1, len(ends) + self._window - 1, self._window), len(ends) - 1)]
        first = np.concatenate([[0], last[:-1]])
        number = np.searchsorted(last, offsets, side="right")
        self._enter(epoch, int(number.max()), len(last))

        def rows(window: int, some: np.ndarray) -> np.ndarray:
            size = int(last[window] - first[window])
            place = first[window] + Permutation(size, _WINDOW, self.seed, epoch, window)(offsets[some] - first[window])
            at = np.searchsorted(ends, place, side="right")
            within = place - (ends[at] - self._part_rows[parts[at]])
            return np.asarray(self._starts[parts[at]] + within)

        return _by_group(number, rows)

    def _enter(self, epoch: int, window: int, windows: int) -> None:
        if self._ahead is None or (epoch, window) <= self._entered:
            return
        self._entered = (epoch, window)
        after = (epoch, window + 1) if window + 1 < windows else (epoch + 1, 0)
        here, there = (
            self._parts_of(e)[0][w * self._window : (w + 1) * self._window].tolist()
            for e, w in ((epoch, window), after)
        )
        self._ahead([*here, *there], here)

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The parts that have rows in this epoch's order, and the number of rows up to and with each."""
        chosen = Permutation(len(self._filled), _PARTS, self.seed, epoch)(np.arange(len(self._filled)))
        parts = self._filled[chosen]
        return parts, np.cumsum(self._part_rows[parts])


class MixedOrder(Order):
    """Several sequences mixed by shares. Of every ``BLOCK`` samples each gives its share; their places are shuffled.

    Args:
        orders: the sequences.
        offsets: added to the row numbers of each.
        shares: of each, adding up to 1.
    """

    def __init__(self, orders: Sequence[Order], offsets: Sequence[int], shares: Sequence[float], seed: int) -> None:
        self._quotas = quotas(shares)
        super().__init__(max(1, round(orders[0].rows * BLOCK / int(self._quotas[0]))), seed)
        self._orders, self._offsets = orders, offsets
        self._ends = np.cumsum(self._quotas)

    def at(self, samples: np.ndarray) -> np.ndarray:
        block, place = np.divmod(samples, BLOCK)
        slot = _by_group(block, lambda number, some: Permutation(BLOCK, _MIXING, self.seed, number)(place[some]))
        source = np.searchsorted(self._ends, slot, side="right")
        own = block * self._quotas[source] + slot - (self._ends - self._quotas)[source]
        return _by_group(source, lambda number, some: self._orders[number].at(own[some]) + self._offsets[number])


def quotas(shares: Sequence[float]) -> np.ndarray:
    """How many of ``BLOCK`` samples each share gets, at least one: [n] int64 adding up to ``BLOCK``."""
    exact = np.asarray(shares, dtype=np.float64) * BLOCK
    found = np.maximum(1, np.floor(exact).astype(np.int64))
    for _ in range(int(BLOCK - found.sum())):
        found[np.argmax(exact - found)] += 1
    while found.sum() > BLOCK:
        found[np.argmax(found - exact)] -= 1
    return found


def share_of_rank(batch: np.ndarray, micro: int, rank: int, world: int) -> list[np.ndarray]:
    """Cut a global batch [micro · world · n] into this rank's n micro-batches [micro] each."""
    return [batch[start + rank * micro : start + (rank + 1) * micro] for start in range(0, len(batch), micro * world)]


def even_shares(rows: int, micro: int, rank: int, world: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cut ``rows`` rows in order into as many micro-batches on every rank, for evaluation.

    Returns pairs (row numbers [micro], real [micro]); a batch is filled up with row 0, marked as not real, so that
    all ranks make the same number of forward passes (ZeRO-3 gathers parameters in each).
    """
    shares = []
    for start in range(0, rows, micro * world):
        numbers = np.arange(start + rank * micro, start + (rank + 1) * micro)
        real = numbers < rows
        shares.append((np.where(real, numbers, 0), real))
    return shares


def _by_group(groups: np.ndarray, work: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
    """``work(group, places in it)`` for each group number among ``groups`` [n], put together as [n] int64."""
    out = np.empty(len(groups), dtype=np.int64)
    for number in np.unique(groups).tolist():
        some = np.flatnonzero(groups == number)
        out[some] = work(number, some)
    return out
