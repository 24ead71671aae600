"""The report's tables, as plain text for the template to lay out."""

import json
from typing import Any

from distill_jobs import words
from distill_jobs.costs.prices import PriceBook
from distill_jobs.errors import SpecError
from distill_jobs.report.artifacts import Artifacts
from distill_jobs.report.blocks import Table, without_empty
from distill_jobs.report.charts import ROLES
from distill_jobs.spec.costs import Costs

_LIKENESS = {
    "nll": lambda value: f"{value:.4f}",
    "agreement": words.percent,
    "kl_to_teacher": lambda value: f"{value:.4f}",
    "ece": lambda value: f"{value:.4f}",
}


def quality(evaluation: dict[str, Any], whole: bool = True) -> Table:
    """One row each for teacher, student and baseline; seeds of one arm are averaged, their range is told.

    Without ``whole`` what an audit tells with intervals is left out.
    """
    metric, models = evaluation["metric"], evaluation["models"]
    unit = "tokens/s" if evaluation["task"] == "causal_lm" else "rows/s"
    rows = []
    for role in ROLES:
        seeds = evaluation["summary"][role].get("seeds", [])
        value = evaluation["summary"][role].get("value", evaluation["summary"][role].get("mean"))
        told = words.score(metric, value)
        if len(seeds) > 1:
            told += f"\n{words.score(metric, min(seeds))} to {words.score(metric, max(seeds))}"
        members = [model for name, model in models.items() if name.split("/")[0] == role]
        rows.append(
            [
                role,
                told,
                *(_mean(members, name, say) if whole else "" for name, say in _LIKENESS.items()),
                _mean(members, "parameters", words.count),
                _mean(members, "bytes", words.size),
                _mean(members, "latency_ms", lambda v: f"{v:.2f} ms"),
                _mean(members, "throughput", lambda v: f"{words.count(v)} {unit}"),
                _mean(members, "memory_bytes", words.size),
            ]
        )
    headings = ["", metric, "log loss", "agrees with teacher", "KL to teacher", "calibration error"]
    headings += ["parameters", "weights", "latency", "throughput", "memory"]
    return without_empty(Table(headings, rows))


def slices(evaluation: dict[str, Any]) -> Table:
    """One row for every value of every slice column, with the student's gain in it."""
    metric, rows = evaluation["metric"], []
    for column, values in evaluation["slices"].items():
        for value, scores in values.items():
            told = [words.score(metric, scores[role]) for role in ROLES]
            gain = words.difference(metric, scores["student"] - scores["baseline"])
            rows.append([f"{column}: {value}", f"{scores['rows']:,}", *told, gain])
    return Table(["slice", "rows", *ROLES, "student vs. baseline"], rows)


def costs(entries: list[dict[str, Any]], total: dict[str, Any]) -> Table:
    """Each stage's time, hours, work and money, and the sum."""
    rows = [_cost_row(entry, total["usd"]) for entry in entries]
    # Rows and tokens of different stages are the same data again and again: their sum would say nothing.
    nothing = {**total["usage"], "rows": 0, "tokens": 0}
    rows.append(_cost_row({**total, "usage": nothing}, total["usd"]))
    headings = [
        "stage",
        "wall",
        "core-hours",
        "accelerator-hours",
        "rows",
        "tokens",
        "energy",
        "CO2e",
        "money",
        "share",
    ]
    return without_empty(Table(headings, rows, last=True))


def price_note(found: Artifacts) -> str:
    """The prices behind the money, and what a run without the comparison would have cost."""
    control = [e for e in found.entries if e["stage"].startswith(("baseline/", "gate-", "evaluate"))]
    others = ", the arms with other gates" if any(e["stage"].startswith("gate-") for e in control) else ""
    spent = (found.total or {}).get("usd", 0.0)
    told = (
        f"Without the baseline{others} and the evaluation, which are there to compare: "
        f"{words.money(max(0.0, spent - sum(e['usd'] for e in control)))}. "
    )
    try:
        spec = Costs.model_validate_json(json.dumps(found.spec.get("costs", {})))
        book = PriceBook.load(spec)
    except (SpecError, ValueError):
        return told
    kinds = sorted({kind for e in found.entries if e.get("accelerator") for kind in e["accelerator"].split(", ")})
    devices = {"core-": "CPU", **{f"{kind} ": kind for kind in kinds}}
    prices = [f"${book.hour(device, spec.is_spot(device)):g} a {name}hour" for name, device in devices.items()]
    own = "yours for " + ", ".join(book.changed) if book.changed else "list prices to their order of magnitude"
    return f"{told}Counted at {' and '.join(prices)} ({own}; book of {book.as_of}), for what was held, idle or not."


def store(found: Artifacts, statistics: dict[str, Any]) -> list[tuple[str, str]]:
    """What the logit store holds, as pairs of a name and its value."""
    manifest, plan = found.store or {}, found.plan or {}
    codec = manifest.get("codec") or plan.get("codec") or {}
    arguments = ", ".join(f"{name} {value}" for name, value in codec.items() if name != "name")
    shown = [("codec", f"{codec.get('name', 'unknown')}{f' ({arguments})' if arguments else ''}")]
    for name, key in (("rows", "rows"), ("positions", "tokens"), ("parts", "parts")):
        if key in manifest:
            shown.append((name, f"{manifest[key]:,}"))
    if manifest.get("quarantined"):
        rows = manifest["quarantined"] + manifest.get("rows", 0)
        shown.append(("in quarantine", f"{manifest['quarantined']:,} of {rows:,} rows, which the teacher can't score"))
    if "bytes" in manifest:
        shown.append(("size", words.size(manifest["bytes"])))
    if manifest.get("bytes_per_position"):
        shown.append(("soft target", f"{manifest['bytes_per_position']:,.0f} bytes a position"))
    if manifest.get("tokens") and "bytes" in manifest:
        shown.append(("all columns", f"{manifest['bytes'] / manifest['tokens']:,.1f} bytes a position"))
    if "vocabulary" in plan:
        shown.append(("classes", f"{plan['vocabulary']['real']:,}"))
    numbers = {**manifest, **statistics}
    if "head_mass" in numbers:
        shown.append(("probability in stored entries", words.percent(numbers["head_mass"], 2)))
    if "teacher_wrong" in numbers:
        shown.append(("teacher's first choice wrong", words.percent(numbers["teacher_wrong"])))
    if "entropy" in numbers:
        shown.append(("teacher's entropy", f"{numbers['entropy']:.3f} nats"))
    return shown


def samples(statistics: dict[str, Any]) -> Table:
    """A few positions of the store as text: what was right, and what the teacher thought."""
    rows = []
    for sample in statistics.get("samples", []):
        before = f"…{sample['context']}" if sample.get("context") else str(sample["source"])
        likely = ", ".join(f"{name} {probability:.2f}" for name, probability in sample["likely"])
        rows.append([before, f"{sample['gold']} ({sample['gold_probability']:.2f})", likely])
    return Table(["position", "right (teacher's probability)", "teacher's likeliest"], rows, kind="text")


def provenance(found: Artifacts) -> list[tuple[str, str]]:
    """Digests and versions: what exactly this page is about."""
    data, plan = found.data or {}, found.plan or {}
    code = {str(record["inputs"]["code"]) for record in found.stages.values() if "code" in record.get("inputs", {})}
    shown = [
        ("distill-jobs", ", ".join(sorted(code))),
        ("data", data.get("fingerprint") or plan.get("data_fingerprint")),
        ("teacher's weights", plan.get("teacher")),
        ("tokenizer", data.get("tokenizer_sha") or plan.get("tokenizer_sha")),
        ("store", (found.store or {}).get("plan")),
    ]
    return [(name, str(value)) for name, value in shown if value]


def stages(found: Artifacts) -> Table:
    """When each stage ran, the digest of its inputs, and what it says it made."""
    rows = []
    for stage, record in sorted(found.stages.items(), key=lambda item: float(item[1]["ended"])):
        plain = {name: value for name, value in record.get("made", {}).items() if isinstance(value, int | float | str)}
        made = ", ".join(
            f"{name.replace('_', ' ')} {f'{v:,}' if isinstance(v, int) else v}" for name, v in plain.items()
        )
        rows.append([stage, words.when(record["ended"]), str(record["digest"]), made])
    return Table(["stage", "ended", "digest of its inputs", "made"], rows, kind="text mono")


def ended(found: Artifacts) -> str | None:
    """When the last stage ended."""
    return words.when(max(float(r["ended"]) for r in found.stages.values())) if found.stages else None


def data_sentence(found: Artifacts) -> str:
    """What the data are, in a line."""
    data = found.data or {}
    splits = data.get("splits", {})
    order = [split for split in ("train", "validation", "test") if split in splits]
    rows = ", ".join(f"{split} {splits[split]['rows']:,}" for split in order)
    kind = str(data.get("task", "")).replace("_", " ").replace("causal lm", "causal language model")
    width = (
        f"{len(data['classes'])} classes" if data.get("classes") else f"{data.get('vocabulary') or 0:,} tokens known"
    )
    dropped = sum(v for v in data.get("dropped", {}).values() if isinstance(v, int))
    left = f"; {dropped:,} left out or cut" if dropped else ""
    return f"{kind}, {data.get('features')}, {width}; rows: {rows}{left}"


def _cost_row(entry: dict[str, Any], total: float) -> list[str]:
    usage = entry["usage"]
    return [
        entry["stage"],
        words.duration(usage["wall_seconds"]),
        words.hours(usage["core_seconds"]),
        words.hours(usage["device_seconds"]) if usage["device_seconds"] else "",
        f"{usage['rows']:,}" if usage["rows"] else "",
        f"{usage['tokens']:,}" if usage["tokens"] != usage["rows"] else "",
        words.energy(entry["kwh"]) if entry["kwh"] else "",
        words.carbon(entry["kg_co2e"]) if entry["kg_co2e"] else "",
        words.money(entry["usd"]),
        words.percent(entry["usd"] / total, 0) if total else "",
    ]


def _mean(members: list[dict[str, Any]], key: str, say: Any) -> str:
    values = [model[key] for model in members if model.get(key) is not None]
    return str(say(sum(values) / len(values))) if values else ""
