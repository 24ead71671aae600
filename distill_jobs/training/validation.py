"""The held-out split in mid-training."""

import math

import torch

from cluster.engine import Engine
from cluster.gang import Rank
from distill_jobs.training.feed import even_shares
from distill_jobs.training.scoring import BatchLoss
from distill_jobs.training.source import Source


def validation_loss(engine: Engine, score: BatchLoss, source: Source, micro: int, rank: Rank) -> float:
    """Mean hard-label loss over all rows of ``source``, of the moving average where one is kept; every rank must call.

    Args:
        micro: rows that go through the model at once.

    Returns:
        The same for every kind of arm, and on all ranks; infinite without rows.
    """
    if source.rows == 0:
        return math.inf
    sums = torch.zeros(2, dtype=torch.float64, device=rank.device)
    engine.eval()
    with torch.no_grad(), engine.averaged():
        for rows, real in even_shares(source.rows, micro, rank.rank, rank.world_size):
            batch, _ = source.load(rows, rank.device, real)
            parts = score(batch, None, 0.0, 1.0)
            if parts.positions:
                sums += torch.stack([parts.hard.double() * parts.positions, sums.new_tensor(parts.positions)])
    engine.train()
    total, positions = engine.sum(sums.tolist())
    return total / max(1.0, positions)
