"""One trial: the student, or the baseline, trained from the one store with the settings proposed, and scored on the
validation split alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.files import Folder
from cluster.gang import run_gang
from cluster.meter import Usage
from cluster.session import Session
from cluster.solo import run_here
from cluster.sweep import Report
from distill_jobs.errors import DistillError, SpecError, TrainingError
from distill_jobs.inputs import arm_of
from distill_jobs.spec import Job
from distill_jobs.stage import StageRecord
from distill_jobs.training.arm import train_arms
from distill_jobs.training.gangs import gang_of, task_of
from distill_jobs.training.loop import steps_of
from distill_jobs.training.task import Arm, TrainTask
from distill_jobs.tuning.space import Parameters, Space

SPOILT = (SpecError, TrainingError)
"""What makes one trial a failed one: values that don't go together, and a loss that is no longer finite."""

_SCORES = {"accuracy": "validation_accuracy", "nll": "validation"}
SEED = "seed"
"""The key among a trial's parameters that gives it another seed than all others."""


@dataclass(frozen=True)
class TrialTask:
    """What all trials of one role share.

    Attributes:
        space: what is searched, and the job that the settings are put into.
        digest: of all that a trial depends on besides its parameters.
        work: the folder in which each trial has one of its own.
        seed: of every trial, so that they start alike and see the same batches.
        rows: training rows, for the number of steps.
        looks: how many times a trial is looked at, where the spec does not say.
    """

    space: Space
    digest: str
    work: Folder
    seed: int
    metric: str
    rows: int
    looks: int | None


def run_trial(task: TrialTask, name: str, parameters: Parameters, report: Report) -> tuple[float, dict[str, Any]]:
    """Train one trial; its score is that of the model that would be kept, at the last or the best look.

    Raises:
        SpecError: the settings don't go together.
        TrainingError: the loss is not finite.
    """
    arm, job = _arm(task, name, parameters)
    log: list[dict[str, Any]] = []

    def on_report(values: dict[str, Any]) -> None:
        steps = values.pop("of")
        entry = {key: value for key, value in values.items() if key not in ("arm", "resumed", "bad")}
        log.append(entry)
        # A loss that is not finite is no look: the training is about to say so itself.
        if math.isfinite(entry.get("validation", math.nan)) and entry["step"] < steps:
            told = {"step": entry["step"], "loss": entry["validation"], "log": log.copy()}
            told["usage"] = {"rows": entry["step"] * arm.train.batch_size}
            log.clear()
            report(entry["step"] / steps, entry[_SCORES[task.metric]], told)

    record = _train(task_of(job, (arm,), arm.train, Folder(job.workdir) / "store"), arm, on_report)
    history = arm.folder.read_json("history.json")
    best = next(e for e in history if e["step"] == record.made["best_step"] and "validation" in e)
    used = Usage.of(record.usage)
    told = {
        "step": best["step"],
        "steps": record.made["steps"],
        "loss": best["validation"],
        "log": log,
        "usage": {"rows": used.rows, "tokens": used.tokens},
    }
    return float(best[_SCORES[task.metric]]), told


def _arm(task: TrialTask, name: str, parameters: Parameters) -> tuple[Arm, Job]:
    own = dict(parameters)
    seed = own.pop(SEED, task.seed)
    settings = task.space.settings(own)
    job = task.space.apply(settings)
    if task.looks is not None:
        job = with_looks(job, task.rows, task.looks)
    inputs = {"tune": task.digest, "role": task.space.role, SEED: seed, **settings}
    return arm_of(job, task.space.role, seed, task.work / name, inputs), job


def with_looks(job: Job, rows: int, looks: int) -> Job:
    """The job with about so many looks in each training, where nothing says how often and nothing hangs on it."""
    train = job.student.train
    if train.evaluate_every is not None or train.early_stopping is not None:
        return job
    steps = steps_of(rows, train.epochs, train.steps, train.batch_size)
    looked = train.model_copy(update={"evaluate_every": max(1, -(-steps // looks))})
    return job.model_copy(update={"student": job.student.model_copy(update={"train": looked})})


def _train(task: TrainTask, arm: Arm, on_report: Callable[[dict[str, Any]], None]) -> StageRecord:
    gang = gang_of(arm.train)
    if gang.workers == 1:
        [record] = run_here(train_arms, task, gang.cpus, on_report)
    else:
        session = Session.of_this_process()
        [record], _ = run_gang(session, train_arms, task, gang, on_report, fatal=(DistillError,), what=arm.name)
    return StageRecord(**record)
