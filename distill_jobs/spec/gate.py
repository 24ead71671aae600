"""The part of a job spec that says what a student is spared of a teacher who is wrong. Imports neither torch nor ray.

What each gate is, and the papers, stand in ``losses/gates.py`` and ``losses/GATES.md``.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from distill_jobs.spec.base import Named, Part, TwoParts

Chance = Annotated[float, Field(ge=0.0, le=1.0)]
Task = Literal["causal_lm", "classification"]


class NoGate(Part):
    """The teacher as it is."""


class Drop(Part):
    """No soft part where the teacher is confidently wrong, by three limits that all have to be met.

    ``confidence`` is the least probability of its likeliest class, ``gold`` the greatest of the right one, ``entropy``
    the greatest in nats. Left out they go by the task, as the audit's do. Classification: 0.9, 1 and no limit. Language
    models: 0, 0.001 and 1, since a text is one sample of what could have been said, and only a teacher who is sure of
    other words is wrong about it.
    """

    confidence: Chance | None = None
    gold: Chance | None = None
    entropy: Annotated[float, Field(ge=0.0)] | None = None

    def of(self, task: Task) -> "Drop":
        """The same with the task's limits in the place of those that are left out; no entropy means no limit."""
        language = task == "causal_lm"
        confidence, gold, entropy = (0.0, 0.001, 1.0) if language else (0.9, 1.0, None)
        return Drop(
            confidence=confidence if self.confidence is None else self.confidence,
            gold=gold if self.gold is None else self.gold,
            entropy=entropy if self.entropy is None else self.entropy,
        )


class Downweight(Part):
    """The soft part weighs (p of the right class / p of the likeliest class)^``power``."""

    power: Annotated[float, Field(gt=0.0)] = 1.0


class Swap(Part):
    """The right class and the likeliest exchange their probabilities."""


class Revise(Part):
    """Where the teacher is wrong, its distribution is mixed with the label until the right class leads.

    At ``eta`` 1 it is just on par with the teacher's likeliest; the smaller ``eta``, the more the label weighs.
    """

    eta: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8


class Refined(TwoParts):
    """Refined logit distillation: ``alpha`` times the confidence's part and ``beta`` times the correlation's."""

    what: ClassVar[str] = "rld"


class Selective(Part):
    """The soft part counts where the student's own guess is among the teacher's ``k`` likeliest, elsewhere ``rejected``
    of it does."""

    k: Annotated[int, Field(gt=0)] = 1
    rejected: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0


class Gate(Named):
    """The gate, by its name or as ``{name: {arguments}}``."""

    what: ClassVar[str] = "gate"
    none: NoGate | None = None
    drop: Drop | None = None
    downweight: Downweight | None = None
    swap: Swap | None = None
    revise: Revise | None = None
    rld: Refined | None = None
    selective: Selective | None = None

    def of(self, task: Task) -> "Gate":
        """The same with nothing left to the task."""
        return Gate(drop=self.drop.of(task)) if self.drop is not None else self

    def inputs(self) -> dict[str, Any]:
        """What a student depends on; nothing of the gate that lets everything through."""
        if self.none is not None:
            return {}
        return {"gate": {"name": self.kind, **self.chosen.model_dump(mode="json")}}

    def clash(self, loss: str, standardise: bool) -> str | None:
        """Why it can't be joined with a soft loss; None where it can."""
        if self.rld is not None and loss != "forward_kl":
            return f"gate rld is a loss of its own and leaves no place for loss {loss}: give one of them"
        if self.revise is not None and standardise:
            return (
                "gate revise changes how far apart the teacher's logits are, which standardise takes out: give one of "
                "them, or gate swap, which moves no scale"
            )
        return None

    def refusal(self, codec: str, arguments: dict[str, Any], classes: int | None = None) -> str | None:
        """Why a store of this codec, or of so few classes, can't serve it; None where it can."""
        if self.selective is None:
            return None
        k = self.selective.k
        if classes is not None and k >= classes:
            return f"gate selective with k {k} stops nothing among {classes} classes: lower k"
        known = {"dense": k, "sampled": 1}.get(codec, arguments.get("head", arguments.get("k", k)))
        if known < k:
            return (
                f"gate selective asks for the teacher's {k} likeliest classes, but capture.codec {codec} keeps {known} "
                f"of them: lower k, or capture with a longer head"
            )
        return None


NO_GATE = Gate(none=NoGate())


class GateComparison(Part):
    """What of ``audit`` is about gates; ``Audit`` has this key.

    Each gate named here is trained beside the student, seed by seed, as an arm ``gate-<name>`` that differs from it in
    the gate alone.
    """

    gates: tuple[Gate, ...] = ()

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        names = [gate.kind for gate in self.gates]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"gates names {twice} twice: its arms would be one and the same")
        return self
