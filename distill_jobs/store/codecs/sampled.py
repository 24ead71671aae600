"""``sampled``: draws from the teacher alone, with their counts (Anshumann et al. 2025, "Sparse Logit Sampling").

An unbiased target of few bytes: what it costs is noise. Shapes: N positions, D draws.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill_jobs.store.blocks import alone
from distill_jobs.store.codecs import fields
from distill_jobs.store.codecs.base import Columns, Field
from distill_jobs.store.codecs.hybrid import DRAW_RANGE, codes_of, logprobs_of
from distill_jobs.store.codecs.select import select
from distill_jobs.store.signal import TeacherSignal


@dataclass(frozen=True)
class SampledCodec:
    """``draws`` draws from all classes: the different ones in rising order with their counts, then empty places."""

    draws: int = 64
    name = "sampled"

    def __post_init__(self) -> None:
        if self.draws > 255:
            raise TypeError("a count is one byte: at most 255 draws")

    def arguments(self) -> dict[str, Any]:
        return {"draws": self.draws}

    def fields(self, classes: int) -> dict[str, Field]:
        return {
            **fields.id_fields("draw_ids", self.draws, classes),
            "draw_codes": Field("uint8", self.draws),
            "draw_counts": Field("uint8", self.draws),
            **fields.id_fields("top1_id", 1, classes),
            "top1": Field("uint16", 1),
            **fields.tail_field(),
            **fields.statistics(),
        }

    def encode(self, logits: Tensor, gold: Tensor, uniforms: Tensor | None = None) -> Columns:
        return self.pack(select(logits, gold, 0, self.draws, uniforms))

    @alone()
    def pack(self, signal: TeacherSignal) -> Columns:
        """The columns of an exact signal without a head, whose draws are in rising order of their classes."""
        assert signal.draw_ids is not None
        assert signal.draw_logprob is not None
        assert signal.tail_nodes is not None
        assert signal.top1_ids is not None
        assert signal.top1_logprob is not None
        ids, logprob, counts = _counted(signal.draw_ids, signal.draw_logprob)
        top1 = fields.fixed(-signal.top1_logprob[:, None])
        return {
            **fields.pack_ids("draw_ids", ids, signal.classes),
            "draw_codes": codes_of(top1.float() / -fields.STEP - logprob, DRAW_RANGE),
            "draw_counts": counts.to(torch.uint8),
            **fields.pack_ids("top1_id", signal.top1_ids[:, None], signal.classes),
            "top1": fields.as_uint16(top1),
            **fields.pack_tail(signal.tail_nodes, signal.classes),
            **fields.pack_statistics(signal.gold_logprob, signal.gold_rank, signal.entropy),
        }

    def decode(self, columns: Columns, classes: int) -> TeacherSignal:
        ids, top1 = fields.unpack_ids("draw_ids", columns, classes), -fields.unfixed(columns["top1"])
        return TeacherSignal(
            head_ids=ids[:, :0],
            head_logprob=torch.empty(len(ids), 0, device=ids.device),
            tail_nodes=fields.unpack_tail(columns, classes),
            classes=classes,
            top1_ids=fields.unpack_ids("top1_id", columns, classes)[:, 0],
            top1_logprob=top1[:, 0],
            draw_ids=ids,
            draw_logprob=logprobs_of(columns["draw_codes"], top1, DRAW_RANGE),
            draw_counts=columns["draw_counts"].float(),
            **fields.unpack_statistics(columns),
        )

    def check(self, columns: Columns, classes: int) -> None:
        fields.check_ids("draw_ids", columns, classes)
        fields.check_ids("top1_id", columns, classes)


def _counted(ids: Tensor, logprob: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Repeats in rising ids [N, D] become counts: ids, log-probabilities and counts, unused places (count 0) last."""
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    place = first.cumsum(dim=-1) - 1
    counts = torch.zeros_like(ids).scatter_add_(1, place, torch.ones_like(ids))
    # Equal draws write the same values to the same place.
    return (
        torch.zeros_like(ids).scatter_(1, place, ids),
        torch.zeros_like(logprob).scatter_(1, place, logprob),
        counts,
    )
