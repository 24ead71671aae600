"""What a job would do and take, before it is run: the resolved spec, the stages and why, and a probe's estimate."""

import math
import tempfile
import time
from typing import Any

import yaml

from cluster.files import Folder, digest
from cluster.meter import Usage
from cluster.session import Session
from cluster.shards import map_shards
from distill_jobs.capture.crews import crew_of
from distill_jobs.console import Console
from distill_jobs.context import Context
from distill_jobs.costs import plan
from distill_jobs.costs.budget import refuse_or_warn
from distill_jobs.costs.estimate import StageEstimate, predict, total
from distill_jobs.costs.ledger import unfinished
from distill_jobs.costs.probing import ProbeWorker
from distill_jobs.costs.rates import Rates, Sizes
from distill_jobs.costs.reckon import Reckoner
from distill_jobs.errors import DistillError
from distill_jobs.inputs import STAGES, Inputs, inputs_of, statuses_of
from distill_jobs.needs import needs_of
from distill_jobs.spec import Job
from distill_jobs.words import duration, money, size

PROBE = "probe.json"
_REPORT_SECONDS = 3.0  # drawing the page, and MLflow's side of it


def print_plan(job: Job, console: Console) -> None:
    """The whole of ``distill plan``; writes the probe's result, which a later run uses, and the plan itself."""
    console.say(yaml.safe_dump(job.model_dump(mode="json", exclude_none=True), sort_keys=False))
    inputs = inputs_of(job)
    rows = [
        [found.stage, "skip" if found.done else "run", found.reason]
        for stage in STAGES
        for found in statuses_of(job, inputs, stage)
    ]
    console.table("what would run", ["stage", "", "why"], rows)
    reckoner = Reckoner(job.costs)
    with Session(job.cluster.address, job.cluster.cpus, job.cluster.gpus) as session:
        session.require(needs_of(job))
        estimates, _ = estimate(job, inputs, session, reckoner)
    table = [_row(each) for each in [*estimates, total(estimates)]]
    headings = ["stage", "time", "bytes", "money", "kWh", "from"]
    console.table("what it would take, done from the start", headings, table)
    kept = plan.read(Folder(job.workdir)) or {}
    console.table("on a cluster of so many times the actors and workers", *_sizes(kept.get("sizes", [])))
    storage = kept["storage"]
    console.say(
        f"keeping what it leaves ({size(storage['bytes'])}) costs {money(storage['usd'])} for {storage['months']:g} "
        f"months; energy is estimated; all of it is right within a factor of about {plan.WITHIN:g}"
    )
    warning = refuse_or_warn(job.costs.budget_usd, 0.0, total(estimates).usd, math.inf)
    if warning is not None:
        console.say(warning)


def _row(each: StageEstimate) -> list[str]:
    return [each.stage, duration(each.seconds), size(each.bytes), money(each.usd), f"{each.kwh:.2g}", each.basis]


def _sizes(sizes: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            f"{each['times']} ×",
            duration(each["total"]["seconds"]),
            money(each["total"]["usd"]),
            f"{each['total']['kwh']:.2g}",
            f"{each['total']['core_hours']:.4g}",
            f"{each['total']['device_hours']:.4g}",
        ]
        for each in sizes
    ]
    return ["", "time", "money", "kWh", "core hours", "GPU hours"], rows


def foretell(context: Context) -> dict[str, float]:
    """Find out by a short probe what each stage will take, where there is something left to do.

    Returns:
        the seconds expected, by stage.

    Raises:
        BudgetError: the budget would be exceeded by more than the prediction may err.
    """
    job, inputs = context.job, context.inputs
    if all(found.done for stage in ("teach", "capture", "train") for found in statuses_of(job, inputs, stage)):
        return {}
    started = time.time()
    context.spending.begin("probe", context.ledger.spent())
    with context.console.bar("probe", None, "a short look at the real models on real rows"):
        estimates, usage = estimate(job, inputs, context.session, context.reckoner)
    if usage.wall_seconds:
        context.enter("probe", usage, started, time.time())
    whole = total(estimates)
    context.console.say(f"done from the start this takes about {duration(whole.seconds)} and {money(whole.usd)}")
    left = math.fsum(each.usd * _share_left(context, each.stage) for each in estimates)
    warning = refuse_or_warn(job.costs.budget_usd, context.ledger.spent(), left, plan.WITHIN)
    if warning is not None:
        context.console.say(warning)
    return {found.stage: found.seconds for found in estimates} | {"report": _REPORT_SECONDS}


def _share_left(context: Context, stage: str) -> float:
    """At least what share of a stage is still to be done; of one that was begun, no more is known than that."""
    if context.ledger.find(unfinished(stage)) is not None:
        return 0.0
    found = statuses_of(context.job, context.inputs, {"teacher": "teach"}.get(stage, stage))
    return sum(not one.done for one in found) / max(1, len(found))


def estimate(job: Job, inputs: Inputs, session: Session, reckoner: Reckoner) -> tuple[list[StageEstimate], Usage]:
    """Predict every stage from a probe of the real models on real rows, and say what the probe has used.

    A probe is made once for the same inputs; what it found lies in ``probe.json``, and the plan that rests on it, made
    before anything else was spent, in ``plan.json``.
    """
    workdir, usage = Folder(job.workdir), Usage()
    asked = _asked(job, inputs)
    known = workdir.read_json(PROBE) if workdir.exists(PROBE) else {}
    if known.get("inputs") != asked:
        found, usage = _probe(job, inputs, session)
        known = {"inputs": asked, **found}
        workdir.write_json(PROBE, known)
    sizes, rates, accelerator = Sizes(**known["sizes"]), Rates(**known["rates"]), session.accelerator()
    plan.keep(workdir, plan.plan_of(job, asked, sizes, rates, reckoner, accelerator))
    return predict(job, sizes, rates, reckoner, accelerator), usage


def _asked(job: Job, inputs: Inputs) -> str:
    """The digest of all that a probe depends on: prices and the goal, for two, change nothing of what it finds.

    So the plan from before a run stays when only these are changed in its midst.
    """
    rest = {name: values for name, values in inputs.items() if name not in ("audit", "report")}
    apart = dict.fromkeys(("costs", "tracking", "goal", "tune", "audit"), True)  # gates to compare are among the arms
    return digest([rest, job.model_dump(mode="json", exclude={**apart, "teacher": {"cost"}})])


def _probe(job: Job, inputs: Inputs, session: Session) -> tuple[dict[str, Any], Usage]:
    workdir = Folder(job.workdir)
    found: dict[str, Any] = {}
    prepared = statuses_of(job, inputs, "prepare")[0].done
    taught = prepared and statuses_of(job, inputs, "teach")[0].done

    def on_result(_: Any, result: dict[str, Any]) -> None:
        found.update(result)

    with tempfile.TemporaryDirectory(prefix="probe-") as scratch:
        worker = ProbeWorker(job, workdir / "data" if prepared else None, workdir / "teacher/model" if taught else None)
        crew = crew_of(job.capture.crews[0], lambda: worker, alone=True)
        report = map_shards(session, crew, [scratch], on_result, retries=0, fatal=(DistillError,), what="probe")
    held = report.usage
    found["rates"]["busy_share"] = min(1.0, held.cpu_seconds / held.core_seconds) if held.core_seconds else 1.0
    return found, held
