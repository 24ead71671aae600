"""The small built-in models: a multi-layer perceptron and a convolutional network."""

from typing import Any

import torch
from torch import Tensor, nn

from distill_jobs.data.facts import DataFacts


class Mlp(nn.Module):
    """Linear layers with ReLU between: features [B, ...] (flattened) → logits [B, C]."""

    def __init__(self, inputs: int, hidden: list[int], outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for width in hidden:
            layers += [nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(dropout)]
            inputs = width
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, outputs))

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.layers(features)
        return logits


class Cnn(nn.Module):
    """3×3 convolutions with ReLU, the picture halved after each: pixels [B, c, h, w] → logits [B, C]."""

    def __init__(self, shape: list[int], channels: list[int], outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        inputs, height, width = shape
        layers: list[nn.Module] = []
        for count in channels:
            layers += [nn.Conv2d(inputs, count, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
            inputs, height, width = count, -(-height // 2), -(-width // 2)
        # Large pictures are averaged to at most 4 × 4, so that the last layer's size doesn't grow with them.
        side = (min(height, 4), min(width, 4))
        layers += [nn.AdaptiveAvgPool2d(side), nn.Flatten(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(inputs * side[0] * side[1], outputs))

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.layers(pixels)
        return logits


def mlp_origin(chosen: Any, facts: DataFacts) -> dict[str, Any]:
    """The plain values from which ``revive`` builds the MLP that the spec asks for."""
    inputs = facts.feature_width
    if facts.features == "image":
        inputs = int(torch.Size(facts.image_shape or ()).numel())
    return {
        "kind": "mlp",
        "inputs": inputs,
        "hidden": list(chosen.hidden),
        "outputs": facts.targets,
        "dropout": chosen.dropout,
    }


def cnn_origin(chosen: Any, facts: DataFacts) -> dict[str, Any]:
    """The plain values from which ``revive`` builds the CNN that the spec asks for."""
    return {
        "kind": "cnn",
        "shape": list(facts.image_shape or ()),
        "channels": list(chosen.channels),
        "outputs": facts.targets,
        "dropout": chosen.dropout,
    }


def revive(origin: dict[str, Any]) -> nn.Module:
    """Build a built-in model from its origin, with fresh weights."""
    makers: dict[str, type[nn.Module]] = {"mlp": Mlp, "cnn": Cnn}
    return makers[origin["kind"]](**{k: v for k, v in origin.items() if k != "kind"})
