"""``alternatives.json``: the options of ``distill_jobs.costs.alternatives``, priced from what a workdir holds.

    {"schema_version": 1, "currency": "USD",
     "measured": the attributes of ``Measured``, or null with "why" beside it,
     "store_or_live":   {"students", "store_usd", "live_usd", "saved_usd", "break_even_students", "break_even_months"},
     "distil_or_alone": {"distil_usd", "alone_usd", "extra_usd", "teacher_usd", "gain", "usd_per_point"},
     "distil_or_serve": {"teacher_request_usd", "student_request_usd", "request_positions",
                         "break_even_requests", "break_even_requests_with_teacher"},
     "curves": [{"name", "x", "y", "at": [x …], "lines": {option: [US dollars …]}, "break_even"}],
     "formulas": {name: sentence}, "rests_on": [sentence …]}

Break-evens and ``usd_per_point`` are ``{"value", "low", "high", "level", "why"}``.
"""

import math
from dataclasses import asdict
from typing import Any

from cluster.errors import FileError
from cluster.files import Folder
from distill_jobs.costs import alternatives as priced
from distill_jobs.costs.alternatives import Measured
from distill_jobs.costs.ledger import Entry, Ledger
from distill_jobs.costs.parts import CPU
from distill_jobs.costs.reckon import DECLARED, Reckoner
from distill_jobs.spec import Job

ALTERNATIVES = "alternatives.json"
_ONCE = "throughput and prices are single figures of this machine and this book: there is no sample to bound them with"
_PRICED = (
    priced.store_usd,
    priced.live_usd,
    priced.break_even_students,
    priced.break_even_months,
    priced.extra_usd,
    priced.request_usd,
    priced.serve_teacher_usd,
    priced.serve_student_usd,
    priced.serve_alone_usd,
    priced.break_even_requests,
)


def write_alternatives(job: Job, workdir: Folder, reckoner: Reckoner, accelerator: str | None) -> dict[str, Any]:
    """Price the options from the ledger, the store and the evaluation, and write them; returns what was written."""
    evaluation = workdir.read_json("evaluation.json")
    measured = measure(job, workdir, reckoner, accelerator, evaluation)
    made = _options(measured, evaluation) if isinstance(measured, Measured) else {"measured": None, "why": measured}
    found = {"schema_version": 1, "currency": "USD", **made}
    workdir.write_json(ALTERNATIVES, found)
    return found


def measure(
    job: Job, workdir: Folder, reckoner: Reckoner, accelerator: str | None, evaluation: dict[str, Any]
) -> Measured | str:
    """What the options are priced from; a sentence saying what is missing where something is."""
    entries = {entry.stage: entry for entry in Ledger(workdir).entries()}
    if "capture" not in entries:
        return "nothing was captured here, so that a store and what it saves have no measured price"
    arms = {role: [e for name, e in entries.items() if name.startswith(f"{role}/")] for role in ("student", "baseline")}
    if not all(arms.values()):
        return "there are not both students and baselines in the ledger"
    models, kind = evaluation["models"], job.capture.crews[0]
    speeds = {role: _speed(models, role) for role in ("teacher", "student")}
    if not all(speeds.values()):
        return "no throughput was measured"
    waited = entries["train/start-up"].usd if "train/start-up" in entries else 0.0
    share = waited / sum(name.rpartition("/")[2].isdigit() for name in entries)
    rows = int(workdir.read_json("store/manifest.json")["rows"])
    hour = kind.cpus_per_actor * reckoner.prices.hour(CPU, job.costs.is_spot(CPU))
    device = kind.accelerator or accelerator or "other"
    hour += kind.gpus_per_actor * reckoner.prices.hour(device, job.costs.is_spot(device))
    return Measured(
        capture_usd=entries["capture"].usd,
        capture_row_usd=entries["capture"].usd * _busy_share(workdir, entries["capture"], kind.cpus_per_actor) / rows,
        month_usd=entries["capture"].usd_month,
        months=job.costs.store_months,
        student_usd=_mean([entry.usd for entry in arms["student"]]) + share,
        baseline_usd=_mean([entry.usd for entry in arms["baseline"]]) + share,
        rows_per_run=_mean([entry.usage.rows for entry in arms["student"]]),
        students=len(arms["student"]) + _trials(workdir),
        teacher_usd=math.fsum(entries[name].usd for name in ("teacher", DECLARED) if name in entries),
        machine_second_usd=hour / 3600.0,
        request_positions=evaluation["tokens"] / evaluation["rows"],
        teacher_throughput=speeds["teacher"],
        student_throughput=speeds["student"],
    )


def _options(m: Measured, evaluation: dict[str, Any]) -> dict[str, Any]:
    gain = evaluation["summary"]["gain"]
    return {
        "measured": asdict(m),
        "store_or_live": {
            "students": m.students,
            "store_usd": priced.store_usd(m, m.students),
            "live_usd": priced.live_usd(m, m.students),
            "saved_usd": priced.live_usd(m, m.students) - priced.store_usd(m, m.students),
            "break_even_students": priced.estimate(priced.break_even_students(m), _ONCE),
            "break_even_months": priced.estimate(priced.break_even_months(m), _ONCE),
        },
        "distil_or_alone": {
            "distil_usd": priced.store_usd(m, 1),
            "alone_usd": m.baseline_usd,
            "extra_usd": priced.extra_usd(m),
            "teacher_usd": m.teacher_usd,
            "gain": gain,
            "usd_per_point": priced.usd_per_point(m, gain, evaluation["metric"], evaluation["better"]),
        },
        "distil_or_serve": {
            "teacher_request_usd": priced.request_usd(m, m.teacher_throughput),
            "student_request_usd": priced.request_usd(m, m.student_throughput),
            "request_positions": m.request_positions,
            "break_even_requests": _requests(m, False),
            "break_even_requests_with_teacher": _requests(m, True),
        },
        "curves": priced.curves(m),
        "formulas": {of.__name__: " ".join(str(of.__doc__).split()) for of in _PRICED},
        "rests_on": [
            "capture, students and baselines: what the ledger says was held for them, by the price book",
            "a live teacher: the same answers at the store's price a row, its machines held only while they answer",
            f"a request: one row of the held-out split, {m.request_positions:.4g} scored positions, at the throughput "
            f"of whole batches on a fully loaded machine of one capture actor; a lightly loaded one costs more",
            "keeping the store: its bytes by the price book",
        ],
    }


def _requests(m: Measured, with_teacher: bool) -> dict[str, Any]:
    value = priced.break_even_requests(m, with_teacher)
    return priced.estimate(value, _ONCE if value is not None else "serving the student is not cheaper here")


def _busy_share(workdir: Folder, entry: Entry, cores: float) -> float:
    """Seconds in which capture's actors worked / seconds for which they were held; 1 where that isn't known."""
    record = workdir.read_json("store/stage.json") if workdir.exists("store/stage.json") else {}
    busy = record.get("made", {}).get("capture", {}).get("busy_seconds")
    held = entry.usage.core_seconds / cores
    return min(1.0, busy / held) if busy and held else 1.0


def _trials(workdir: Folder) -> int:
    """Students that a tuning has trained from the store; a baseline's trials ask no teacher."""
    if not workdir.exists("tune/trials.json"):
        return 0
    try:
        found = workdir.read_json("tune/trials.json")
    except FileError:
        return 0
    trials = found.get("trials") if isinstance(found, dict) else found
    return sum(trial.get("role") == "student" for trial in trials) if isinstance(trials, list) else 0


def _speed(models: dict[str, Any], role: str) -> float:
    measured = [model.get("throughput") for name, model in models.items() if name.split("/")[0] == role]
    return next((float(speed) for speed in measured if speed), 0.0)


def _mean(values: list[Any]) -> float:
    return math.fsum(values) / len(values)
