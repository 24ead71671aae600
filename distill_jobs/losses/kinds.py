"""What a soft loss is, and what the spec makes of one."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from distill_jobs.errors import SpecError
from distill_jobs.losses import divergences, soft
from distill_jobs.losses.cells import make_cells
from distill_jobs.losses.gates import Gate
from distill_jobs.losses.standardise import standardise
from distill_jobs.spec.base import LossArguments, Sparse
from distill_jobs.spec.distill import ForwardKL, refusal
from distill_jobs.store.signal import TeacherSignal


@dataclass(frozen=True)
class Kind:
    """One line of ``LOSSES``.

    Attributes:
        divergence: (cells, **arguments) -> [N], see ``divergences``.
        arguments: what it takes, with defaults and ranges, and what it asks of a store.
        direct: (logits, signal, T) -> [N], which takes the divergence's place where logits are not standardised.
        power: the value is multiplied by T to this power, so that its gradient does not shrink as T grows.
    """

    divergence: Callable[..., Tensor]
    arguments: type[LossArguments]
    direct: Callable[[Tensor, TeacherSignal, float], Tensor] | None = None
    power: int = 2

    @property
    def name(self) -> str:
        """As in ``LOSSES`` and in the spec."""
        return self.divergence.__name__

    @property
    def needs_labels(self) -> bool:
        """Whether it depends on the right class."""
        return self.arguments.needs_labels

    @property
    def sparse(self) -> Sparse:
        """What it makes of a signal that holds only some classes."""
        return self.arguments.sparse


@dataclass(frozen=True)
class SoftLoss:
    """A soft loss with its arguments, ready to be computed. Plain data: it can be sent to a gang.

    Attributes:
        kind: its line of ``LOSSES``.
        arguments: as the spec has them.
        standardise: whether z-scores of the logits are compared in their place.
        gate: what stands before it. Whoever asks for the loss asks the gate first: it also weighs the hard labels.
    """

    kind: Kind
    arguments: LossArguments = field(default_factory=ForwardKL)
    standardise: bool = False
    gate: Gate = field(default_factory=Gate)

    def __call__(
        self, logits: Tensor, signal: TeacherSignal, temperature: float, labels: Tensor | None = None
    ) -> Tensor:
        """The loss at each position, [N], before it is multiplied by ``scale``.

        Args:
            logits: [N, V'], the student's; columns beyond the teacher's classes are padding and take no part.
            signal: the teacher at the same positions.
            temperature: T, in [0.5, 10].
            labels: [N] int64, the right classes.

        Raises:
            VocabularyError: the student has fewer classes than the teacher.
            SpecError: the loss needs every class, and the signal holds only some.
        """
        if self.kind.sparse == "refused" and signal.head_ids is not None:
            raise SpecError(refusal(self.kind.name, "the store's codec"))
        logits = soft.real_classes(logits, signal.classes)
        gold = labels if self.kind.needs_labels else None
        if self.standardise:
            logits, softness = standardise(logits, signal, temperature)
            cells = make_cells(logits, signal, 1.0, softness, gold)
        elif self.kind.direct is not None:
            return self.kind.direct(logits, signal, temperature)
        else:
            cells = make_cells(logits, signal, temperature, None, gold)
        return self.kind.divergence(cells, **self.arguments.model_dump())

    def scale(self, temperature: float) -> float:
        """What multiplies it in the total loss: T², but for losses that say otherwise."""
        return temperature**self.kind.power

    @property
    def is_forward_kl(self) -> bool:
        """Whether it is the plain forward KL, for which there are kernels made by hand."""
        return self.kind.direct is soft.forward_kl and not self.standardise


FORWARD_KL = Kind(divergences.forward_kl, ForwardKL, direct=soft.forward_kl)
