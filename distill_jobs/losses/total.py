"""The one convention: L = (1-α)·CE(student, hard) + α·T²·KL(teacher_T ‖ student_T).

Every other soft loss takes the place of the KL and keeps α; ``SoftLoss.scale`` says what takes the place of T². Behind
a gate each position has an α of its own, α times the share w that the gate leaves it: what the soft part loses the hard
label gets, and the mean stays one over all positions that the mask keeps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill_jobs.errors import VocabularyError
from distill_jobs.losses.kinds import FORWARD_KL, SoftLoss
from distill_jobs.losses.soft import real_classes
from distill_jobs.store.signal import TeacherSignal

PLAIN = SoftLoss(FORWARD_KL)


@dataclass(frozen=True)
class LossParts:
    """The loss of some positions, as means over them.

    Attributes:
        total: scalar to call ``backward`` on. It may be not finite: then stop before the optimizer moves.
        hard: cross-entropy with the right classes, detached.
        soft: the soft loss times its scale (T² for most), detached; 0 where alpha is 0, because it was not computed.
            Behind a gate each position counts with the share that it keeps.
        positions: how many positions the means are over.
        gated: the share of positions at which a gate changed something, detached; None without a gate.
        features: the feature loss without its weight, detached; None where there is none.
    """

    total: Tensor
    hard: Tensor
    soft: Tensor
    positions: int
    gated: Tensor | None = None
    features: Tensor | None = None


def distillation_loss(
    logits: Tensor,
    labels: Tensor,
    signal: TeacherSignal | None,
    alpha: float,
    temperature: float,
    soft: SoftLoss = PLAIN,
    classes: int | None = None,
) -> LossParts:
    """(1-α)·CE + α·scale·soft loss, means over N positions (all of them scored: keep no -100 among the labels).

    With ``alpha`` 0 the signal is not looked at (it may be None), nor is a gate, and what is computed is plain
    cross-entropy. With ``alpha`` 1 and no gate the cross-entropy is reported but has no gradient. Half-precision logits
    are taken to float32.

    Args:
        logits: [N, V'], perhaps wider than the real classes.
        labels: [N] int64.
        signal: the teacher at the same positions.
        soft: what takes the place of the KL, behind its gate.
        classes: number of real classes, for the case that there is no signal to tell; default all columns.

    Raises:
        VocabularyError: the student has fewer classes than the teacher, or there is no signal where one is needed.
        SpecError: the soft loss needs every class, and the signal holds only some.
    """
    real = signal.classes if signal is not None else classes or logits.shape[-1]
    logits = real_classes(logits, real)
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    count = len(labels)
    if count == 0:
        nothing = logits.sum() * 0.0
        return LossParts(nothing, nothing.detach(), nothing.detach(), 0)
    if alpha > 0 and signal is not None and not soft.gate.stands_open:
        return _gated_loss(logits, labels, signal, alpha, temperature, soft)
    hard = torch.nn.functional.cross_entropy(logits if alpha < 1 else logits.detach(), labels)
    if alpha == 0:
        return LossParts(hard, hard.detach(), torch.zeros_like(hard.detach()), count)
    if signal is None:
        raise VocabularyError(f"alpha is {alpha:g}, so the loss needs the teacher's signal, but none was given")
    softened = soft.scale(temperature) * soft(logits, signal, temperature, labels).mean()
    total = softened if alpha == 1 else (1 - alpha) * hard + alpha * softened
    return LossParts(total, hard.detach(), softened.detach(), count)


def _gated_loss(
    logits: Tensor, labels: Tensor, signal: TeacherSignal, alpha: float, temperature: float, soft: SoftLoss
) -> LossParts:
    gated = soft.gate(signal, labels, logits.detach().argmax(dim=-1) if soft.gate.kind.asks_student else None)
    hard_N = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    soft_N = soft.scale(temperature) * soft(logits, gated.signal, temperature, labels)
    total, softened = weighed(hard_N, soft_N, alpha, gated.weight)
    touched = gated.touched.to(hard_N.dtype).mean()
    return LossParts(total.mean(), hard_N.detach().mean(), softened.detach().mean(), len(labels), touched)


def weighed(hard: Tensor, soft: Tensor, alpha: float, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """(1-αw)·hard + αw·soft and w·soft at each position, [N] each; a part without weight adds nothing, even if it is
    not finite.

    Args:
        weight: [N], w; None for 1.
    """
    share = torch.ones_like(hard) if weight is None else weight.to(hard.dtype)
    kept = torch.where(share > 0, share * soft, 0.0)
    own = 1.0 - alpha * share
    return torch.where(own > 0, own * hard, 0.0) + alpha * kept, kept
