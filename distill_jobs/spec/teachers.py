"""The part of a job spec that says whom a student learns from, where that is not the job's own store alone."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from distill_jobs.spec.base import Part

Weight = Annotated[float, Field(ge=0.0)]


class TeacherStore(Part):
    """One of several teachers: its logit ``store`` over the same rows, or the job's own where none is named.

    Weights count relative to each other, row by row: ``weight``, times what ``slices`` says of the row's own values,
    as in ``slices: {language: {de: 2.0, en: 0.5}}``. A value that is not named leaves the weight as it is. ``data``
    names the data where they hold the store's images.
    """

    store: str | None = None
    data: str | None = None
    weight: Weight = 1.0
    slices: dict[str, dict[str, Weight]] = {}


ByLabel = Literal["right", "probability"]
"""``right``: at each position the teachers that put the right class first share it by their weights, and where none
does the one that gives it most. ``probability``: weights times what each gives the right class. Positions without a
right class go by the weights alone."""


class Teachers(Part):
    """What of ``distill`` is about several teachers; ``Distill`` has these keys."""

    teachers: tuple[TeacherStore, ...] = ()
    by_label: ByLabel | None = None

    @model_validator(mode="after")
    def _teachers_fit(self) -> Self:
        if not self.teachers:
            if self.by_label is not None:
                raise ValueError("by_label chooses between teachers: name them in distill.teachers")
            return self
        own = [teacher for teacher in self.teachers if teacher.store is None]
        if len(own) != 1 or len(self.teachers) < 2:
            raise ValueError(
                f"teachers needs the job's own, an entry without store, once, and at least one other (found: "
                f"{len(own)} of its own and {len(self.teachers) - len(own)} others)"
            )
        if not any(teacher.weight for teacher in self.teachers):
            raise ValueError("no teacher has any weight")
        return self
