"""The right class as an entry of a sparse signal's head, for gates that change what it gets.

Nothing else about the distribution changes: what the right class had in the tail leaves the tail, and the head's least
entry, which makes room for it, goes there. Shapes: N positions, K head entries, M tail nodes, D draws.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distill_jobs.store import tail
from distill_jobs.store.codecs.base import FLOOR
from distill_jobs.store.signal import TeacherSignal

_ALL_BUT = 2.0**-9
"""A tail keeps so much of what its log-partition says, though the right class alone should have all of it: about what
the rounding of the stored numbers leaves open."""


def gold_place(signal: TeacherSignal, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the right class is in the head [N] of bool, and at which place [N] int64 (0 where it is not)."""
    assert signal.head_ids is not None
    if not signal.head_ids.shape[1]:
        return torch.zeros_like(labels, dtype=torch.bool), torch.zeros_like(labels)
    match = signal.head_ids == labels[:, None]
    return match.any(dim=-1), match.int().argmax(dim=-1)


def with_gold(signal: TeacherSignal, labels: Tensor, rows: Tensor) -> TeacherSignal:
    """The same distribution with the right class in the head, at the positions ``rows`` [N] of bool.

    A signal of every class comes back as it is. A signal without a head gets one, of the right class alone, at every
    position. Draws that fell on the right class are not used, so that the others are fewer: a bias of the order of 1/D.
    The entry that leaves the head counts among the draws as often as makes its share exact at T = 1. Where all draws of
    a headless signal fell on the right class, nothing stands for the rest of its tail.
    """
    if signal.head_ids is None:
        return signal
    gold = torch.where(signal.gold_rank >= 0, signal.gold_logprob, FLOOR)
    if not signal.head_ids.shape[1]:
        return _headed(signal, labels, gold)
    inside, _ = gold_place(signal, labels)
    moved = rows & ~inside
    least = signal.head_logprob.argmin(dim=-1, keepdim=True)
    out_ids, out = signal.head_ids.gather(1, least), signal.head_logprob.gather(1, least)
    changes: dict[str, Any] = {
        "head_ids": signal.head_ids.scatter(1, least, torch.where(moved[:, None], labels[:, None], out_ids)),
        "head_logprob": signal.head_logprob.scatter(1, least, torch.where(moved[:, None], gold[:, None], out)),
    }
    assert signal.tail_nodes is not None
    rest = _without(signal.tail_nodes, gold)
    joined = torch.logaddexp(rest, _betas(rest) * out.double()).clamp(min=tail.NO_TAIL).float()
    changes["tail_nodes"] = torch.where(moved[:, None], joined, signal.tail_nodes)
    if signal.draw_ids is not None:
        assert signal.draw_logprob is not None
        counts = _counts(signal, labels, moved)
        # At T = 1 a draw stands for its share of the counts: out's is to be p_out of what the tail holds now.
        at_one = rest[:, tail.TAIL_BETAS.index(1.0)].float()[:, None]
        others = counts.sum(dim=-1, keepdim=True)
        own = torch.where(others > 0, others * (out - at_one).clamp(max=60.0).exp(), 1.0)
        changes["draw_ids"] = torch.cat([signal.draw_ids, out_ids], dim=1)
        changes["draw_logprob"] = torch.cat([signal.draw_logprob, out], dim=1)
        changes["draw_counts"] = torch.cat([counts, own * moved[:, None]], dim=1)
    return replace(signal, **changes)


def _headed(signal: TeacherSignal, labels: Tensor, gold: Tensor) -> TeacherSignal:
    assert signal.tail_nodes is not None
    return replace(
        signal,
        head_ids=labels[:, None],
        head_logprob=gold[:, None],
        tail_nodes=_without(signal.tail_nodes, gold).clamp(min=tail.NO_TAIL).float(),
        draw_counts=None if signal.draw_ids is None else _counts(signal, labels, torch.ones_like(labels) > 0),
    )


def _counts(signal: TeacherSignal, labels: Tensor, rows: Tensor) -> Tensor:
    """[N, D], how often each class was drawn, at ``rows`` without the right class."""
    assert signal.draw_ids is not None
    assert signal.draw_logprob is not None
    counts = torch.ones_like(signal.draw_logprob) if signal.draw_counts is None else signal.draw_counts
    return counts.masked_fill(rows[:, None] & (signal.draw_ids == labels[:, None]), 0.0)


def _without(nodes: Tensor, gold: Tensor) -> Tensor:
    """[N, M] float64, the log-partitions of a tail that has lost a class of log-probability ``gold`` [N]."""
    whole = nodes.double()
    share = (_betas(nodes) * gold.double()[:, None] - whole).exp().clamp(max=1.0 - _ALL_BUT)
    return whole + torch.log1p(-share)


def _betas(like: Tensor) -> Tensor:
    return torch.tensor(tail.TAIL_BETAS, dtype=torch.float64, device=like.device)
