"""Soft labels without a store: the teacher answers beside the student, in actors, as the rows are needed.

What comes back is what a store would hold, by the same codec and with the same draws, so that neither the losses nor
the loop know the difference, and the two can be compared. Actors are asked some steps ahead, in the order in which the
rows will be read. There is no quarantine: a row that the teacher can't score ends the run. The teacher is paid for in
every run and for every epoch: what its actors hold counts to the student's own entry in the ledger.
"""

import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cluster.files import Folder
from cluster.gang import Rank
from cluster.oncall import Answer, OnCall
from distill_jobs.capture.batches import Trim, Window, groups
from distill_jobs.capture.crews import crew_of
from distill_jobs.capture.scoring import Scoring, chunk_for
from distill_jobs.capture.transfer import Transfer
from distill_jobs.capture.watch import Watch
from distill_jobs.data.batch import batch_columns
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.reader import TableReader
from distill_jobs.errors import CaptureError, DistillError
from distill_jobs.models.head import split_head
from distill_jobs.models.place import device_for, load_placed
from distill_jobs.models.spread import spread_for
from distill_jobs.models.unscorable import unscorable
from distill_jobs.spec.capture import ActorKind, Capture
from distill_jobs.spec.reading import Reading
from distill_jobs.spec.train import Train
from distill_jobs.store.codecs import make_codec
from distill_jobs.store.features import FeatureCoding
from distill_jobs.store.plan import SPLIT, StorePlan
from distill_jobs.store.reader import as_tensor
from distill_jobs.store.signal import TeacherSignal
from distill_jobs.store.writer import PREFIX
from distill_jobs.training.feed import Order, share_of_rank
from distill_jobs.training.source import Columns, Source, split_source
from distill_jobs.training.task import Arm, TrainTask

STEPS_AHEAD = 2
"""Steps whose rows are asked for beside the one that is read."""


@dataclass(frozen=True)
class LiveTask:
    """Where an actor finds the teacher and the data, and how it runs them."""

    teacher: Folder
    data: Folder
    capture: Capture
    kind: ActorKind


class LiveWorker:
    """Holds the teacher and says what it thinks of rows."""

    def __init__(self, task: LiveTask) -> None:
        spec, kind = task.capture, task.kind
        self.facts = DataFacts.load(task.data)
        self.table = TableReader(task.data / SPLIT)
        device = device_for(kind.gpus_per_actor)
        self.teacher = load_placed(
            task.teacher,
            device,
            spec.precision,
            autocast=spec.autocast,
            compile=spec.compile,
            spread=spread_for(kind.gpus_per_actor),
        )
        plan = live_plan(spec, self.facts, self.teacher.outputs)
        codec = plan.make_codec()
        self.fields, self.tokens = plan.fields(), kind.batch_tokens or spec.batch_tokens
        own = next((p.dtype for p in self.teacher.parameters() if p.is_floating_point()), torch.float32)
        chunk = spec.chunk_positions or chunk_for(device, plan.classes, self.teacher.autocast or own)
        self.scoring = Scoring(
            self.teacher,
            lambda inputs: None if spec.chunk_positions == 0 else split_head(self.teacher, self.facts, inputs),
            codec,
            targets=plan.classes,
            seed=spec.seed,
            device=device,
            chunk=lambda: chunk,
            watch=Watch(device),
            features=plan.make_features(),
        )
        self.scoring.check(self.facts)
        self.transfer = Transfer(device)
        self.trim = Trim(whole=self.teacher.origin["kind"] != "hf", pin=device != "cpu")

    def run(self, numbers: np.ndarray) -> Columns:
        """What a store would hold of the training rows ``numbers`` [n]: ``t.<field>``, [n, positions · width] each.

        Raises:
            CaptureError: the teacher can't score one of them.
        """
        columns = self.table.take(numbers, batch_columns(self.facts))
        window = Window([_record_batch(columns)], self.facts, self.fields)
        window.bad.update(unscorable(window.columns, self.teacher, self.facts))
        for group in [] if window.bad else groups(window, lambda: self.tokens, self.trim):
            self.transfer.start(self.scoring(group)).land()
        if window.bad:
            row, reason = next(iter(window.bad.items()))
            raise CaptureError(
                f"the teacher can't score sample {int(window.sample_ids[row])}: {reason}. Live soft labels know no "
                f"quarantine: mend the data or the teacher, or set distill.soft_labels to store"
            )
        return {PREFIX + name: values.reshape(len(numbers), -1) for name, values in window.targets.items()}


def live_plan(spec: Capture, facts: DataFacts, outputs: int) -> StorePlan:
    """The plan of the store that there would be, by which a student is checked and signals are decoded.

    Raises:
        VocabularyError: the teacher gives fewer logits than there are classes.
    """
    codec = make_codec(spec.codec, facts)
    return StorePlan.make(
        facts,
        codec,
        "live",
        outputs,
        seed=spec.seed,
        precision=spec.arithmetic,
        features=FeatureCoding.of(spec.features),
    )


@contextmanager
def live_teacher(rank: Rank, task: TrainTask, arm: Arm) -> Iterator[OnCall | None]:
    """The teacher's actors, shared by all ranks, all of which must call; None for an arm that doesn't ask a teacher."""
    if task.live is None or not arm.reads_soft:
        yield None
        return
    assert task.teacher is not None, "nobody to ask"
    crews = [
        crew_of(kind, partial(LiveWorker, LiveTask(task.teacher, task.data, task.live, kind)))
        for kind in task.live.crews
        if kind.least
    ]
    # A name that no earlier attempt had, whose actors may still be about to end.
    name = f"teacher-{rank.agreed(secrets.randbits(62)):x}"
    asked = OnCall(name, crews, retries=task.live.retries, fatal=(DistillError,), what="the live teacher")
    try:
        yield asked
    finally:
        if rank.rank == 0:
            asked.close()


def live_source(asked: OnCall, data: Folder, spec: Capture, train: Train, rank: Rank, reading: Reading) -> Source:
    """The training split with the teacher's signal from actors, in the order in which it is read without one."""
    hard = split_source(data, SPLIT, reading)
    plan = live_plan(spec, hard.facts, hard.facts.targets)
    table = Asking(hard.columns, asked.ask)
    codec, features, fields = plan.make_codec(), plan.make_features(), plan.fields()

    def signal(columns: Columns, device: str, keep: Tensor) -> TeacherSignal:
        chosen = keep.reshape(-1).cpu().numpy().nonzero()[0]
        raw = {}
        for name, field in fields.items():
            values = columns[PREFIX + name].reshape(-1, field.width)
            raw[name] = as_tensor(values.take(chosen, axis=0)).to(device)
        said = codec.decode(raw, plan.classes)
        return said if features is None else replace(said, features=features.decode(raw))

    def order(seed: int) -> Order:
        return Foretelling(hard.order(seed), table.expect, train.rows_per_micro_batch, rank)

    return Source(hard.facts, hard.rows, table.take, signal, order)


class Asking:
    """Rows with the teacher's columns: those that were expected have been asked for already."""

    def __init__(self, take: Callable[[np.ndarray], Columns], ask: Callable[[np.ndarray], Answer]) -> None:
        self._take, self._ask = take, ask
        self._open: OrderedDict[bytes, Answer] = OrderedDict()
        self._lock = threading.Lock()
        self._most = 0

    def expect(self, batches: list[np.ndarray]) -> None:
        """Have these asked for that have not been; what else is open and older is given up."""
        with self._lock:
            for numbers in batches:
                key = numbers.tobytes()
                if key not in self._open:
                    self._open[key] = self._ask(numbers)
            # After a run has gone back some steps, nobody comes for what was open.
            self._most = max(self._most, 2 * len(batches))
            while len(self._open) > self._most:
                self._open.popitem(last=False)

    def take(self, numbers: np.ndarray) -> Columns:
        """The rows ``numbers`` with the teacher's columns; waits for them."""
        with self._lock:
            answer = self._open.pop(numbers.tobytes(), None) or self._ask(numbers)
        # The data are read while the teacher works.
        columns = self._take(numbers)
        said: Columns = answer.wait()
        return columns | said


class Foretelling(Order):
    """An order that tells, whenever rows are taken from it, which micro-batches this rank will read next."""

    def __init__(self, order: Order, expect: Callable[[list[np.ndarray]], None], micro: int, rank: Rank) -> None:
        super().__init__(order.rows, order.seed)
        self._order, self._expect, self._micro, self._rank = order, expect, micro, rank

    def take(self, consumed: int, count: int) -> np.ndarray:
        rows = self._order.take(consumed, count * (1 + STEPS_AHEAD))
        steps = [rows[start : start + count] for start in range(0, len(rows), count)]
        shares: list[Any] = []
        for step in steps:
            shares += share_of_rank(step, self._micro, self._rank.rank, self._rank.world_size)
        self._expect(shares)
        return steps[0]

    def at(self, samples: np.ndarray) -> np.ndarray:
        return self._order.at(samples)


def _record_batch(columns: Columns) -> pa.RecordBatch:
    arrays = {}
    for name, values in columns.items():
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        arrays[name] = flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    return pa.RecordBatch.from_pydict(arrays)
