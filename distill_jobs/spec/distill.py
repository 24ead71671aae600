"""The part of a job spec that says what the student learns by: loss, alpha and T. Imports neither torch nor ray."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from distill_jobs.spec.base import LossArguments, Named, Part, Sparse, TwoParts
from distill_jobs.spec.features import MatchedFeatures, inputs_of
from distill_jobs.spec.gate import NO_GATE, Gate
from distill_jobs.spec.reading import Mix
from distill_jobs.spec.teachers import Teachers


class ForwardKL(LossArguments):
    """KL(teacher ‖ student)."""

    sparse: ClassVar[Sparse] = "exact"


class ReverseKL(LossArguments):
    """KL(student ‖ teacher)."""


class JensenShannon(LossArguments):
    """beta·KL(teacher ‖ m) + (1-beta)·KL(student ‖ m), m the mixture with beta of the teacher."""

    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5


class SkewForwardKL(LossArguments):
    """KL(teacher ‖ mixture with ``skew`` of the teacher)."""

    skew: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1


class SkewReverseKL(LossArguments):
    """KL(student ‖ mixture with ``skew`` of the student)."""

    skew: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1


class AdaptiveKL(LossArguments):
    """Forward and reverse KL, weighed by where student and teacher differ; ``mu`` of the mass is the head."""

    mu: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5


class TotalVariation(LossArguments):
    """Half the sum of the absolute differences."""


class Decoupled(TwoParts):
    """``alpha`` times the KL of right against wrong, and ``beta`` times the KL among the wrong classes."""

    what: ClassVar[str] = "decoupled"


class Mse(LossArguments):
    """Squared differences of centred logits; T plays no part in it."""

    sparse: ClassVar[Sparse] = "refused"


class Loss(Named):
    """The soft loss, by its name or as ``{name: {arguments}}``. What each is stands in ``losses/divergences.py``."""

    what: ClassVar[str] = "loss"
    forward_kl: ForwardKL | None = None
    reverse_kl: ReverseKL | None = None
    jensen_shannon: JensenShannon | None = None
    skew_forward_kl: SkewForwardKL | None = None
    skew_reverse_kl: SkewReverseKL | None = None
    adaptive_kl: AdaptiveKL | None = None
    total_variation: TotalVariation | None = None
    decoupled: Decoupled | None = None
    mse: Mse | None = None

    def refusal(self, codec: str) -> str | None:
        """Why a store of this codec can't serve the loss; None where it can."""
        if self.chosen.sparse != "refused" or codec == "dense":
            return None
        return refusal(self.kind, f"capture.codec {codec}")


def refusal(loss: str, codec: str) -> str:
    """What to say where ``loss`` needs every class and ``codec`` doesn't keep them."""
    return (
        f"distill.loss {loss} compares all classes one by one, but {codec} keeps only some of them: capture with codec "
        f"dense, or choose another loss"
    )


class Schedule(Part):
    """A value that moves over a student's optimizer steps, from its first step's (``from``) to its last one's (``to``).

    ``linear`` and ``cosine`` move all the time. ``wsd`` stays until the learning rate decays, and goes with it: where a
    third of the decay is left, a third of the way is.
    """

    # What is written out can be read again.
    model_config = ConfigDict(serialize_by_alias=True)

    schedule: Literal["constant", "linear", "cosine", "wsd"]

    @model_validator(mode="after")
    def _constant_stays(self) -> Self:
        if self.schedule == "constant" and self.ends[0] != self.ends[1]:
            raise ValueError(f"a constant schedule does not move, but goes from {self.ends[0]:g} to {self.ends[1]:g}")
        return self

    @property
    def ends(self) -> tuple[float, float]:
        """The values of the first and of the last step."""
        raise NotImplementedError


Warmth = Annotated[float, Field(ge=0.5, le=10.0)]
Weight = Annotated[float, Field(ge=0.0, le=1.0)]


class TemperatureSchedule(Schedule):
    """T over training."""

    start: Warmth = Field(alias="from")
    to: Warmth

    @property
    def ends(self) -> tuple[float, float]:
        return self.start, self.to


class AlphaSchedule(Schedule):
    """Alpha over training."""

    start: Weight = Field(alias="from")
    to: Weight

    @property
    def ends(self) -> tuple[float, float]:
        return self.start, self.to


def _which(value: Any) -> str:
    return "<schedule>" if isinstance(value, (dict, Schedule)) else "<number>"


# The tags are no names of keys, so that no error message takes them for such.
Temperature = Annotated[
    Annotated[Warmth, Tag("<number>")] | Annotated[TemperatureSchedule, Tag("<schedule>")], Discriminator(_which)
]
Alpha = Annotated[
    Annotated[Weight, Tag("<number>")] | Annotated[AlphaSchedule, Tag("<schedule>")], Discriminator(_which)
]
Moving = float | Schedule
"""A number, or how it moves."""


def greatest(value: Moving) -> float:
    """The largest value that it takes."""
    return max(value.ends) if isinstance(value, Schedule) else value


class Distill(Teachers):
    """``L = (1-alpha)·CE(student, hard) + alpha·T²·KL(teacher_T ‖ student_T)``, or another ``loss`` in the KL's place.

    ``temperature`` and ``alpha`` are numbers or schedules, ``{schedule: linear, from: 4, to: 1}``. ``standardise``
    compares z-scores of the logits, so that the student need not match the teacher's scale. ``gate`` spares the student
    what the teacher gets wrong. ``mix`` names further stores; the job's own gives the samples that their shares leave.
    ``teachers`` names several that are mixed row by row. With ``soft_labels: live`` there is no store: the teacher says
    the same beside the student, in actors. ``features`` adds a loss on what layers give; see ``capture.features``.
    """

    temperature: Temperature = 2.0
    alpha: Alpha = 0.9
    loss: Loss = Loss(forward_kl=ForwardKL())
    standardise: bool = False
    gate: Gate = NO_GATE
    soft_labels: Literal["store", "live"] = "store"
    mix: tuple[Mix, ...] = ()
    features: MatchedFeatures | None = None

    @model_validator(mode="after")
    def _mix_leaves_own(self) -> Self:
        taken = sum(other.share for other in self.mix)
        if taken > 0.999:
            raise ValueError(f"the shares in mix add up to {taken:g}; leave the job's own store at least 0.001")
        return self

    @model_validator(mode="after")
    def _gate_fits(self) -> Self:
        clash = self.gate.clash(self.loss.kind, self.standardise)
        if clash:
            raise ValueError(clash)
        return self

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.mix and self.teachers:
            raise ValueError("mix adds rows and teachers adds what is said of rows: give one of them")
        if self.soft_labels == "live" and (self.mix or self.teachers):
            raise ValueError(
                f"soft_labels live asks the job's own teacher only: remove {'mix' if self.mix else 'teachers'}"
            )
        if self.features and self.teachers:
            raise ValueError(
                "features are those of the job's own teacher, and several teachers share no layer: remove features or "
                "teachers"
            )
        return self

    def behind(self, gate: Gate) -> "Distill":
        """The same in all but the gate."""
        return self.model_copy(update={"gate": gate})

    def refusal(self, codec: str, arguments: dict[str, Any], classes: int | None = None) -> str | None:
        """Why a store of this codec, and of so many classes, can't serve loss and gate; None where it can."""
        return self.loss.refusal(codec) or self.gate.refusal(codec, arguments, classes)

    @property
    def follows_learning_rate(self) -> bool:
        """Whether T or alpha moves as the learning rate decays."""
        return any(isinstance(v, Schedule) and v.schedule == "wsd" for v in (self.temperature, self.alpha))

    def inputs(self) -> dict[str, Any]:
        """What a student depends on, in plain values. Defaults that came later are left out, and no digest changes."""
        tree = self.model_dump(mode="json", include={"temperature", "alpha"})
        if self.loss.kind != "forward_kl":
            tree["loss"] = {"name": self.loss.kind, **self.loss.chosen.model_dump(mode="json")}
        if self.teachers:
            tree["teachers"] = [teacher.model_dump(mode="json") for teacher in self.teachers]
            tree["by_label"] = self.by_label
        if self.soft_labels == "live":
            tree["soft_labels"] = "live"
        tree |= inputs_of(self.features)
        return tree | ({"standardise": True} if self.standardise else {}) | self.gate.inputs()
