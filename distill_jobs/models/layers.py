"""A student cut from its teacher: a copy with only some of the layers, for decoders and encoders of any kind."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from distill_jobs.errors import ModelError
from distill_jobs.models.huggingface import said

_NUMBERS = ("layer_idx", "layer_id", "layer_index", "training")


def cut_layers(teacher: nn.Module, layers: Sequence[int]) -> nn.Module:
    """A new model of the teacher's architecture whose layer i is a copy of the teacher's layer ``layers[i]``.

    Embeddings, norms and head are copied whole; tied weights stay tied.

    Raises:
        ModelError: there is no such layer, or the architecture's layers can't be told apart or exchanged.
    """
    config = teacher.config
    count = getattr(config, "num_hidden_layers", None)
    stacks = _stacks(teacher, count)
    if not isinstance(count, int) or not stacks:
        raise ModelError(f"can't cut layers from a {type(teacher).__name__}: it has no list of layers of its own")
    beyond = [index for index in layers if not 0 <= index < count]
    if beyond:
        raise ModelError(f"the teacher has {count} layers, numbered 0 to {count - 1}; there is no layer {beyond[0]}")
    kept = list(layers)
    with said(f"can't cut layers from a {type(teacher).__name__}"):
        # The weights are all copied in below, so what the fresh model starts from doesn't matter.
        student: nn.Module = type(teacher)._from_config(_shorter(config, kept, count))  # type: ignore[attr-defined]
        student.load_state_dict(_renumbered(teacher.state_dict(), student.state_dict(), stacks, kept))
    for stack in stacks:
        _check_same(teacher.get_submodule(stack), student.get_submodule(stack), kept)
    return student.train(teacher.training)


def _stacks(model: nn.Module, count: Any) -> list[str]:
    """The names of the lists that hold one entry a layer; lists within such an entry (experts) are not meant."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{stack}.") for stack in found)
        if isinstance(module, nn.ModuleList) and len(module) == count and not inside:
            found.append(name)
    return found


def _shorter(config: Any, kept: list[int], count: int) -> Any:
    shorter = copy.deepcopy(config)
    for key, value in vars(config).items():
        # One entry a layer (layer_types and the like), or numbers of layers (mlp_only_layers and the like).
        if not isinstance(value, list | tuple) or key == "architectures":
            continue
        if len(value) == count:
            setattr(shorter, key, type(value)(value[index] for index in kept))
        elif key.endswith(("_layers", "_idxs")) and all(isinstance(entry, int) for entry in value):
            setattr(shorter, key, type(value)(place for place, index in enumerate(kept) if index in value))
    shorter.num_hidden_layers = len(kept)
    # By way of what is saved, so that a pattern that a saved config can't express is noticed now.
    return type(config).from_dict(shorter.to_dict())


def _renumbered(
    old: dict[str, Tensor], new: dict[str, Tensor], stacks: list[str], kept: list[int]
) -> dict[str, Tensor]:
    def source(key: str) -> str:
        for stack in stacks:
            if key.startswith(f"{stack}."):
                place, rest = key.removeprefix(f"{stack}.").split(".", 1)
                return f"{stack}.{kept[int(place)]}.{rest}"
        return key

    strange = [key for key in new if source(key) not in old]
    if strange:
        raise ModelError(
            f"the teacher's layers can't be exchanged: {strange[0]} has no counterpart {source(strange[0])} in it; "
            f"choose layers of the same pattern"
        )
    return {key: old[source(key)] for key in new}


def _check_same(old: nn.Module, new: nn.Module, kept: list[int]) -> None:
    """A layer that behaves otherwise in its new place (by its number's parity, say) would be a silent mistake."""
    assert isinstance(old, nn.ModuleList) and isinstance(new, nn.ModuleList)
    for place, index in enumerate(kept):
        for name, part in old[index].named_modules():
            twin = new[place].get_submodule(name)
            if type(part) is not type(twin) or _traits(part) != _traits(twin):
                raise ModelError(
                    f"the teacher's layer {index} would behave otherwise as the student's layer {place} "
                    f"({name or type(part).__name__} depends on its place): choose layers of the same pattern"
                )


def _traits(module: nn.Module) -> dict[str, Any]:
    return {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str) and not key.startswith("_") and key not in _NUMBERS
    }
