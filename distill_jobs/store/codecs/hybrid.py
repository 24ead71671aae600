"""``hybrid``: an exact head, and draws that stand for the rest. The default for language models.

The head makes the bulk of the gradient exact; the draws make what is left of it unbiased, where a truncated head would
be wrong for ever (after Anshumann et al. 2025, with the head taken out of what is sampled). One byte an entry: codes of
the root of the distance from the likeliest class, finest where the mass lies. ``sampled`` is the same without a head.
Shapes: N positions, K head entries, D draws.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill_jobs.store.blocks import alone
from distill_jobs.store.codecs import fields
from distill_jobs.store.codecs.base import FLOOR, Columns, Field
from distill_jobs.store.codecs.select import select
from distill_jobs.store.signal import TeacherSignal

RANGE_STEPS = 4
"""Steps in a nat of a head's range, which is rounded up: one byte reaches 63.75 nats."""

CODES = 254
"""The largest code of an entry; 255 says that the entry has no mass."""

DRAW_RANGE = 48.0
"""Nats below the head's end that a draw's code can reach: nobody draws what has probability e^-48."""


@dataclass(frozen=True)
class HybridCodec:
    """``head`` exact entries, likeliest first, then ``draws`` draws from the rest."""

    head: int = 48
    draws: int = 16
    name = "hybrid"

    def arguments(self) -> dict[str, Any]:
        return {"head": self.head, "draws": self.draws}

    def fields(self, classes: int) -> dict[str, Field]:
        head = min(self.head, classes)
        return {
            **fields.id_fields("ids", head + self.draws, classes),
            "codes": Field("uint8", head + self.draws),
            "top1": Field("uint16", 1),
            "range": Field("uint8", 1),
            **fields.tail_field(),
            **fields.statistics(),
        }

    def encode(self, logits: Tensor, gold: Tensor, uniforms: Tensor | None = None) -> Columns:
        return self.pack(select(logits, gold, self.head, self.draws, uniforms))

    @alone()
    def pack(self, signal: TeacherSignal) -> Columns:
        """The columns of an exact signal with a head of min(``head``, V) entries, likeliest first, and the draws."""
        assert signal.head_ids is not None
        assert signal.tail_nodes is not None
        assert signal.draw_ids is not None
        assert signal.draw_logprob is not None
        top1 = fields.fixed(-signal.head_logprob[:, :1])
        below = top1.float() / -fields.STEP - signal.head_logprob
        span = _span(below)
        end = top1.float() / -fields.STEP - _end(span)
        codes = codes_of(below, span.float() / RANGE_STEPS), codes_of(end - signal.draw_logprob, DRAW_RANGE)
        return {
            **fields.pack_ids("ids", torch.cat([signal.head_ids, signal.draw_ids], dim=1), signal.classes),
            "codes": torch.cat(codes, dim=1),
            "top1": fields.as_uint16(top1),
            "range": span,
            **fields.pack_tail(signal.tail_nodes, signal.classes),
            **fields.pack_statistics(signal.gold_logprob, signal.gold_rank, signal.entropy),
        }

    def decode(self, columns: Columns, classes: int) -> TeacherSignal:
        ids, codes, head = fields.unpack_ids("ids", columns, classes), columns["codes"], min(self.head, classes)
        top1, span = -fields.unfixed(columns["top1"]), columns["range"]
        return TeacherSignal(
            head_ids=ids[:, :head],
            head_logprob=logprobs_of(codes[:, :head], top1, span.float() / RANGE_STEPS),
            tail_nodes=fields.unpack_tail(columns, classes),
            classes=classes,
            top1_ids=ids[:, 0],
            draw_ids=ids[:, head:],
            draw_logprob=logprobs_of(codes[:, head:], top1 - _end(span), DRAW_RANGE),
            **fields.unpack_statistics(columns),
        )

    def check(self, columns: Columns, classes: int) -> None:
        fields.check_ids("ids", columns, classes)


def codes_of(below: Tensor, span: Tensor | float) -> Tensor:
    """Distances [N, W] ≥ 0 below a reference, out of ``span`` ([N, 1], nats), as uint8: the root, in 254 steps."""
    share = (below / span).nan_to_num_(nan=0.0).clamp_(min=0.0)
    codes = share.sqrt_().mul_(CODES).round_()
    # A little beyond the range is its end; far beyond is nothing.
    return codes.masked_fill_(codes > CODES + 16, CODES + 1).clamp_(max=CODES + 1).to(torch.uint8)


def logprobs_of(codes: Tensor, top: Tensor, span: Tensor | float) -> Tensor:
    """uint8 codes [N, W] back to log-probabilities, ``top`` [N, 1] being the reference."""
    root = codes.float()
    logprob = top - root.square_().mul_(span / CODES**2)
    return logprob.masked_fill_(codes > CODES, FLOOR)


def _span(below: Tensor) -> Tensor:
    """[N, 1] uint8: the distance of the last entry that has mass, in quarters of a nat, rounded up."""
    last = below.masked_fill(below > 255 / RANGE_STEPS, 0.0).amax(dim=-1, keepdim=True)
    return (last * RANGE_STEPS).ceil_().clamp_(0, 255).to(torch.uint8)


def _end(span: Tensor) -> Tensor:
    """[N, 1], nats from the likeliest entry to a place at or above the head's last: draws are counted from there."""
    return ((span.float() - 1.0) / RANGE_STEPS).clamp_(min=0.0)
