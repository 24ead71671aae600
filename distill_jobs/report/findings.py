"""What the report says first: what was distilled from what, whether it helped, and the few numbers that matter."""

from dataclasses import dataclass
from typing import Any

from distill_jobs import words
from distill_jobs.report.artifacts import Artifacts


@dataclass(frozen=True)
class Finding:
    """One sentence; ``verdict`` is ``helped``, ``hurt`` or ``nothing``."""

    verdict: str
    sentence: str


def title(found: Artifacts) -> str:
    """``MLP 32 distilled from MLP 512×512``."""
    student = words.model_name(found.spec.get("student", {}).get("model"))
    teacher = words.model_name(found.spec.get("teacher", {}).get("model"))
    return f"{student} distilled from {teacher}"


def finding(evaluation: dict[str, Any]) -> Finding:
    """The student against the no-teacher baseline; 'not distinguishable' whenever the interval holds zero."""
    metric, summary = evaluation["metric"], evaluation["summary"]
    gain = summary["gain"]
    student, baseline = (words.score(metric, summary[role]["mean"]) for role in ("student", "baseline"))
    scores = f"held-out {metric} is {student} with the teacher's soft labels and {baseline} without"
    seeds = len(summary["student"]["seeds"])
    caution = " It rests on one seed of each: how much another seed would change is not known." if seeds == 1 else ""
    told = f"a difference of {words.difference(metric, gain['mean'])} {words.unit(metric)}"
    if gain["low"] is None:
        return Finding("nothing", f"No interval can be had: {scores}, {told}; {gain['why']}.{caution}")
    low, high = (words.difference(metric, gain[name]) for name in ("low", "high"))
    interval = f"{told} ({words.percent(gain['level'], 0)} interval {low} to {high})"
    if not gain["distinguishable"]:
        told = f"The gain is not distinguishable from nothing: {scores}, {interval}, and the interval includes zero."
        return Finding("nothing", told + caution)
    better = (gain["mean"] > 0) == (evaluation["better"] == "higher")
    verb = "helped" if better else "hurt"
    return Finding(verb, f"Learning from the teacher {verb}: {scores}, {interval}.{caution}")


def tiles(found: Artifacts) -> list[tuple[str, str]]:
    """Pairs of a number and what it is."""
    shown: list[tuple[str, str]] = []
    if found.evaluation is not None:
        metric, summary, models = (found.evaluation[name] for name in ("metric", "summary", "models"))
        gain = summary["gain"]
        doubt = "" if gain["distinguishable"] else ", not distinguishable from nothing"
        told = f"{words.unit(metric)} against the no-teacher baseline{doubt}"
        shown.append((words.difference(metric, gain["mean"]), told))
        students = [model for name, model in models.items() if name.startswith("student/")]
        teacher, student = models["teacher"], students[0]
        agreement = sum(model["agreement"] for model in students) / len(students)
        shown.append((words.percent(agreement), "of first choices are the teacher's"))
        if teacher.get("parameters") and student.get("parameters"):
            shown.append((_times(teacher["parameters"] / student["parameters"]), "fewer parameters than the teacher"))
        if teacher.get("latency_ms") and student.get("latency_ms"):
            shown.append(
                (_times(teacher["latency_ms"] / student["latency_ms"]), "the teacher's speed, one row at a time")
            )
    if found.total is not None:
        spent = words.duration(found.total["usage"]["wall_seconds"])
        shown.append((words.money(found.total["usd"]), f"for all stages, in {spent}"))
    return shown


def _times(ratio: float) -> str:
    return f"{ratio:.0f}×" if ratio >= 20 else f"{ratio:.1f}×"
