"""What of an audit is told at once: numbers for MLflow, a few lines for the terminal, and the release gate's
sentence. And what it says of learning rates, which decides whether it has to be made anew."""

import math
import re
from typing import Any

from cluster.files import Folder
from distill_jobs.audit.intervals import LEVEL
from distill_jobs.audit.labels import LABELS, NONE
from distill_jobs.audit.negative import TRANSFER
from distill_jobs.errors import AuditError
from distill_jobs.spec import Job
from distill_jobs.words import percent

AUDIT = "audit.json"
_TRIALS = "tune/trials.json"
_CEILING = ("gain", "student_over_teacher", "gap_closed")


def made_of(found: dict[str, Any]) -> dict[str, Any]:
    """The audit's numbers by MLflow's families: ``quality``, ``negative`` and ``bias``; what is undefined is left
    out."""
    ceiling, heldout = found["ceiling"], found["negative"]["heldout"]
    quality: dict[str, Any] = {name: ceiling[name] for name in _CEILING}
    for role, arm in ceiling["arms"].items():
        for name in ("kl_to_teacher", "agreement", "fidelity_right", "fidelity_wrong"):
            quality[f"{role}_{name}"] = arm[name]
        quality[f"{role}_ece"] = found["calibration"][role]["ece"]
    negative: dict[str, Any] = {
        "heldout_rate": heldout["rate"],
        "stored_rate": {"value": found["negative"]["train"].get("rate")},
    }
    for role, arm in heldout["arms"].items():
        negative[f"{role}_repeats"] = arm["repeats"]
        negative |= {f"{role}_{name}": arm[name] for name in TRANSFER if name in arm}
    bias: dict[str, Any] = {}
    for column, each in found["bias"]["columns"].items():
        for name, told in each["differences"].items():
            bias |= {f"{_plain(column)}_{name}_{role}": told[role] for role in ceiling["arms"]}
    families = {"quality": quality, "negative": negative, "bias": bias}
    return {family: _values(estimates) for family, estimates in families.items()}


def _values(estimates: dict[str, Any]) -> dict[str, float]:
    told = {}
    for name, estimate in estimates.items():
        for suffix, key in (("", "value"), ("_low", "low"), ("_high", "high")):
            if estimate.get(key) is not None:
                told[name + suffix] = float(estimate[key])
    return told


def _plain(name: str) -> str:
    """A column's name with what metric names take."""
    return re.sub(r"[^\w-]+", "_", name)


def mistakes(stored: dict[str, Any]) -> str:
    """One line on ``negative.json``."""
    if not stored["positions"]:
        return "negative knowledge: the store says of no position what is right"
    rate, count = stored["rate"], stored["mistakes"]
    told = f"confidently wrong at {percent(rate, 2)} of positions ({count:,} of {stored['positions']:,})"
    more = [
        (group["rate"], f"{column} {value}")
        for column, groups in stored["slices"].items()
        for value, group in groups.items()
        if group["positions"] and not group["small"] and _at_least(group["rate"], group["positions"]) > rate
    ]
    most = f", most in {max(more)[1]} ({percent(max(more)[0], 2)})" if more else ""
    return f"the teacher is {told}{most}"


def _at_least(rate: float, count: int) -> float:
    """The lower end of Wilson's (1927) 95% interval of a rate."""
    z = 1.96
    middle = rate + z * z / (2 * count)
    return (middle - z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))) / (1 + z * z / count)


def lines(found: dict[str, Any]) -> list[str]:
    """What the terminal shows of an audit, in a few lines."""
    said = [f"ceiling: {text}" for text in found["ceiling"]["sentences"][1:3]]
    ece = {role: arm["ece"]["value"] for role, arm in found["calibration"].items() if not role.startswith("gate-")}
    said.append("calibration error: " + ", ".join(f"{role} {value:.3f}" for role, value in ece.items()))
    said.append(f"mistakes: {_transfer(found['negative']['heldout'])}")
    if found["bias"]["columns"]:
        labels = found["bias"]["labels"]
        told = [f"{labels[name]} {name}" for name in LABELS if labels[name] and name != NONE]
        judged = sum(labels.values())
        said.append(f"gaps between groups: {', '.join(told) or 'none shown'} (of {judged} judged)")
    return said


def _transfer(heldout: dict[str, Any]) -> str:
    if heldout["small"]:
        return f"the teacher is confidently wrong at {heldout['mistakes']} held-out positions, too few to say more"
    arms = heldout["arms"]
    student, baseline = (arms[role]["repeats"]["value"] for role in ("student", "baseline"))
    told = (
        f"of the teacher's {heldout['mistakes']:,} confident ones the student repeats {percent(student)}, "
        f"the baseline {percent(baseline)}"
    )
    ratio = arms["student"]["negative_transfer_ratio"]
    if ratio["value"] is None or ratio["low"] is None:
        return told
    interval = f"{percent(LEVEL, 0)} interval {ratio['low']:.2f} to {ratio['high']:.2f}"
    return f"{told}; negative-transfer ratio {ratio['value']:.2f} ({interval})"


def refuse_gaps(workdir: Folder) -> None:
    """Raise AuditError where the student's gap between groups exceeds ``audit.max_gap``."""
    limit = workdir.read_json(AUDIT)["bias"]["limit"]
    if not limit or not limit["over"]:
        return
    worst = max(limit["over"], key=lambda one: one["gap"]["value"] / one["limit"])
    gap, more = worst["gap"], len(limit["over"]) - 1
    others = f", and {more} more exceed theirs" if more else ""
    ends = "" if gap["low"] is None else f" ({percent(LEVEL, 0)} interval {gap['low']:.4f} to {gap['high']:.4f})"
    raise AuditError(
        f"the student's {worst['metric']} over {worst['column']} is {gap['value']:.4f}{ends}, above audit.max_gap "
        f"{worst['limit']:g}{others}; everything that was made is kept, and {workdir}/{AUDIT} holds all gaps"
    )


def learning_rate(job: Job, workdir: Folder) -> dict[str, Any]:
    """What student and baseline train with, and whether the baseline's learning rate was looked for by itself."""
    student, baseline = job.student.train.learning_rate, job.baseline_train.learning_rate
    trials = workdir.read_json(_TRIALS) if workdir.exists(_TRIALS) else {}
    found = (trials.get("baseline") or {}).get("settings") or {}
    tuned = "student.train.learning_rate" in found and job.has(found, "baseline")
    own = "with the student's learning rate" if student == baseline else "with a learning rate of its own"
    how = "which tuning found for it" if tuned else "which was set, not tuned for it"
    sentence = f"The baseline trains {own}, {baseline:g}, {how}."
    return {"student": student, "baseline": baseline, "tuned": tuned, "sentence": sentence}
