import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import BERT, GPT2, LLAMA, LM, TEXT, config

from cluster.files import Folder
from distill_jobs import spec
from distill_jobs.data.facts import DataFacts
from distill_jobs.errors import ModelError
from distill_jobs.losses.fused_head import fused_head
from distill_jobs.models.build import build_model
from distill_jobs.models.files import load_model, save_model
from distill_jobs.models.scorer import Scorer, sample_inputs

TIED = {**LLAMA, "tie_word_embeddings": True, "attention_bias": True}


def adapted(
    path: Path, values: dict[str, Any], facts: DataFacts, trained: bool = True, **wanted: Any
) -> tuple[Scorer, Scorer]:
    """A saved model, and the same with adapters on it, which look trained if asked for."""
    build_model(config(values), facts, seed=1).core.save_pretrained(path)  # type: ignore[operator]
    model = spec.Model(hf=str(path))
    scorer = build_model(model, facts, seed=5, lora=spec.Lora(**wanted))
    if trained:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in scorer.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return build_model(model, facts, seed=5), scorer


def logits(scorer: Any, facts: DataFacts) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = scorer(**sample_inputs(facts))
    return found


def test_untrained_adapters_change_nothing_and_they_alone_are_trained(tmp_path: Path) -> None:
    plain, scorer = adapted(tmp_path, TIED, LM, trained=False, rank=4)
    assert torch.equal(logits(scorer, LM), logits(plain, LM)) and not scorer.training
    trained = {name for name, p in scorer.named_parameters() if p.requires_grad}
    # Seven linear layers in each of four, none of them the output head, which is the embedding.
    assert len(trained) == 2 * 7 * 4 and all(".lora_" in name for name in trained)
    assert sum(p.numel() for p in scorer.parameters() if p.requires_grad) == 4 * 4 * (
        2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48)
    )
    again = build_model(spec.Model(hf=str(tmp_path)), LM, seed=5, lora=spec.Lora(rank=4))
    assert all(torch.equal(*pair) for pair in zip(scorer.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("values", "facts", "wanted"),
    [
        (TIED, LM, {"rank": 4, "alpha": 6.0}),
        (GPT2, LM, {"rank": 4, "rank_stabilised": True}),
        (LLAMA, LM, {"targets": ("q_proj", "mlp.down_proj")}),
        (BERT, TEXT, {"rank": 2, "dropout": 0.5}),
    ],
)
def test_saved_they_are_merged(
    tmp_path: Path, values: dict[str, Any], facts: DataFacts, wanted: dict[str, Any]
) -> None:
    plain, scorer = adapted(tmp_path / "hf", values, facts, **wanted)
    assert not torch.allclose(logits(scorer, facts), logits(plain, facts), atol=1e-2)
    folder, state = Folder(str(tmp_path / "model")), {k: v.clone() for k, v in scorer.state_dict().items()}
    # As an engine gathers it: whole copies, while the module itself may hold pieces.
    emptied = copy.deepcopy(scorer)
    for parameter in emptied.parameters():
        parameter.data = torch.empty(0)
    save_model(emptied, folder, facts, Folder(str(tmp_path)), state)
    loaded = load_model(folder)
    torch.testing.assert_close(logits(loaded, facts), logits(scorer, facts), rtol=1e-4, atol=1e-5)
    assert loaded.state_dict().keys() == plain.state_dict().keys()
    # peft's own way to merge, of the module and not of its state.
    for name, module in scorer.core.named_modules():
        if hasattr(module, "lora_A"):
            module.merge()  # type: ignore[operator]
            weight: Any = loaded.core.get_submodule(name).weight
            torch.testing.assert_close(weight, module.base_layer.weight)  # type: ignore[union-attr]


def test_a_classifiers_new_head_is_trained_whole(tmp_path: Path) -> None:
    _, scorer = adapted(tmp_path, BERT, TEXT, rank=2)
    whole = {name for name, p in scorer.named_parameters() if p.requires_grad and ".lora_" not in name}
    start = "core.bert.pooler.dense"
    assert whole == {f"{start}.weight", f"{start}.bias", "core.classifier.weight", "core.classifier.bias"}
    assert not any("pooler" in name and ".lora_" in name for name, _ in scorer.named_parameters())


def test_the_output_head_still_gives_the_loss(tmp_path: Path) -> None:
    _, scorer = adapted(tmp_path, TIED, LM)
    assert fused_head(scorer, LM) is not None


@pytest.mark.parametrize(
    ("target", "said"),
    [("q_prj", "did you mean q_proj"), ("lm_head", "lora.targets: no linear layer within the model")],
)
def test_targets_that_are_not_there_are_named(tmp_path: Path, target: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        adapted(tmp_path, LLAMA, LM, targets=(target,))


def test_only_trained_parameters_are_an_engines_state(tmp_path: Path) -> None:
    from cluster.engine_build import build_optimizer
    from distill_jobs.spec import Train

    _, scorer = adapted(tmp_path, LLAMA, LM, rank=2)
    optimizer = build_optimizer(scorer, Train().engine(total_steps=1))
    held = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert held == sum(p.numel() for name, p in scorer.named_parameters() if ".lora_" in name)
