"""What came of a pipeline: the lines at the end of a run, and the numbers in MLflow."""

from pathlib import Path
from typing import Any

from cluster.logged import without_login
from cluster.tracking_server import open_command, server
from distill_jobs.advising import print_verdict
from distill_jobs.audit.evaluate import EVALUATION
from distill_jobs.audit.findings import AUDIT, lines
from distill_jobs.context import Context
from distill_jobs.costs.advice import decide
from distill_jobs.costs.evidence import gather
from distill_jobs.costs.ledger import LEDGER, headlines
from distill_jobs.costs.ledger import metrics as cost_metrics
from distill_jobs.costs.options import ALTERNATIVES
from distill_jobs.costs.plan import PLAN
from distill_jobs.costs.verdict import VERDICT
from distill_jobs.judged import intervals_of, note_of, tags_of
from distill_jobs.report.fidelity import sentence
from distill_jobs.report.findings import finding
from distill_jobs.store.fidelity.measure import read as read_fidelity
from distill_jobs.words import count, duration, money, percent, significant, size

_ARTIFACTS = (
    "spec.yaml",
    EVALUATION,
    AUDIT,
    LEDGER,
    PLAN,
    ALTERNATIVES,
    VERDICT,
    "store/negative.json",
    "store/fidelity.json",
    "tune/trials.json",
    "tune/importance.json",
    "tune/surface.json",
    "tune/surface.png",
    "tune/best.yaml",
    "report.html",
)
_REGISTERED = ("teacher", "student")
_FETCH = " (to read it here: distill report SPEC --to report.html)"


def log_outcome(context: Context) -> None:
    """Quality beside cost in the pipeline's own run, quality in each arm's, and all that the report stands on.

    Verdict and audit are tags of the pipeline's run and of its models in the registry.
    """
    workdir = context.workdir
    evaluation = workdir.read_json(EVALUATION)
    verdict, audit = (workdir.read_json(name) if workdir.exists(name) else None for name in (VERDICT, AUDIT))
    tags = tags_of(verdict, audit)
    metric, summary, gain = evaluation["metric"], evaluation["summary"], evaluation["summary"]["gain"]
    numbers = {
        f"quality/teacher_{metric}": summary["teacher"]["value"],
        f"quality/student_{metric}": summary["student"]["mean"],
        f"quality/baseline_{metric}": summary["baseline"]["mean"],
        "quality/gain": gain["mean"],
    }
    if context.job.distill.soft_labels == "store":
        numbers["store/bytes"] = workdir.read_json("store/manifest.json")["bytes"]
    note = note_of(evaluation, verdict, audit, context.ledger.totals())
    context.parent.tags({**tags, "mlflow.note.content": note})
    context.parent.metrics({**numbers, **headlines(context.ledger.totals())})
    ends = {f"quality/gain_{end}": gain[end] for end in ("low", "high")}
    context.tracked("audit").metrics({**ends, **intervals_of(audit)})
    for name, measured in evaluation["models"].items():
        run = context.tracked(name)
        run.metrics({f"quality/{what}": v for what, v in measured.items() if isinstance(v, int | float)})
        if name.split("/")[0] in _REGISTERED:
            run.model_tags(tags)
    # Also of what no stage stands for, and of stages that an earlier pipeline's run has: so these add up to the total.
    entered = [entry for entry in context.ledger.entries() if entry.kind != "unfinished" and entry.stage != "report"]
    for entry in entered:
        context.tracked(entry.stage).metrics(cost_metrics(entry))
    for name in dict.fromkeys([*evaluation["models"], "audit", *(entry.stage for entry in entered)]):
        context.tracked(name).end("FINISHED")
    for name in _ARTIFACTS:
        if workdir.exists(name):
            context.parent.artifact(name, name.rpartition("/")[0])


def print_summary(context: Context) -> None:
    """The last screen of ``distill run``: quality, cost, and where everything lies."""
    console, workdir = context.console, context.workdir
    evaluation = workdir.read_json(EVALUATION)
    console.say()
    console.table(
        f"{context.job.name}: held-out {evaluation['metric']}, {evaluation['rows']:,} rows", *_quality(evaluation)
    )
    console.say(finding(evaluation).sentence)
    for line in lines(workdir.read_json(AUDIT)):
        console.say(line)
    console.say()
    console.table("cost of each stage", *_costs(context))
    print_verdict(decide(context.job.goal, gather(context.job, workdir)), console)
    console.say()
    places = []
    if context.job.distill.soft_labels == "store":
        manifest = workdir.read_json("store/manifest.json")
        kept = read_fidelity(workdir / "store")
        if kept is not None:
            console.say(f"kept:    {sentence(kept)}")
        places = [f"store:   {workdir}/store, {size(manifest['bytes'])} for {manifest['tokens']:,} positions"]
    uri = server(context.job.tracking.uri)
    total = context.ledger.totals()
    measured = f", {percent(total.kwh_measured / total.kwh, 0)} of it measured" if total.kwh_measured else ""
    told = f"{significant(total.kwh)} kWh, {significant(total.kg_co2e)} kg CO2e"
    console.say(f"energy:  {told}{measured or ', all of it estimated'}")
    places += [
        f"report:  {workdir}/report.html{_FETCH if not workdir.is_local else ''}",
        f"MLflow:  {without_login(uri) if uri else f'{context.home}/mlflow.db'}",
        f"open it: {open_command(uri, context.home)}",
    ]
    for place in places:
        console.say(place.replace(f"{Path.cwd()}/", ""))


def _quality(evaluation: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    metric, summary, models = evaluation["metric"], evaluation["summary"], evaluation["models"]
    rows = []
    for arm in ("teacher", "student", "baseline"):
        value = summary[arm].get("value", summary[arm].get("mean"))
        seeds = summary[arm].get("seeds", [])
        spread = f"{min(seeds):.4g} to {max(seeds):.4g}" if len(seeds) > 1 else ""
        members = [m for name, m in models.items() if name.split("/")[0] == arm]
        agreement = sum(m["agreement"] for m in members) / len(members)
        speed = members[0]
        rows.append(
            [
                arm,
                f"{value:.4g}",
                spread,
                f"{agreement:.1%}",
                count(speed["parameters"]),
                f"{speed['latency_ms']:.2f} ms",
                f"{count(speed['throughput'])}/s",
            ]
        )
    return ["", metric, "over seeds", "agrees", "weights", "latency", "throughput"], rows


def _costs(context: Context) -> tuple[list[str], list[list[str]]]:
    rows = []
    for entry in [*context.ledger.entries(), context.ledger.totals()]:
        usage = entry.usage
        rows.append(
            [
                entry.stage,
                duration(usage.wall_seconds),
                f"{usage.core_seconds / 3600:.4f}",
                f"{usage.device_seconds / 3600:.4f}",
                f"{usage.rows:,}",
                money(entry.usd),
            ]
        )
    return ["stage", "wall", "core hours", "GPU hours", "rows", "money"], rows
