"""What all stages of one run share: the session, the tracker, the ledger, the terminal; and how a stage ends."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from types import TracebackType
from typing import Any, Self

from cluster import logs
from cluster.errors import LeaseError
from cluster.files import Folder, digest
from cluster.lease import Hold
from cluster.meter import Usage
from cluster.session import Session
from cluster.tracking import Run, Status, Tracker, flatten, owes
from cluster.tracking_server import server
from distill_jobs.console import Advance, Console
from distill_jobs.costs.budget import Spending
from distill_jobs.costs.ledger import Entry, Kind, Ledger, unfinished
from distill_jobs.costs.ledger import metrics as cost_metrics
from distill_jobs.costs.reckon import Reckoner
from distill_jobs.inputs import inputs_of
from distill_jobs.live import Live, sentence
from distill_jobs.needs import needs_of
from distill_jobs.shipping import DEAD_LEASE, JOB
from distill_jobs.spec import Job
from distill_jobs.stage import RECORD, StageRecord, status
from distill_jobs.words import size

Made = dict[str, Any]
Work = Callable[[Advance], tuple[Made, Usage]]
# Seconds for which a server that takes nothing is waited for at the end, and after a signal, when little time is left.
_PATIENCE, _KILLED_PATIENCE = 10.0, 3.0
_LOADER = "distill_jobs.models.serving:load"
_log = logging.getLogger(__name__)
_PACKAGES = ("distill-jobs", "torch", "transformers")


class Context:
    """One run of a pipeline. The workdir is this process's alone until the block ends.

    The Ray session starts when a stage first needs it, and ends with the block.

    Raises:
        LeaseError: on entering, when another process is at work in the workdir.
    """

    def __init__(self, job: Job, console: Console) -> None:
        self.job, self.console = job, console
        self.workdir = Folder(job.workdir)
        self.reckoner = Reckoner(job.costs)
        self.ledger = Ledger(self.workdir, self.reckoner.told)
        self.spending = Spending(self.priced, job.costs.budget_usd, lambda usage: self._keep_unfinished(usage))
        self.inputs = inputs_of(job)
        self.expected: dict[str, float] = {}
        self.live = Live(job.name, self.workdir, lambda: self.spending.usd, job.costs.budget_usd, lambda: self.expected)
        self._open = ExitStack()
        self._runs: dict[str, Run] = {}
        self._accelerator: str | None = None
        self._attempt: tuple[str, Usage, float] = ("", Usage(), 0.0)
        self._ended: Status = "FINISHED"

    def __enter__(self) -> Self:
        job, dead = os.environ.get(JOB, ""), os.environ.get(DEAD_LEASE, "")
        self._lease = self._open.enter_context(Hold(self.workdir, job, dead, self.console.say))
        self._open.enter_context(self.live)
        logs.bind(pipeline=self.job.name, job=job or None)
        self.console.on_stage = self.live.follow
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = "FINISHED" if kind is None else "KILLED" if kind is KeyboardInterrupt else "FAILED"
        self.live.ended(error)
        # Whatever comes in between, a second signal for example: no actor stays behind, and no lease.
        with self._open:
            for run in self._runs.values():
                run.end(self._ended)
            if "parent" in self.__dict__:
                self.parent.end(self._ended)
            elif kind is None and owes(self.workdir):
                self.tracker.outbox.start()
        if self._lease.lost:
            raise LeaseError(self._lease.lost)

    @cached_property
    def session(self) -> Session:
        """The Ray session, started now if it is not running yet."""
        self.parent  # noqa: B018  # trouble with tracking is told before anything is started
        spec = self.job.cluster
        session = self._open.enter_context(Session(spec.address, spec.cpus, spec.gpus))
        session.on_usage = self.spending.hear
        session.require(needs_of(self.job))
        return session

    @property
    def accelerator(self) -> str | None:
        """Ray's name of the cluster's accelerator: what device-seconds count as where their type isn't known."""
        # A cluster that grows may have its first only later.
        self._accelerator = self._accelerator or self.session.accelerator()
        return self._accelerator

    def priced(self, usage: Usage) -> float:
        """US dollars for what was held."""
        return self.reckoner.money(usage, self.accelerator)

    @property
    def home(self) -> Folder:
        """Where MLflow's own database lies unless a server is named."""
        return home_of(self.workdir)

    @cached_property
    def tracker(self) -> Tracker:
        """MLflow's experiment, with what an earlier command has left to be sent."""
        spec = self.job.tracking
        tracker = Tracker(server(spec.uri), spec.experiment or self.job.name, self.home, self.workdir)
        self._open.callback(self._leave, tracker)
        return tracker

    def _leave(self, tracker: Tracker) -> None:
        killed = self._ended == "KILLED"
        if told := tracker.close(_KILLED_PATIENCE if killed else _PATIENCE, uploads=not killed):
            self.console.say(f"{told}; the next `distill` command on this workdir, or `distill report SPEC`, sends it")

    @cached_property
    def parent(self) -> Run:
        """The pipeline's run in MLflow; the one of an earlier call is gone on with."""
        params = self.job.model_dump(mode="json", exclude_none=True)
        return self.tracker.parent(self.job.name, params, {"distill.task": self.job.task})

    def tracked(self, name: str) -> Run:
        """The nested run of a stage or arm."""
        if name not in self._runs:
            self._runs[name] = self.parent.child(name, {"distill.stage": name})
        return self._runs[name]

    def do(self, stage: str, folder: Folder, work: Work, model: Folder | None = None) -> bool:
        """Do a stage unless it is done: work, then the record, the ledger and MLflow; returns whether it did."""
        inputs = self.inputs[stage]
        found = status(stage, folder, inputs)
        if found.done:
            record = StageRecord.read(folder)
            if record and not self.ledger.has(stage):  # Killed between the record and the ledger.
                self.settle(record, Usage.of(record.usage), folder, model)
            self.ledger.drop(unfinished(stage))
            self.console.skipped(found)
            return False
        started = time.time()
        # From here on what lies in the folder may be neither the old nor the new.
        folder.remove(RECORD)
        with self.attempt(stage) as before, self.console.bar(stage, self.expected.get(stage), found.reason) as advance:
            self.tracked(stage)
            made, usage = work(advance)
        usage += before
        record = StageRecord(stage, digest(inputs), inputs, made, usage.as_dict(), started, time.time())
        record.commit(folder)
        self.settle(record, usage, folder, model)
        self.ledger.drop(unfinished(stage))
        return True

    @contextmanager
    def attempt(self, stage: str, beside: Usage | None = None) -> Iterator[Usage]:
        """Within, what the stage uses is known even if it doesn't come to its end; gives what earlier attempts used.

        Whoever brings the stage to its end counts those in, and drops their entry.

        Args:
            beside: what is held each second without being told of, for the budget.

        Raises:
            BudgetError: nothing is left of the budget.
        """
        known = self.ledger.find(unfinished(stage))
        self._attempt = (stage, known.usage if known else Usage(), time.time())
        self.spending.begin(stage, self.ledger.spent(), beside)
        logs.bind(stage=stage)
        _log.info("stage begun", extra=logs.TOLD)
        try:
            yield self._attempt[1]
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                _log.info("stage stopped", extra=logs.TOLD)
            else:
                _log.error("stage failed: %s", sentence(error), extra=logs.TOLD)
            self._keep_unfinished(self.spending.usage)
            raise
        else:
            _log.info("stage done", extra={**logs.TOLD, "seconds": round(time.time() - self._attempt[2], 3)})
        finally:
            logs.bind(stage=None)

    def _keep_unfinished(self, used: Usage) -> None:
        stage, before, started = self._attempt
        if stage and used.wall_seconds:
            self.enter(unfinished(stage), used + before, started, time.time(), kind="unfinished")

    def enter(
        self, stage: str, usage: Usage, started: float, ended: float, *, size: int = 0, kind: Kind = "measured"
    ) -> Entry:
        """Reckon what a stage has used, and enter it in the ledger."""
        entry = self.reckoner.entry(
            stage, usage, self.accelerator, started, ended, size=size, kind=kind, precision=self._precision(stage)
        )
        return self.ledger.enter(entry)

    def _precision(self, stage: str) -> str:
        """What a stage's models are computed in; half precision, whose peak is the higher, unless the spec says so."""
        job, role = self.job, stage.split("/")[0]
        if role == "teacher" and job.teacher.train is not None:
            return job.teacher.train.precision
        return job.capture.precision if role in ("teacher", "capture", "evaluate") else job.student.train.precision

    def settle(self, record: StageRecord, usage: Usage, folder: Folder, model: Folder | None = None) -> None:
        """Enter a finished stage in the ledger and in MLflow, with what it left in ``folder``, and say so."""
        size = record.made.get("bytes", 0) or folder.total_bytes()
        entry = self.enter(record.stage, usage, record.started, record.ended, size=size)
        run = self.tracked(record.stage)
        run.tags({"distill.digest": record.digest})
        run.metrics({**cost_metrics(entry), **_numbers(record.made)})
        if model is not None and self.job.tracking.log_models:
            kind = record.stage.split("/")[0]
            parameters = {"max_new_tokens": 32} if self.job.task == "causal_lm" else {}
            name = f"{self.job.name}-{kind}"
            place = model.uri.removeprefix(self.workdir.uri).strip("/")
            run.model(place, kind, name, loader=_LOADER, packages=_PACKAGES, parameters=parameters)
        self.end(record.stage, "FINISHED")
        self.console.finished(record.stage, usage, entry.usd, _note(record.made))

    def end(self, name: str, status: Status) -> None:
        """Close a nested run."""
        self.tracked(name).end(status)
        self._runs.pop(name, None)


def home_of(workdir: Folder) -> Folder:
    """The folder beside a workdir."""
    return Folder(workdir.uri.rstrip("/").rpartition("/")[0] or ".")


def _numbers(made: Made) -> dict[str, float]:
    """The numbers among what a stage made, under MLflow's names (``a.b`` becomes ``a/b``)."""
    found = {}
    for name, text in flatten(made).items():
        try:
            found[name.replace(".", "/")] = float(text)
        except ValueError:
            continue
    return found


def _note(made: Made) -> str:
    words = []
    for name, value in made.items():
        if isinstance(value, int):
            told = size(value) if name.endswith("bytes") else f"{value:,}"
            words.append(f"{name.removesuffix('_bytes').replace('_', ' ')} {told}")
    return ", ".join(words[:4])
