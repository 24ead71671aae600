"""What advice is made of: evidence with its intervals, and a verdict that cites it. Plain values, as in JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Answer = Literal["distil", "train the student alone", "keep the teacher", "not yet known"]
VERDICT = "verdict.json"


@dataclass(frozen=True)
class Estimate:
    """A number with the ends of its 95 % interval (None where there is none), and the file that it stands in."""

    value: float
    low: float | None
    high: float | None
    source: str

    @property
    def bounded(self) -> bool:
        """Whether it has an interval at all."""
        return self.low is not None and self.high is not None

    def above(self, limit: float) -> bool:
        """Whether it is shown to be more than ``limit``."""
        return self.low is not None and self.low > limit

    def at_most(self, limit: float) -> bool:
        """Whether it is shown to be no more than ``limit``."""
        return self.high is not None and self.high <= limit

    def below(self, limit: float) -> bool:
        """Whether it is shown to be less than ``limit``."""
        return self.high is not None and self.high < limit

    def reversed(self) -> "Estimate":
        """The same with the other sign."""
        low, high = (None if end is None else -end for end in (self.high, self.low))
        return Estimate(-self.value, low, high, self.source)


@dataclass(frozen=True)
class Serving:
    """How a model serves, as measured: milliseconds a row, bytes, US dollars a million rows (None: not known)."""

    latency_ms: float
    memory_bytes: float
    usd_per_million: float | None


@dataclass(frozen=True)
class Iteration:
    """What one more student takes, in US dollars by the ledger.

    Attributes:
        saved: by the teacher, in each further student: what the baseline's run costs, less what the student's costs up
            to the baseline's final quality on the validation split. Negative where it gets there later or never.
        upfront: teacher and capture.
        alone: a baseline's run.
        reached: seeds whose student gets to the baseline's final quality, of ``seeds``.
    """

    saved: Estimate
    upfront: float
    alone: float
    reached: int
    seeds: int


@dataclass(frozen=True)
class Evidence:
    """What is known about a job. Differences are in the metric's unit, and more is better whatever the metric.

    Attributes:
        metric: ``accuracy`` or ``nats a token``, what differences are counted in.
        gain: the student's over the baseline.
        behind: the teacher's lead over the student; headroom: over the baseline.
        seeds, rows: of each arm, and held out.
        tuned: T or alpha come from ``distill tune``; baseline_tuned: so does the baseline's learning rate.
        serving: by ``teacher`` and ``student``.
        hardware: what they were timed on.
        extra_usd: teacher, capture and what a student costs more than a baseline; alone_usd: a baseline.
        harm: how many times as often as the baseline the student makes the teacher's confident mistakes.
        biases: gaps between slices that distillation introduced or amplified, in words.
        iteration: for the goal ``iterate``.
        mistakes: the share of training positions at which the teacher is confidently wrong, by the store's labels.
        payback_requests: from how many requests on serving the student has paid for teacher and distillation.
        predicted: whether the money is a prediction, because nothing was run yet.
        tune_usd: what tuning would cost, about.
    """

    metric: str
    gain: Estimate | None = None
    behind: Estimate | None = None
    headroom: Estimate | None = None
    seeds: int = 0
    rows: int = 0
    tuned: bool = False
    baseline_tuned: bool = False
    serving: dict[str, Serving] = field(default_factory=dict)
    hardware: str | None = None
    extra_usd: float | None = None
    alone_usd: float | None = None
    harm: Estimate | None = None
    biases: tuple[str, ...] = ()
    iteration: Iteration | None = None
    mistakes: Estimate | None = None
    payback_requests: float | None = None
    predicted: bool = False
    tune_usd: float | None = None


@dataclass(frozen=True)
class Reason:
    """A sentence, the number that it rests on with its interval, and the file that this stands in."""

    text: str
    value: float | None
    low: float | None
    high: float | None
    source: str

    @classmethod
    def of(cls, text: str, estimate: Estimate) -> "Reason":
        return cls(text, estimate.value, estimate.low, estimate.high, estimate.source)


@dataclass(frozen=True)
class Verdict:
    """``verdict.json``: the answer for a goal, why, what speaks most against it, and what to measure next, if anything.

    ``sentence`` is the answer in a sentence; ``reasons`` come in order of weight.
    """

    answer: Answer
    goal: str
    sentence: str
    reasons: tuple[Reason, ...]
    against: Reason | None
    next: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {"schema_version": 1, **asdict(self)}
