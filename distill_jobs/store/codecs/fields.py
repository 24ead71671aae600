"""The building blocks of codecs: class ids with bit-planes, small logarithms, and the statistics that all share.

Shapes: N positions, V classes, W entries of a field, M tail nodes.
"""

import math
from typing import TypedDict

import torch
from torch import Tensor

from distill_jobs.errors import CaptureError, StoreError
from distill_jobs.store.codecs.base import Columns, Field
from distill_jobs.store.tail import NO_TAIL, TAIL_BETAS, is_empty

STEP = 1024
"""Steps in a nat of a ``fixed`` number: rounding costs at most 0.0005 nats, and 64 nats fit."""

NONE = (1 << 16) - 1
"""In a ``fixed`` field and in a rank: there is nothing to say."""

_MOST = NONE - 1


# Class ids: the low 16 bits as they are, the bits above them as planes of one bit an entry.


def id_fields(name: str, width: int, classes: int) -> dict[str, Field]:
    """The columns that hold ``width`` class ids under ``name``."""
    found = {name: Field("uint16", width)}
    if planes(classes):
        found[f"{name}_high"] = Field("uint8", planes(classes) * -(-width // 8))
    return found


def planes(classes: int) -> int:
    """Bits of a class id above its lower 16."""
    return max(0, (classes - 1).bit_length() - 16)


def pack_ids(name: str, ids: Tensor, classes: int) -> Columns:
    """Ids [N, W] of any integer type as the columns of ``id_fields``."""
    found = {name: as_uint16(ids)}
    if planes(classes):
        high = torch.nn.functional.pad((ids >> 16).to(torch.uint8), (0, -ids.shape[1] % 8))
        found[f"{name}_high"] = torch.cat([_to_bytes(high >> plane & 1) for plane in range(planes(classes))], dim=1)
    return found


def unpack_ids(name: str, columns: Columns, classes: int) -> Tensor:
    """[N, W] int64, as ``pack_ids`` took them."""
    if not planes(classes):
        return columns[name].to(torch.int64)
    # In 32 bits as long as possible: half the memory to pass over.
    ids, high = from_uint16(columns[name]), columns[f"{name}_high"]
    for plane, packed in enumerate(high.view(len(high), planes(classes), -1).unbind(dim=1)):
        ids |= _from_bytes(packed)[:, : ids.shape[1]].to(torch.int32) << (16 + plane)
    return ids.to(torch.int64)


def check_ids(name: str, columns: Columns, classes: int) -> None:
    """Raise StoreError where an id is no class."""
    stored = columns[name]
    if not stored.numel():
        return
    # Whole parts are checked: where the codes are the ids themselves, numpy finds the largest without a copy.
    narrow = not planes(classes) and stored.device.type == "cpu"
    largest = int(stored.numpy().max() if narrow else unpack_ids(name, columns, classes).max())
    if largest >= classes:
        raise StoreError(f"the store is damaged: t.{name} holds class {largest}, but there are {classes}")


def check_finite(name: str, columns: Columns) -> None:
    """Raise StoreError where a float field holds NaN or an infinity."""
    if not bool(torch.isfinite(columns[name]).all()):
        raise StoreError(f"the store is damaged: t.{name} holds values that are not finite")


def as_uint16(codes: Tensor) -> Tensor:
    """The low 16 bits of integers. (torch computes little on uint16 itself; int16 holds the same bits.)"""
    return codes.to(torch.int16).view(torch.uint16)


def from_uint16(codes: Tensor) -> Tensor:
    """uint16 as int32."""
    return codes.view(torch.int16).to(torch.int32) & 0xFFFF


def _to_bytes(flags: Tensor) -> Tensor:
    """Flags [N, 8·B] of uint8 0 or 1 as bytes [N, B], the first flag in the lowest bit.

    Eight flags are one 64-bit number, and one product moves flag i to bit 56 + i: no two terms of it meet.
    """
    eight = flags.contiguous().view(torch.int64)
    return (eight * 0x0102040810204080 >> 56 & 0xFF).to(torch.uint8)


def _from_bytes(packed: Tensor) -> Tensor:
    """What ``_to_bytes`` took: eight flags a byte, by table."""
    numbers = torch.arange(256, dtype=torch.uint8, device=packed.device)
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    table = (numbers[:, None] >> places & 1).view(torch.int64)[:, 0]
    return table[packed.to(torch.int64)].view(torch.uint8)


# Numbers of 16 bits: distances in nats, from 0 up to 64.


def fixed(distance: Tensor) -> Tensor:
    """Distances ≥ 0 in nats as int32 codes below 65,535; what lies beyond 64 nats is stored as 64."""
    return (distance * STEP).round_().clamp_(0, _MOST).to(torch.int32)


def unfixed(codes: Tensor) -> Tensor:
    """uint16 codes back to float32 distances; ``NONE`` gives 64."""
    return from_uint16(codes).float() / STEP


# Log-partitions of the tail, and the statistics of every codec.


def tail_field() -> dict[str, Field]:
    """The column that holds the tail's log-partitions."""
    return {"tail": Field("uint16", len(TAIL_BETAS))}


def pack_tail(nodes: Tensor, classes: int) -> Columns:
    """log Σ_tail p^β [N, M] as distances below max(0, 1-β)·log V, which by Jensen's inequality they never exceed."""
    codes = fixed(_most(classes, nodes.device) - nodes)
    return {"tail": as_uint16(codes.masked_fill_(is_empty(nodes)[:, None], NONE))}


def unpack_tail(columns: Columns, classes: int) -> Tensor:
    """[N, M] float32."""
    codes = columns["tail"]
    nodes = _most(classes, codes.device) - unfixed(codes)
    return nodes.masked_fill((codes.view(torch.int16) == -1).all(dim=-1, keepdim=True), NO_TAIL)


def _most(classes: int, device: torch.device) -> Tensor:
    return torch.tensor([max(0.0, 1.0 - beta) * math.log(classes) for beta in TAIL_BETAS], device=device)


def statistics() -> dict[str, Field]:
    """The columns that every codec has beside the distribution itself."""
    return {"gold_logprob": Field("uint16", 1), "gold_rank": Field("uint16", 1), "entropy": Field("uint16", 1)}


def pack_statistics(gold_logprob: Tensor, gold_rank: Tensor, entropy: Tensor) -> Columns:
    """[N] each; a rank of -1 says that there is no right class. Ranks beyond 65,534 are stored as that."""
    none = gold_rank < 0
    columns = {
        "gold_logprob": fixed(-gold_logprob).masked_fill_(none, NONE),
        "gold_rank": gold_rank.clamp(max=_MOST).masked_fill(none, NONE),
        "entropy": fixed(entropy),
    }
    return {name: as_uint16(codes)[:, None] for name, codes in columns.items()}


class Statistics(TypedDict):
    """What every signal has, [N] each; see ``TeacherSignal``."""

    gold_logprob: Tensor
    gold_rank: Tensor
    entropy: Tensor


def unpack_statistics(columns: Columns) -> Statistics:
    """What ``pack_statistics`` took, under the names that ``TeacherSignal`` has for them."""
    rank = from_uint16(columns["gold_rank"][:, 0]).to(torch.int64)
    none = rank == NONE
    return {
        "gold_logprob": (-unfixed(columns["gold_logprob"][:, 0])).masked_fill(none, 0.0),
        "gold_rank": rank.masked_fill(none, -1),
        "entropy": unfixed(columns["entropy"][:, 0]),
    }


def refuse_broken(largest: Tensor) -> None:
    """Raise CaptureError unless the largest logit [N] of every row is finite (a NaN counts as largest)."""
    broken = (~torch.isfinite(largest)).nonzero().flatten().tolist()
    if broken:
        few = ", ".join(map(str, broken[:8])) + (", ..." if len(broken) > 8 else "")
        raise CaptureError(
            f"the teacher's logits are not finite (NaN, +inf, or nothing but -inf) at {len(broken)} of {len(largest)} "
            f"positions: {few}; check the teacher's weights, or capture in fp32"
        )
