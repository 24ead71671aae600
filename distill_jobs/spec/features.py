"""The parts of a job spec about features: what layers of the teacher give, stored, and layers of the student taught.

Imports neither torch nor ray.
"""

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from distill_jobs.spec.base import Part, Positive

LayerName = Annotated[str, Field(min_length=1)]


class StoredFeatures(Part):
    """What named layers of the teacher give, kept in the store beside the soft target.

    ``layers`` are names of the teacher's modules (``named_modules()``). Each gives ``width`` numbers a position, by a
    random orthogonal projection that ``seed`` fixes (at the layer's own width a rotation, which loses nothing), in
    ``bits`` each and 4 bytes of scale.
    """

    layers: Annotated[tuple[LayerName, ...], Field(min_length=1)]
    width: Positive = 64
    bits: Literal[8, 16] = 8
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.layers)) != len(self.layers):
            raise ValueError("layers names a layer twice")
        return self


class MatchedFeatures(Part):
    """A feature loss beside the others: ``weight`` times its mean over ``pairs``, {student's layer: teacher's layer}.

    ``mse`` and ``cosine`` compare by way of a linear layer for each pair, which is trained with the student and not
    saved with it; ``cka`` compares without.
    """

    weight: Annotated[float, Field(gt=0)] = 0.1
    loss: Literal["mse", "cosine", "cka"] = "mse"
    pairs: Annotated[dict[LayerName, LayerName], Field(min_length=1)]

    @property
    def layers(self) -> tuple[str, ...]:
        """The teacher's layers, each once."""
        return tuple(dict.fromkeys(self.pairs.values()))

    def refusal(self, stored: StoredFeatures | None) -> str | None:
        """Why what is stored can't serve it; None where it can."""
        if stored is None:
            return "distill.features learns from layers of the teacher: name them in capture.features.layers"
        missing = [name for name in self.layers if name not in stored.layers]
        if not missing:
            return None
        there = known(missing[0], stored.layers)
        return f"distill.features.pairs names the teacher's {missing[0]}, but capture.features.layers {there}"


def known(name: str, names: Iterable[str]) -> str:
    """``has a, b, c``: those of ``names`` that are nearest to ``name``, for a message about one that isn't there."""
    every = list(names)
    near = difflib.get_close_matches(name, every, n=3, cutoff=0.3) or every[:3]
    return f"has {', '.join(near)}{' and others' if len(every) > len(near) else ''}"


def inputs_of(features: StoredFeatures | MatchedFeatures | None) -> dict[str, Any]:
    """What a stage depends on; nothing where there are no features, so that no digest changes."""
    return {} if features is None else {"features": features.model_dump(mode="json")}
