"""``dense``: the fp16 log-probability of every class. For classifiers and small vocabularies."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill_jobs.store.blocks import by_blocks
from distill_jobs.store.codecs.base import (
    FLOOR,
    Field,
    decode_rank,
    encode_rank,
    refuse_broken,
    statistics,
)
from distill_jobs.store.signal import TeacherSignal


@dataclass(frozen=True)
class DenseCodec:
    """Every class, in order. Exact at every T but for the rounding of fp16."""

    name = "dense"

    def arguments(self) -> dict[str, Any]:
        return {}

    def fields(self, classes: int) -> dict[str, Field]:
        return {"logprob": Field("float16", classes), **statistics(classes)}

    def encode(self, logits: Tensor, gold: Tensor) -> dict[str, Tensor]:
        refuse_broken(logits.amax(dim=-1))
        blocks = by_blocks(lambda rows: _encode(logits[rows], gold[rows]), logits)
        return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}

    def decode(self, columns: dict[str, Tensor], classes: int) -> TeacherSignal:
        return TeacherSignal(
            head_ids=None,
            head_logprob=columns["logprob"].float(),
            tail_nodes=None,
            gold_logprob=columns["gold_logprob"][:, 0].float(),
            gold_rank=decode_rank(columns["gold_rank"], classes),
            entropy=columns["entropy"][:, 0].float(),
            classes=classes,
        )


def _encode(logits: Tensor, gold: Tensor) -> dict[str, Tensor]:
    logprob = torch.log_softmax(logits.float(), dim=-1).clamp_(min=FLOOR)
    has_gold = gold >= 0
    gold_logprob = logprob.gather(1, gold.clamp(min=0)[:, None])
    return {
        "logprob": logprob.half(),
        "gold_logprob": torch.where(has_gold[:, None], gold_logprob, 0.0),
        "gold_rank": encode_rank((logprob > gold_logprob).sum(dim=-1), has_gold, logits.shape[1]),
        "entropy": -(logprob.exp() * logprob).sum(dim=-1, keepdim=True),
    }
