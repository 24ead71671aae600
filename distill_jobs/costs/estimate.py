"""What a job will take, predicted from a short probe of the real models: plain arithmetic, nothing is run here.

``predict(job, sizes, rates, reckoner, accelerator)`` gives one ``StageEstimate`` for each stage that costs anything;
``stage_of``, on which it stands, serves for any stage. Rates are those of one actor or rank and are taken to add up
over several; every estimate says what it rests on.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.meter import Usage
from distill_jobs.costs.rates import Rates, Sizes, StartUp
from distill_jobs.costs.reckon import Reckoner
from distill_jobs.spec import Train
from distill_jobs.spec.job import Job

# What DeepSpeed itself takes for an optimizer step, beside the model's forward and backward: about this on a CPU, with
# a model too small to matter. The probe runs without the engine and can't see it.
_ENGINE_STEP_SECONDS = 0.008


@dataclass(frozen=True)
class StageEstimate:
    """Predicted for one stage.

    Attributes:
        seconds: wall time.
        bytes: left on disk.
        usd, kwh, kg_co2e: as the ledger will reckon them.
        usage: cores and accelerators held, rows, tokens, and operations of the models.
        basis: a sentence saying what this rests on.
    """

    stage: str
    seconds: float
    bytes: int
    usd: float
    basis: str
    kwh: float = 0.0
    kg_co2e: float = 0.0
    usage: Usage = field(default_factory=Usage)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with hours in place of seconds held."""
        plain = {name: getattr(self, name) for name in ("stage", "seconds", "bytes", "usd", "kwh", "kg_co2e", "basis")}
        used = self.usage
        return {
            **plain,
            "core_hours": used.core_seconds / 3600,
            "device_hours": used.device_seconds / 3600,
            "rows": used.rows,
            "tokens": used.tokens,
            "flops": used.flops,
        }


@dataclass(frozen=True)
class Held:
    """What a stage holds while it runs: ``count`` actors or ranks of so many cores and accelerators each."""

    count: int
    cpus: float
    gpus: float = 0.0

    def for_seconds(self, seconds: float, done: "Done", busy: float = 1.0) -> Usage:
        """The usage of holding them that long, ``busy`` of the cores' time burnt."""
        cores = seconds * self.count * self.cpus
        return Usage(
            device_seconds=seconds * self.count * self.gpus,
            core_seconds=cores,
            cpu_seconds=busy * cores,
            wall_seconds=seconds,
            rows=done.rows,
            tokens=done.tokens,
            flops=done.flops,
        )

    def __str__(self) -> str:
        each = f"{self.gpus:g} GPU" if self.gpus else f"{self.cpus:g} CPU"
        return f"{self.count} × {each}"


@dataclass(frozen=True)
class Done:
    """What a stage will have worked through: rows, tokens, and the models' floating-point operations."""

    rows: int = 0
    tokens: int = 0
    flops: float = 0.0


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
    reckoner: Reckoner,
    accelerator: str | None,
    *,
    size: float = 0.0,
    note: str = "",
    done: Done | None = None,
    beside: Held | None = None,
    busy: float = 1.0,
) -> StageEstimate:
    """A stage that does ``work`` one after another, each spread evenly over what it holds; ``beside`` is held, too."""
    seconds = start_up + math.fsum(piece.amount * piece.seconds for piece in work) / held.count
    said = ", ".join(str(piece) for piece in work if piece.amount)
    basis = f"{said or 'nothing'} on each of {held}, and {start_up:g} s to start{'; ' if note else ''}{note}"
    usage = held.for_seconds(seconds, done or Done(), busy)
    if beside is not None:
        usage = replace(usage + beside.for_seconds(seconds, Done(), busy), wall_seconds=seconds)
    entry = reckoner.entry(stage, usage, accelerator, 0.0, seconds)
    return StageEstimate(stage, seconds, math.ceil(size), entry.usd, basis, entry.kwh, entry.kg_co2e, usage)


def predict(
    job: Job,
    sizes: Sizes,
    rates: Rates,
    reckoner: Reckoner,
    accelerator: str | None = None,
    start_up: StartUp | None = None,
    times: int = 1,
) -> list[StageEstimate]:
    """The stages ``prepare``, ``teacher`` (where it costs anything), ``capture``, ``train``, ``evaluate``, in order.

    Args:
        times: on a cluster of so many times the actors and ranks that the spec asks for; a gang has as many of them as
            can share its batch evenly. The evaluation is done by one actor on any.
    """
    its = _Prediction(job, sizes, rates, reckoner, accelerator, start_up or StartUp(), times)
    captures = its.capture() if job.distill.soft_labels == "store" else None
    stages = [its.prepare(), its.teacher(), captures, its.train(), its.evaluate()]
    return [stage for stage in stages if stage is not None]


@dataclass(frozen=True)
class _Prediction:
    """The arithmetic of each stage of one job."""

    job: Job
    sizes: Sizes
    rates: Rates
    reckoner: Reckoner
    accelerator: str | None
    wait: StartUp
    times: int = 1

    @property
    def forward(self) -> float:
        """Seconds of the teacher's bare forward, a row."""
        return self.rates.capture_row_seconds * (1 - self.rates.encoding_share)

    def prepare(self) -> StageEstimate:
        rows = self.sizes.train_rows + self.sizes.validation_rows + self.sizes.test_rows
        work = Work("source rows", self.sizes.source_rows, self.sizes.prepare_row_seconds)
        held = Held(self.job.data.actors * self.times, self.job.data.cpus_per_actor)
        return self._stage("prepare", [work], held, size=rows * self.sizes.row_bytes, done=self._done(rows, 0.0))

    def teacher(self) -> StageEstimate | None:
        if self.job.teacher.train is not None:
            arms = {"teacher": (1, self.rates.teacher_row_seconds)}
            flops, size = self.rates.teacher_flops, self.sizes.teacher_bytes
            return self._training("teacher", self.job.teacher.train, arms, self.forward, size, flops)
        if not self.sizes.bring_seconds:
            return None
        return self._stage("teacher", [Work("teacher to bring", 1, self.sizes.bring_seconds)], self._actors(1))

    def capture(self) -> StageEstimate:
        rows, each = self.sizes.train_rows, self.rates.bytes_per_row
        return self._stage(
            "capture",
            [Work("rows", rows, self.rates.capture_row_seconds)],
            self._actors(sum(kind.most for kind in self.job.capture.crews) * self.times),
            done=self._done(rows, self.rates.teacher_flops),
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
        size, flops = self.sizes.student_bytes, self.rates.student_flops
        # A live teacher's actors are held beside the students; that they are not beside the baselines is left out.
        actors = sum(kind.least for kind in self.job.capture.crews) * self.times
        live = self._actors(actors) if self.job.distill.soft_labels == "live" else None
        return self._training("train", self.job.student.train, arms, forward, size, flops, live)

    @property
    def _live_row(self) -> float:
        """Seconds a row that a live teacher's actors need together; students wait for them where that is more."""
        if self.job.distill.soft_labels == "store":
            return 0.0
        actors = sum(kind.least for kind in self.job.capture.crews) * self.times
        return self.rates.capture_row_seconds / max(1, actors)

    def evaluate(self) -> StageEstimate:
        rows, students = self.sizes.test_rows, (1 + len(self.job.taught)) * len(self.job.seeds)
        work = [
            Work("rows by the teacher", rows, self.forward),
            Work("rows by its students", rows * students, self.rates.student_forward_row_seconds),
        ]
        flops = self.rates.teacher_flops + students * self.rates.student_flops
        return self._stage("evaluate", work, self._actors(1), done=self._done(rows, flops))

    def _done(self, rows: int, flops: float) -> Done:
        """Of ``flops`` for a position."""
        tokens = rows * self.rates.positions_per_row
        return Done(rows, tokens, tokens * flops)

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
        done: Done | None = None,
        beside: Held | None = None,
    ) -> StageEstimate:
        seconds = self.wait.pool if start_up is None else start_up
        busy = self.rates.busy_share
        more: dict[str, Any] = {"size": size, "note": note, "done": done, "beside": beside, "busy": busy}
        return stage_of(stage, work, held, seconds, self.reckoner, self.accelerator, **more)

    def _training(
        self,
        stage: str,
        train: Train,
        arms: dict[str, tuple[int, float]],
        forward: float,
        size: int,
        flops: float,
        beside: Held | None = None,
    ) -> StageEstimate:
        """A gang that trains ``arms`` (name: how many models, seconds of a row), one model after another.

        Args:
            forward, flops: seconds of a row's, and operations of a position's, forward pass. Training takes three
                times as many operations (6N for 2N): the gradients of a layer's input and of its parameters come on
                top.
        """
        workers = ranks_of(train, train.most_workers * self.times)
        steps, models = optimizer_steps(train, self.sizes.train_rows), sum(count for count, _ in arms.values())
        looks = math.ceil(steps / train.steps_between_looks(self.sizes.train_rows))
        work = [Work(f"{name} rows", count * steps * train.batch_size, row) for name, (count, row) in arms.items()]
        # Every rank goes through every step, so that more ranks don't shorten this.
        work.append(Work("engine steps", models * steps * workers, _ENGINE_STEP_SECONDS))
        work.append(Work("validation rows", models * looks * self.sizes.validation_rows, forward))
        stopping = "; at most, since it may stop early" if train.early_stopping else ""
        held = Held(workers, train.cpus_per_worker, train.gpus_per_worker)
        done = self._done(models * steps * train.batch_size, 3 * flops)
        note = f"{models} × {steps:,} steps{stopping}"
        return self._stage(
            stage, work, held, start_up=self.wait.gang, size=models * size, note=note, done=done, beside=beside
        )


def store_bytes(rows: int, bytes_per_row: float, row_bytes: float) -> int:
    """Bytes of the logit store: the soft targets, and the rows themselves that travel with them."""
    return math.ceil(rows * (bytes_per_row + row_bytes))


def optimizer_steps(train: Train, rows: int) -> int:
    """Optimizer steps of a run over ``rows`` training rows: as given, or as many as the epochs take."""
    return train.steps or max(1, math.ceil(rows * train.epochs / train.batch_size))


def ranks_of(train: Train, most: int) -> int:
    """The most ranks up to ``most`` that share a step's rows evenly, in micro-batches as given."""
    sharing = [n for n in range(1, most + 1) if train.batch_size % (n * (train.micro_batch or 1)) == 0]
    return max(sharing, default=1)


def total(estimates: list[StageEstimate]) -> StageEstimate:
    """The sum of all stages, one after another."""
    return StageEstimate(
        "total",
        math.fsum(e.seconds for e in estimates),
        sum(e.bytes for e in estimates),
        math.fsum(e.usd for e in estimates),
        "the sum of the stages, one after another",
        math.fsum(e.kwh for e in estimates),
        math.fsum(e.kg_co2e for e in estimates),
        sum((e.usage for e in estimates), Usage()),
    )


def _as_the_first(job: Job) -> str:
    kinds = job.capture.crews
    return f"; actors of every kind counted as those of {kinds[0].name}" if kinds[1:] else ""


def _rate(seconds: float) -> str:
    rate = 1 / seconds if seconds else math.inf
    return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"
