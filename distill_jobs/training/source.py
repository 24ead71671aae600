"""Rows for training, whether they come from the logit store or from prepared data."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from cluster.files import Folder
from distill_jobs.data.batch import Batch, make_batch
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.reader import TableReader
from distill_jobs.store.reader import LogitStore
from distill_jobs.store.signal import TeacherSignal

Columns = dict[str, np.ndarray]


class Source:
    """Loads any rows, by number, as a batch on the device, with the teacher's signal where there is one."""

    def __init__(
        self,
        facts: DataFacts,
        rows: int,
        take: Callable[[np.ndarray], Columns],
        signal: Callable[[Columns, Any, torch.Tensor], TeacherSignal] | None = None,
    ) -> None:
        self.facts, self.rows, self._take, self._signal = facts, rows, take, signal

    def load(self, numbers: np.ndarray, device: str) -> tuple[Batch, TeacherSignal | None]:
        """The rows ``numbers`` [n]: inputs and labels, and the signal at the scored positions (row-major)."""
        columns = self._take(numbers)
        batch = make_batch(columns, self.facts)
        signal = None
        if self._signal is not None:
            keep = (batch.labels != -100).reshape(len(numbers), -1)
            signal = self._signal(columns, device, keep)
        return batch.to(device), signal


def split_source(data: Folder, split: str) -> Source:
    """The rows of a prepared split, hard labels only."""
    facts = DataFacts.load(data)
    if facts.splits.get(split, {}).get("rows", 0) == 0:
        return Source(facts, 0, lambda _: {})
    table = TableReader(data / split)
    return Source(facts, table.rows, table.take)


def store_source(store: Folder, data: Folder, soft: bool) -> Source:
    """The rows of a logit store; ``soft`` asks for the teacher's signal too, else its columns are never read."""
    opened = LogitStore.open(store, data)
    take = opened.take if soft else partial(opened.take, soft=False)
    return Source(opened.facts, opened.rows, take, opened.signal if soft else None)
