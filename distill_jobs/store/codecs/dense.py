"""``dense``: the fp16 log-probability of every class. For classifiers and small vocabularies."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill_jobs.store.blocks import by_blocks
from distill_jobs.store.codecs import fields
from distill_jobs.store.codecs.base import FLOOR, Columns, Field
from distill_jobs.store.signal import TeacherSignal


@dataclass(frozen=True)
class DenseCodec:
    """Every class, in order. Exact at every T but for the rounding of fp16."""

    name = "dense"

    def arguments(self) -> dict[str, Any]:
        return {}

    def fields(self, classes: int) -> dict[str, Field]:
        return {"logprob": Field("float16", classes), **fields.statistics()}

    def encode(self, logits: Tensor, gold: Tensor, uniforms: Tensor | None = None) -> Columns:  # noqa: ARG002
        fields.refuse_broken(logits.amax(dim=-1))
        blocks = by_blocks(lambda rows: _encode(logits[rows], gold[rows]), logits)
        return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}

    def decode(self, columns: Columns, classes: int) -> TeacherSignal:
        return TeacherSignal(
            head_ids=None,
            head_logprob=columns["logprob"].float(),
            tail_nodes=None,
            classes=classes,
            **fields.unpack_statistics(columns),
        )

    def check(self, columns: Columns, classes: int) -> None:  # noqa: ARG002
        fields.check_finite("logprob", columns)


def _encode(logits: Tensor, gold: Tensor) -> Columns:
    logprob = torch.log_softmax(logits.float(), dim=-1).clamp_(min=FLOOR)
    has_gold = gold >= 0
    at_gold = gold.clamp(min=0)[:, None]
    gold_logprob = logprob.gather(1, at_gold)
    rank = torch.where(has_gold, (logits > logits.gather(1, at_gold)).sum(dim=-1), -1)
    entropy = -(logprob.exp() * logprob).sum(dim=-1)
    return {"logprob": logprob.half(), **fields.pack_statistics(gold_logprob[:, 0], rank, entropy)}
