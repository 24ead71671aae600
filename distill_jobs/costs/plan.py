"""What a job would take, kept from before it is run, and set against what it took: ``plan.json``.

    {"schema_version": 1, "inputs": digest, "made": seconds since the epoch, "within": 2.0, "spot": …,
     "prices": the price book, "grid": …, "accelerator": "H100" or null,
     "stages": [stage …], "total": stage,
     "storage": {"bytes", "months", "usd"},
     "sizes": [{"times": 4, "stages": [stage …], "total": stage} …]}

A stage has the keys of ``StageEstimate.as_dict``. ``stages`` are for the cluster that the spec asks for, done from the
start; ``sizes`` for several times as many actors and ranks. ``within`` is the factor that totals are taken to be right
within.
"""

import math
import time
from typing import Any

from cluster.files import Folder
from distill_jobs.costs.estimate import StageEstimate, predict, total
from distill_jobs.costs.ledger import Entry, Ledger
from distill_jobs.costs.rates import Rates, Sizes
from distill_jobs.costs.reckon import Reckoner
from distill_jobs.spec import Job

PLAN = "plan.json"
WITHIN = 2.0
"""The factor within which the total of a plan is taken to be right: half a second's probe, on a machine that may have
other things to do, says no more."""

_COMPARED = ("seconds", "usd", "kwh", "kg_co2e", "core_hours", "device_hours", "tokens", "flops", "bytes")


def plan_of(
    job: Job, inputs: str, sizes: Sizes, rates: Rates, reckoner: Reckoner, accelerator: str | None
) -> dict[str, Any]:
    """The plan as plain values.

    Args:
        inputs: the digest of all that the probe depends on.
    """
    stages = predict(job, sizes, rates, reckoner, accelerator)
    kept = sum(stage.bytes for stage in stages)
    months = job.costs.store_months
    return {
        "schema_version": 1,
        "inputs": inputs,
        "made": time.time(),
        "within": WITHIN,
        "spot": job.costs.spot,
        "prices": reckoner.prices.as_dict(),
        "grid": reckoner.told(),
        "accelerator": accelerator,
        **_both(stages),
        "storage": {"bytes": kept, "months": months, "usd": reckoner.prices.storage(kept, months)},
        "sizes": [
            {"times": times, **_both(predict(job, sizes, rates, reckoner, accelerator, times=times))}
            for times in sorted(set(job.costs.sizes))
        ],
    }


def keep(workdir: Folder, plan: dict[str, Any]) -> dict[str, Any]:
    """Write the plan, unless one for the same job was kept before it was run; returns the one that is kept.

    A later look at a job that is half done rests on more, but it is no prediction.
    """
    known = read(workdir)
    begun = any(entry.stage != "probe" for entry in Ledger(workdir).entries())
    if known is not None and known.get("inputs") == plan["inputs"] and begun:
        return known
    workdir.write_json(PLAN, plan)
    return plan


def read(workdir: Folder) -> dict[str, Any] | None:
    """The plan that was kept; None without one."""
    return dict(workdir.read_json(PLAN)) if workdir.exists(PLAN) else None


def predicted_against_actual(workdir: Folder) -> dict[str, Any] | None:
    """What was predicted, what it took, and how many times as much that is, by stage; None without a plan.

    Returns:
        ``stages``: by stage ``{"predicted": {…}, "actual": {…}, "ratio": {…}}`` with the same names in each: seconds,
        usd, kwh, kg_co2e, core_hours, device_hours, tokens, flops, bytes. ``actual`` and ``ratio`` are None for a stage
        that has not been done, a ratio None where nothing was predicted; all arms are in ``train``, with their
        start-up. ``total``: the same over the stages that are both predicted and done. ``not_predicted``: US dollars of
        further entries by stage, such as the probe and the report.
    """
    plan = read(workdir)
    if plan is None:
        return None
    actual: dict[str, list[Entry]] = {}
    for entry in Ledger(workdir).entries():
        actual.setdefault(_stage_of(entry.stage), []).append(entry)
    stages = {}
    for predicted in plan["stages"]:
        taken = _actual(actual[predicted["stage"]]) if predicted["stage"] in actual else None
        stages[predicted["stage"]] = _against({name: predicted[name] for name in _COMPARED}, taken)
    done = [stage for stage in stages.values() if stage["actual"] is not None]
    sums = {
        side: {name: math.fsum(stage[side][name] for stage in done) for name in _COMPARED}
        for side in ("predicted", "actual")
    }
    others = {name: math.fsum(e.usd for e in some) for name, some in actual.items() if name not in stages}
    return {
        "stages": stages,
        "total": _against(sums["predicted"], sums["actual"] if done else None),
        "not_predicted": others,
        "within": plan["within"],
        "made": plan["made"],
    }


def _both(stages: list[StageEstimate]) -> dict[str, Any]:
    return {"stages": [stage.as_dict() for stage in stages], "total": total(stages).as_dict()}


def _stage_of(name: str) -> str:
    """The stage of a plan that an entry of the ledger belongs to."""
    first, _, rest = name.partition("/")
    if first in ("student", "baseline", "train") or first.startswith("gate-"):
        return "train"
    return first if rest == "unfinished" else name


def _actual(entries: list[Entry]) -> dict[str, float]:
    used = [entry.usage for entry in entries]
    return {
        "seconds": math.fsum(usage.wall_seconds for usage in used),
        "usd": math.fsum(entry.usd for entry in entries),
        "kwh": math.fsum(entry.kwh for entry in entries),
        "kg_co2e": math.fsum(entry.kg_co2e for entry in entries),
        "core_hours": math.fsum(usage.core_seconds for usage in used) / 3600,
        "device_hours": math.fsum(usage.device_seconds for usage in used) / 3600,
        "tokens": sum(usage.tokens for usage in used),
        "flops": math.fsum(usage.flops for usage in used),
        "bytes": sum(entry.bytes for entry in entries),
    }


def _against(predicted: dict[str, float], actual: dict[str, float] | None) -> dict[str, Any]:
    ratio: dict[str, float | None] | None = None
    if actual is not None:
        ratio = {name: actual[name] / predicted[name] if predicted[name] else None for name in _COMPARED}
    return {"predicted": predicted, "actual": actual, "ratio": ratio}
