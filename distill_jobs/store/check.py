"""What is wrong with a teacher's signal: promises that no single value can break, but several together can.

Shapes: N positions, K head entries, M tail nodes, D draws.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from distill_jobs.store.signal import TeacherSignal
from distill_jobs.store.tail import TAIL_BETAS, is_empty

MASS_TOLERANCE = 0.02
"""fp16 rounds a log-probability near -16 by up to 0.008, and so the mass of a flat distribution."""

_DEEPEST = -60.0  # The statistics end at 64 nats, and there a head's codes are coarse.


def check_signal(signal: TeacherSignal, gold: Tensor) -> Iterator[str]:
    """One sentence for each kind of fault.

    Args:
        signal: of positions that are all scored.
        gold: [N] int64, their right classes.
    """
    if not len(signal):
        return
    yield from _head(signal)
    yield from _statistics(signal, gold)
    if signal.tail_nodes is not None:
        yield from _tail(signal.tail_nodes)
    if signal.draw_ids is not None:
        yield from _draws(signal, signal.draw_ids)


def _head(signal: TeacherSignal) -> Iterator[str]:
    mass = signal.head_logprob.double().exp().sum(dim=-1)
    if signal.tail_nodes is not None:
        mass = mass + signal.tail_at(1.0).double().exp()
    if not float((mass - 1).abs().max()) <= MASS_TOLERANCE:
        yield f"probabilities add up to {float(mass[(mass - 1).abs().argmax()]):.4g}, not 1"
    if signal.head_ids is not None and signal.head_ids.shape[1]:
        ids = signal.head_ids.sort(dim=-1).values
        if bool((ids[:, 1:] == ids[:, :-1]).any()):
            yield "a class stands twice in one head"
        if int(ids.max()) >= signal.classes:
            yield f"class ids reach {int(ids.max())}, but there are {signal.classes} classes"


def _statistics(signal: TeacherSignal, gold: Tensor) -> Iterator[str]:
    if bool((signal.gold_rank < 0).any()):
        yield "positions that are scored have no gold rank"
    if int(signal.gold_rank.max()) >= signal.classes:
        yield f"gold ranks reach {int(signal.gold_rank.max())}, but there are {signal.classes} classes"
    if bool((signal.entropy < 0).any()) or bool((signal.entropy > np.log(signal.classes) + 1e-2).any()):
        yield f"an entropy lies outside 0 … log {signal.classes}"
    if bool((signal.gold_logprob > 0).any()):
        yield "a gold log-probability is above 0"
    inside, logprob = _in_head(signal, gold)
    # Rounding is coarser the deeper an entry lies, and deep down it is cut off.
    logprob, stored = logprob.clamp(min=_DEEPEST), signal.gold_logprob.clamp(min=_DEEPEST)
    if bool((inside & ~((stored - logprob).abs() <= 0.05 + 0.01 * logprob.abs())).any()):
        yield "a gold log-probability is not the one that the head gives to the right class"


def _in_head(signal: TeacherSignal, gold: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the head holds the class ``gold`` [N], and its log-probability there."""
    if signal.head_ids is None:
        return torch.ones_like(gold, dtype=torch.bool), signal.head_logprob.gather(1, gold[:, None])[:, 0]
    here = signal.head_ids == gold[:, None]
    return here.any(dim=-1), torch.where(here, signal.head_logprob, 0.0).sum(dim=-1)


def _tail(nodes: Tensor) -> Iterator[str]:
    slopes = nodes.diff(dim=-1) / torch.tensor(TAIL_BETAS, device=nodes.device).diff()
    held = ~is_empty(nodes)
    # f(β) = log Σ p^β falls with β and is convex; the tolerance is that of its stored steps over the shortest interval.
    if bool((held & ((slopes > 0.05).any(dim=-1) | (slopes.diff(dim=-1) < -0.05).any(dim=-1))).any()):
        yield "a tail's log-partitions are not those of any distribution"


def _draws(signal: TeacherSignal, ids: Tensor) -> Iterator[str]:
    assert signal.tail_nodes is not None
    held = ~is_empty(signal.tail_nodes)[:, None]
    used = held.expand_as(ids)
    if int(ids.max()) >= signal.classes:
        yield f"draws reach class {int(ids.max())}, but there are {signal.classes} classes"
        return
    if signal.draw_counts is not None:
        used = held & (signal.draw_counts > 0)
        if bool((signal.draw_counts.sum(dim=-1, keepdim=True) != ids.shape[1])[held].any()):
            yield f"counts of draws don't add up to the {ids.shape[1]} that were drawn"
        if bool((used[:, 1:] & (~used[:, :-1] | (ids[:, 1:] <= ids[:, :-1]))).any()):
            yield "draws with counts are not in rising order, each class once"
    if signal.head_ids is not None and signal.head_ids.shape[1]:
        head = signal.head_ids.sort(dim=-1).values
        at = torch.searchsorted(head, ids.contiguous()).clamp_(max=head.shape[1] - 1)
        # A tail without any mass gives nothing to draw from: what stands there counts for nothing.
        some = signal.tail_at(1.0)[:, None] > _DEEPEST
        if bool((used & some & (head.gather(1, at) == ids)).any()):
            yield "a class was drawn that the head holds"
