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
from distill_jobs.spec.job import Job
from distill_jobs.spec.parts import Train

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
    """The stages ``prepare``, ``teacher`` (where it is trained), ``capture``, ``train`` and ``evaluate``, in order."""
    wait, spec = start_up or StartUp(), job.capture
    actor = Held(spec.actors, spec.cpus_per_actor, spec.gpus_per_actor)
    rows = sizes.train_rows + sizes.validation_rows + sizes.test_rows
    forward = rates.capture_row_seconds * (1 - rates.encoding_share)
    prepare = stage_of(
        "prepare",
        [Work("source rows", sizes.source_rows, sizes.prepare_row_seconds)],
        Held(job.data.actors, job.data.cpus_per_actor),
        wait.pool,
        prices,
        accelerator,
        size=rows * sizes.row_bytes,
    )
    capture = stage_of(
        "capture",
        [Work("rows", sizes.train_rows, rates.capture_row_seconds)],
        actor,
        wait.pool,
        prices,
        accelerator,
        size=store_bytes(sizes.train_rows, rates.bytes_per_row, sizes.row_bytes),
        note=f"{rates.bytes_per_row / rates.positions_per_row:.0f} bytes of soft target a position",
    )
    evaluate = stage_of(
        "evaluate",
        [
            Work("rows by the teacher", sizes.test_rows, forward),
            Work("rows by its students", sizes.test_rows * 2 * len(job.seeds), rates.student_forward_row_seconds),
        ],
        Held(1, actor.cpus, actor.gpus),
        wait.pool,
        prices,
        accelerator,
    )
    arms = {"student": rates.student_row_seconds, "baseline": rates.baseline_row_seconds}
    train = _training(
        "train",
        job.student.train,
        {name: (len(job.seeds), seconds) for name, seconds in arms.items()},
        sizes,
        rates.student_forward_row_seconds,
        sizes.student_bytes,
        wait.gang,
        prices,
        accelerator,
    )
    if job.teacher.train is None:
        if not sizes.bring_seconds:
            return [prepare, capture, train, evaluate]
        work = [Work("teacher to bring", 1, sizes.bring_seconds)]
        bring = stage_of("teacher", work, Held(1, actor.cpus, actor.gpus), wait.pool, prices, accelerator)
        return [prepare, bring, capture, train, evaluate]
    teach = _training(
        "teacher",
        job.teacher.train,
        {"teacher": (1, rates.teacher_row_seconds)},
        sizes,
        forward,
        sizes.teacher_bytes,
        wait.gang,
        prices,
        accelerator,
    )
    return [prepare, teach, capture, train, evaluate]


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


def _training(
    stage: str,
    train: Train,
    arms: dict[str, tuple[int, float]],
    sizes: Sizes,
    forward_row_seconds: float,
    size: int,
    start_up: float,
    prices: PriceBook,
    accelerator: str | None,
) -> StageEstimate:
    """A gang that trains ``arms`` (name: how many models, seconds of a row), one model after another."""
    steps = optimizer_steps(train, sizes.train_rows)
    # Early stopping looks at the validation split once an epoch; a run without it once, at the end.
    looks = math.ceil(steps * train.batch_size / max(1, sizes.train_rows)) if train.early_stopping else 1
    models = sum(count for count, _ in arms.values())
    work = [Work(f"{name} rows", count * steps * train.batch_size, row) for name, (count, row) in arms.items()]
    # Every rank goes through every step, so that more ranks don't shorten this.
    work.append(Work("engine steps", models * steps * train.workers, _ENGINE_STEP_SECONDS))
    work.append(Work("validation rows", models * looks * sizes.validation_rows, forward_row_seconds))
    stopping = "; at most, since it may stop early" if train.early_stopping else ""
    return stage_of(
        stage,
        work,
        Held(train.workers, train.cpus_per_worker, train.gpus_per_worker),
        start_up,
        prices,
        accelerator,
        size=models * size,
        note=f"{models} × {steps:,} steps{stopping}",
    )


def _rate(seconds: float) -> str:
    rate = 1 / seconds if seconds else math.inf
    return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"
