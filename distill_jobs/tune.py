"""``distill tune``: search the settings, every trial from the one store, and write the best as a spec.

The trials are scored on the validation split, which they also stop early by. The test split stays unseen: ``distill
run tune/best.yaml`` trains the winner with all seeds and evaluates it there.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import count
from typing import Any

from cluster.errors import FileError
from cluster.files import digest
from cluster.meter import Usage
from cluster.sweep import Book, Halving, Sweep, Trial, run_sweep
from distill_jobs.console import Advance
from distill_jobs.context import Context, Made
from distill_jobs.costs.ledger import metrics as cost_metrics
from distill_jobs.data.facts import DataFacts
from distill_jobs.errors import DataError, DistillError, SpecError, TrainingError
from distill_jobs.inputs import Inputs
from distill_jobs.pipeline import DO, check_store
from distill_jobs.spec import Job
from distill_jobs.spec.tune import Tune
from distill_jobs.stage import flatten
from distill_jobs.store.plan import StorePlan
from distill_jobs.training.gangs import gang_of
from distill_jobs.tuning.finalists import DEFAULT, Finalist, finalists, judge, points
from distill_jobs.tuning.results import BEST, FOLDER, IMPORTANCE, PICTURE, SURFACE, TRIALS, Outcome, Round, used
from distill_jobs.tuning.space import Settings, Space, baseline_space, student_space
from distill_jobs.tuning.tables import print_tuning
from distill_jobs.tuning.trial import SEED, SPOILT, TrialTask, run_trial

_WORK, _STATE = "work", "sweep.json"


def tune(context: Context) -> None:
    """Prepare, teach and capture where that is not done, then search, and say what came out."""
    job, spec = context.job, context.job.tune or Tune()
    space = space_of(job)
    for stage in ("prepare", "teach", "capture"):
        DO[stage](context)
    check_store(context)
    _check(context, space)
    context.inputs["tune"] = tune_inputs(job, spec, context.inputs)
    folder = context.workdir / FOLDER
    context.do("tune", folder, Tuning(context, spec, space).work)
    print_tuning(context.console, folder)


def space_of(job: Job) -> Space:
    """What is searched.

    Raises:
        SpecError: the job can't be tuned so; told before a workdir is touched.
    """
    if job.distill.soft_labels != "store":
        raise SpecError("tuning trains every trial from one store: set distill.soft_labels to store")
    return student_space(job, (job.tune or Tune()).search)


def tune_inputs(job: Job, spec: Tune, inputs: Inputs) -> dict[str, Any]:
    """What the outcome of tuning depends on."""
    return {
        **_trial_inputs(job, spec, inputs),
        "baseline": _first(inputs, "baseline") if spec.baseline else None,
        "seeds": list(job.seeds),
        "tune.trials": spec.trials,
        "tune.finalists": spec.finalists,
    }


def _trial_inputs(job: Job, spec: Tune, inputs: Inputs) -> dict[str, Any]:
    """What a trial depends on besides its parameters; more trials or finalists leave those that were made alone."""
    tree = spec.model_dump(mode="json", exclude_none=True, include={"search", "early_stopping", "seed"})
    return {
        **_first(inputs, "student"),
        "metric": metric_of(job, spec),
        SEED: search_seed(job),
        **flatten(tree, "tune"),
    }


def _first(inputs: Inputs, role: str) -> dict[str, Any]:
    return next(values for name, values in inputs.items() if name.startswith(f"{role}/"))


def metric_of(job: Job, spec: Tune) -> str:
    """What is scored on the validation split: what the evaluation compares, of perplexity its logarithm."""
    return spec.metric or ("nll" if job.task == "causal_lm" else "accuracy")


def search_seed(job: Job) -> int:
    """The training seed of all trials: none of the job's, which the finalists get, so that no luck is carried over."""
    return next(seed for seed in count() if seed not in job.seeds)


class Tuning:
    """The sweep of one job, and what is made of it."""

    def __init__(self, context: Context, spec: Tune, space: Space) -> None:
        self.context, self.spec, self.space = context, spec, space
        self.job, self.folder = context.job, context.workdir / FOLDER
        self.work_folder = self.folder / _WORK
        self.metric = metric_of(self.job, spec)
        self.better = "higher" if self.metric == "accuracy" else "lower"
        self.digest = digest(_trial_inputs(self.job, spec, context.inputs))
        self.gang = gang_of(self.job.student.train)
        self.accelerator: str | None = None
        self.books: list[Book] = []
        self.shares: dict[str, float] = {}
        self.spent: dict[str, Usage] = {}
        self.seconds: Callable[[], float] = lambda: 0.0
        self.total = 0
        self.advance: Advance = lambda *_: None

    def work(self, advance: Advance) -> tuple[Made, Usage]:
        """All rounds, then the files; what was spent is in the ledger also when this is stopped."""
        self.advance, self.accelerator = advance, self.context.session.accelerator()
        self._open()
        before, started = self._state().get("seconds", 0.0), time.time()

        def seconds() -> float:
            return float(before + time.time() - started)

        self.seconds = seconds
        # The trials of earlier calls are among those that are heard of.
        known = self.context.ledger.find("tune")
        self.context.spending.begin("tune", self.context.ledger.spent() - (known.usd if known else 0.0))
        try:
            student, baseline = self._rounds()
        except BaseException:
            self._count_unfinished(started, seconds())
            raise
        finally:
            self.work_folder.write_json(_STATE, {"digest": self.digest, "seconds": seconds()})
        return self._write(student, baseline, seconds())

    def _rounds(self) -> tuple[Round, Round | None]:
        tuned = self.spec.baseline and bool(baseline_space(self.job, self.spec.search).search)
        each = self.spec.trials + (1 + self.spec.finalists) * len(self.job.seeds)
        self.total = each * (2 if tuned else 1)
        student = self._round(self.space, {})
        if not tuned:
            return student, None
        # The baseline has the student's model and budget, so it is searched after it.
        own = baseline_space(self.job, self.spec.search).search
        chosen = {path: value for path, value in student.best_settings.items() if path not in own}
        space = baseline_space(self.space.apply(chosen), self.spec.search)
        return student, self._round(space, {p: v for p, v in chosen.items() if p.startswith("student.")})

    def _round(self, space: Space, given: Settings) -> Round:
        """One role: the search, and then its finalists with the job's seeds; ``given`` is settled before."""
        role, job, spec, early = space.role, self.job, self.spec, self.spec.early_stopping
        default = space.parameters()
        found = Round(space)
        found.searched = self._sweep(
            space,
            Sweep(
                space=space.distributions(),
                trials=spec.trials,
                prefix=role,
                points={f"{role}-{DEFAULT}": default},
                seed=spec.seed,
                halving=Halving(early.grace, early.reduction) if early is not None else None,
                **self._held(),
            ),
            Book(self.work_folder / f"{role}-search-{digest(given)}"),
        )
        chosen = finalists(found.searched, Finalist(DEFAULT, default), self.better, spec.finalists)
        again = points(chosen, role, job.seeds)
        last = Sweep(space={}, trials=len(again), prefix=role, points=again, **self._held())
        found.last = self._sweep(space, last, Book(self.work_folder / f"{role}-finalists-{digest(given)}"))
        trials = {trial.name: trial for trial in found.last}
        found.judged = judge(chosen, role, job.seeds, trials, self.better)
        if found.judged["best"] is None:
            why = next((trial.why for trial in found.last if trial.why), "no trial came to its end")
            raise TrainingError(f"tuning the {role} failed with all settings: {why}")
        return found

    def _held(self) -> dict[str, Any]:
        """How many trials at a time, and what each holds."""
        gang, session, asked = self.gang, self.context.session, self.spec.concurrent
        alone = {"CPU": gang.cpus} | ({"GPU": gang.gpus} if gang.gpus else {})
        room = max(1, session.room(alone) // gang.workers)
        return {
            "better": self.better,
            "cpus": gang.cpus * gang.workers,
            "gpus": gang.gpus * gang.workers,
            "in_process": gang.workers == 1,
            "concurrent": room if asked == "auto" else min(room, asked),
        }

    def _sweep(self, space: Space, sweep: Sweep, book: Book) -> list[Trial]:
        early = self.spec.early_stopping
        task = TrialTask(
            space=space,
            digest=self.digest,
            work=self.work_folder / "arms",
            seed=search_seed(self.job),
            metric=self.metric,
            rows=DataFacts.load(self.context.workdir / "data").splits["train"]["rows"],
            looks=early.looks if early is not None and sweep.halving is not None else None,
        )
        self.books.append(book)
        for trial in book.trials():
            self.spent[trial.name] = Usage.of(trial.usage)
            # A call that was killed may have left its run open. What was cut off ends with this call at the latest.
            if trial.state == "begun":
                self.context.tracked(f"{FOLDER}/{trial.name}")
            else:
                self.shares[trial.name] = 1.0
                self._close(trial)
        return run_sweep(
            self.context.session,
            run_trial,
            task,
            sweep,
            book,
            lambda trial, log: self._tell(space, trial, log),
            spoils=SPOILT,
            fatal=(DistillError,),
        )

    def _tell(self, space: Space, trial: Trial, log: list[dict[str, Any]]) -> None:
        """A trial has begun, gone on or ended: say so on the console and in MLflow."""
        context, name = self.context, f"{FOLDER}/{trial.name}"
        run = context.tracked(name)
        if trial.state == "begun" and not trial.curve:
            own = {path: value for path, value in trial.parameters.items() if path != SEED}
            run.params({"role": space.role, SEED: trial.parameters.get(SEED, search_seed(self.job))})
            run.params(space.settings(own))
        for entry in log:
            run.metrics({f"train/{key}": value for key, value in entry.items() if key != "step"}, entry["step"])
        self.spent[trial.name] = Usage.of(trial.usage)
        held = replace(sum(self.spent.values(), Usage()), wall_seconds=self.seconds())
        context.spending.hear("trials", held, entered=True)
        share = trial.curve[-1]["share"] if trial.curve else 0.0
        self.shares[trial.name] = share if trial.state == "begun" else 1.0
        self.advance(sum(self.shares.values()), self.total, trial.name)
        if trial.state == "begun":
            return
        self._close(trial)
        with suppress(FileError):  # it may still be writing: the whole folder goes at the end
            (self.work_folder / "arms" / trial.name).clear()

    def _close(self, trial: Trial) -> None:
        """Give MLflow the outcome of a trial that has ended."""
        context, name = self.context, f"{FOLDER}/{trial.name}"
        run, usage = context.tracked(name), Usage.of(trial.usage)
        reckoned = context.reckoner.entry(name, usage, self.accelerator, trial.started, trial.ended)
        run.metrics({f"quality/validation_{self.metric}": trial.score, **cost_metrics(reckoned)})
        run.tags({"distill.trial": trial.state.upper(), **({"distill.why": trial.why} if trial.why else {})})
        context.end(name, "FAILED" if trial.state == "failed" else "FINISHED")

    def _write(self, student: Round, baseline: Round | None, seconds: float) -> tuple[Made, Usage]:
        context, workdir = self.context, self.context.workdir
        captured = [entry.usd for entry in context.ledger.entries() if entry.stage == "capture"]
        outcome = Outcome(
            job=self.job,
            spec=self.spec,
            metric=self.metric,
            better=self.better,
            seed=search_seed(self.job),
            student=student,
            baseline=baseline,
            seconds=seconds,
            validation_rows=DataFacts.load(workdir / "data").splits["validation"]["rows"],
            store_rows=int(workdir.read_json("store/manifest.json")["rows"]),
            capture_usd=sum(captured) if captured else None,
        )
        usage = outcome.usage
        outcome.write(self.folder, self.context.priced)
        self._log_files()
        (self.work_folder / "arms").clear()
        states = [trial.state for trial in outcome.trials]
        made = {"trials": len(states), **{state: states.count(state) for state in ("finished", "pruned", "failed")}}
        return {**made, "best": student.best_settings}, usage

    def _open(self) -> None:
        """Go on with what an earlier call has begun, where it was for the same trials."""
        if self._state().get("digest") != self.digest:
            self.work_folder.clear()
            self.work_folder.write_json(_STATE, {"digest": self.digest, "seconds": 0.0})

    def _state(self) -> dict[str, Any]:
        with suppress(FileError):
            if self.work_folder.exists(_STATE):
                found = self.work_folder.read_json(_STATE)
                return found if isinstance(found, dict) else {}
        return {}

    def _count_unfinished(self, started: float, seconds: float) -> None:
        """What has been spent by now is in the ledger whatever becomes of the rest."""
        trials = [trial for book in self.books for trial in book.trials()]
        usage = used(trials, seconds)
        self.context.enter("tune", usage, started, time.time())

    def _log_files(self) -> None:
        run = self.context.tracked("tune")
        for name in (TRIALS, IMPORTANCE, SURFACE, PICTURE, BEST):
            if self.folder.exists(name):
                run.artifact(f"{FOLDER}/{name}")


def _check(context: Context, space: Space) -> None:
    """Refuse before any trial what only the prepared data and the store can tell."""
    facts = DataFacts.load(context.workdir / "data")
    if not facts.splits.get("validation", {}).get("rows"):
        raise DataError("tuning scores trials on the validation split, which holds no rows: give data.validation some")
    codec = StorePlan.load(context.workdir / "store").codec
    for path in space.search:
        for value in space.ends(path):
            refused = space.apply({path: value}).refusal(str(codec["name"]), codec, facts.targets)
            if refused:
                raise SpecError(f"tune.search.{path}: {refused}")
