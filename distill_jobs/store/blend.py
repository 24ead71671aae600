"""What several teachers say together: the mixture of their distributions, as one signal.

The mixture is made at T = 1, p = Σ_i w_i·p_i, and softened as one distribution, p^(1/T) / Σ p^(1/T): a loss sees one
teacher. Dense signals are mixed exactly. Of sparse ones the mixture's head is the union of the heads. What a teacher
says of a class that is in another's head but in its own tail is not stored; it is taken from what stands for its tail:

- with draws, each draw that fell on a class of the union is counted there, and the others go on standing for what is
  left. That is unbiased at T = 1, but for a sixteenth of a draw (``EVENLY``) that lies evenly over the tail, so that no
  class gets nothing: at 16 draws 0.4 % of a tail's mass.
- without draws, such a class gets half of that teacher's least head entry, which it can't be above: that errs least.

Either way mass is neither lost nor renormalised: at T = 1 head and tail hold Σ_i w_i·1. At other temperatures the
tail's mass is Σ_i w_i·Σ p_i^β, right where teachers agree in the tail, times how much more the mixture's is among the
classes that all heads know, where both can be had. With 32,000 classes, hybrid stores and two teachers that stray by 1
nat a class from what they have in common, that is 0.07 nats too little at T = 2 (0.11 without the second factor).

Shapes: I teachers, N positions, K head entries of one teacher, W of the union, D draws, M tail nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill_jobs.errors import StoreError
from distill_jobs.store import tail
from distill_jobs.store.codecs.base import FLOOR
from distill_jobs.store.signal import TeacherSignal

EVENLY = 1.0 / 16.0
"""The part of a draw that lies evenly over a teacher's tail."""

_DOUBT = 4.0  # So many classes that show no difference are added to those that heads share.


def blend(signals: Sequence[TeacherSignal], weights: Tensor, gold: Tensor) -> TeacherSignal:
    """The mixture of teachers at the same N positions.

    Gold log-probabilities are exact, and so are gold ranks and entropies of dense signals. Of sparse ones the rank
    counts the classes of the head, and the entropy's tail part is that of the interpolated log-partitions.

    Args:
        weights: [I, N], each position's adding up to 1. A teacher without weight at a position has no part in it.
        gold: [N] int64, the right class; negative where there is none.

    Raises:
        StoreError: some signals are dense and others sparse, or they tell unequally many classes apart.
    """
    first = signals[0]
    dense = first.head_ids is None
    if any((signal.head_ids is None) != dense or signal.classes != first.classes for signal in signals):
        raise StoreError(
            "teachers can't be combined where some keep every class and others only a few, or of unequal classes; "
            "capture them with the same codec"
        )
    log_weights = weights.log()
    gold_logprob = _mixed([signal.gold_logprob for signal in signals], log_weights)
    gold_logprob = torch.where(gold >= 0, gold_logprob, 0.0)
    if dense:
        return _dense(signals, log_weights, gold, gold_logprob)
    return _sparse(signals, weights, gold, gold_logprob)


def _dense(signals: Sequence[TeacherSignal], log_weights: Tensor, gold: Tensor, gold_logprob: Tensor) -> TeacherSignal:
    logprob = _mixed([signal.at(1.0)[0] for signal in signals], log_weights[:, :, None]).clamp(min=FLOOR)
    likelier = (logprob > logprob.gather(1, gold.clamp(min=0)[:, None])).sum(dim=-1)
    return TeacherSignal(
        head_ids=None,
        head_logprob=logprob,
        tail_nodes=None,
        gold_logprob=gold_logprob,
        gold_rank=torch.where(gold >= 0, likelier, -1),
        entropy=-(logprob.exp() * logprob).sum(dim=-1),
        classes=signals[0].classes,
    )


def _sparse(signals: Sequence[TeacherSignal], weights: Tensor, gold: Tensor, gold_logprob: Tensor) -> TeacherSignal:
    classes = signals[0].classes
    union = _union(signals, weights > 0, classes)
    shares = [_Share.of(signal, union) for signal in signals]
    mass = sum(w[:, None].double() * share.head for w, share in zip(weights, shares, strict=True))
    assert isinstance(mass, Tensor)
    head = mass.log().clamp(min=FLOOR).float()
    nodes = _mixed([share.nodes for share in shares], weights.log()[:, :, None])
    nodes = (nodes + _apart(shares, weights)).nan_to_num(nan=tail.NO_TAIL).clamp(min=tail.NO_TAIL)
    likelier = ((head > gold_logprob[:, None]) & (union != gold[:, None])).sum(dim=-1)
    draws = _draws(shares, weights) if all(share.ids is not None for share in shares) else (None, None, None)
    # -Σ_tail p·log p, from the log-partitions: their slope at 1 is the tail's own mean of log p.
    rest = tail.log_partition(nodes, 1.0).exp() * tail.mean_logprob(nodes, 1.0)
    top1, top1_logprob = _top1(signals, weights, union, head)
    return TeacherSignal(
        head_ids=union,
        head_logprob=head,
        tail_nodes=nodes,
        gold_logprob=gold_logprob,
        gold_rank=torch.where(gold >= 0, likelier, -1),
        entropy=(-(head.exp() * head).sum(dim=-1) - rest).clamp(min=0.0),
        classes=classes,
        top1_ids=top1,
        top1_logprob=top1_logprob,
        draw_ids=draws[0],
        draw_logprob=draws[1],
        draw_counts=draws[2],
    )


def _mixed(values: Sequence[Tensor], log_weights: Tensor) -> Tensor:
    """log Σ_i w_i·exp(value_i)."""
    return torch.logsumexp(torch.stack(list(values)) + log_weights, dim=0)


def _apart(shares: Sequence["_Share"], weights: Tensor) -> Tensor:
    """[N, M], how much larger than Σ_i w_i·p_i^β a tail's (Σ_i w_i·p_i)^β is because teachers differ, in its logarithm.

    As on average over the classes that all heads know: there both are known.
    """
    betas = torch.tensor(tail.TAIL_BETAS, dtype=torch.float64, device=weights.device)
    known = torch.stack([share.known | (w <= 0)[:, None] for share, w in zip(shares, weights, strict=True)]).all(dim=0)
    logprob = torch.stack([share.head for share in shares]).clamp(min=1e-300).log()
    log_weights = weights.double().log()[:, :, None]
    mixed = torch.logsumexp(logprob + log_weights, dim=0)
    count = known.sum(dim=-1)
    found = []
    for beta in betas:
        ratio = (beta * mixed - torch.logsumexp(beta * logprob + log_weights, dim=0)).exp()
        mean = torch.where(known, ratio - 1.0, 0.0).sum(dim=-1) / (count + _DOUBT)
        found.append(mean.log1p())
    return torch.stack(found, dim=1).float()


def _union(signals: Sequence[TeacherSignal], counts: Tensor, classes: int) -> Tensor:
    """[N, W], the classes of all heads that count, each once, in rising order.

    W is that of the position with the most; the others are filled up with the first classes that they don't have,
    which are then treated as all classes are that only some heads hold.
    """
    every = []
    for signal, counted in zip(signals, counts, strict=True):
        assert signal.head_ids is not None
        every.append(signal.head_ids.masked_fill(~counted[:, None], classes))
    ids = torch.cat(every, dim=1).sort(dim=-1).values
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[:, 1:] = ids[:, 1:] == ids[:, :-1]
    ids = ids.masked_fill(again, classes).sort(dim=-1).values
    sizes = (ids < classes).sum(dim=-1)
    width = int(sizes.max()) if len(sizes) else 0
    ids = ids[:, :width].contiguous()
    if width == 0 or bool((sizes == width).all()):
        return ids
    # Among the first W classes there are as many that a row has not as it has places left.
    had = torch.zeros(len(ids), width + 1, dtype=torch.bool, device=ids.device).scatter_(1, ids.clamp(max=width), True)
    free = had[:, :width].int().argsort(dim=-1, stable=True)
    place = (torch.arange(width, device=ids.device) - sizes[:, None]).clamp(min=0)
    return torch.where(ids < classes, ids, free.gather(1, place)).sort(dim=-1).values


@dataclass(frozen=True)
class _Share:
    """What one teacher brings to a union of heads.

    Attributes:
        head: [N, W] float64, its probabilities of the union's classes, estimated where they are in its tail.
        known: [N, W], where they are not.
        nodes: [N, M], the log-partitions of its tail without those classes.
        even: [N], the mean probability of a class of that rest.
        ids, logprob: [N, D], its draws; None without.
        times: [N, D], how often each was drawn, 0 for one that fell on a class of the union.
        unit: [N], the mass at T = 1 that one draw stands for.
    """

    head: Tensor
    known: Tensor
    nodes: Tensor
    even: Tensor
    ids: Tensor | None = None
    logprob: Tensor | None = None
    times: Tensor | None = None
    unit: Tensor | None = None

    @classmethod
    def of(cls, signal: TeacherSignal, union: Tensor) -> "_Share":
        assert signal.head_ids is not None
        assert signal.tail_nodes is not None
        head = torch.zeros(union.shape, dtype=torch.float64, device=union.device)
        known = torch.zeros_like(union, dtype=torch.bool)
        place, there = _places(union, signal.head_ids)
        if union.shape[1]:
            head.scatter_add_(1, place, torch.where(there, signal.head_logprob.double().exp(), 0.0))
            known.scatter_(1, place, there)
        rest = signal.tail_at(1.0).double().exp()
        # The classes of its tail, and how many of them the union takes away.
        outside = signal.classes - signal.head_ids.shape[1]
        taken = (~known).sum(dim=-1)
        ids, logprob, drawn, total = _live_draws(signal)
        each = _each(signal, rest, outside, taken) if ids is None else EVENLY / max(1, outside) / (total + EVENLY)
        shares = each[:, None].expand(head.shape).clone()
        drawn = drawn / (total + EVENLY)[:, None]
        if ids is not None:
            place, there = _places(union, ids)
            if union.shape[1]:
                shares.scatter_add_(1, place, torch.where(there, drawn, 0.0))
            drawn = torch.where(there, 0.0, drawn)
        head = torch.where(known, head, rest[:, None] * shares)
        left = (outside - taken).clamp(min=0)
        kept = drawn.sum(dim=-1) + each * left if ids is not None else 1.0 - each * taken
        nodes = _without(signal.tail_nodes, left / max(1, outside), kept)
        mean = rest * kept / left.clamp(min=1)
        if ids is None:
            return cls(head, known, nodes, mean)
        times = drawn * (total + EVENLY)[:, None]
        unit = rest * kept / times.sum(dim=-1).clamp(min=1e-30)
        return cls(head, known, nodes, mean, ids, logprob, times, unit)


def _each(signal: TeacherSignal, rest: Tensor, outside: int, taken: Tensor) -> Tensor:
    """[N], the share of a tail without draws that a class of it gets when the union takes it.

    It lies between nothing and the head's least entry, and half of that errs least; ``taken`` classes get at most half
    of the tail's mass so, unless the mean of the tail is more.
    """
    mean = torch.full_like(rest, 1.0 / max(1, outside))
    if not signal.head_logprob.shape[1]:
        return mean
    half = signal.head_logprob.double().amin(dim=-1).exp() / 2 / rest.clamp(min=1e-300)
    return torch.maximum(mean, torch.minimum(half, 0.5 / taken.clamp(min=1)))


def _places(union: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where classes stand in the union [N, W], and whether they do: [N, E] each."""
    if not union.shape[1]:
        return torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    place = torch.searchsorted(union, ids.contiguous()).clamp(max=union.shape[1] - 1)
    return place, union.gather(1, place) == ids


def _live_draws(signal: TeacherSignal) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Ids and log-probabilities [N, D] of draws, how often each was drawn, 0 for none, and the sum of that [N]."""
    none = torch.zeros_like(signal.entropy, dtype=torch.float64)
    if signal.draw_ids is None:
        return None, None, none[:, None], none
    assert signal.draw_logprob is not None
    assert signal.tail_nodes is not None
    times = torch.ones_like(signal.draw_logprob) if signal.draw_counts is None else signal.draw_counts
    live = (signal.draw_logprob > FLOOR / 2) & ~tail.is_empty(signal.tail_nodes)[:, None]
    times = torch.where(live, times, 0.0).double()
    return signal.draw_ids, signal.draw_logprob, times, times.sum(dim=-1)


def _without(nodes: Tensor, classes: Tensor, mass: Tensor) -> Tensor:
    """Log-partitions of a tail of which this share of the classes and of the mass at T = 1 is left, [N] each.

    Between β = 0, where a log-partition counts classes, and 1 the share goes over from the one to the other in its
    logarithm. A straight line by β is added, so that what was convex stays so.
    """
    betas = torch.tensor(tail.TAIL_BETAS, dtype=torch.float64, device=nodes.device)
    line = (1.0 - betas) * classes.double().log()[:, None] + betas * mass.log()[:, None]
    gone = (classes <= 0) | (mass <= 0) | tail.is_empty(nodes)
    return (nodes.double() + line).float().masked_fill(gone[:, None], tail.NO_TAIL)


def _draws(shares: Sequence[_Share], weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All teachers' draws as draws of the mixture: ids, log-probabilities, and how often each counts, [N, ΣD] each.

    What the mixture says of a drawn class is known from those who drew it; of the others it gets the mean of their
    tail, and so is rather too little. The counts add up to the number of equal draws that would be as good (Kish).
    """
    ids, logprob, mass, squares = [], [], [], []
    for w, share in zip(weights.double(), shares, strict=True):
        assert share.ids is not None
        assert share.times is not None
        assert share.unit is not None
        said = torch.zeros_like(share.times)
        for other_w, other in zip(weights, shares, strict=True):
            said += other_w[:, None] * _said_of(share.ids, other)
        ids.append(share.ids)
        logprob.append(said.log().clamp(min=FLOOR).float())
        mass.append(share.times * (w * share.unit)[:, None])
        squares.append(share.times.sum(dim=-1) * (w * share.unit) ** 2)
    together = torch.cat(mass, dim=1)
    scale = together.sum(dim=-1) / torch.stack(squares).sum(dim=0).clamp(min=1e-300)
    return torch.cat(ids, dim=1), torch.cat(logprob, dim=1), (together * scale[:, None]).float()


def _said_of(ids: Tensor, teacher: _Share) -> Tensor:
    """[N, D] float64, what a teacher says of classes outside the union: known where it drew them, else its mean."""
    assert teacher.ids is not None
    assert teacher.logprob is not None
    assert teacher.times is not None
    same = (ids[:, :, None] == teacher.ids[:, None, :]) & (teacher.times > 0)[:, None, :]
    where = same.int().argmax(dim=-1)
    return torch.where(same.any(dim=-1), teacher.logprob.double().exp().gather(1, where), teacher.even[:, None])


def _top1(
    signals: Sequence[TeacherSignal], weights: Tensor, union: Tensor, head: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The likeliest class of the head; without one, that of the teacher who counts most and is surest of its own."""
    if union.shape[1]:
        best = head.argmax(dim=-1, keepdim=True)
        return union.gather(1, best)[:, 0], None
    said = torch.stack([torch.zeros_like(s.entropy) if s.top1_logprob is None else s.top1_logprob for s in signals])
    surest = (said + weights.log()).argmax(dim=0, keepdim=True)
    ids = torch.stack([signal.top1 for signal in signals])
    return ids.gather(0, surest)[0], (said + weights.log()).gather(0, surest)[0]
