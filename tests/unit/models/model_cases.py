"""Tiny models and data facts for the model tests."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distill_jobs import spec
from distill_jobs.data.facts import DataFacts

TABULAR = DataFacts("classification", "tabular", "f", feature_width=5, classes=("no", "yes"))
IMAGE = DataFacts("classification", "image", "f", feature_width=64, image_shape=(1, 8, 8), classes=("0", "1", "2"))
TEXT = DataFacts(
    "classification", "text", "f", sequence_length=12, classes=("a", "b"), vocabulary=40, tokenizer_sha="t", pad_id=0
)
LM = DataFacts(
    "causal_lm", "documents", "f", sequence_length=24, vocabulary=40, tokenizer_sha="t", pad_id=0, packing="documents"
)
NAIVE = replace(LM, packing="naive")

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4}
BERT: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
VIT: dict[str, Any] = {
    "model_type": "vit",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 4,
}


def config(values: dict[str, Any], **changes: Any) -> spec.Model:
    return spec.Model(config={**values, **changes})


def factory(name: str, **args: Any) -> spec.Model:
    return spec.Model.model_validate({"factory": {"target": f"model_cases:{name}", "args": args}})


class LeakyLm(nn.Module):
    """Adds up all earlier embeddings, whatever document they are of."""

    def __init__(self, vocabulary: int, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.embed(input_ids).cumsum(1))
        return found


class HonestLm(LeakyLm):
    """The same within each document, by the mask that it is given; embedding and head are one tensor."""

    def __init__(self, vocabulary: int, width: int = 16) -> None:
        super().__init__(vocabulary, width)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
        mixed = attention_mask[:, 0].to(self.embed.weight.dtype) @ self.embed(input_ids)
        return type("Output", (), {"logits": self.head(mixed)})()


class FarSightedLm(LeakyLm):
    def forward(self, input_ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.embed(input_ids).sum(1, keepdim=True).expand(-1, input_ids.shape[1], -1))
        return found


def leaky_lm(vocabulary: int) -> nn.Module:
    return LeakyLm(vocabulary)


def honest_lm(vocabulary: int) -> nn.Module:
    return HonestLm(vocabulary)


def far_sighted_lm(vocabulary: int) -> nn.Module:
    return FarSightedLm(vocabulary)


def linear(feature_width: int, classes: int, bias: bool = True) -> nn.Module:
    return nn.Linear(feature_width, classes, bias=bias)


def two_wide(feature_width: int, outputs: int) -> nn.Module:
    return nn.Linear(feature_width, outputs)


def no_module() -> object:
    return torch.zeros(2)


def breaks() -> nn.Module:
    raise RuntimeError("no such luck")
