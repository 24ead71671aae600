"""Which samples make a step bad: found by scoring ever smaller groups of its rows."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from cluster.engine import Engine
from cluster.gang import Rank
from distill_jobs.training.ahead import Micro
from distill_jobs.training.scoring import BatchLoss
from distill_jobs.training.source import Source

SUSPECTS = 16
"""So many are followed, and told, on each rank at most."""


class Inquest:
    """Asks the model about rows of a step, as it is in evaluation: without dropout, and without moving anything."""

    def __init__(self, engine: Engine, score: BatchLoss, source: Source, rank: Rank) -> None:
        self.engine, self.score, self.source, self.rank = engine, score, source, rank

    def find(self, micros: Sequence[Micro], limit: float, alpha: float, temperature: float) -> dict[int, float]:
        """The rows of all ranks whose own loss is above ``limit`` or not finite, with it; every rank must call.

        Args:
            micros: this rank's of the step.
        """

        def loss(rows: np.ndarray) -> float:
            batch, signal = self.source.load(rows, self.rank.device)
            return float(self.score(batch, signal, alpha, temperature).total)

        self.engine.eval()
        with torch.no_grad():
            found = culprits([micro.rows for micro in micros], loss, limit, self._most, np.zeros(1, dtype=np.int64))
        self.engine.train()
        return self._of_all(found[:SUSPECTS])

    def samples(self, rows: Sequence[int]) -> list[int]:
        """The sample ids of some rows, at most ``SUSPECTS`` of them."""
        return [int(i) for i in self.source.load(np.asarray(rows[:SUSPECTS]), "cpu")[0].sample_ids] if rows else []

    def _most(self, count: int) -> int:
        counts = [0.0] * self.rank.world_size
        counts[self.rank.rank] = count
        return int(max(self.engine.sum(counts)))

    def _of_all(self, found: list[tuple[int, float]]) -> dict[int, float]:
        # Ranks can only add up: each has places of its own, and a row's number is told as one more than it is.
        places = np.zeros((self.rank.world_size, SUSPECTS, 2))
        for place, (row, loss) in enumerate(found):
            places[self.rank.rank, place] = row + 1, loss
        told = np.asarray(self.engine.sum(places.ravel().tolist())).reshape(-1, 2)
        return {int(row) - 1: float(loss) for row, loss in told if row}


def culprits(
    groups: Sequence[np.ndarray],
    score: Callable[[np.ndarray], float],
    limit: float,
    most: Callable[[int], int],
    spare: np.ndarray,
) -> list[tuple[int, float]]:
    """The rows whose own loss is above ``limit`` or not finite, with it: found by halving the groups that are bad.

    The mean of a group is only above the limit where that of one of its halves is. Every rank must call: all make the
    same number of forward passes, as ZeRO-3 wants it.

    Args:
        groups: row numbers of each micro-batch of this rank.
        score: the mean loss of some rows.
        most: the greatest of all ranks' numbers.
        spare: rows to score where another rank has more to look at.
    """
    found = []
    waiting = [group for group in groups if len(group)]
    while rounds := most(len(waiting)):
        halves: list[np.ndarray] = []
        for number in range(rounds):
            rows = waiting[number] if number < len(waiting) else spare
            loss = score(rows)
            if number >= len(waiting) or loss <= limit:
                continue
            if len(rows) == 1:
                found.append((int(rows[0]), loss))
            else:
                middle = len(rows) // 2
                halves += [rows[:middle], rows[middle:]]
        waiting = halves[:SUSPECTS]
    return found
