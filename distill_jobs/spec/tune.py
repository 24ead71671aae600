"""The parts of a job spec that say how settings are searched, and what only the baseline is trained with."""

import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from distill_jobs.spec.base import OneOf, Part, Positive
from distill_jobs.spec.train import Train

Finite = Annotated[float, Field(allow_inf_nan=False)]
Range = tuple[Finite, Finite]


class Values(OneOf):
    """What one key of the spec may be: a number from a range, evenly or evenly in its logarithm, or one of a list."""

    what: ClassVar[str] = "kind of range"
    uniform: Range | None = None
    log_uniform: Range | None = None
    integer: tuple[int, int] | None = None
    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.kind == "choice":
            return self
        low, high = self.chosen
        if not low < high:
            raise ValueError(f"a range goes from a lower to a higher end, not from {low} to {high}")
        if self.kind == "log_uniform" and low <= 0:
            raise ValueError(f"log_uniform needs ends above 0, not {low}")
        return self


class Halving(Part):
    """End trials early (ASHA): they meet at the shares ``grace``, ``grace``·``reduction``, … of their training, and
    whoever is not among the best 1/``reduction`` there ends. ``looks`` at the validation split are made in each trial,
    where ``student.train`` does not say how often."""

    grace: Annotated[float, Field(gt=0, le=1)] = 0.25
    reduction: Annotated[float, Field(gt=1)] = 3.0
    looks: Positive = 8


SEARCH = {
    "distill.temperature": Values(uniform=(1.0, 8.0)),
    "distill.alpha": Values(uniform=(0.0, 1.0)),
    "student.train.learning_rate": Values(log_uniform=(1e-4, 1e-2)),
}
"""What is searched where ``tune.search`` does not say."""


class Tune(Part):
    """``distill tune``: ``search`` says by dotted path which values to try, in ``trials`` trainings of the student.

    ``baseline`` gives the no-teacher baseline as many trials, over what is searched of ``student.train``. The best
    ``finalists`` of each, and the settings as they are in the spec, are then trained with all ``seeds`` of the job, and
    the best mean wins. ``concurrent`` trials run at a time; ``auto``: as many as the cluster has room for. ``metric``
    is what is scored on the validation split; by default accuracy for classification, nll for language models.
    """

    search: Annotated[dict[str, Values], Field(min_length=1)] = SEARCH
    trials: Positive = 20
    concurrent: Positive | Literal["auto"] = "auto"
    early_stopping: Halving | None = Halving()
    seed: Annotated[int, Field(ge=0)] = 0
    baseline: bool = True
    finalists: Positive = 3
    metric: Literal["accuracy", "nll"] | None = None


class Baseline(Part):
    """What the no-teacher baseline is trained with, as keys of ``train``, where that differs from ``student.train``."""

    SHARED: ClassVar[frozenset[str]] = frozenset({"epochs", "steps", "batch_size"}) | Train.RESOURCES

    train: dict[str, Any] = {}

    @model_validator(mode="after")
    def _same_budget(self) -> Self:
        shared = sorted(self.SHARED & self.train.keys())
        if shared:
            raise ValueError(
                f"a baseline has the budget of the student and runs where it does: remove {', '.join(shared)} from "
                f"baseline.train"
            )
        return self

    def train_of(self, student: Train) -> Train:
        """The student's training with what is given here in its place.

        Raises:
            ValidationError: that is no valid training.
        """
        return Train.model_validate_json(json.dumps(_merged(student.model_dump(mode="json"), self.train)))


def _merged(base: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in other.items():
        before = merged.get(key)
        merged[key] = _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged
