"""The next step's rows, read in a thread while this one is trained on, so that no step waits for the reader.

On a GPU they are copied there too, from page-locked memory and on a stream of their own, beside what it computes.
"""

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.gang import Rank
from distill_jobs.data.batch import Batch
from distill_jobs.spec.train import Train
from distill_jobs.store.signal import TeacherSignal
from distill_jobs.training.feed import Order, share_of_rank
from distill_jobs.training.source import Source


@dataclass
class Omissions:
    """What a run goes on without, after it has been rolled back.

    Attributes:
        rows: row numbers. Another row of the same step takes their places, unscored, so that steps keep their shape.
        batches: first samples of whole steps that are passed over.
    """

    rows: list[int] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)

    def take(self, order: Order, consumed: int, count: int) -> tuple[int, np.ndarray, np.ndarray]:
        """The step at or after sample ``consumed``: its first sample, its rows [count], and which are scored."""
        while True:
            rows = order.take(consumed, count)
            real = ~np.isin(rows, self.rows)
            if consumed not in self.batches and real.any():
                return consumed, np.where(real, rows, rows[real.argmax()]), real
            consumed += count


@dataclass(frozen=True)
class Micro:
    """A micro-batch of one rank.

    Attributes:
        rows: row numbers of those that are scored.
        positions, tokens: scored positions, and tokens that go through the model, padding left out.
    """

    rows: np.ndarray
    batch: Batch
    signal: TeacherSignal | None
    positions: int
    tokens: int


@dataclass(frozen=True)
class Portion:
    """One rank's share of a step: ``start`` is the step's first sample in the order, ``end`` the one after its last."""

    start: int
    end: int
    micros: list[Micro]
    ready: Any = None  # on a GPU, the event after which its tensors are there


class Ahead:
    """Reads one rank's shares of ``steps`` steps, from sample ``consumed`` on; one lies ready and one is being read.

    Attributes:
        waited: seconds for which ``take`` has waited, all calls together.
    """

    def __init__(
        self, source: Source, order: Order, train: Train, rank: Rank, consumed: int, steps: int, omitted: Omissions
    ) -> None:
        self._source, self._order, self._train, self._rank, self._omitted = source, order, train, rank, omitted
        self._cuda = rank.device.startswith("cuda")
        self.waited = 0.0
        self._ready: queue.Queue[Portion | BaseException] = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(consumed, steps), daemon=True, name="reader")
        self._thread.start()

    def take(self) -> Portion:
        """The next step's share. Raises what reading it has raised."""
        started = time.perf_counter()
        item = self._ready.get()
        self.waited += time.perf_counter() - started
        if isinstance(item, BaseException):
            raise item
        if item.ready is not None:
            stream = torch.cuda.current_stream(self._rank.device)
            stream.wait_event(item.ready)
            for tensor in _tensors(item):
                tensor.record_stream(stream)  # lest its memory be given to the next copy while it is in use
        return item

    def close(self) -> None:
        """Let the thread end, and wait for it."""
        self._closed.set()
        with suppress(queue.Empty):
            self._ready.get_nowait()
        self._thread.join()

    def _read(self, consumed: int, steps: int) -> None:
        try:
            with torch.no_grad(), self._beside():
                for _ in range(steps):
                    portion = self._portion(consumed)
                    if self._closed.is_set():
                        return
                    self._ready.put(portion)
                    consumed = portion.end
        except BaseException as error:
            self._ready.put(error)

    def _portion(self, consumed: int) -> Portion:
        count, micro = self._train.batch_size, self._train.rows_per_micro_batch
        start, rows, real = self._omitted.take(self._order, consumed, count)
        shares, scored = (share_of_rank(each, micro, self._rank.rank, self._rank.world_size) for each in (rows, real))
        micros = [self._micro(*pair) for pair in zip(shares, scored, strict=True)]
        ready = torch.cuda.current_stream().record_event() if self._cuda else None
        return Portion(start, start + count, micros, ready)

    def _micro(self, rows: np.ndarray, real: np.ndarray) -> Micro:
        batch, signal = self._source.load(rows, self._rank.device, real)
        return Micro(rows[real], batch, signal, batch.positions, _tokens(batch))

    @contextmanager
    def _beside(self) -> Iterator[None]:
        if not self._cuda:
            yield
            return
        make: Any = torch.cuda.Stream
        with torch.cuda.device(self._rank.device), torch.cuda.stream(make(self._rank.device)):
            yield


def _tokens(batch: Batch) -> int:
    inputs = batch.inputs
    if "segments" in inputs:
        return int((inputs["segments"] != 0).sum())
    return int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else batch.rows


def _tensors(portion: Portion) -> Iterator[Tensor]:
    for micro in portion.micros:
        yield from (*micro.batch.inputs.values(), micro.batch.labels, micro.batch.sample_ids)
        if micro.signal is not None:
            values = (getattr(micro.signal, each.name) for each in fields(micro.signal))
            yield from (value for value in values if isinstance(value, Tensor))
            yield from (micro.signal.features or {}).values()
