"""``distill compare``: pipelines by the ids of their MLflow runs or by their workdirs, set side by side."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import yaml

from cluster.errors import FileError
from cluster.files import Folder
from cluster.run_book import PIPELINE, RUNS, is_pending
from cluster.tracked import TrackedRun, read_run
from cluster.tracking_server import local_uri, server
from distill_jobs import words
from distill_jobs.console import Console
from distill_jobs.context import home_of
from distill_jobs.errors import NotReadyError
from distill_jobs.report.compare import ROLES, Pipeline, by_metric, findings, front, page, points_of

_RUN_ID = re.compile(r"[0-9a-f]{32}")
_HIGHER = {"accuracy": "higher", "perplexity": "lower"}


def compare(runs: Sequence[str], out: str, tracking: str | None, console: Console) -> None:
    """Write the page to ``out`` and print the same as a table.

    Args:
        runs: ids of pipelines' MLflow runs, or workdirs.
        tracking: where MLflow runs given by their ids are; else ``MLFLOW_TRACKING_URI``, ``runs/`` or this folder.

    Raises:
        NotReadyError: fewer than two pipelines, or one that was never run.
        TrackingError: MLflow has no such run.
    """
    found = [pipeline_of(read_run(*_place(run, tracking))) for run in dict.fromkeys(runs)]
    known: dict[str, Pipeline] = {pipeline.run_id: pipeline for pipeline in found}
    if len(known) < 2:
        raise NotReadyError("a comparison takes two pipelines at least: give the ids of their MLflow runs, or workdirs")
    pipelines = named_apart(list(known.values()))
    folder, slash, name = out.rpartition("/")
    Folder(folder or slash or ".").write(name or "compare.html", page(pipelines).encode())
    console.table("compared", *_table(pipelines))
    for sentence in findings(pipelines):
        console.say(sentence)
    console.say(f"page: {out if name else f'{out}compare.html'}")


def pipeline_of(run: TrackedRun) -> Pipeline:
    """What the comparison takes of a pipeline's run.

    Raises:
        NotReadyError: the run is not a pipeline's.
    """
    if "distill.task" not in run.tags:
        raise NotReadyError(f"MLflow's run {run.run_id} is not that of a pipeline: give the run above it")
    # The ends of intervals are on the audit's run.
    under = [each.metrics for each in run.nested if each.tags.get("distill.stage", each.name) == "audit"]
    metrics = {**(under[-1] if under else {}), **run.metrics}
    metric = next((name for name in _HIGHER if f"quality/student_{name}" in metrics), "")
    stages = {each.tags.get("distill.stage", each.name): each for each in run.nested if "cost/usd" in each.metrics}
    latency = {role: _of(run, role, "quality/latency_ms") for role in ROLES}
    return Pipeline(
        name=run.name,
        run_id=run.run_id,
        metric=metric,
        better=_HIGHER.get(metric, "higher"),
        quality={role: found for role in ROLES if (found := _estimate(metrics, f"quality/{role}_{metric}"))},
        gain=_estimate(metrics, "quality/gain"),
        latency_ms={role: value for role, value in latency.items() if value is not None},
        # What trials cost is counted in the stage that ran them.
        usd={stage: each.metrics["cost/usd"] for stage, each in stages.items() if not stage.startswith("tune/")},
        settings=run.params,
        verdict=run.tags.get("distill.verdict", ""),
        sentence=run.tags.get("distill.verdict_sentence", ""),
        audit=run.tags.get("distill.audit", ""),
        ended=run.ended,
    )


def named_apart(pipelines: list[Pipeline]) -> list[Pipeline]:
    """Pipelines of one name with the beginning of their runs' ids."""
    counts = Counter(pipeline.name for pipeline in pipelines)
    return [replace(p, name=f"{p.name} {p.run_id[:6]}") if counts[p.name] > 1 else p for p in pipelines]


def _place(run: str, tracking: str | None) -> tuple[str, str]:
    """MLflow's address and the run's id."""
    # The database lies beside the workdir, and nothing is beside "." as it is written.
    workdir = Folder(run if "://" in run else os.path.abspath(run))
    if workdir.exists(RUNS):
        try:
            run_id = str(workdir.read_json(RUNS)[PIPELINE])
            spec = yaml.safe_load(workdir.read("spec.yaml"))
            uri = tracking or server((spec.get("tracking") or {}).get("uri"))
        except (FileError, KeyError, TypeError, AttributeError, yaml.YAMLError):
            raise NotReadyError(f"{run} doesn't say which run of MLflow it was: run the pipeline again") from None
        if is_pending(run_id):
            raise NotReadyError(f"MLflow was away while {run} ran: any `distill` command on it sends what was kept")
        return uri or local_uri(home_of(workdir)), run_id
    if not _RUN_ID.fullmatch(run):
        raise NotReadyError(f"{run} is neither the id of an MLflow run nor the workdir of a pipeline that was run")
    uri = server(tracking)
    here = [local_uri(Folder(home)) for home in ("runs", ".") if Folder(home).exists("mlflow.db")]
    if not uri and not here:
        raise NotReadyError(
            f"where is run {run} tracked? Give --tracking, or the pipeline's workdir in place of the id"
        )
    return uri or here[0], run


def _of(run: TrackedRun, role: str, metric: str) -> float | None:
    """A metric of the first nested run of a role that has it."""
    own = [each for each in run.nested if each.tags.get("distill.stage", each.name).split("/")[0] == role]
    return next((each.metrics[metric] for each in own if metric in each.metrics), None)


def _estimate(metrics: Any, name: str) -> dict[str, Any] | None:
    if name not in metrics:
        return None
    return {"value": metrics[name], "low": metrics.get(f"{name}_low"), "high": metrics.get(f"{name}_high")}


def _table(pipelines: Sequence[Pipeline]) -> tuple[list[str], list[list[Any]]]:
    comparable = by_metric([p for p in pipelines if p.quality]).values()
    on = {point.name for some in comparable for point in front(points_of(some), some[0].better)}
    rows = []
    for p in pipelines:
        scores = [words.score(p.metric, p.quality[r]["value"]) if r in p.quality else "–" for r in ROLES]
        gain = words.difference(p.metric, p.gain["value"]) if p.gain else "–"
        mark = ", ".join(role for role in ROLES if f"{p.name}, {role}" in on) or "–"
        rows.append([p.name, p.metric or "–", *scores, gain, words.money(p.total_usd), p.verdict or "–", mark])
    return ["", "metric", *ROLES, "gain", "money", "verdict", "on the front"], rows
