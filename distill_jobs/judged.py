"""What MLflow shows of verdict, audit and costs: tags of the pipeline's run and its models, a note, and intervals."""

from typing import Any

from distill_jobs import words
from distill_jobs.costs.ledger import Entry
from distill_jobs.report.bias import counted
from distill_jobs.report.estimates import flat, number
from distill_jobs.words import percent

Json = dict[str, Any] | None


def tags_of(verdict: Json, audit: Json) -> dict[str, str]:
    """Tags by name; none of what is not there yet."""
    tags: dict[str, str] = {}
    if verdict is not None:
        tags |= {"distill.verdict": verdict["answer"], "distill.goal": verdict["goal"]}
        tags["distill.verdict_sentence"] = verdict["sentence"]
    if audit is None:
        return tags
    ceiling, bias = audit["ceiling"], audit["bias"]
    heldout = audit["negative"]["heldout"]
    tags["distill.gap_closed"] = flat(ceiling["gap_closed"], lambda value: percent(value, 0))
    if bias["columns"]:
        tags["distill.audit"] = counted(bias) or "no group was large enough to judge"
    if bias["limit"]:
        over = [f"{one['metric']} over {one['column']} {one['gap']['value']:.4f}" for one in bias["limit"]["over"]]
        tags["distill.max_gap"] = f"exceeded: {', '.join(over)}" if over else "kept"
    if not heldout["small"]:
        tags["distill.negative_transfer"] = flat(heldout["arms"]["student"]["negative_transfer_ratio"], number)
    return {name: words.ordinary(text) for name, text in tags.items()}


def note_of(evaluation: dict[str, Any], verdict: Json, audit: Json, totals: Entry) -> str:
    """The pipeline at a glance, as Markdown: the verdict, and what each model is worth beside what all has cost."""
    metric, summary, intervals = evaluation["metric"], evaluation["summary"], intervals_of(audit)
    rows = []
    for role in ("teacher", "student", "baseline"):
        value = summary[role].get("value", summary[role].get("mean"))
        ends = [intervals.get(f"quality/{role}_{metric}_{end}") for end in ("low", "high")]
        between = " to ".join(words.score(metric, end) for end in ends if end is not None)
        rows.append(f"| {role} | {words.score(metric, value)} | {between} |")
    usage = totals.usage
    costs = {
        "money": words.money(totals.usd),
        "GPU hours": words.significant(usage.device_seconds / 3600),
        "CPU core hours": words.significant(usage.core_seconds / 3600),
        "energy": f"{words.significant(totals.kwh)} kWh",
        "CO2e": f"{words.significant(totals.kg_co2e)} kg",
    }
    told = f"**{verdict['answer']}**: {verdict['sentence']}\n\n" if verdict is not None else ""
    quality = "\n".join([f"| quality | {metric} | 95 % interval |", "|---|---:|---|", *rows])
    cost = "\n".join(
        ["| cost | of all stages |", "|---|---:|", *(f"| {name} | {text} |" for name, text in costs.items())]
    )
    return words.ordinary(f"{told}{quality}\n\n{cost}\n")


def intervals_of(audit: Json) -> dict[str, float]:
    """The ends of the intervals of each arm's quality, as metrics; empty without an audit."""
    if audit is None:
        return {}
    found = {}
    for role in ("teacher", "student", "baseline"):
        quality = audit["ceiling"]["arms"][role]["quality"]
        for end in ("low", "high"):
            if quality[end] is not None:
                found[f"quality/{role}_{audit['metric']}_{end}"] = float(quality[end])
    return found
