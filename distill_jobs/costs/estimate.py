"""What a job will take, predicted from a short probe of the real models: plain arithmetic, nothing is run here.

``predict(job, sizes, rates, prices, accelerator)`` gives one ``StageEstimate`` for each stage that costs anything;
``stage_of``, on which it stands, serves for any stage. Rates are those of one actor or rank and are taken to add up
over several; every estimate says what it rests on.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from cluster.meter import Usage
from distill_jobs.costs.prices import PriceBook
from distill_jobs.spec import Train
from distill_jobs.spec.job import Job

# What DeepSpeed itself takes for an optimizer step, beside the model's forward and backward: about this on a CPU, with
# a model too small to matter. The probe runs without the engine and can't see it.
_ENGINE_STEP_SECONDS = 0.008


@dataclass(frozen=True)
class StageEstimate:
    """Predicted for one stage: wall seconds, bytes left on disk, US dollars, and a sentence saying from what."""

    stage: str
    seconds: float
    bytes: int
    usd: float
    basis: str


@dataclass(frozen=True)
class Rates:
    """What a probe measured, on the device and with the threads of one capture actor.

    Attributes:
        capture_row_seconds: teacher forward and encoding of one row.
        encoding_share: the share of that which is not the bare forward.
        student_row_seconds, baseline_row_seconds: forward and backward of one row, with and without soft labels.
        teacher_row_seconds: the same for training the teacher; 0 where it is brought.
        student_forward_row_seconds: the student's bare forward.
        bytes_per_row: of soft targets in the store.
        positions_per_row: positions in a row.
    """

    capture_row_seconds: float
    encoding_share: float
    student_row_seconds: float
    baseline_row_seconds: float
    teacher_row_seconds: float
    student_forward_row_seconds: float
    bytes_per_row: float
    positions_per_row: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they come from an actor."""
        return asdict(self)


@dataclass(frozen=True)
class Sizes:
    """What is there to work through.

    Attributes:
        source_rows: rows of the source files, all splits together.
        prepare_row_seconds: seconds in which one actor prepares one of them.
        train_rows, validation_rows, test_rows: rows of the prepared splits (packed sequences for a language model).
        row_bytes: of a prepared row, in ``data/`` and again in the store.
        teacher_bytes, student_bytes: of the weights on disk.
        bring_seconds: for converting a teacher that is brought; 0 where it is trained or is there already.
    """

    source_rows: int
    prepare_row_seconds: float
    train_rows: int
    validation_rows: int
    test_rows: int
    row_bytes: float = 0.0
    teacher_bytes: int = 0
    student_bytes: int = 0
    bring_seconds: float = 0.0


@dataclass(frozen=True)
class StartUp:
    """Seconds before work begins: of a pool of actors and of a gang of ranks, imports and model loading included."""

    pool: float = 8.0
    gang: float = 15.0


@dataclass(frozen=True)
class Held:
    """What a stage holds while it runs: ``count`` actors or ranks of so many cores and accelerators each."""

    count: int
    cpus: float
    gpus: float = 0.0

    def for_seconds(self, seconds: float) -> Usage:
        """The usage of holding them that long."""
        return Usage(
            device_seconds=seconds * self.count * self.gpus,
            core_seconds=seconds * self.count * self.cpus,
            wall_seconds=seconds,
        )

    def __str__(self) -> str:
        each = f"{self.gpus:g} GPU" if self.gpus else f"{self.cpus:g} CPU"
        return f"{self.count} × {each}"


@dataclass(frozen=True)
class Work:
    """``amount`` of something, each of which takes one actor or rank ``seconds``."""

    what: str
    amount: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.amount:,.0f} {self.what} at {_rate(self.seconds)}"


def stage_of(
    stage: str,
    work: list[Work],
    held: Held,
    start_up: float,
    prices: PriceBook,
    accelerator: str | None,
    *,
    size: float = 0.0,
    note: str = "",
) -> StageEstimate:
    """A stage that does ``work`` one after another, each spread evenly over what it holds."""
    seconds = start_up + math.fsum(piece.amount * piece.seconds for piece in work) / held.count
    said = ", ".join(str(piece) for piece in work if piece.amount)
    basis = f"{said or 'nothing'} on each of {held}, and {start_up:g} s to start{'; ' if note else ''}{note}"
    usd = prices.money(held.for_seconds(seconds), accelerator)
    return StageEstimate(stage, seconds, math.ceil(size), usd, basis)


def predict(
    job: Job,
    sizes: Sizes,
    rates: Rates,
    prices: PriceBook,
    accelerator: str | None = None,
    start_up: StartUp | None = None,
) -> list[StageEstimate]:
    """The stages ``prepare``, ``teacher`` (where it costs anything), ``capture``, ``train``, ``evaluate``, in order."""
    its = _Prediction(job, sizes, rates, prices, accelerator, start_up or StartUp())
    captures = its.capture() if job.distill.soft_labels == "store" else None
    stages = [its.prepare(), its.teacher(), captures, its.train(), its.evaluate()]
    return [stage for stage in stages if stage is not None]


@dataclass(frozen=True)
class _Prediction:
    """The arithmetic of each stage of one job."""

    job: Job
    sizes: Sizes
    rates: Rates
    prices: PriceBook
    accelerator: str | None
    wait: StartUp

    @property
    def forward(self) -> float:
        """Seconds of the teacher's bare forward, a row."""
        return self.rates.capture_row_seconds * (1 - self.rates.encoding_share)

    def prepare(self) -> StageEstimate:
        rows = self.sizes.train_rows + self.sizes.validation_rows + self.sizes.test_rows
        work = Work("source rows", self.sizes.source_rows, self.sizes.prepare_row_seconds)
        held = Held(self.job.data.actors, self.job.data.cpus_per_actor)
        return self._stage("prepare", [work], held, size=rows * self.sizes.row_bytes)

    def teacher(self) -> StageEstimate | None:
        if self.job.teacher.train is not None:
            arms = {"teacher": (1, self.rates.teacher_row_seconds)}
            return self._training("teacher", self.job.teacher.train, arms, self.forward, self.sizes.teacher_bytes)
        if not self.sizes.bring_seconds:
            return None
        return self._stage("teacher", [Work("teacher to bring", 1, self.sizes.bring_seconds)], self._actors(1))

    def capture(self) -> StageEstimate:
        rows, each = self.sizes.train_rows, self.rates.bytes_per_row
        return self._stage(
            "capture",
            [Work("rows", rows, self.rates.capture_row_seconds)],
            self._actors(sum(kind.most for kind in self.job.capture.crews)),
            size=store_bytes(rows, each, self.sizes.row_bytes),
            note=f"{each / self.rates.positions_per_row:.0f} bytes of soft target a position{_as_the_first(self.job)}",
        )

    def train(self) -> StageEstimate:
        count = len(self.job.seeds)
        arms = {
            "student": (count * len(self.job.taught), max(self.rates.student_row_seconds, self._live_row)),
            "baseline": (count, self.rates.baseline_row_seconds),
        }
        forward = self.rates.student_forward_row_seconds
        return self._training("train", self.job.student.train, arms, forward, self.sizes.student_bytes)

    @property
    def _live_row(self) -> float:
        """Seconds a row that a live teacher's actors need together; students wait for them where that is more."""
        if self.job.distill.soft_labels == "store":
            return 0.0
        return self.rates.capture_row_seconds / max(1, sum(kind.least for kind in self.job.capture.crews))

    def evaluate(self) -> StageEstimate:
        rows, students = self.sizes.test_rows, (1 + len(self.job.taught)) * len(self.job.seeds)
        work = [
            Work("rows by the teacher", rows, self.forward),
            Work("rows by its students", rows * students, self.rates.student_forward_row_seconds),
        ]
        return self._stage("evaluate", work, self._actors(1))

    def _actors(self, count: int) -> Held:
        kind = self.job.capture.crews[0]
        return Held(count, kind.cpus_per_actor, kind.gpus_per_actor)

    def _stage(
        self,
        stage: str,
        work: list[Work],
        held: Held,
        *,
        start_up: float | None = None,
        size: float = 0,
        note: str = "",
    ) -> StageEstimate:
        seconds = self.wait.pool if start_up is None else start_up
        return stage_of(stage, work, held, seconds, self.prices, self.accelerator, size=size, note=note)

    def _training(
        self, stage: str, train: Train, arms: dict[str, tuple[int, float]], forward: float, size: int
    ) -> StageEstimate:
        """A gang that trains ``arms`` (name: how many models, seconds of a row), one model after another."""
        steps, models = optimizer_steps(train, self.sizes.train_rows), sum(count for count, _ in arms.values())
        looks = math.ceil(steps / train.steps_between_looks(self.sizes.train_rows))
        work = [Work(f"{name} rows", count * steps * train.batch_size, row) for name, (count, row) in arms.items()]
        # Every rank goes through every step, so that more ranks don't shorten this.
        work.append(Work("engine steps", models * steps * train.most_workers, _ENGINE_STEP_SECONDS))
        work.append(Work("validation rows", models * looks * self.sizes.validation_rows, forward))
        stopping = "; at most, since it may stop early" if train.early_stopping else ""
        held = Held(train.most_workers, train.cpus_per_worker, train.gpus_per_worker)
        note = f"{models} × {steps:,} steps{stopping}"
        return self._stage(stage, work, held, start_up=self.wait.gang, size=models * size, note=note)


def store_bytes(rows: int, bytes_per_row: float, row_bytes: float) -> int:
    """Bytes of the logit store: the soft targets, and the rows themselves that travel with them."""
    return math.ceil(rows * (bytes_per_row + row_bytes))


def optimizer_steps(train: Train, rows: int) -> int:
    """Optimizer steps of a run over ``rows`` training rows: as given, or as many as the epochs take."""
    return train.steps or max(1, math.ceil(rows * train.epochs / train.batch_size))


def total(estimates: list[StageEstimate]) -> StageEstimate:
    """The sum of all stages, one after another."""
    return StageEstimate(
        "total",
        math.fsum(e.seconds for e in estimates),
        sum(e.bytes for e in estimates),
        math.fsum(e.usd for e in estimates),
        "the sum of the stages, one after another",
    )


def _as_the_first(job: Job) -> str:
    kinds = job.capture.crews
    return f"; actors of every kind counted as those of {kinds[0].name}" if kinds[1:] else ""


def _rate(seconds: float) -> str:
    rate = 1 / seconds if seconds else math.inf
    return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"
