"""What one actor does to one shard: the teacher over a part of the data, encoded, into a part of the store.

One shard more is the store's fidelity: the actor that gets it holds the teacher already, and needs no second one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cluster.files import Folder
from cluster.meter import Meter
from distill_jobs.data.batch import make_batch
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.reader import TableReader, as_array
from distill_jobs.errors import CaptureError
from distill_jobs.models.files import load_model
from distill_jobs.models.place import device_for, place
from distill_jobs.store.draws import uniforms
from distill_jobs.store.fidelity.measure import FIDELITY, measure_store, numbers
from distill_jobs.store.plan import StorePlan
from distill_jobs.store.writer import write_part

Encoded = dict[str, Tensor]


@dataclass(frozen=True)
class CaptureTask:
    """Where an actor finds the teacher and the data, and how it runs them."""

    teacher: Folder
    data: Folder
    store: Folder
    batch_tokens: int
    precision: str
    cores: float
    devices: float
    fidelity_positions: int = 0


class CaptureWorker:
    """Holds the teacher and captures parts, one after another."""

    def __init__(self, task: CaptureTask) -> None:
        self.task = task
        self.facts = DataFacts.load(task.data)
        self.table = TableReader(task.data / "train")
        self.plan = StorePlan.load(task.store)
        self.codec = self.plan.make_codec()
        self.device = device_for(task.devices)
        self.teacher = place(load_model(task.teacher), self.device, task.precision)
        self.rows_at_once = max(1, task.batch_tokens // self.facts.positions_per_row)

    def run(self, shard: int | str) -> dict[str, Any]:
        """Capture the part of this number and commit it, or measure for ``FIDELITY``.

        Returns:
            the part's rows, tokens and bytes; or the numbers that the tracker gets.
        """
        return self._capture(shard) if isinstance(shard, int) else self._measure()

    def _measure(self) -> dict[str, Any]:
        page = measure_store(
            self.plan,
            self.task.data,
            self.teacher,
            positions=self.task.fidelity_positions,
            rows_at_once=self.rows_at_once,
            device=self.device,
        )
        self.task.store.write_json(FIDELITY, page)
        return numbers(page)

    def _capture(self, part: int) -> dict[str, Any]:
        with Meter(self.task.cores, self.task.devices) as meter:
            batches = list(self.table.batches(part))
            tokens = sum(_tokens(batch) for batch in batches)
            record = write_part(
                self.task.store,
                self.plan,
                part,
                batches,
                self._targets(batches),
                data_sha256=self.table.facts["part_sha256"][part],
                tokens=tokens,
                usage=meter.read,
            )
        return {"rows": record.rows, "tokens": record.tokens, "bytes": record.bytes}

    def _targets(self, batches: list[pa.RecordBatch]) -> Iterator[Encoded]:
        """The encoded targets of each record batch in turn, [rows · positions, width] a field.

        The teacher takes ``rows_at_once`` rows: several record batches of one packed sequence each, or a piece of a
        large one.
        """
        for group in _groups(batches, self.rows_at_once):
            columns = _columns(group)
            rows = len(columns["sample_id"])
            pieces = [self._encode(columns, start) for start in range(0, rows, self.rows_at_once)]
            whole = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
            start = 0
            for batch in group:
                stop = start + batch.num_rows * self.facts.positions_per_row
                yield {name: value[start:stop] for name, value in whole.items()}
                start = stop

    @torch.inference_mode()
    def _encode(self, columns: dict[str, np.ndarray], start: int) -> Encoded:
        some = {name: values[start : start + self.rows_at_once] for name, values in columns.items()}
        batch = make_batch(some, self.facts).to(self.device)
        logits = self.teacher(**batch.inputs).flatten(0, -2)[:, : self.facts.targets]
        try:
            chances = uniforms(self.plan.seed, batch.sample_ids, self.facts.positions_per_row)
            encoded = self.codec.encode(logits, batch.labels.flatten(), chances)
        except CaptureError as error:
            ids = some["sample_id"]
            raise CaptureError(f"{error} (in the batch of samples {ids[0]} to {ids[-1]})") from None
        return {name: value.cpu() for name, value in encoded.items()}


def _groups(batches: list[pa.RecordBatch], rows: int) -> Iterator[list[pa.RecordBatch]]:
    """Neighbouring record batches that together hold at most ``rows`` rows, or a single larger one."""
    group: list[pa.RecordBatch] = []
    for batch in batches:
        if group and sum(b.num_rows for b in group) + batch.num_rows > rows:
            yield group
            group = []
        group.append(batch)
    if group:
        yield group


def _columns(group: list[pa.RecordBatch]) -> dict[str, np.ndarray]:
    names = group[0].schema.names
    return {name: np.concatenate([as_array(batch.column(name)) for batch in group]) for name in names}


def _tokens(batch: pa.RecordBatch) -> int:
    return int(as_array(batch.column("tokens")).sum()) if "tokens" in batch.schema.names else batch.num_rows
