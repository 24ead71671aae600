"""Low-rank adapters on a model (LoRA, Hu et al. 2021), by peft: beside a linear layer's W stands s·B·A, and only
A [rank, inputs] and B [outputs, rank] are trained."""

import difflib
from typing import Any

import torch
from torch import Tensor, nn

from distill_jobs import spec
from distill_jobs.errors import ModelError
from distill_jobs.models.huggingface import said

_NAME = "default"
_POOLER = ".pooler."
_BASE, _A, _B = ".base_layer.", f".lora_A.{_NAME}.weight", f".lora_B.{_NAME}.weight"


def add_adapters(core: nn.Module, wanted: spec.Lora) -> None:
    """Put adapters beside linear layers of a Hugging Face model, in place, and freeze all else.

    They begin as nothing: B is zero. A classifier's head and pooler, which may be new, are trained whole.

    Raises:
        ModelError: a target is no linear layer of the model, or peft can't adapt it.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    targets = _targets(core, wanted.targets, (nn.Linear, Conv1D))
    turned = {isinstance(core.get_submodule(name), Conv1D) for name in targets}
    config = LoraConfig(
        r=wanted.rank,
        lora_alpha=wanted.alpha,  # type: ignore[arg-type]  # whole or not, it is a factor
        lora_dropout=wanted.dropout,
        use_rslora=wanted.rank_stabilised,
        target_modules=targets,
        fan_in_fan_out=turned == {True},
    )
    with said(f"can't put adapters on a {type(core).__name__}"):
        inject_adapter_in_model(config, core, _NAME)
    if core.get_output_embeddings() is None:  # type: ignore[operator]
        for name, parameter in core.named_parameters():
            if not name.startswith(f"{core.base_model_prefix}.") or _POOLER in name:
                parameter.requires_grad_(True)


def merged(core: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model with adapters as those of the model alone: W + s·B·A, under W's name.

    Args:
        weights: by the names in ``core``'s own state dict, whole. Those of a model without adapters stay as they are.
    """
    if not any(name.endswith(_A) for name in weights):
        return weights
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        layer, _, rest = name.rpartition(_BASE)
        if ".lora_" in name:
            continue
        if not layer:
            found[name] = value
        elif rest != "weight":
            found[f"{layer}.{rest}"] = value
        else:
            found[f"{layer}.weight"] = _with_delta(
                core.get_submodule(layer), value, weights[layer + _A], weights[layer + _B]
            )
    return found


def _with_delta(layer: Any, weight: Tensor, a_RI: Tensor, b_OR: Tensor) -> Tensor:
    with torch.no_grad():
        delta = (b_OR.float() @ a_RI.float()) * layer.scaling[_NAME]
        whole: Tensor = weight.float() + (delta.T if layer.fan_in_fan_out else delta)
        return whole.to(weight.dtype)


def _targets(core: Any, wanted: tuple[str, ...] | None, kinds: tuple[type[nn.Module], ...]) -> list[str]:
    """The full names of the layers to adapt: those of the backbone, so that heads and embeddings stay out of it."""
    backbone = core.base_model
    start = "" if backbone is core else f"{core.base_model_prefix}."
    found = [start + name for name, module in backbone.named_modules() if isinstance(module, kinds)]
    linear = [name for name in found if _POOLER not in name]
    if wanted is None:
        return linear
    for end in wanted:
        if not any(_ends(name, end) for name in linear):
            ends = sorted({name.rpartition(".")[2] for name in linear})
            near = difflib.get_close_matches(end, ends, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"they end in {', '.join(ends)}"
            raise ModelError(f"lora.targets: no linear layer within the model ends in {end}; {hint}")
    return [name for name in linear if any(_ends(name, end) for end in wanted)]


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
