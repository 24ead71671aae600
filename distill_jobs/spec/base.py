"""What every part of the spec shares: frozen, typed, no unknown keys; and 'exactly one of these keys' groups."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Precision = Literal["auto", "fp32", "bf16", "fp16"]


class Part(BaseModel):
    """A part of the spec: frozen, strict in its types, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class OneOf(Part):
    """A mapping that must carry exactly one of its keys, for example ``model: {mlp: {...}}``."""

    what: ClassVar[str] = "choice"

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            names = ", ".join(type(self).model_fields)
            raise ValueError(f"give exactly one {self.what} of: {names} (found: {', '.join(given) or 'none'})")
        return self

    @property
    def kind(self) -> str:
        """The key that was given."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def chosen(self) -> Any:
        """The value of the key that was given."""
        return getattr(self, self.kind)


class Named(OneOf):
    """One that may be given by its name alone, with its defaults: ``swap`` for ``{swap: {}}``."""

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {value: {}} if isinstance(value, str) else value


Sparse = Literal["exact", "bucket", "refused"]


class LossArguments(Part):
    """What a soft loss takes: its arguments as fields, with defaults and ranges, and what it asks of a store.

    ``sparse`` says what it makes of a codec that keeps only some classes. ``exact``: draws, where there are any, stand
    for the others without bias at T = 1. ``bucket``: the others are one class on both sides, a lower bound of the whole
    loss. ``refused``: it needs every class.
    """

    needs_labels: ClassVar[bool] = False
    sparse: ClassVar[Sparse] = "bucket"


class TwoParts(LossArguments):
    """A loss of two parts, ``alpha`` times the one about the right class and ``beta`` times the one about others."""

    needs_labels: ClassVar[bool] = True
    what: ClassVar[str]
    alpha: Annotated[float, Field(ge=0.0)] = 1.0
    beta: Annotated[float, Field(ge=0.0)] = 8.0

    @model_validator(mode="after")
    def _some_weight(self) -> Self:
        if self.alpha == 0 and self.beta == 0:
            raise ValueError(f"{self.what} with alpha 0 and beta 0 is no loss; give one of them some weight")
        return self
