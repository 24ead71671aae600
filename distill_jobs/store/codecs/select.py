"""From whole rows of logits to what a store keeps of them: the head, draws from the tail, and the statistics.

All codecs but ``dense`` stand on this: what it returns is exact, and a codec only rounds it. On a CPU whole rows are
read by compiled code where there is a compiler (``native``), in two passes; anywhere else by Torch's operators, which
give the same up to rounding. Shapes: N positions, V classes, K head entries, M tail nodes, D draws.
"""

import threading

import torch
from torch import Tensor

from distill_jobs.store.blocks import alone, by_blocks, rows_in_cache
from distill_jobs.store.codecs.base import FLOOR
from distill_jobs.store.codecs.fields import refuse_broken
from distill_jobs.store.codecs.native import LEAST_SUM, STEP, Rows, library, read_rows
from distill_jobs.store.signal import TeacherSignal
from distill_jobs.store.tail import NO_TAIL, TAIL_BETAS

_GROUP = 64
_WIDE = 4096  # classes from which on a second of compiling is soon made up for
_AT_ONCE = 32


def select(logits: Tensor, gold: Tensor, head: int, draws: int = 0, uniforms: Tensor | None = None) -> TeacherSignal:
    """The exact signal of a teacher with these logits.

    Args:
        logits: [N, V] of any float type.
        gold: [N] int64, negative where there is no right class.
        head: K, entries of the head; the likeliest classes, likeliest first. May be 0: then all is tail.
        draws: D, draws from the tail, each with probability p / (mass of the tail).
        uniforms: [N] in [0, 1), which fix the draws.

    Raises:
        CaptureError: a row holds NaN or +inf, or nothing but -inf.
    """
    logits = logits.float() if logits.dtype == torch.float64 else logits
    classes = logits.shape[1]
    gold_logit = logits.gather(1, gold.clamp(min=0)[:, None])
    assert uniforms is not None or not draws, "draws need uniforms"
    compiled = logits.device.type == "cpu" and classes >= _WIDE and library() is not None
    found = (_compiled if compiled else _passes)(logits, min(head, classes), draws, gold_logit, uniforms)
    refuse_broken(found.top[:, 0])
    return _signal(found, logits, gold, gold_logit, draws)


@alone()
def _signal(found: Rows, logits: Tensor, gold: Tensor, gold_logit: Tensor, draws: int) -> TeacherSignal:
    inside, peak = found.top[:, :-1], found.top[:, -1]
    log_sums = found.sums.log()
    at_one = TAIL_BETAS.index(1.0)
    total = torch.logaddexp(torch.logsumexp(inside, dim=-1), peak + log_sums[:, at_one])[:, None]
    offset = (peak[:, None] - total).clamp(min=NO_TAIL)
    betas = torch.tensor(TAIL_BETAS, dtype=torch.float32, device=logits.device)
    logprob = (inside - total).clamp(min=FLOOR)
    tail_entropy = -offset[:, 0].exp() * (found.weighted + found.sums[:, at_one] * offset[:, 0].clamp(min=FLOOR))
    has_gold = gold >= 0
    return TeacherSignal(
        head_ids=found.ids[:, : inside.shape[1]],
        head_logprob=logprob,
        tail_nodes=(betas * offset + log_sums).clamp(min=NO_TAIL),
        gold_logprob=torch.where(has_gold, (gold_logit - total)[:, 0].clamp(min=FLOOR), 0.0),
        gold_rank=torch.where(has_gold, found.ranks, -1),
        entropy=(tail_entropy - (logprob.exp() * logprob).sum(dim=-1)).clamp_(min=0.0),
        classes=logits.shape[1],
        top1_ids=found.ids[:, 0],
        top1_logprob=(found.top[:, :1] - total)[:, 0],
        draw_ids=found.drawn if draws else None,
        draw_logprob=(logits.gather(1, found.drawn) - total).clamp(min=FLOOR) if draws else None,
    )


def _compiled(logits: Tensor, k: int, draws: int, gold_logit: Tensor, uniforms: Tensor | None) -> Rows:
    def some(rows: slice) -> Rows:
        return read_rows(logits[rows], k, draws, gold_logit[rows, 0], None if uniforms is None else uniforms[rows])

    # Few at once: those of a half-precision teacher are copied.
    each = -(-len(logits) // torch.get_num_threads())
    return Rows.joined(by_blocks(some, logits, max(1, min(_AT_ONCE, each))))


def _passes(logits: Tensor, k: int, draws: int, gold_logit: Tensor, uniforms: Tensor | None) -> Rows:
    # Each thread's own: fresh pages for every block would cost several times what the arithmetic does.
    own = threading.local()
    classes = logits.shape[1]

    def some(rows: slice) -> Rows:
        block = logits[rows]
        if not hasattr(own, "work"):
            shape = (rows_in_cache(logits), -(-classes // _GROUP) * _GROUP)
            own.work = [torch.empty(shape, dtype=torch.float32, device=logits.device) for _ in range(5)]
        # One more than the head: shifted by the tail's own peak, no sum over the tail can under- or overflow.
        top, ids = largest(block, min(k + 1, classes))
        top = torch.nn.functional.pad(top.float(), (0, k + 1 - top.shape[1]), value=-torch.inf)
        work = [w[: len(block)] for w in own.work]
        sums, weighted, chances = _tail_sums(block, ids[:, :k], top[:, k:], work)
        drawn = ids[:, :0] if uniforms is None or not draws else _draw(chances, uniforms[rows], draws, classes)
        return Rows(top, ids, sums, weighted, drawn, _ranks(block, gold_logit[rows], top))

    return Rows.joined(by_blocks(some, logits))


def largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, sorted, and where they are: [N, k] each.

    On a CPU and for wide rows by way of the maxima of V / 64 groups: the k largest entries lie in the k groups with
    the largest maxima, so that only those are searched.
    """
    rows, classes = logits.shape
    groups = classes // _GROUP
    if logits.device.type != "cpu" or groups < 8 * k or classes % _GROUP:
        return logits.topk(k, dim=-1)
    # Group j holds the classes j, j + groups, j + 2·groups, ...: so the maxima are taken along the slow dimension.
    grouped = logits.view(rows, _GROUP, groups)
    best = grouped.amax(dim=1).topk(k, dim=-1, sorted=False).indices
    few = grouped.gather(2, best[:, None, :].expand(rows, _GROUP, k)).flatten(1)
    values, where = few.topk(k, dim=-1)
    return values, where // k * groups + best.gather(1, where % k)


def _tail_sums(logits: Tensor, ids: Tensor, peak: Tensor, work: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Σ exp(β·(ℓ - peak)) over the tail at every node [N, M], Σ exp(ℓ - peak)·(ℓ - peak) [N], and exp(ℓ - peak).

    The tail is ``logits`` [N, V] without the classes ``ids`` [N, k]; ``peak`` [N, 1] is its largest logit. One
    exponential an element: every node is a power of u = exp((ℓ - peak) / 20). The last result is [N, V] with V
    filled up to whole groups, 0 on the head; it lies in ``work``.
    """
    x, u1, u2, u3, u4 = work
    classes = logits.shape[1]
    # As powers of 2, which take half the time of powers of e.
    torch.add(-STEP * peak.clamp(min=NO_TAIL), logits, alpha=STEP, out=x[:, :classes])
    x[:, classes:] = -torch.inf
    # The head is taken out before anything is summed: a small tail is never the difference of two large sums.
    x.scatter_(1, ids, -torch.inf)
    torch.exp2(x, out=u1)
    torch.mul(u1, u1, out=u2)
    torch.mul(u1, u2, out=u3)
    torch.mul(u2, u2, out=u4)
    sums = [u2.sum(dim=-1), u3.sum(dim=-1)]
    u5 = torch.mul(u2, u3, out=u1)
    sums += [u5.sum(dim=-1), torch.mul(u5, u4, out=u3).sum(dim=-1)]
    u10 = torch.mul(u5, u5, out=u4)
    u20 = torch.mul(u10, u10, out=u1)
    sums += [u20.sum(dim=-1), torch.mul(u20, u2, out=u3).sum(dim=-1), torch.linalg.vector_norm(u20, dim=-1) ** 2]
    # 0·(-inf) where a class has no mass: those products are NaN, and count for nothing.
    weighted = torch.mul(u20, x, out=u2).nansum(dim=-1) / STEP
    return torch.stack(sums, dim=1).clamp_(min=LEAST_SUM), weighted, u20


def _draw(chances: Tensor, uniforms: Tensor, draws: int, classes: int) -> Tensor:
    """Systematic sampling: ``draws`` classes a row [N, D], each class ⌊D·p⌋ or ⌈D·p⌉ times, D·p on average.

    One uniform number shifts a comb of D evenly spaced teeth over the row's cumulated chances (Madow 1949). That is
    unbiased as independent draws are, with less noise, and costs two searches where a multinomial costs a full
    cumulative sum: first for the group, then for the class inside it.

    Args:
        chances: [N, V'] not normalised, V' a multiple of the group.
        uniforms: [N] float64.
    """
    groups = chances.view(len(chances), chances.shape[1] // _GROUP, _GROUP)
    reached = groups.sum(dim=-1).double().cumsum(dim=-1)
    teeth = torch.arange(draws, dtype=torch.float64, device=chances.device)
    targets = (uniforms[:, None] + teeth) / draws * reached[:, -1:]
    group = torch.searchsorted(reached, targets, right=True).clamp_(max=groups.shape[1] - 1)
    before = torch.nn.functional.pad(reached, (1, 0)).gather(1, group)
    inside = groups.gather(1, group[:, :, None].expand(*group.shape, _GROUP))
    reached_inside = inside.cumsum(dim=-1)
    # The sums of a group and of all groups are not rounded alike: no target may lie beyond its group's end.
    wanted = torch.minimum((targets - before).float(), reached_inside[..., -1] * (1 - 1e-6))
    place = (reached_inside <= wanted[:, :, None]).sum(dim=-1)
    return (group * _GROUP + place).clamp_(max=classes - 1)


def _ranks(logits: Tensor, gold_logit: Tensor, top: Tensor) -> Tensor:
    """[N] classes likelier than the gold one; whole rows are searched only where the gold class is in the tail."""
    rank = (top[:, :-1] > gold_logit).sum(dim=-1)
    rows = (gold_logit[:, 0] < top[:, -1]).nonzero().flatten()
    if len(rows):
        rank[rows] = (logits[rows] > gold_logit[rows]).sum(dim=-1)
    return rank
