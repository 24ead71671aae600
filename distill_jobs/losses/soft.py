"""Soft losses: how far the student's distribution is from the teacher's, both softened by T.

Shapes: N positions, V classes that the teacher told apart, K head entries. ``z`` are the student's logits over T, ``t``
the teacher's probabilities at T, ``s`` the student's.
"""

from typing import Any

import torch
from torch import Tensor

from distill_jobs.errors import VocabularyError
from distill_jobs.store.blocks import by_blocks
from distill_jobs.store.signal import TeacherSignal


def forward_kl(logits: Tensor, signal: TeacherSignal, temperature: float) -> Tensor:
    """KL(teacher_T ‖ student_T) at each position (Hinton et al. 2015), without the factor T².

    Without draws the tail is one bucket on both sides: Σ_head t·log(t/s) + t_tail·log(t_tail/s_tail), with s_tail the
    student's whole mass outside the head. That is a lower bound of the full KL, 0 only where head and tail mass agree.
    With draws they stand for the tail: Σ_head t·log(t/s) + Σ_tail t·log t - Σ_draws w·log s, w from
    ``TeacherSignal.draws_at``: unbiased at T = 1, of value and gradient (a single position may come out below 0). Above
    T = 1, where draws grow noisy, it is the mean of both, weighed by ``TeacherSignal.trust_at``. A head is never
    renormalised.

    Args:
        logits: [N, V'] with V' ≥ V; columns beyond the teacher's classes are padding and take no part.
        signal: the teacher at the same N positions.

    Returns:
        [N], in nats.

    Raises:
        VocabularyError: the student has fewer classes than the teacher.
    """
    logits = real_classes(logits, signal.classes)
    head, tail = signal.at(temperature)
    head = head.to(logits.dtype)
    if signal.head_ids is None:
        student = torch.log_softmax(logits / temperature, dim=-1)
        return _cross(head, head - student).sum(dim=-1)
    if signal.draw_ids is not None and temperature <= 1:
        return _drawn(logits, signal, head, temperature)
    if tail is None:
        tail = torch.full_like(head[:, 0], -torch.inf)
    bucketed: Tensor = _SparseKL.apply(logits, signal.head_ids, head, tail.to(logits.dtype), temperature)  # type: ignore[no-untyped-call]
    if signal.draw_ids is None:
        return bucketed
    trust = signal.trust_at(temperature).to(logits.dtype)
    return trust * _drawn(logits, signal, head, temperature) + (1 - trust) * bucketed


def _drawn(logits: Tensor, signal: TeacherSignal, head: Tensor, temperature: float) -> Tensor:
    """The KL with draws in the tail's place, [N]."""
    assert signal.head_ids is not None
    assert signal.draw_ids is not None
    ids = torch.cat([signal.head_ids, signal.draw_ids], dim=1)
    target = torch.cat([head, signal.draws_at(temperature).to(head.dtype)], dim=1)
    crossed: Tensor = _CrossEntropy.apply(logits, ids, target, temperature)  # type: ignore[no-untyped-call]
    return crossed - signal.entropy_at(temperature).to(head.dtype)


def real_classes(logits: Tensor, classes: int) -> Tensor:
    """The columns of real classes; padding columns behind them are dropped, as if masked."""
    if logits.shape[-1] < classes:
        raise VocabularyError(
            f"the student gives {logits.shape[-1]} logits but the teacher told {classes} classes apart; use a student "
            "with the teacher's classes or vocabulary"
        )
    return logits[:, :classes]


class _CrossEntropy(torch.autograd.Function):
    """-Σ_i t_i·log s_i over few classes ``ids`` [N, E], which may repeat, with Σ t = 1 a row; ``target`` holds log t.

    d / d z_v = s_v - t_v. Keeps nothing of size [N, V] but the logits and their gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, target: Tensor, temperature: float) -> Tensor:
        total = torch.empty_like(target[:, 0])

        def log_masses(rows: slice) -> None:
            total[rows] = torch.logsumexp(logits[rows] / temperature, dim=-1)

        by_blocks(log_masses, logits)
        ctx.save_for_backward(logits, ids, target, total)
        ctx.temperature = temperature
        return _cross(target, total[:, None] - logits.gather(1, ids) / temperature).sum(dim=-1)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        logits, ids, target, total = ctx.saved_tensors
        scale = (upstream[0] / ctx.temperature)[:, None]
        gradient = torch.empty_like(logits)
        # Of a target that adds up to 1 - ε the gradient still adds up to 0, as that of a KL does.
        mass = target.exp().sum(dim=-1, keepdim=True) * scale

        def softmax(rows: slice) -> None:
            torch.div(logits[rows], ctx.temperature, out=gradient[rows]).sub_(total[rows, None]).exp_().mul_(mass[rows])

        by_blocks(softmax, logits)
        return gradient.scatter_add_(1, ids, -target.exp() * scale), None, None, None


class _SparseKL(torch.autograd.Function):
    """The bucketed KL in blocks of rows, which keeps nothing of size [N, V] but the logits and their gradient.

    d KL / d z_v = s_v - t_v on the head, and s_v - t_tail·(s_v / s_tail) off it: the softmax over the tail alone is
    formed there directly, so that a vanishing s_tail loses no digits.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, head: Tensor, tail: Tensor, temperature: float) -> Tensor:
        inside = torch.empty_like(tail)
        outside = torch.empty_like(tail)

        def log_masses(rows: slice) -> None:
            z = logits[rows] / temperature
            inside[rows] = torch.logsumexp(z.gather(1, ids[rows]), dim=-1)
            outside[rows] = torch.logsumexp(z.scatter_(1, ids[rows], -torch.inf), dim=-1)

        by_blocks(log_masses, logits)
        total = torch.logaddexp(inside, outside)
        student = logits.gather(1, ids) / temperature - total[:, None]
        ctx.save_for_backward(logits, ids, head, tail, outside, total)
        ctx.temperature = temperature
        return _cross(head, head - student).sum(dim=-1) + _cross(tail, tail - (outside - total))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, ids, head, tail, outside, total = ctx.saved_tensors
        scale = (upstream[0] / ctx.temperature)[:, None]
        gradient = torch.empty_like(logits)
        # Off the head, s_v - t_tail·s_v/s_tail = exp(z_v - outside)·(s_tail - t_tail).
        off_head = (outside - total).exp() - tail.exp()
        on_head = ((logits.gather(1, ids) / ctx.temperature - total[:, None]).exp() - head.exp()) * scale
        # Where the head is everything, no class is off it.
        outside = outside.masked_fill(torch.isneginf(outside), 0.0)

        def off_head_gradient(rows: slice) -> None:
            softmax = torch.div(logits[rows], ctx.temperature, out=gradient[rows]).sub_(outside[rows, None]).exp_()
            softmax.mul_(off_head[rows, None] * scale[rows])

        by_blocks(off_head_gradient, logits)
        return gradient.scatter_(1, ids, on_head.to(gradient.dtype)), None, None, None, None


def _cross(log_weight: Tensor, value: Tensor) -> Tensor:
    """exp(log_weight)·value, and 0 where the weight is 0 even if the value is not finite."""
    weight = log_weight.exp()
    return torch.where(weight > 0, weight * value, torch.zeros((), dtype=value.dtype, device=value.device))
