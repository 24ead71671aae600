"""How training went, from the arms' ``history.json``: its pace, and the steps that went wrong."""

from statistics import median
from typing import Any

from distill_jobs import words
from distill_jobs.report.blocks import Table, without_empty

Histories = dict[str, list[dict[str, Any]]]
_SHOWN = 8
_WHAT = {"loss": "loss not finite", "gradient": "gradient not finite", "spike": "loss far above the recent ones"}


def paces(histories: Histories) -> Table | None:
    """A row for each arm: medians over what it logged of its rates, and the most memory."""
    rows = []
    for arm, history in sorted(histories.items()):
        logged = [entry for entry in history if "tokens_per_second" in entry]
        if not logged:
            continue
        rows.append(
            [
                arm,
                f"{logged[-1]['step']:,}",
                words.count(_median(logged, "tokens_per_second")),
                words.count(_median(logged, "positions_per_second")),
                words.percent(_median(logged, "mfu")) if "mfu" in logged[-1] else "",
                words.percent(_median(logged, "waiting"), 2),
                words.size(max(entry["memory_bytes"] for entry in logged)),
                str(sum("bad" in entry for entry in history) or ""),
            ]
        )
    headings = ["", "steps", "tokens/s", "scored/s", "of peak FLOPs", "waiting for data", "memory", "bad steps"]
    return without_empty(Table(headings, rows)) if rows else None


def bad_steps(histories: Histories) -> Table | None:
    """A row for each step that was not finite or a spike, with the samples that made it so."""
    rows = []
    for arm, history in sorted(histories.items()):
        for entry in history:
            if "bad" not in entry:
                continue
            samples = [str(sample) for sample in entry.get("samples", [])]
            more = [f"and {len(samples) - _SHOWN} more"] if len(samples) > _SHOWN else []
            then = f"back to step {entry['back_to']:,}" if "back_to" in entry else "left out"
            loss = f"{entry['loss']:.4g}" if entry.get("loss") is not None else "–"
            rows.append(
                [arm, f"{entry['step']:,}", _WHAT[entry["bad"]], loss, ", ".join(samples[:_SHOWN] + more) or "–", then]
            )
    return Table(["", "step", "what", "loss", "samples", "then"], rows) if rows else None


def _median(entries: list[dict[str, Any]], name: str) -> float:
    return float(median(entry[name] for entry in entries if name in entry))
