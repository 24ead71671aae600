"""Gathers what is known about a job from the files that its stages have committed."""

from typing import Any

import numpy as np

from cluster.errors import FileError
from cluster.files import Folder
from distill_jobs.costs.ledger import Ledger
from distill_jobs.costs.pace import iteration
from distill_jobs.costs.verdict import Estimate, Evidence, Iteration, Serving
from distill_jobs.errors import DataError
from distill_jobs.spec import Job
from distill_jobs.spec.tune import Tune

_GREW = ("amplified", "introduced by distillation")


def gather(job: Job, workdir: Folder) -> Evidence:
    """All that ``decide`` asks for; what has not been measured is left out.

    Raises:
        DataError: a file can't be read, or is of another shape than this version writes.
    """
    audit, evaluation = _read(workdir, "audit.json"), _read(workdir, "evaluation.json")
    try:
        return _after(job, workdir, audit, evaluation) if audit and evaluation else _before(job, workdir)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        told = f"{type(error).__name__} {error}"
        raise DataError(
            f"{workdir}: audit.json, evaluation.json or plan.json is of another shape than this version writes "
            f"({told}); run `distill run` again"
        ) from None


def _after(job: Job, workdir: Folder, audit: dict[str, Any], evaluation: dict[str, Any]) -> Evidence:
    ceiling, usd = audit["ceiling"], {entry.stage: entry.usd for entry in Ledger(workdir).entries()}
    student = [value for stage, value in usd.items() if stage.startswith("student/")]
    priced = _read(workdir, "alternatives.json") or {}
    money = priced.get("distil_or_alone")
    lead, trials = _estimate(ceiling["student_over_teacher"]), _read(workdir, "tune/trials.json")
    return Evidence(
        metric=ceiling["in"],
        gain=_estimate(ceiling["gain"]),
        behind=None if lead is None else lead.reversed(),
        headroom=_estimate(ceiling["teacher_over_baseline"]),
        seeds=int(ceiling["seeds"]),
        rows=int(ceiling["rows"]),
        tuned=_tuned(job, trials, "student", ("distill.temperature", "distill.alpha")),
        baseline_tuned=_tuned(job, trials, "baseline", ("student.train.learning_rate",)),
        serving=_serving(evaluation, priced.get("distil_or_serve")),
        hardware=evaluation["models"]["teacher"].get("hardware"),
        extra_usd=money["extra_usd"] + money["teacher_usd"] if money else None,
        alone_usd=money["alone_usd"] if money else None,
        harm=_estimate(audit["negative"]["heldout"]["arms"]["student"]["ratio_to_baseline"]),
        biases=_biases(audit["bias"]),
        iteration=iteration(workdir, job.seeds, usd),
        payback_requests=priced["distil_or_serve"]["break_even_requests_with_teacher"]["value"] if money else None,
        tune_usd=2 * (job.tune or Tune()).trials * float(np.mean(student)) if student else None,
    )


def _before(job: Job, workdir: Folder) -> Evidence:
    """What a plan predicts of the money; nothing else is known."""
    metric = "nats a token" if job.task == "causal_lm" else "accuracy"
    plan = _read(workdir, "plan.json")
    mistakes = _estimate({"value": (_read(workdir, "store/negative.json") or {}).get("rate")}, "store/negative.json")
    if plan is None:
        return Evidence(metric, mistakes=mistakes)
    usd = {stage["stage"]: float(stage["usd"]) for stage in plan["stages"]}
    declared = job.teacher.cost.usd * job.teacher.cost.share if job.teacher.cost is not None else 0.0
    upfront = declared + usd.get("teacher", 0.0) + usd.get("capture", 0.0)
    # The plan has all arms in one stage: students, with whichever gate, cost about what baselines do.
    alone = usd["train"] / ((1 + len(job.taught)) * len(job.seeds))
    nothing = Estimate(0.0, None, None, "plan.json")
    return Evidence(
        metric,
        extra_usd=upfront,
        alone_usd=alone,
        iteration=Iteration(nothing, upfront, alone, 0, 0),
        mistakes=mistakes,
        predicted=True,
    )


def _read(workdir: Folder, name: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] | None = workdir.read_json(name) if workdir.exists(name) else None
    except FileError as error:
        raise DataError(f"{workdir}/{name} can't be read ({error}); make it again") from None
    return found


def _tuned(job: Job, trials: dict[str, Any] | None, role: str, paths: tuple[str, ...]) -> bool:
    """Whether a role has the settings that tuning chose for it, one of ``paths`` among them."""
    settings = ((trials or {}).get(role) or {}).get("settings") or {}
    return not settings.keys().isdisjoint(paths) and job.has(settings, role)


def _estimate(told: dict[str, Any], source: str = "audit.json") -> Estimate | None:
    if told.get("value") is None:
        return None
    return Estimate(float(told["value"]), told.get("low"), told.get("high"), source)


def _serving(evaluation: dict[str, Any], priced: dict[str, Any] | None) -> dict[str, Serving]:
    models, found = evaluation["models"], {}
    for name in ("teacher", next((name for name in models if name.startswith("student/")), "")):
        role, timed = name.split("/")[0], models.get(name, {})
        if "latency_ms" in timed:
            usd = 1e6 * priced[f"{role}_request_usd"] if priced else None
            found[role] = Serving(timed["latency_ms"], timed["memory_bytes"], usd)
    return found if len(found) == 2 else {}


def _biases(bias: dict[str, Any]) -> tuple[str, ...]:
    return tuple(
        f"{column} {gap['group']}, {gap['metric'].replace('_', ' ')} ({gap['label']})"
        for column, told in bias["columns"].items()
        for gap in told["gaps"]
        if gap["label"] in _GREW
    )
