"""Which rows a step trains on: a shuffle fixed by (seed, epoch) alone, whatever the number of ranks.

The state of a run is one integer, the samples consumed so far. Step ``s`` takes the samples ``s·B`` to ``(s+1)·B - 1``
of an endless sequence of shuffled epochs; each rank takes its share of every micro-batch, so that one rank or eight
see the same global batches in the same order.
"""

from functools import lru_cache

import numpy as np


class Order:
    """The endless shuffled sequence of row numbers."""

    def __init__(self, rows: int, seed: int) -> None:
        assert rows > 0
        self.rows, self.seed = rows, seed
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def take(self, consumed: int, count: int) -> np.ndarray:
        """The row numbers of samples ``consumed`` to ``consumed + count - 1``, int64 [count]."""
        pieces, position, end = [], consumed, consumed + count
        while position < end:
            epoch, offset = divmod(position, self.rows)
            piece = self._epoch(epoch)[offset : offset + end - position]
            pieces.append(piece)
            position += len(piece)
        return np.concatenate(pieces)

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.rows)


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
