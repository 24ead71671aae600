"""A student pruned from its teacher: a copy with the channels, neurons, heads and layers that matter most to it.

What the scores are worth before any training, by the perplexity of SmolLM2-135M (26 to 39 whole) on real text: with
1,152 of 1,536 neurons 46 to 54 by importance and 270 to 540 by chance; with 504 of 576 channels 99 and 430 or more;
with two of three key-value groups 44 to 50 and 67 to 180; with 26 of 30 layers 48 and 68 or more. Query heads within a
group are told apart poorly: with two of each three, three samples of text gave 186, 206 and 545, and chance 150 to 345.
To lose heads, lose groups.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill_jobs import spec
from distill_jobs.errors import ModelError
from distill_jobs.models.families import Family, Sizes, family_of
from distill_jobs.models.huggingface import said
from distill_jobs.models.importance import Importance
from distill_jobs.models.layers import cut_layers


def prune(teacher: nn.Module, wanted: spec.PrunedTeacher, importance: Importance) -> nn.Module:
    """A new model of the teacher's architecture with the sizes ``wanted``, of the parts that matter most.

    What stays keeps its order, so that a model pruned to its own sizes is the teacher itself. Key-value heads go with
    the query heads that share them; of those that are left, the best within each group stay. Layers are left out
    first; nothing is made up for what is gone, that is left to training.

    Raises:
        ModelError: of an architecture that can't be narrowed, or sizes that it can't have.
    """
    family = family_of(teacher)
    sizes = narrowed(teacher, wanted)
    kept = _layers(wanted, importance)
    shorter = teacher if kept is None else cut_layers(teacher, kept)
    numbers = list(range(len(importance.layers))) if kept is None else kept
    places = _choose(family.sizes(teacher.config), sizes, importance, numbers)
    with said(f"can't prune a {type(teacher).__name__}"):
        # The weights are all copied in below, so what the fresh model starts from doesn't matter.
        student: nn.Module = type(teacher)._from_config(_narrower(family, shorter.config, sizes))  # type: ignore[attr-defined]
        student.load_state_dict(
            {name: _narrow(family, shorter, name, value, places) for name, value in shorter.state_dict().items()}
        )
    return student.train(teacher.training)


def narrowed(teacher: Any, wanted: spec.PrunedTeacher) -> Sizes:
    """The widths of the pruned model.

    To be asked before anything is measured: whatever is wrong with the sizes shows here.

    Raises:
        ModelError: the teacher can't be narrowed, or not to such sizes.
    """
    family = family_of(teacher)
    sizes = _sizes(family, teacher.config, wanted)
    count = int(teacher.config.num_hidden_layers)
    if isinstance(wanted.layers, int) and wanted.layers > count:
        raise ModelError(f"prune_teacher.layers {wanted.layers} is more than the teacher's {count}")
    with said(f"prune_teacher asks for a {teacher.config.model_type} model that transformers won't have"):
        _narrower(family, teacher.config, sizes)
    return sizes


def _sizes(family: Family, config: Any, wanted: spec.PrunedTeacher) -> Sizes:
    """The sizes of the pruned model, those that aren't named as they follow from the others."""
    own = family.sizes(config)
    shared = own.heads // own.groups
    hidden = wanted.hidden_size or own.hidden
    heads, groups = wanted.attention_heads, wanted.key_value_heads
    if heads is None and groups is None and not family.free_heads:
        heads = hidden // own.head_dim
    if groups is None:
        groups = own.groups if shared > 1 or heads is None else heads
    heads = heads or groups * shared
    found = Sizes(hidden, wanted.intermediate_size or own.neurons, heads, groups, own.head_dim)
    _check(family, found, own)
    return found


def _check(family: Family, found: Sizes, own: Sizes) -> None:
    names = {
        "hidden_size": (found.hidden, own.hidden),
        "intermediate_size": (found.neurons, own.neurons),
        "key_value_heads": (found.groups, own.groups),
        "attention_heads": (found.heads, own.heads),
    }
    for name, (new, old) in names.items():
        if new > old:
            raise ModelError(f"prune_teacher.{name} {new} is more than the teacher's {old}")
    shared = own.heads // own.groups
    if found.heads % found.groups or found.heads // found.groups > shared:
        raise ModelError(
            f"prune_teacher can't share {found.groups} key-value heads among {found.heads} attention heads: each is "
            f"shared by equally many, and by {shared} at most, as in the teacher"
        )
    if not family.free_heads and found.hidden != found.heads * own.head_dim:
        raise ModelError(
            f"prune_teacher.hidden_size {found.hidden} and attention_heads {found.heads} don't fit: in a "
            f"{family.kinds[0]} model they go together, {own.head_dim} channels for each head"
        )


def _layers(wanted: spec.PrunedTeacher, importance: Importance) -> list[int] | None:
    """The numbers of the layers that stay; None for all."""
    if wanted.layers is None:
        return None
    if not isinstance(wanted.layers, int):
        return list(wanted.layers)
    return _best(importance.layers, wanted.layers).tolist()


@dataclass(frozen=True)
class _Places:
    """What stays of each axis, as indices into a parameter's dimension; of all but ``hidden`` layer by layer."""

    hidden: Tensor
    neurons: list[Tensor]
    heads: list[Tensor]
    groups: list[Tensor]
    qkv: list[Tensor]

    def along(self, axis: str, layer: int) -> Tensor:
        found = getattr(self, axis)
        return self.hidden if axis == "hidden" else found[layer]


def _choose(own: Sizes, sizes: Sizes, importance: Importance, layers: list[int]) -> _Places:
    hidden = _best(importance.hidden[[*layers, -1]].sum(dim=0), sizes.hidden)
    neurons = [_best(importance.neurons[layer], sizes.neurons) for layer in layers]
    chosen = [_heads(importance.heads[layer], own, sizes) for layer in layers]
    heads = [_channels(kept, own.head_dim) for kept, _ in chosen]
    groups = [_channels(kept, own.head_dim) for _, kept in chosen]
    third = own.heads * own.head_dim
    qkv = [torch.cat([kept + part * third for part in range(3)]) for kept in heads]
    return _Places(hidden, neurons, heads, groups, qkv)


def _heads(scores_A: Tensor, own: Sizes, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """The query heads that stay, group by group, and the groups."""
    scores_GS = scores_A.view(own.groups, -1)
    groups = _best(scores_GS.sum(dim=1), sizes.groups)
    each = sizes.heads // sizes.groups
    heads = [group * scores_GS.shape[1] + _best(scores_GS[group], each) for group in groups.tolist()]
    return torch.cat(heads), groups


def _best(scores: Tensor, count: int) -> Tensor:
    """The places of the ``count`` highest scores in ascending order; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _channels(kept: Tensor, width: int) -> Tensor:
    return (kept[:, None] * width + torch.arange(width)).flatten()


def _narrower(family: Family, config: Any, sizes: Sizes) -> Any:
    narrower = copy.deepcopy(config)
    narrower.hidden_size = sizes.hidden
    narrower.num_attention_heads = sizes.heads
    setattr(narrower, family.neurons_key, sizes.neurons)
    if family.grouped:
        narrower.num_key_value_heads = sizes.groups
    if family.free_heads:
        narrower.head_dim = sizes.head_dim
    # By way of what is saved, so that sizes that a saved config can't express are noticed now.
    return type(config).from_dict(narrower.to_dict())


def _narrow(family: Family, core: nn.Module, name: str, value: Tensor, places: _Places) -> Tensor:
    axes, layer = family.axes_of(core, name)
    for dimension, axis in enumerate(axes):
        if axis is not None:
            value = value.index_select(dimension, places.along(axis, layer).to(value.device))
    return value
