"""What a job is for: the question that its verdict answers. Imports neither torch nor ray."""

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from distill_jobs.spec.base import OneOf, Part, Positive

Limit = Annotated[float, Field(gt=0)]


class Aim(Part):
    """What all goals share: ``margin``, the smallest difference in quality that matters to you.

    Of accuracy for classifiers (0.002 is 0.2 percentage points), nats a token for language models. Gains that are shown
    to be smaller count as none.
    """

    margin: Annotated[float, Field(ge=0)] = 0.0


class Deploy(Aim):
    """Serve within limits: milliseconds for one row (median), MB of weights and activations, US dollars a million rows.

    ``hardware`` is a part of the name of what the limits hold on; without it what ``evaluate`` runs on.
    ``requests_per_month`` says how soon what is saved in serving pays for distillation.
    """

    latency_ms: Limit | None = None
    memory_mb: Limit | None = None
    usd_per_million: Limit | None = None
    hardware: str | None = None
    requests_per_month: Limit | None = None

    @model_validator(mode="after")
    def _some_limit(self) -> Self:
        if self.latency_ms is self.memory_mb is self.usd_per_million is None:
            raise ValueError("deploy needs a limit: give latency_ms, memory_mb or usd_per_million")
        return self


class Accuracy(Aim):
    """The best quality, whatever it costs to serve."""


class Iterate(Aim):
    """Get from an idea to a trained model quickly: ``runs`` students are trained before teacher or data change."""

    runs: Positive = 10


class Goal(OneOf):
    """One of the three; without one ``distill advise`` takes ``accuracy``."""

    what: ClassVar[str] = "goal"
    deploy: Deploy | None = None
    accuracy: Accuracy | None = None
    iterate: Iterate | None = None
