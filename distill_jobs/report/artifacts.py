"""What a workdir holds for the report. Whatever is missing or damaged is left out and noted, never an error."""

from dataclasses import dataclass, field
from typing import Any

import yaml

from cluster.errors import FileError
from cluster.files import Folder
from cluster.logged import without_login
from distill_jobs.costs.ledger import LEDGER, Ledger
from distill_jobs.costs.plan import PLAN, predicted_against_actual
from distill_jobs.errors import DataError

STAGE_FOLDERS = {
    "prepare": "data",
    "teacher": "teacher",
    "capture": "store",
    "evaluate": "evaluation",
    "audit": "audit",
}


FILES = {
    "data": "data/manifest.json",
    "plan": "store/plan.json",
    "store": "store/manifest.json",
    "fidelity": "store/fidelity.json",
    "negative": "store/negative.json",
    "evaluation": "evaluation.json",
    "audit": "audit.json",
    "verdict": "verdict.json",
    "foreseen": "plan.json",
    "alternatives": "alternatives.json",
    "trials": "tune/trials.json",
    "surface": "tune/surface.json",
    "importance": "tune/importance.json",
}
"""Attributes of ``Artifacts`` that are each a file of JSON. ``foreseen`` is the plan of the costs."""


@dataclass
class Artifacts:
    """The committed files of a workdir, as plain values; None or empty where there is none.

    Attributes:
        spec, spec_text: the resolved job spec, and its text without passwords of addresses.
        stages: ``stage.json`` by stage, with arms as ``student/0``.
        histories: ``history.json`` by arm.
        entries: the ledger's entries, as in ``ledger.json``; grid: the electricity that they count.
        against: what ``predicted_against_actual`` says of the plan.
        damaged: files that are there but can't be read.
    """

    spec: dict[str, Any] = field(default_factory=dict)
    spec_text: str = ""
    data: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None
    store: dict[str, Any] | None = None
    fidelity: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    audit: dict[str, Any] | None = None
    negative: dict[str, Any] | None = None
    verdict: dict[str, Any] | None = None
    foreseen: dict[str, Any] | None = None
    against: dict[str, Any] | None = None
    grid: dict[str, Any] | None = None
    alternatives: dict[str, Any] | None = None
    trials: dict[str, Any] | None = None
    surface: dict[str, Any] | None = None
    importance: dict[str, Any] | None = None
    entries: list[dict[str, Any]] = field(default_factory=list)
    total: dict[str, Any] | None = None
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    histories: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)


def collect(workdir: Folder) -> Artifacts:
    """Read what is there."""
    found = Artifacts()
    if workdir.exists("spec.yaml"):
        try:
            found.spec_text = without_login(workdir.read("spec.yaml").decode())
            tree = yaml.safe_load(found.spec_text)
            found.spec = tree if isinstance(tree, dict) else {}
        except (FileError, UnicodeDecodeError, yaml.YAMLError):
            found.damaged.append("spec.yaml")
    for name, file in FILES.items():
        setattr(found, name, _mapping(workdir, file, found.damaged))
    try:
        ledger = Ledger(workdir)
        found.entries = [entry.as_dict() for entry in ledger.entries()]
        found.total = ledger.totals().as_dict() if found.entries else None
        found.grid = (_mapping(workdir, LEDGER, found.damaged) or {}).get("grid")
        found.against = _against(workdir, found)
    except DataError:
        found.damaged.append(LEDGER)
    for stage, folder in {**STAGE_FOLDERS, **{arm: arm for arm in _arms(found)}}.items():
        record = _mapping(workdir, f"{folder}/stage.json", found.damaged)
        if record is not None:
            found.stages[stage] = record
        history = _json(workdir, f"{folder}/history.json", found.damaged)
        if isinstance(history, list):
            found.histories[stage] = [step for step in history if isinstance(step, dict) and "step" in step]
    return found


def _against(workdir: Folder, found: Artifacts) -> dict[str, Any] | None:
    if found.foreseen is None:
        return None
    try:
        return predicted_against_actual(workdir)
    except (KeyError, TypeError, AttributeError, ValueError):
        found.damaged.append(PLAN)
        return None


def _arms(found: Artifacts) -> list[str]:
    seeds, stages = found.spec.get("seeds"), [str(entry["stage"]) for entry in found.entries]
    gates = [stage for stage in stages if stage.startswith("gate-")]
    if isinstance(seeds, list):
        arms = [f"{role}/{seed}" for role in ("student", "baseline") for seed in seeds if isinstance(seed, int)]
        return arms + gates
    return [stage for stage in stages if stage.split("/")[0] in ("student", "baseline")] + gates


def _mapping(workdir: Folder, name: str, damaged: list[str]) -> dict[str, Any] | None:
    value = _json(workdir, name, damaged)
    if value is not None and not isinstance(value, dict):
        damaged.append(name)
        return None
    return value


def _json(workdir: Folder, name: str, damaged: list[str]) -> Any:
    if not workdir.exists(name):
        return None
    try:
        return workdir.read_json(name)
    except FileError:
        damaged.append(name)
        return None
