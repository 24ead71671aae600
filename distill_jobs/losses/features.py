"""Losses on what layers give: a student's layer against a teacher's, position by position or as a whole.

Shapes: N positions, D numbers of the student, K of the teacher; D = K where a loss is ``aligned``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = 1e-12


@dataclass(frozen=True)
class FeatureKind:
    """One line of ``FEATURE_LOSSES``.

    Attributes:
        compare: (student [N, D], teacher [N, K]) -> a scalar, the mean over positions. 0 without positions.
        aligned: whether it compares number by number, so that a trained linear layer has to bring the student's D to
            the teacher's K first.
    """

    compare: Callable[[Tensor, Tensor], Tensor]
    aligned: bool = True

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss, in float32 at least; a zero that reaches all of the student's parameters where N is 0."""
        student = student.float() if student.dtype in (torch.float16, torch.bfloat16) else student
        return self.compare(student, teacher.to(student.dtype)) if len(student) else student.sum() * 0.0


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Σ_k (s_k - t_k)² / K: the hint of FitNets (Romero et al. 2015), as a mean over K, without their factor ½.

    It goes with the square of the features' magnitude, which differs from layer to layer: look at the loss part and
    choose the weight by it.
    """
    return (student - teacher).square().mean()


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - s·t / (‖s‖‖t‖): the angle between hidden states, as DistilBERT has it (Sanh et al. 2019)."""
    return (1.0 - torch.nn.functional.cosine_similarity(student, teacher, dim=1, eps=1e-8)).mean()


def cka(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - ‖SᵀT‖² / (‖SᵀS‖ ‖TᵀT‖), Frobenius norms of centred S [N, D] and T [N, K]: linear CKA (Kornblith et al. 2019).

    It compares which positions are like which, and so needs no layer in between and takes any two widths: rotating or
    scaling either side changes nothing. It is about the positions of one micro-batch of one worker, and is averaged
    over those: another ``micro_batch`` is another loss. One position has nothing to be compared with, and costs 0.
    """
    if len(student) < 2:
        return student.sum() * 0.0
    student, teacher = student - student.mean(dim=0), teacher - teacher.mean(dim=0)
    # Scaled first, so that fourth powers neither vanish nor overflow.
    student, teacher = (x / x.norm().clamp(min=_TINY) for x in (student, teacher))
    shared = (student.T @ teacher).square().sum()
    own = (student.T @ student).norm() * (teacher.T @ teacher).norm()
    like: Tensor = shared / own.clamp(min=_TINY)
    return 1.0 - like
