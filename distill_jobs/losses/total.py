"""The one convention: L = (1-α)·CE(student, hard) + α·T²·KL(teacher_T ‖ student_T).

Every other soft loss takes the place of the KL and keeps α; ``SoftLoss.scale`` says what takes the place of T².
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
        positions: how many positions the means are over.
    """

    total: Tensor
    hard: Tensor
    soft: Tensor
    positions: int


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

    With ``alpha`` 0 the signal is not looked at (it may be None), and what is computed is plain cross-entropy. With
    ``alpha`` 1 the cross-entropy is reported but has no gradient. Half-precision logits are taken to float32.

    Args:
        logits: [N, V'], perhaps wider than the real classes.
        labels: [N] int64.
        signal: the teacher at the same positions.
        soft: what takes the place of the KL.
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
    hard = torch.nn.functional.cross_entropy(logits if alpha < 1 else logits.detach(), labels)
    if alpha == 0:
        return LossParts(hard, hard.detach(), torch.zeros_like(hard.detach()), count)
    if signal is None:
        raise VocabularyError(f"alpha is {alpha:g}, so the loss needs the teacher's signal, but none was given")
    softened = soft.scale(temperature) * soft(logits, signal, temperature, labels).mean()
    total = softened if alpha == 1 else (1 - alpha) * hard + alpha * softened
    return LossParts(total, hard.detach(), softened.detach(), count)
