"""Teacher and student over the same cells: what all soft losses but the forward KL with draws are computed from.

A *cell* is one class, or the bucket of all classes that the store does not know one by one. In a dense store every
class is a cell. In a sparse one the cells are the head, the different classes that were drawn, the right class where a
loss asks for it, and one bucket for the rest, on both sides. A divergence between distributions over cells is a lower
bound of the one between the distributions themselves (data processing inequality), the tighter the more classes were
drawn. Without draws it is 0 wherever head and tail mass agree; with draws, in expectation over them, only where student
and teacher agree in full, because every class may be drawn. Nothing is renormalised over what happens to be known.

Shapes: N positions, V classes that the teacher told apart, K head entries, D draws, E single cells.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill_jobs.losses.tail_rows import log_partition
from distill_jobs.store.blocks import by_blocks
from distill_jobs.store.codecs.base import FLOOR
from distill_jobs.store.signal import TeacherSignal
from distill_jobs.store.tail import is_empty

LEAST = -64.0
"""The least log mass of a teacher's cell, where the store's own codes end: no logarithm is infinite."""

ROUNDED = (0.001, 0.014)
"""How far off the mass of a single cell outside the head is, as a share of it: a constant, and a slope in the root of
its distance from the likeliest of them, in nats. About what the rounding of the draws' codes leaves open."""


@dataclass(frozen=True)
class Cells:
    """Two distributions over the same cells, at some temperature.

    Attributes:
        teacher: [N, E] or [N, E + 1], log masses, none below ``LEAST``; without a gradient.
        student: the same shape. A place that stands for no cell holds ``LEAST`` on both sides: no divergence sees it.
        gold: [N] int64, the cell of the right class, where the loss needs labels.
        bucket: whether the last cell is the bucket of unknown classes.
        top: [N], the teacher's log mass of its likeliest class, where the loss needs labels.
        unsorted: [N] of bool, whether the bucket may hold classes that the teacher finds likelier than the right one,
            where the loss needs labels.
    """

    teacher: Tensor
    student: Tensor
    gold: Tensor | None
    bucket: bool
    top: Tensor | None = None
    unsorted: Tensor | None = None


def make_cells(
    logits: Tensor,
    signal: TeacherSignal,
    temperature: float,
    softness: Tensor | None = None,
    labels: Tensor | None = None,
) -> Cells:
    """The cells of a signal at T, with the student's log masses differentiable by its logits.

    For a sparse signal nothing of size [N, V] is kept but the logits and their gradient; for a dense one each step of a
    divergence keeps its own, as autograd does.

    Args:
        logits: [N, V], real classes only.
        signal: the teacher at the same positions.
        temperature: softens the student.
        softness: [N], the teacher's temperature at each position, where it is not ``temperature``.
        labels: [N] int64, for losses that need the right class as a cell.
    """
    warmth = torch.full_like(signal.entropy, temperature) if softness is None else softness
    if signal.head_ids is None:
        teacher = torch.log_softmax(signal.head_logprob / warmth[:, None], dim=-1).clamp(min=LEAST)
        teacher = teacher.to(logits.dtype)
        sorted_all = torch.zeros_like(signal.entropy, dtype=torch.bool)
        student = torch.log_softmax(logits / temperature, dim=-1)
        return Cells(teacher, student, labels, False, teacher.amax(dim=-1), sorted_all)
    ids, alive, logprob = single_classes(signal, labels)
    known = (logprob / warmth[:, None]).masked_fill(~alive, -torch.inf)
    tail = _tail(signal, temperature if softness is None else warmth)
    width = signal.head_logprob.shape[1]
    total = torch.logaddexp(torch.logsumexp(known[:, :width], dim=-1), tail)
    known = known - total[:, None]
    beyond = known[:, width:]
    log_scale, rest = _split(tail - total, beyond, alive.sum(dim=-1) < signal.classes)
    beyond -= log_scale[:, None]
    teacher = torch.cat([known, rest[:, None]], dim=1).clamp(min=LEAST)
    masses: Tensor = _CellMasses.apply(logits, _only_alive(ids, alive), alive, temperature)  # type: ignore[no-untyped-call]
    teacher = teacher.to(logits.dtype)
    if labels is None:
        return Cells(teacher, masses, None, True)
    gold = (alive & (ids == labels[:, None])).int().argmax(dim=-1)
    best = known[:, :width].amax(dim=-1) if width else _top1(signal) / warmth - total
    likelier = (alive & (logprob > signal.gold_logprob[:, None])).sum(dim=-1)
    # A head holds the likeliest: with the right class in it, all that is likelier is known.
    unsorted = (gold >= width) & (signal.gold_rank > likelier)
    return Cells(teacher, masses, gold, True, best.to(logits.dtype), unsorted)


def single_classes(signal: TeacherSignal, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, whether a place stands for a class (each class once), and log-probabilities at T = 1: [N, E] each.

    The head comes first, then the right class where it is asked for, then draws in rising order.
    """
    assert signal.head_ids is not None
    ids, logprob = [signal.head_ids], [signal.head_logprob]
    alive = [torch.ones_like(signal.head_ids, dtype=torch.bool)]
    if labels is not None:
        gold = labels[:, None]
        ids.append(gold)
        logprob.append(signal.gold_logprob[:, None])
        alive.append(~(signal.head_ids == gold).any(dim=-1, keepdim=True))
    if signal.draw_ids is not None:
        assert signal.draw_logprob is not None
        assert signal.tail_nodes is not None
        # Out of an empty tail nothing was drawn, whatever stands there.
        drawn = (signal.draw_logprob > FLOOR / 2) & ~is_empty(signal.tail_nodes)[:, None]
        if signal.draw_counts is not None:
            drawn &= signal.draw_counts > 0
        # Places that were not used, or hold no mass, go behind all classes, where they are no class's repeat.
        places, order = torch.where(drawn, signal.draw_ids, signal.classes).sort(dim=-1)
        fresh = places < signal.classes
        fresh[:, 1:] &= places[:, 1:] != places[:, :-1]
        if labels is not None:
            fresh &= places != labels[:, None]
        ids.append(places.clamp(max=signal.classes - 1))
        logprob.append(signal.draw_logprob.gather(1, order))
        alive.append(fresh)
    return torch.cat(ids, dim=1), torch.cat(alive, dim=1), torch.cat(logprob, dim=1)


def _top1(signal: TeacherSignal) -> Tensor:
    """[N], the log-probability at T = 1 of the likeliest class of a signal without a head."""
    assert signal.top1_logprob is not None
    return signal.top1_logprob


def _tail(signal: TeacherSignal, temperature: float | Tensor) -> Tensor:
    """[N], log Σ_tail p^(1/T), -inf without a tail."""
    if signal.tail_nodes is None:
        return torch.full_like(signal.entropy, -torch.inf)
    if isinstance(temperature, Tensor):
        return log_partition(signal.tail_nodes, 1.0 / temperature)
    return signal.tail_at(temperature)


def _split(tail: Tensor, beyond: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    """Share the tail's mass out between single cells outside the head and the bucket.

    Args:
        tail: [N], log of the tail's whole mass.
        beyond: [N, E - K], log masses of the single cells outside the head, -inf for a place that is none.
        more: [N] of bool, whether there are classes that are no single cell.

    Returns:
        the log of what to divide those single cells by (0 but where rounding makes them hold nearly all of the tail or
        more), and the log of the bucket's mass.
    """
    share = (beyond - tail[:, None]).exp().nan_to_num(nan=0.0)
    constant, slope = ROUNDED
    away = (beyond.amax(dim=-1, keepdim=True) - beyond if beyond.shape[1] else beyond).nan_to_num(nan=0.0, posinf=0.0)
    least = (share * (constant + slope * away.sqrt())).sum(dim=-1)
    share = share.sum(dim=-1)
    left = torch.where(more, torch.maximum(1.0 - share, least), 0.0)
    log_scale = (share + left).log().nan_to_num(neginf=0.0)
    return log_scale, torch.where(torch.isneginf(tail), tail, tail + left.log() - log_scale)


def _only_alive(ids: Tensor, alive: Tensor) -> Tensor:
    """``ids`` [N, E] with each place that stands for no class pointed at one that does, where the row has any."""
    some = ids.gather(1, alive.int().argmax(dim=-1, keepdim=True))
    return torch.where(alive, ids, some)


class _CellMasses(torch.autograd.Function):
    """The student's log masses of the cells, [N, E + 1], in blocks of rows.

    d log s_i / d z_v = [v = i] - s_v, and for the bucket [v in it]·s_v / s_bucket - s_v. Keeps nothing of size [N, V]
    but the logits and their gradient. The softmax over the bucket is formed directly, so that a vanishing bucket loses
    no digits.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, alive: Tensor, temperature: float) -> Tensor:
        outside = torch.empty_like(logits[:, 0])
        known = logits.gather(1, ids) / temperature
        # Where no place of a row is alive its ids are no cells either.
        cells = alive.any(dim=-1, keepdim=True)
        cut = torch.where(cells, -torch.inf, known)

        def log_masses(rows: slice) -> None:
            z = logits[rows] / temperature
            outside[rows] = torch.logsumexp(z.scatter_(1, ids[rows], cut[rows]), dim=-1)

        by_blocks(log_masses, logits)
        known = known.masked_fill(~alive, -torch.inf)
        total = torch.logaddexp(torch.logsumexp(known, dim=-1), outside)
        masses = torch.cat([known, outside[:, None]], dim=1) - total[:, None]
        ctx.save_for_backward(logits, ids, alive, masses, outside)
        ctx.temperature = temperature
        return masses.masked_fill(torch.isneginf(masses), LEAST)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        logits, ids, alive, masses, outside = ctx.saved_tensors
        real = ~torch.isneginf(masses)
        wanted = upstream[0].masked_fill(~real, 0.0) / ctx.temperature
        flow = wanted - wanted.sum(dim=-1, keepdim=True) * masses.exp()
        outside = outside.masked_fill(torch.isneginf(outside), 0.0)
        gradient = torch.empty_like(logits)

        def bucket_gradient(rows: slice) -> None:
            share = torch.div(logits[rows], ctx.temperature, out=gradient[rows]).sub_(outside[rows, None]).exp_()
            share.mul_(flow[rows, -1:])

        by_blocks(bucket_gradient, logits)
        cells = alive.any(dim=-1, keepdim=True)
        gradient.scatter_(1, ids, torch.where(cells, 0.0, gradient.gather(1, ids)))
        return gradient.scatter_add_(1, ids, flow[:, :-1].masked_fill(~alive, 0.0)), None, None, None
