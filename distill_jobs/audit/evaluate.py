"""The evaluate stage: teacher, students and baselines on the held-out split, side by side."""

from collections.abc import Callable
from typing import Any

from cluster.files import Folder, digest
from cluster.meter import Usage
from cluster.session import Session
from cluster.shards import map_shards
from distill_jobs.audit.score import COLUMNS, ScoreTask, ScoreWorker
from distill_jobs.audit.scores import Scores
from distill_jobs.audit.stored_mistakes import thresholds_of
from distill_jobs.audit.summary import summarise
from distill_jobs.capture.crews import crew_of
from distill_jobs.data.commits import Commits
from distill_jobs.data.facts import DataFacts
from distill_jobs.errors import DataError, DistillError
from distill_jobs.spec import Job

EVALUATION = "evaluation.json"
EVALUATED = "evaluation"
"""The folder of the scored rows."""


def evaluate(
    job: Job, session: Session, workdir: Folder, models: dict[str, Folder], on_progress: Callable[[int, int], None]
) -> tuple[dict[str, Any], Usage]:
    """Score every model on every held-out row, time one of each kind, and write ``evaluation.json``.

    Args:
        models: saved models by name: ``teacher``, and by role and seed those of all arms, as ``student/0``.

    Returns:
        the evaluation, and what it used.
    """
    facts = DataFacts.load(workdir / "data")
    parts = int(facts.splits["test"]["parts"])
    if not facts.splits["test"]["rows"]:
        raise DataError("the test split holds no rows to evaluate on; give data.test a share or files of its own")
    out, spec = workdir / EVALUATED, job.capture
    named = {name: str(folder) for name, folder in models.items()}
    inputs = digest([facts.fingerprint, named, _weights(models), columns_of(job)])
    commits = Commits.open(out, parts, inputs)
    timed = _one_of_each(models)
    shards: list[tuple[str, Any]] = [("speed", name) for name in timed]
    shards += [("part", part) for part in commits.missing().tolist()]
    speeds: dict[str, dict[str, Any]] = {}
    kind = spec.crews[0]
    finished = 0

    def on_result(shard: tuple[str, Any], result: dict[str, Any]) -> None:
        nonlocal finished
        finished += 1
        if shard[0] == "speed":
            speeds[shard[1]] = result
        on_progress(finished, len(shards))

    task = ScoreTask(
        data=workdir / "data",
        out=out,
        models=models,
        batch_tokens=job.evaluate.batch_tokens,
        latency_repeats=job.evaluate.latency_repeats,
        precision=job.capture.precision,
        inputs=inputs,
        cores=kind.cpus_per_actor,
        devices=kind.gpus_per_actor,
        low_entropy=job.audit.low_entropy,
        tiny_gold=job.audit.tiny_gold,
    )
    # One actor: timings taken beside busy neighbours would say more about these than about the model.
    crew = crew_of(kind, lambda: ScoreWorker(task), alone=True)
    report = map_shards(session, crew, shards, on_result, retries=spec.retries, fatal=(DistillError,), what="evaluate")
    commits = Commits.open(out, parts, inputs)
    commits.manifest(inputs=inputs)
    evaluation = summarise(job.task, Scores.read(out), speeds, facts.slices)
    workdir.write_json(EVALUATION, evaluation)
    read = Usage(rows=evaluation["rows"], tokens=evaluation["tokens"])
    return evaluation, report.usage + read


def columns_of(job: Job) -> dict[str, Any]:
    """What of the spec, and of this release, the columns of the scored rows depend on."""
    # A language model's positions are summed up where they are scored; a classifier's rows can be judged anew.
    language = job.task == "causal_lm"
    return {"columns": COLUMNS, **(thresholds_of(job.audit, language) if language else {})}


def _one_of_each(models: dict[str, Folder]) -> tuple[str, ...]:
    """One model of each architecture: the teacher, and the first student; a baseline is built as the student is."""
    return ("teacher", next(name for name in models if name.startswith("student/")))


def _weights(models: dict[str, Folder]) -> list[Any]:
    return [folder.read_json("serving.json")["digest"] for folder in models.values()]
