"""A teacher's listed entries as a whole distribution: what lies outside of them is spread evenly.

Whoever stored only a list of likely classes threw the rest away. Its mass is known all the same (what the list lacks of
1); how it lies is not, so each class outside of the list gets the same share of it. Then with a tail of S classes at
log-probability s each, log Σ_tail p^β = log S + β·s at every β.
Shapes: N positions, W listed entries, K head entries, V classes.
"""

import math

import numpy as np
import torch
from torch import Tensor

from distill_jobs.errors import DataError
from distill_jobs.store.codecs.base import FLOOR
from distill_jobs.store.signal import TeacherSignal
from distill_jobs.store.tail import NO_TAIL, TAIL_BETAS

ABSENT = -1
"""In place of a class id: nothing is listed here."""

NOTHING = 1e-7
"""A remainder up to this is rounding: a sum of float32 probabilities can't be told from 1."""


def listed(ids: Tensor, values: Tensor, kind: str, classes: int, most_mass: float) -> tuple[Tensor, Tensor]:
    """Check what a file lists, and turn it into log-probabilities in falling order.

    Args:
        ids: [N, W] int64; ``ABSENT`` where nothing is listed.
        values: [N, W] float64: what ``kind`` says. Logits are normalised over the list: nobody knows the rest's mass.
        most_mass: masses above this are refused; those between 1 and this are scaled down to 1.

    Returns:
        ids and log-probabilities, both [N, W]; ``ABSENT`` entries come last, at -inf.

    Raises:
        DataError: an id is no class or stands twice at a position, a value is no number, or the mass is too large.
    """
    there = ids != ABSENT
    if bool(((ids >= classes) | (ids < ABSENT)).any()):
        raise DataError(f"class {int(ids.abs().max())} is listed, but the tokenizer has {classes} tokens")
    values = values.masked_fill(~there, -torch.inf)
    if bool(torch.isnan(values).any()) or bool((values == torch.inf).any()):
        raise DataError("a value is NaN or infinite")
    if kind == "probs":
        if bool((values[there] < 0).any()):
            raise DataError("a probability is negative; are these logprobs?")
        values = values.masked_fill(~there, 0.0).log()
    ids, values = _falling(ids, values)
    ids = ids.masked_fill(torch.isneginf(values), ABSENT)
    _refuse_twice(ids)
    total = (
        torch.logsumexp(values, dim=-1, keepdim=True) if ids.shape[1] else values.new_full((len(ids), 1), -torch.inf)
    )
    if kind == "logits":
        return ids, values - total.nan_to_num(neginf=0.0)
    worst = float(total.max()) if len(total) else 0.0
    if worst > math.log(most_mass):
        what = f"the listed probabilities of a position add up to {math.exp(min(worst, 700.0)):.4g}"
        raise DataError(f"{what}, not to at most 1; if the values are logits, say so")
    return ids, values - total.clamp(min=0.0)


def whole(ids: Tensor, logprob: Tensor, gold: Tensor, classes: int, k: int) -> TeacherSignal:
    """The distribution that ``listed`` entries stand for, with a head of K = min(k, V) entries.

    Positions that list fewer than K get classes of the tail, at the tail's even share, into their head; entries beyond
    K go into the tail's mass.

    Args:
        ids, logprob: [N, W] as ``listed`` gives them.
        gold: [N] int64, the right class; negative where there is none.
    """
    k = min(k, classes)
    ids, logprob = _width(ids, k, ABSENT), _width(logprob, k, -torch.inf)
    there = ids != ABSENT
    outside = classes - there.sum(dim=-1, keepdim=True)
    left = 1.0 - logprob.exp().sum(dim=-1, keepdim=True)
    share = torch.where((outside > 0) & (left > NOTHING), left / outside.clamp(min=1), 0.0).log()
    ids, logprob = _falling(_filled(ids), torch.where(there, logprob, share))
    tail = classes - k
    gold_logprob, gold_rank = _gold(ids, logprob, share, gold, tail)
    return TeacherSignal(
        head_ids=ids,
        head_logprob=logprob.clamp(min=FLOOR).float(),
        tail_nodes=_tail_nodes(share, tail),
        gold_logprob=gold_logprob.clamp(min=FLOOR).float(),
        gold_rank=gold_rank,
        entropy=(_entropy(logprob).sum(dim=-1) + tail * _entropy(share)[:, 0]).float(),
        classes=classes,
        top1_ids=ids[:, 0],
    )


def nothing_known(classes: int, k: int) -> TeacherSignal:
    """One position at which every class is as likely as any other: what padding holds."""
    empty = torch.zeros(1, 0)
    return whole(empty.long(), empty.double(), torch.full((1,), -1), classes, k)


def _falling(ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Both [N, W] in the order of falling values, equal ones as they were."""
    if bool((values[:, 1:] <= values[:, :-1]).all()):
        # So they come from nearly everybody, and sorting is most of the work.
        return ids, values
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return ids.gather(1, order), values


def _gold(ids: Tensor, logprob: Tensor, share: Tensor, gold: Tensor, tail: int) -> tuple[Tensor, Tensor]:
    """Log-probability and rank [N] of the right class under the stored distribution, ties not counted against it."""
    match = ids == gold[:, None]
    value = torch.where(match.any(dim=-1, keepdim=True), logprob.masked_fill(~match, -torch.inf).amax(-1, True), share)
    rank = (logprob > value).sum(dim=-1) + tail * (share > value).squeeze(1)
    none = gold < 0
    return value.squeeze(1).masked_fill(none, 0.0), rank.masked_fill(none, -1)


def _tail_nodes(share: Tensor, tail: int) -> Tensor:
    betas = torch.tensor(TAIL_BETAS, dtype=share.dtype)
    empty = torch.isneginf(share) | (tail == 0)
    nodes = math.log(max(1, tail)) + betas * share.masked_fill(empty, 0.0)
    return nodes.masked_fill(empty, NO_TAIL).float()


def _entropy(logprob: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(logprob.exp())
    return entropy


def _width(values: Tensor, k: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(values[:, :k], (0, max(0, k - values.shape[1])), value=fill)


def _filled(ids: Tensor) -> Tensor:
    """[N, K] with each ``ABSENT`` replaced by a class that the row doesn't hold, the lowest first."""
    rows = (ids == ABSENT).any(dim=-1).nonzero().flatten()
    if not len(rows):
        return ids
    some, k = ids[rows], ids.shape[1]
    # Of the first 2K classes a row holds at most K, so that K of them are free.
    held = torch.zeros(len(rows), 2 * k + 1, dtype=torch.int8)
    held.scatter_(1, some.where((some >= 0) & (some < 2 * k), 2 * k), 1)
    free = held[:, : 2 * k].argsort(dim=-1, stable=True)[:, :k]
    filled = ids.clone()
    # Absent entries come last: the j-th of them takes the j-th free class.
    absent = some == ABSENT
    place = (absent.cumsum(dim=-1) - 1).clamp(min=0)
    filled[rows] = torch.where(absent, free.gather(1, place), some)
    return filled


def _refuse_twice(ids: Tensor) -> None:
    # numpy sorts short rows of integers many times as fast as torch does.
    ordered = np.sort(ids.to(torch.int32).numpy(), axis=-1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != ABSENT)
    if twice.any():
        raise DataError(f"class {ordered[:, 1:][twice][0]} is listed twice at one position")
