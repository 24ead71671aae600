"""A model in bf16 keeps the buffers that it computes itself exact."""

import torch
from model_cases import LM

from distill_jobs.models.build import build_model
from distill_jobs.models.place import place
from distill_jobs.spec import Model


def test_rotary_frequencies_are_not_rounded() -> None:
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    scorer = build_model(Model(config={**config, "num_attention_heads": 2}), LM, seed=0)
    exact = {name: value.clone() for name, value in scorer.named_buffers()}
    place(scorer, "cpu", "bf16")
    assert exact and all(torch.equal(value, exact[name]) for name, value in scorer.named_buffers())
    assert all(parameter.dtype == torch.bfloat16 for parameter in scorer.parameters())
