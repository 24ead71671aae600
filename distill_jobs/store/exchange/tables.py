"""Rows of a store as plain Arrow columns that any tool reads: the data's own, and the decoded soft target as lists.

Shapes: n rows of P positions, K head entries, D draws, M tail nodes.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distill_jobs.data.batch import IGNORED
from distill_jobs.store.reader import LogitStore
from distill_jobs.store.signal import TeacherSignal
from distill_jobs.store.tail import TAIL_BETAS
from distill_jobs.store.verify import labels_of
from distill_jobs.store.writer import PREFIX, STAYS_IN_DATA

METADATA = b"distill_jobs"

_ENTRIES_AT_ONCE = 1 << 22


def batches_of_part(store: LogitStore, part: int) -> Iterator[pa.RecordBatch]:
    """The rows of one part in order, few at a time: memory stays bounded however large the part is.

    Raises:
        StoreError: the part is damaged.
    """
    rows, positions = store.table.part_range(part), store.plan.positions_per_row
    widest = max(field.width for field in store.plan.fields().values())
    size = max(1, _ENTRIES_AT_ONCE // (positions * widest))
    for start in range(rows.start, rows.stop, size):
        yield batch_of_rows(store, np.arange(start, min(start + size, rows.stop)))


def batch_of_rows(store: LogitStore, numbers: np.ndarray) -> pa.RecordBatch:
    """The rows ``numbers`` [n] of the store, soft target decoded; a row of one position has no level for positions."""
    columns = store.table.take(numbers)
    if store.facts.features == "image":
        columns[STAYS_IN_DATA] = store.take(numbers, soft=False)[STAYS_IN_DATA]
    rows, positions = len(numbers), store.plan.positions_per_row
    signal = store.signal(columns, "cpu")
    made: dict[str, pa.Array] = {name: _plain(columns[name]) for name in columns if not name.startswith(PREFIX)}
    if positions > 1:
        made["labels"] = _lists(labels_of(columns, store.facts).numpy().astype(np.int64))
    for name, values in soft_columns(signal).items():
        made[name] = _by_rows(values, rows, positions)
    return pa.RecordBatch.from_pydict(made)


def soft_columns(signal: TeacherSignal) -> dict[str, Tensor]:
    """The signal under the names of an export, [n·P, width] or [n·P] each, all at T = 1 and in nats."""
    found: dict[str, Tensor] = {}
    # Head and tail normalised together, so that whoever reads them finds probabilities that add up to 1.
    head, mass = signal.at(1.0)
    if signal.head_ids is not None:
        found["ids"] = signal.head_ids.to(torch.int32)
    found["logprobs"] = head.float()
    if signal.draw_ids is not None and signal.draw_logprob is not None:
        found["draw_ids"] = signal.draw_ids.to(torch.int32)
        found["draw_logprobs"] = signal.draw_logprob.float()
        found["draw_logweights"] = signal.draws_at(1.0).float()
    if mass is not None and signal.tail_nodes is not None:
        found["tail_logmass"] = mass.float()
        found["tail_nodes"] = signal.tail_nodes.float()
    found["gold_logprob"] = signal.gold_logprob.float()
    found["gold_rank"] = signal.gold_rank.to(torch.int32)
    found["entropy"] = signal.entropy.float()
    found |= {f"feature.{layer}": values for layer, values in (signal.features or {}).items()}
    return found


def facts_of(store: LogitStore) -> dict[str, Any]:
    """What a reader of an export has to know beside the columns; it travels in each file's schema metadata."""
    plan = store.plan
    return {
        "schema_version": plan.schema_version,
        "plan": plan.digest,
        "teacher": plan.teacher,
        "tokenizer_sha": plan.tokenizer_sha,
        "data_fingerprint": plan.data_fingerprint,
        "codec": plan.codec,
        "classes": plan.classes,
        "class_names": list(store.facts.classes),
        "task": store.facts.task,
        "positions_per_row": plan.positions_per_row,
        "pad_id": store.facts.pad_id,
        "tail_betas": list(TAIL_BETAS),
        "temperature": 1.0,
        "ignored_label": IGNORED,
        **({"features": plan.features} if plan.features else {}),
    }


def _plain(values: np.ndarray) -> pa.Array:
    return _lists(values) if values.ndim == 2 else pa.array(values)


def _by_rows(values: Tensor, rows: int, positions: int) -> pa.Array:
    """[n·P, width] as a list of lists a row, or [n·P] as one list; without the level of positions where P is 1."""
    array = values.contiguous().numpy()
    inner = _lists(array) if array.ndim == 2 else pa.array(array)
    if positions == 1:
        return inner
    return pa.ListArray.from_arrays(_offsets(rows, positions), inner)


def _lists(values: np.ndarray) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.ListArray.from_arrays(_offsets(*values.shape), flat)


def _offsets(rows: int, width: int) -> pa.Array:
    return pa.array(np.arange(rows + 1, dtype=np.int32) * np.int32(width))
