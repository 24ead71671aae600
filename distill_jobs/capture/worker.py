"""What one actor does to one shard: the teacher over a part of the data, encoded, into a part of the store.

One shard more is the store's fidelity: the actor that gets it holds the teacher already, and needs no second one.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import tee
from typing import Any

import torch
from torch import Tensor

from cluster.files import Folder
from cluster.meter import Meter
from cluster.notice import leave, tell
from distill_jobs.capture.batches import Trim, Window
from distill_jobs.capture.isolate import DeviceLostError
from distill_jobs.capture.part import PartCapture, Tally, Tools
from distill_jobs.capture.scoring import Scoring, chunk_for
from distill_jobs.capture.sizes import Sizes, device_name
from distill_jobs.capture.transfer import Transfer
from distill_jobs.capture.watch import Watch
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.reader import TableReader
from distill_jobs.data.table import PartRecord, adopted
from distill_jobs.errors import StoreError
from distill_jobs.models.flops import forward_flops
from distill_jobs.models.head import SplitHead, split_head
from distill_jobs.models.place import device_for, load_placed
from distill_jobs.models.scorer import Scorer
from distill_jobs.models.spread import spread_for
from distill_jobs.models.unscorable import unscorable
from distill_jobs.store.fidelity.measure import FIDELITY, measure_store, numbers, unmeasured
from distill_jobs.store.plan import PARTS, StorePlan
from distill_jobs.store.quarantine import Quarantined
from distill_jobs.store.writer import write_part

_SAMPLES = 5
_COMPILED_STEP = 64


@dataclass(frozen=True)
class CaptureTask:
    """Where an actor finds the teacher and the data, and how it runs them.

    Attributes:
        cores, devices: what the actor holds; from 2 devices on the teacher's layers are spread over them.
        chunk_positions: scored positions through the teacher's output head at once; None for as many as suit the
            device, 0 for the teacher's own whole forward.
        quarantine_limit: rows of one part that may be put into quarantine; None for any number.
        kind: the kind of actor, as the spec names it.
    """

    teacher: Folder
    data: Folder
    store: Folder
    batch_tokens: int
    precision: str
    cores: float
    devices: float
    fidelity_positions: int = 0
    compile: bool = False
    autocast: bool = False
    chunk_positions: int | None = None
    quarantine_limit: int | None = None
    kind: str = "actors"


class CaptureWorker:
    """Holds the teacher and captures parts, one after another."""

    def __init__(self, task: CaptureTask) -> None:
        self.task = task
        self.facts = DataFacts.load(task.data)
        self.table = TableReader(task.data / "train")
        self.plan = StorePlan.load(task.store)
        self.device = device_for(task.devices)
        self.teacher = load_placed(
            task.teacher,
            self.device,
            task.precision,
            autocast=task.autocast,
            compile=task.compile,
            spread=spread_for(task.devices),
        )
        self.watch, self.tally = Watch(self.device), Tally()
        self.flops = forward_flops(self.teacher, self.facts) or 0.0
        self.sizes = self._sizes()
        self.tools = self._tools()

    def run(self, shard: int | str) -> dict[str, Any]:
        """Capture the part of this number and commit it, or measure for ``FIDELITY``.

        Returns:
            the part's rows, tokens, bytes, commit record, how many rows are in quarantine and the first few of them;
            or the numbers that the tracker gets, none where nothing could be measured.

        Raises:
            HandBack: the actor has to go before the shard can be finished.
            CaptureError: more rows than allowed can't be scored.
            DeviceLostError, NoRoomError: faults of the machine, after which the shard can be tried again.
        """
        try:
            return self._capture(shard) if isinstance(shard, int) else self._measure()
        except DeviceLostError:
            # Whatever this process asks of the device now fails: another has to take its place.
            leave()
            raise

    def _measure(self) -> dict[str, Any]:
        try:
            page = measure_store(
                self.plan,
                self.task.data,
                self.teacher,
                positions=self.task.fidelity_positions,
                rows_at_once=max(1, self.sizes.tokens // self.facts.positions_per_row),
                device=self.device,
                ask=self.tools.scoring.ask,
            )
        except StoreError as error:
            # A capture doesn't stand or fall with what is known about it.
            self.task.store.write_json(FIDELITY, unmeasured(self.plan, str(error)))
            return {}
        self.task.store.write_json(FIDELITY, page)
        return numbers(page)

    def _capture(self, part: int) -> dict[str, Any]:
        data_sha256 = self.table.facts["part_sha256"][part]
        there = adopted(self.task.store / PARTS, part, self.plan.part_inputs(data_sha256))
        if there is not None:
            # Somebody was faster, or this attempt's record was written by an actor that died right after.
            return _told(there, [], 0.0)
        before = self.tally.tokens
        with Meter(self.task.cores, self.task.devices) as meter:

            def commit(windows: Iterator[Window], quarantined: Any) -> PartRecord:
                rows, targets = tee(window.kept() for window in windows)
                return write_part(
                    self.task.store,
                    self.plan,
                    part,
                    (batch for batch, _ in rows),
                    (encoded for _, encoded in targets),
                    data_sha256=data_sha256,
                    usage=meter.read,
                    extra={"kind": self.task.kind},
                    quarantined=quarantined,
                )

            rows = int(self.table.part_rows[part])
            capture = PartCapture(self.tools, part, rows, self.tally, lambda: self._tell(meter))
            with self.watch("busy", host=True):
                record = capture.run(self.table.batches(part), commit)
        self._tell(None)
        return _told(record, capture.quarantine, self.flops * (self.tally.tokens - before))

    def _tell(self, meter: Meter | None) -> None:
        seconds = self.watch.seconds
        now = meter.read().wall_seconds if meter else 0.0
        tell(
            tokens=self.tally.tokens,
            padding=self.tally.padding,
            teacher_seconds=seconds.get("teacher", 0.0) + seconds.get("head", 0.0),
            busy_seconds=seconds.get("busy", 0.0) + now,
        )

    def _sizes(self) -> Sizes:
        task, device = self.task, device_name(self.device, self.task.devices)
        wanted = {"batch_tokens": task.batch_tokens, "chunk_positions": task.chunk_positions}
        of = {"device": device, "teacher": self.plan.teacher, "precision": task.precision, **wanted}
        chunk = task.chunk_positions or chunk_for(self.device, self.plan.classes, _dtype(self.teacher))
        return Sizes(task.store, of, task.batch_tokens, chunk)

    def _tools(self) -> Tools:
        codec = self.plan.make_codec()
        scoring = Scoring(
            self.teacher,
            self._split,
            codec,
            targets=self.facts.targets,
            seed=self.plan.seed,
            device=self.device,
            chunk=lambda: self.sizes.chunk,
            watch=self.watch,
            features=self.plan.make_features(),
        )
        scoring.check(self.facts)
        return Tools(
            facts=self.facts,
            fields=self.plan.fields(),
            scoring=scoring,
            transfer=Transfer(self.device),
            sizes=self.sizes,
            # Only models of transformers are known to take rows of any length.
            trim=Trim(
                whole=self.teacher.origin["kind"] != "hf",
                step=_COMPILED_STEP if self.task.compile else Trim.step,
                pin=self.device != "cpu",
            ),
            watch=self.watch,
            unscorable=lambda window: unscorable(window.columns, self.teacher, self.facts),
            limit=self.task.quarantine_limit,
        )

    def _split(self, inputs: dict[str, Tensor]) -> SplitHead | None:
        return None if self.task.chunk_positions == 0 else split_head(self.teacher, self.facts, inputs)


def _told(record: PartRecord, quarantined: list[Quarantined], flops: float) -> dict[str, Any]:
    return {
        "flops": flops,
        "rows": record.rows,
        "tokens": record.tokens,
        "bytes": record.bytes,
        "record": asdict(record),
        "quarantined": record.quarantined,
        "quarantine_samples": [(row.source or f"sample {row.sample_id}", row.reason) for row in quarantined[:_SAMPLES]],
    }


def _dtype(teacher: Scorer) -> torch.dtype:
    own = next((p.dtype for p in teacher.parameters() if p.is_floating_point()), torch.float32)
    return teacher.autocast or own
