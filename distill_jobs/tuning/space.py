"""The search space: from dotted paths of the spec to Optuna's distributions, and from what is proposed back to jobs.

Optuna is given plain numbers and text. A choice is the JSON text of its value as the spec reads it, so that a value
may be a whole part of the spec, and ``forward_kl`` and ``{forward_kl: {}}`` are one choice.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from distill_jobs.errors import SpecError
from distill_jobs.inputs import inputs_of, learnt
from distill_jobs.spec import Job, parse_job
from distill_jobs.spec.load import place
from distill_jobs.spec.tune import Baseline, Values

Parameters = dict[str, Any]
"""By dotted path what Optuna proposed: numbers, and choices as JSON text."""
Settings = dict[str, Any]
"""By dotted path the values as the spec has them."""

_TRAIN = "student.train."


@dataclass(frozen=True)
class Space:
    """What is searched for one role.

    Attributes:
        job: what the values are put into.
        role: ``student``, or ``baseline``, whose values go to ``baseline.train``.
        search: the values to try by dotted path.
    """

    job: Job
    role: str
    search: Mapping[str, Values]

    def distributions(self) -> dict[str, Any]:
        """Optuna's distributions by path."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        found: dict[str, Any] = {}
        for path, values in self.search.items():
            if values.kind == "choice":
                found[path] = CategoricalDistribution(self._choices[path])
            elif values.kind == "integer":
                found[path] = IntDistribution(*values.chosen)
            else:
                found[path] = FloatDistribution(*values.chosen, log=values.kind == "log_uniform")
        return found

    def settings(self, parameters: Parameters) -> Settings:
        """What is proposed as values of the spec; numbers from a range to four digits."""
        return {path: self._value(path, value) for path, value in parameters.items()}

    def parameters(self) -> Parameters:
        """The job's own values, as if Optuna had proposed them; without those that it has not."""
        tree = _tree(self.job)
        own = {path: _at(tree, self._place(path)) for path in self.search}
        own = {path: _at(tree, path) if value is None else value for path, value in own.items()}
        choices = {path for path, values in self.search.items() if values.kind == "choice"}
        return {p: _text(v) if p in choices else v for p, v in own.items() if v is not None or p in choices}

    def apply(self, settings: Settings) -> Job:
        """The job with these values.

        Raises:
            SpecError: they don't go together, or with the rest of the job.
        """
        tree = _tree(self.job)
        for path, value in settings.items():
            if not place(tree, self._place(path), value):
                raise SpecError(f"there is no such place in the spec as {path}")
        return parse_job(tree, ", ".join(f"{path}={_short(value)}" for path, value in settings.items()))

    def ends(self, path: str) -> list[Any]:
        """Values that stand for all: both ends of a range, or each choice."""
        values = self.search[path]
        return (
            [self._value(path, text) for text in self._choices[path]] if values.kind == "choice" else [*values.chosen]
        )

    @cached_property
    def _choices(self) -> dict[str, list[str]]:
        found = {}
        for path, values in self.search.items():
            if values.kind == "choice":
                texts = (_text(_at(_tree(self.apply({path: value})), self._place(path))) for value in values.chosen)
                found[path] = list(dict.fromkeys(texts))
        return found

    def _place(self, path: str) -> str:
        return path if self.role == "student" else "baseline." + path.removeprefix("student.")

    def _value(self, path: str, proposed: Any) -> Any:
        values = self.search[path]
        if values.kind == "choice":
            return json.loads(proposed)
        if values.kind == "integer" or not isinstance(proposed, float):
            return proposed
        low, high = values.chosen
        short = float(f"{proposed:.4g}")
        return min(high, max(low, short)) if low <= proposed <= high else proposed


def student_space(job: Job, search: Mapping[str, Values]) -> Space:
    """The student's search, checked.

    Raises:
        SpecError: a path or a value is wrong, or another value would need another capture, or change nothing.
    """
    # Arms that compare gates are no part of a trial, and one of them may be what a trial's student is.
    space = Space(job.model_copy(update={"audit": job.audit.model_copy(update={"gates": ()})}), "student", search)
    for path in search:
        try:
            others = [space.apply({path: value}) for value in space.ends(path)]
        except SpecError as error:
            raise SpecError(f"tune.search.{path}: {error}") from None
        if any(_captured(other) != _captured(job) and _recaptures(job, other) for other in others):
            raise SpecError(
                f"tune.search.{path} changes the data, the teacher or its capture, but all trials train from the one "
                f"store: search among what the student learns by (distill, student), or give {path} one value"
            )
        if any(other.distill.soft_labels != "store" for other in others):
            raise SpecError(f"tune.search.{path}: all trials train from the one store, so soft_labels must be store")
        if all(learnt(other) == learnt(job) for other in others):
            raise SpecError(f"tune.search.{path} changes nothing that a student learns by: remove it")
    return space


def baseline_space(job: Job, search: Mapping[str, Values]) -> Space:
    """What of a search is the baseline's own: how it is trained, beyond its budget, which is the student's.

    Args:
        job: with the student's best settings.
    """
    own = {
        path: values
        for path, values in search.items()
        if path.startswith(_TRAIN) and path.removeprefix(_TRAIN).split(".")[0] not in Baseline.SHARED
    }
    return Space(job, "baseline", own)


def told(settings: Settings) -> str:
    """Settings in one line."""
    return ", ".join(f"{path.rpartition('.')[2]} {_short(value)}" for path, value in settings.items())


def _captured(job: Job) -> list[Any]:
    """The parts of the spec that a capture can depend on."""
    return [job.task, job.data, job.teacher, job.capture]


def _recaptures(job: Job, other: Job) -> bool:
    """Whether ``other`` needs another capture. It digests data and weights, so it is asked only where it may."""
    return inputs_of(other)["capture"] != inputs_of(job)["capture"]


def _tree(job: Job) -> dict[str, Any]:
    return job.model_dump(mode="json", exclude_none=True)


def _at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _short(value: Any) -> str:
    if isinstance(value, dict) and len(value) == 1:
        [(name, rest)] = value.items()
        return name if not rest else f"{name} {json.dumps(rest)}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
