"""``topk``: the k likeliest classes exactly, and the mass of the rest at every temperature.

Beside the head it stores log Σ_tail p^β at a few inverse temperatures β, from which the tail's mass is right at any T
in [0.5, 10] (see ``store/tail.py``).
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from distill_jobs.store.blocks import alone
from distill_jobs.store.codecs import fields
from distill_jobs.store.codecs.base import Columns, Field
from distill_jobs.store.codecs.select import select
from distill_jobs.store.signal import TeacherSignal


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
            **fields.id_fields("ids", width, classes),
            "logprob": Field("float16", width),
            **fields.tail_field(),
            **fields.statistics(),
        }

    def encode(self, logits: Tensor, gold: Tensor, uniforms: Tensor | None = None) -> Columns:  # noqa: ARG002
        return self.pack(select(logits, gold, self.k))

    @alone()
    def pack(self, signal: TeacherSignal) -> Columns:
        """The columns of an exact signal whose head has min(k, V) entries, likeliest first."""
        assert signal.head_ids is not None
        assert signal.tail_nodes is not None
        return {
            **fields.pack_ids("ids", signal.head_ids, signal.classes),
            "logprob": signal.head_logprob.half(),
            **fields.pack_tail(signal.tail_nodes, signal.classes),
            **fields.pack_statistics(signal.gold_logprob, signal.gold_rank, signal.entropy),
        }

    def decode(self, columns: Columns, classes: int) -> TeacherSignal:
        ids = fields.unpack_ids("ids", columns, classes)
        return TeacherSignal(
            head_ids=ids,
            head_logprob=columns["logprob"].float(),
            tail_nodes=fields.unpack_tail(columns, classes),
            classes=classes,
            top1_ids=ids[:, 0],
            **fields.unpack_statistics(columns),
        )

    def check(self, columns: Columns, classes: int) -> None:
        fields.check_ids("ids", columns, classes)
        fields.check_finite("logprob", columns)
