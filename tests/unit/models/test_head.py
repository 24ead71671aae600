"""A language model split at its output head gives what the model itself gives, whatever it does with its logits."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from model_cases import BERT, GPT2, LLAMA, LM, TEXT, config, factory
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distill_jobs.errors import ModelError
from distill_jobs.models import head
from distill_jobs.models.build import build_model
from distill_jobs.models.head import split_head
from distill_jobs.models.scorer import Scorer, sample_inputs

SMALL: dict[str, Any] = {**LLAMA, "num_hidden_layers": 2, "head_dim": 8}
FALCON_H1 = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
# model_type, more settings, the scale, the soft cap, a bias, tied to the embedding
MODELS: list[tuple[str, dict[str, Any], float, float | None, bool, bool]] = [
    ("llama", {}, 1.0, None, False, False),
    ("llama", {"tie_word_embeddings": True}, 1.0, None, False, True),
    ("gpt2", GPT2, 1.0, None, False, True),
    ("phi", {}, 1.0, None, True, False),
    ("gemma2", {"final_logit_softcapping": 5.0}, 1.0, 5.0, False, True),
    ("gemma3_text", {"final_logit_softcapping": 7.0}, 1.0, 7.0, False, True),
    ("gemma3_text", {}, 1.0, None, False, True),
    ("recurrent_gemma", {"logits_soft_cap": 4.0}, 1.0, 4.0, False, True),
    ("granite", {"logits_scaling": 8.0}, 1 / 8, None, False, False),
    ("hyperclovax", {"logits_scaling": 0.3}, 0.3, None, False, False),
    ("cohere", {"logit_scale": 0.2}, 0.2, None, False, True),
    ("falcon_h1", {**FALCON_H1, "lm_head_multiplier": 0.3}, 0.3, None, False, False),
    ("nanochat", {}, 1.0, 15.0, False, False),
    ("mamba", {}, 1.0, None, False, True),
]


class Widths(TorchDispatchMode):
    """Remembers the most elements of a tensor that any operation makes whose last axis is ``width`` long.

    A transposed view of a weight is no new tensor, and is not contiguous either.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.most = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.shape[-1:] == (self.width,) and made.is_contiguous():
            self.most = max(self.most, made.numel())
        return made


def build(kind: str = "llama", **changes: Any) -> Scorer:
    from transformers import CONFIG_MAPPING

    usual = CONFIG_MAPPING[kind]()
    known = {*usual.to_dict(), *usual.attribute_map}
    sizes = {key: value for key, value in SMALL.items() if key in known}
    scorer = build_model(config({**sizes, "model_type": kind}, **{**changes, "model_type": kind}), LM, seed=1)
    core: Any = scorer.core
    with torch.no_grad():
        # As far apart as a trained model's, so that a cap caps; a fresh bias is all zeros.
        core.get_output_embeddings().weight.mul_(60)
        if core.get_output_embeddings().bias is not None:
            core.get_output_embeddings().bias.normal_()
    return scorer


@pytest.mark.parametrize(("kind", "changes", "scale", "softcap", "bias", "tied"), MODELS)
def test_both_parts_give_the_models_own_logits(
    kind: str, changes: dict[str, Any], scale: float, softcap: float | None, bias: bool, tied: bool
) -> None:
    scorer = build(kind, **changes)
    split, inputs = split_head(scorer, LM), sample_inputs(LM, rows=3)
    assert split is not None
    with torch.no_grad():
        own, hidden = scorer(**inputs).flatten(0, 1), split.hidden(inputs).flatten(0, 1)
        whole, some = split.logits(hidden), split.logits(hidden[5:9], targets=30)
    torch.testing.assert_close(whole, own)
    torch.testing.assert_close(some, own[5:9, :30])
    assert own.std() > 0.5 and (softcap is None or own.abs().max() > softcap / 3)
    assert (split.scale, split.softcap, split.bias is not None) == (pytest.approx(scale), softcap, bias)
    core: Any = scorer.core
    assert (split.weight is core.get_input_embeddings().weight) is tied


def test_hidden_states_cost_no_logits() -> None:
    facts = replace(LM, vocabulary=321)
    scorer = build_model(config(LLAMA), facts, seed=0)
    split, inputs = split_head(scorer, facts), sample_inputs(facts)
    assert split is not None
    with torch.no_grad(), Widths(321) as seen:
        hidden = split.hidden(inputs).flatten(0, 1)
        assert seen.most == 0
        split.logits(hidden[:4])
        assert seen.most == 4 * 321
        scorer(**inputs)
        assert seen.most == 2 * 24 * 321


def test_the_head_is_put_back_even_after_an_error() -> None:
    scorer = build()
    split, inputs = split_head(scorer, LM), sample_inputs(LM)
    assert split is not None
    before = scorer(**inputs)
    split.hidden(inputs)
    with pytest.raises(IndexError):
        split.hidden({"input_ids": torch.full((1, 4), 4000)})
    assert torch.equal(scorer(**inputs), before)
    assert "forward" not in vars(split.head)


def test_gradients_go_through_both_parts() -> None:
    scorer = build("gemma2", final_logit_softcapping=5.0)
    split, inputs = split_head(scorer, LM), sample_inputs(LM)
    assert split is not None
    scorer(**inputs).square().sum().backward()
    own = {name: p.grad.clone() for name, p in scorer.named_parameters() if p.grad is not None}
    scorer.zero_grad()
    split.logits(split.hidden(inputs).flatten(0, 1)).square().sum().backward()
    assert own
    for name, parameter in scorer.named_parameters():
        torch.testing.assert_close(parameter.grad, own[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["gemma2", "granite", "cohere"])
def test_low_precision(kind: str, precision: torch.dtype) -> None:
    scorer = build(kind).to(precision)
    split, inputs = split_head(scorer, LM), sample_inputs(LM)
    assert split is not None
    with torch.no_grad():
        own, ours = scorer(**inputs).flatten(0, 1), split.logits(split.hidden(inputs).flatten(0, 1))
    assert ours.dtype == own.dtype
    assert (ours - own).abs().max() < 0.02 * own.float().std()


def test_models_without_a_head_to_split() -> None:
    assert split_head(build_model(config(BERT), TEXT, seed=0), TEXT) is None
    assert split_head(build_model(factory("honest_lm"), LM, seed=0), LM) is None


@pytest.mark.parametrize(
    ("kind", "table", "value", "said"),
    [
        ("cohere", "SCALES", {}, "something to its logits that is not known here, beside a scale of 1 "),
        ("cohere", "SCALES", {"cohere": ("logit_scale", -1)}, "beside a scale of 16 and a soft cap of none"),
        ("gemma2", "SOFT_CAPS", (), "a soft cap of none"),
    ],
)
def test_an_unknown_scale_or_cap_is_refused(
    kind: str, table: str, value: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, table, value)
    with pytest.raises(ModelError, match=said) as caught:
        split_head(build(kind), LM)
    assert f"({kind})" in str(caught.value) and "set capture.chunk_positions to 0" in str(caught.value)


class _Moved(torch.nn.Linear):
    """A head that adds what its weights don't show."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + torch.arange(self.out_features) / 40


def test_a_head_that_is_more_than_its_weights_is_refused() -> None:
    scorer = build()
    core: Any = scorer.core
    core.lm_head.__class__ = _Moved
    with pytest.raises(ModelError, match="gives other logits when its output head is applied apart"):
        split_head(scorer, LM)


def test_a_head_that_is_called_twice_is_refused() -> None:
    scorer = build()
    core: Any = scorer.core
    own = core.forward
    core.forward = lambda **inputs: (own(**inputs), own(**inputs))[1]
    with pytest.raises(ModelError, match=r"its output head \[2, 24, 32\] and \[2, 24, 32\], not once \[2, 24, 32\]"):
        split_head(scorer, LM)


def test_the_check_takes_a_real_batch_and_leaves_out_what_the_model_makes_nothing_of() -> None:
    scorer = build()
    core: Any = scorer.core
    with torch.no_grad():
        core.get_input_embeddings().weight[7] = torch.nan
    inputs = {"input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), "segments": torch.ones(2, 4, dtype=torch.long)}
    assert split_head(scorer, LM, inputs) is not None
    assert split_head(scorer, LM, {name: value[1:, 2:] for name, value in inputs.items()}) is not None
