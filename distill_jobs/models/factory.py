"""A model from the user's own code: ``module:callable``.

What it returns is called as ``forward(features)`` or ``forward(pixels)``, as ``forward(input_ids=…, attention_mask=…)``
for texts (mask [B, L]), and as ``forward(input_ids=…, attention_mask=…, position_ids=…)`` for documents, where the
mask is bool [B, 1, L, L], causal and within each document; keywords that it doesn't take are left out. It returns
logits or an object with ``.logits``.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from distill_jobs.data.facts import DataFacts
from distill_jobs.errors import ModelError
from distill_jobs.models.brought import see_working_directory
from distill_jobs.models.scorer import flat


def factory_origin(target: str, args: dict[str, Any], facts: DataFacts) -> dict[str, Any]:
    """The target and all arguments of the call: the user's, and the data's sizes that its signature takes.

    Those are ``classes`` (how many), ``feature_width``, ``image_shape``, ``sequence_length`` and ``vocabulary``.
    """
    sizes = {
        "classes": len(facts.classes) or None,
        "feature_width": facts.feature_width,
        "image_shape": list(facts.image_shape) if facts.image_shape else None,
        "sequence_length": facts.sequence_length,
        "vocabulary": facts.vocabulary,
    }
    taken = _parameters(find_factory(target))
    given = {k: v for k, v in sizes.items() if k in taken and v is not None}
    return {"kind": "factory", "target": target, "args": {**given, **args}}


def revive(origin: dict[str, Any]) -> nn.Module:
    """Call the factory. Raises ModelError when it can't be found, fails, or returns something else."""
    target = origin["target"]
    function = find_factory(target)
    try:
        made = function(**origin["args"])
    except Exception as error:
        raise ModelError(f"factory {target} failed: {type(error).__name__}: {flat(error)}") from None
    if not isinstance(made, nn.Module):
        raise ModelError(f"factory {target} returned {type(made).__name__}; it must return a torch.nn.Module")
    return made


def find_factory(target: str) -> Callable[..., Any]:
    """Import what ``module:callable`` names; modules are also looked for in the working directory."""
    module, _, name = target.partition(":")
    see_working_directory()
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        missing = "it" if error.name == module else f"module {error.name}, which it imports,"
        raise ModelError(
            f"can't import the factory {target}: {missing} is not installed and not in the working directory"
        ) from None
    except Exception as error:
        raise ModelError(f"can't import the factory {target}: {type(error).__name__}: {flat(error)}") from None
    if not callable(found):
        raise ModelError(f"can't use the factory {target}: module {module} has no callable {name}")
    return found  # type: ignore[no-any-return]


def _parameters(function: Callable[..., Any]) -> set[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return set()
    return {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
