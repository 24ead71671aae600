"""What the engine's tests train: a small awkward model, its batches and its loss."""

import torch
from torch import nn

STEPS, RANKS, ACCUMULATION, ROWS = 6, 2, 2, 3
STAGES = (0, 1, 2, 3)


class Tied(nn.Module):
    """Small, with all that trips up a sharded optimizer: tied weights, a frozen matrix, a buffer, biases, a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embed = nn.Embedding(11, 8)
        self.frozen = nn.Linear(8, 8)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.tensor(1.5))
        self.register_buffer("inv_freq", torch.tensor(0.1), persistent=False)

    def forward(self, ids: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        hidden = self.frozen(self.embed(ids)) * self.scale + shift + (3.0 * self.inv_freq.float()).to(shift.dtype)
        return self.head(self.body(hidden))


def batch(step: int, rank: int, micro: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1000 * step + 10 * rank + micro)
    ids = torch.randint(0, 11, (ROWS, 5), generator=draw)
    return ids, torch.randn(ROWS, 5, 8, generator=draw), torch.randint(0, 11, (ROWS, 5), generator=draw)


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
