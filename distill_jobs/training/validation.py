"""The held-out split in mid-training."""

import math
from dataclasses import dataclass

import torch

from cluster.engine import Engine
from cluster.gang import Rank
from distill_jobs.training.feed import even_shares
from distill_jobs.training.scoring import BatchLoss
from distill_jobs.training.source import Source


@dataclass(frozen=True)
class Look:
    """What a look at the split shows.

    Attributes:
        loss: mean hard-label loss; the same for every kind of arm; infinite without rows.
        accuracy: share of the scored positions whose likeliest class is right; None without rows, and where a fused
            output head makes no logits to tell.
    """

    loss: float
    accuracy: float | None


def validate(engine: Engine, score: BatchLoss, source: Source, micro: int, rank: Rank) -> Look:
    """Look at all rows of ``source``, with the moving average of the weights where one is kept; every rank must call.

    Args:
        micro: rows that go through the model at once.

    Returns:
        the same on all ranks.
    """
    if source.rows == 0:
        return Look(math.inf, None)
    sums = torch.zeros(3, dtype=torch.float64, device=rank.device)
    engine.eval()
    with torch.no_grad(), engine.averaged():
        for rows, real in even_shares(source.rows, micro, rank.rank, rank.world_size):
            batch, _ = source.load(rows, rank.device, real)
            parts, right = score.look(batch)
            if parts.positions:
                share = parts.hard.new_zeros(()) if right is None else right
                sums += torch.stack([parts.hard.double(), share.double(), sums.new_ones(())]) * parts.positions
    engine.train()
    loss, right_sum, positions = engine.sum(sums.tolist())
    seen = max(1.0, positions)
    return Look(loss / seen, None if score.head is not None else right_sum / seen)
