"""``topk``: the k likeliest classes exactly, and the mass of the rest at every temperature.

Beside the head it stores log Σ_tail p^β at a few inverse temperatures β, from which the tail's mass is right at any T
in [0.5, 10] (see ``store/signal.py``). Shapes: N positions, V classes, K head entries, M tail nodes.
"""

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill_jobs.store.blocks import by_blocks, rows_in_cache
from distill_jobs.store.codecs.base import (
    FLOOR,
    Field,
    decode_rank,
    encode_rank,
    id_type,
    refuse_broken,
    statistics,
)
from distill_jobs.store.signal import NO_TAIL, TAIL_BETAS, TeacherSignal

_GROUP = 64


@dataclass(frozen=True)
class TopKCodec:
    """An exact head of ``k`` entries, likeliest first, and the tail as one mass."""

    k: int = 64
    name = "topk"

    def arguments(self) -> dict[str, Any]:
        return {"k": self.k}

    def fields(self, classes: int) -> dict[str, Field]:
        width = min(self.k, classes)
        return {
            "ids": Field(id_type(classes), width, below=classes),
            "logprob": Field("float16", width),
            "tail": Field("float32", len(TAIL_BETAS)),
            **statistics(classes),
        }

    def encode(self, logits: Tensor, gold: Tensor) -> dict[str, Tensor]:
        logits = logits.float() if logits.dtype == torch.float64 else logits
        classes = logits.shape[1]
        has_gold = gold >= 0
        gold_logit = logits.gather(1, gold.clamp(min=0)[:, None])
        top, ids, sums, weighted = _passes(logits, min(self.k, classes))
        refuse_broken(top[:, 0])
        head, peak = top[:, :-1], top[:, -1]

        log_sums = sums.log()
        at_one = TAIL_BETAS.index(1.0)
        total = torch.logaddexp(torch.logsumexp(head, dim=-1), peak + log_sums[:, at_one])[:, None]
        offset = (peak[:, None] - total).clamp(min=NO_TAIL)
        betas = torch.tensor(TAIL_BETAS, dtype=torch.float32, device=logits.device)
        logprob = (head - total).clamp(min=FLOOR)
        tail_entropy = -offset[:, 0].exp() * (weighted + sums[:, at_one] * offset[:, 0].clamp(min=FLOOR))
        return {
            "ids": ids.to(getattr(torch, id_type(classes))),
            "logprob": logprob.half(),
            "tail": (betas * offset + log_sums).clamp(min=NO_TAIL),
            "gold_logprob": torch.where(has_gold[:, None], (gold_logit - total).clamp(min=FLOOR), 0.0),
            "gold_rank": encode_rank(_ranks(logits, gold_logit, top, has_gold), has_gold, classes),
            "entropy": (tail_entropy - (logprob.exp() * logprob).sum(dim=-1)).clamp_(min=0.0)[:, None],
        }

    def decode(self, columns: dict[str, Tensor], classes: int) -> TeacherSignal:
        return TeacherSignal(
            head_ids=columns["ids"].long(),
            head_logprob=columns["logprob"].float(),
            tail_nodes=columns["tail"].float(),
            gold_logprob=columns["gold_logprob"][:, 0].float(),
            gold_rank=decode_rank(columns["gold_rank"], classes),
            entropy=columns["entropy"][:, 0].float(),
            classes=classes,
        )


def _passes(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All that has to read whole rows, in blocks of rows that stay in cache.

    Returns:
        The k largest logits and the tail's largest (-inf where there is no tail) [N, k + 1] in float32, the k largest's
        classes [N, k], and what ``_tail_sums`` gives.
    """
    # Each thread's own: fresh pages for every block would cost several times what the arithmetic does.
    own = threading.local()

    def one(rows: slice) -> tuple[Tensor, ...]:
        block = logits[rows]
        if not hasattr(own, "work"):
            shape = (rows_in_cache(logits), logits.shape[1])
            own.work = [torch.empty(shape, dtype=torch.float32, device=logits.device) for _ in range(5)]
        # One more than the head: shifted by the tail's own peak, no sum over the tail can under- or overflow.
        top, ids = largest(block, min(k + 1, block.shape[1]))
        top, ids = torch.nn.functional.pad(top.float(), (0, k + 1 - top.shape[1]), value=-torch.inf), ids[:, :k]
        return top, ids, *_tail_sums(block, ids, top[:, k:], [w[: len(block)] for w in own.work])

    top, ids, sums, weighted = (torch.cat(pieces) for pieces in zip(*by_blocks(one, logits), strict=True))
    return top, ids, sums, weighted


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


def _tail_sums(logits: Tensor, ids: Tensor, peak: Tensor, work: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Σ exp(β·(ℓ - peak)) over the tail at every node [N, M], and Σ exp(ℓ - peak)·(ℓ - peak) [N].

    The tail is ``logits`` [N, V] without the classes ``ids`` [N, k]; ``peak`` [N, 1] is its largest logit. One
    exponential an element: with u = exp(0.1·(ℓ - peak)) every node is a power of u.
    """
    x, u1, u2, u4, u8 = work
    torch.add(-0.1 * peak.clamp(min=NO_TAIL), logits, alpha=0.1, out=x)
    # The head is taken out before anything is summed: a small tail is never the difference of two large sums.
    x.scatter_(1, ids, -torch.inf)
    torch.exp(x, out=u1)
    torch.mul(u1, u1, out=u2)
    torch.mul(u2, u2, out=u4)
    torch.mul(u4, u4, out=u8)
    sums = [u1.sum(dim=-1), u2.sum(dim=-1), u4.sum(dim=-1), u8.sum(dim=-1)]
    u10 = torch.mul(u8, u2, out=u1)
    u16 = torch.mul(u8, u8, out=u4)
    u20 = torch.mul(u10, u10, out=u2)
    sums += [u10.sum(dim=-1), u16.sum(dim=-1), u20.sum(dim=-1)]
    # 0·(-inf) where a class has no mass: those products are NaN, and count for nothing.
    weighted = 10.0 * u10.mul_(x).nansum(dim=-1)
    # A tail without any finite logit has sums of 0; its peak of -inf already says that it holds nothing.
    return torch.stack(sums, dim=1).clamp_(min=1e-30), weighted


def _ranks(logits: Tensor, gold_logit: Tensor, top: Tensor, has_gold: Tensor) -> Tensor:
    """[N] classes likelier than the gold one; whole rows are searched only where the gold class is in the tail."""
    rank = (top[:, :-1] > gold_logit).sum(dim=-1)
    rows = (has_gold & (gold_logit[:, 0] < top[:, -1])).nonzero().flatten()
    for few in torch.split(rows, rows_in_cache(logits)):
        rank[few] = (logits[few] > gold_logit[few]).sum(dim=-1)
    return rank
