"""The gates side by side: what each spares in the teacher's mistakes and what it costs in quality.

Reads ``gates`` of ``audit.json`` (``distill_jobs/audit/stage.py`` says what it holds).
"""

from collections.abc import Sequence
from typing import Any

from distill_jobs import words
from distill_jobs.report.blocks import Block, Chart, Row, Table, Text, without_empty
from distill_jobs.report.estimates import flat, number, pp, signed, told
from distill_jobs.report.live import chart
from distill_jobs.report.plot import Axis, Mark, Plot, Series
from distill_jobs.report.svg import BASELINE, STUDENT

HALF = 0.5


def blocks(audit: dict[str, Any]) -> Sequence[Block | None]:
    """Every gate by what it costs in quality and what it spares in mistakes."""
    rows = audit["gates"]
    if not any(row["arm"].startswith("gate-") for row in rows):
        return []
    metric = audit["metric"]
    return [
        Text("Gates: what each does to the teacher's mistakes", "heading"),
        Text(halves(rows), "finding"),
        Row([trade(rows, metric)], "wide"),
        table(rows, metric),
        Text(
            "A gate keeps the teacher's mistakes out of the loss; each arm was trained like the student in all else. "
            "Excess is how much more often than a baseline an arm makes the teacher's own mistakes; transfer kept is a "
            "gate's excess over the student's: at 50 % the gate has cut the negative transfer by half.",
            "faint",
        ),
    ]


def trade(rows: Sequence[dict[str, Any]], metric: str) -> Chart:
    """Negative transfer against the gain over the baseline: right and low is best."""
    language = metric == "perplexity"
    scale = 1.0 if language else 100.0
    there = [r for r in rows if r["gain"].get("value") is not None and r["negative_transfer"].get("value") is not None]
    drawn = []
    for row in there:
        gain, excess = row["gain"], row["negative_transfer"]
        name = row["arm"].removeprefix("gate-")
        drawn.append(
            Series(
                "",
                STUDENT if row["arm"] == "student" else BASELINE,
                [scale * gain["value"]],
                [100 * excess["value"]],
                low=[None if excess.get("low") is None else 100 * excess["low"]],
                high=[None if excess.get("high") is None else 100 * excess["high"]],
                told=[f"{name}: gain {flat(gain, signed if language else pp)}, excess {flat(excess, pp)}"],
                labels=["no gate" if row["arm"] == "student" else name],
                marker="o" if row["arm"] == "student" else "D",
            )
        )
    unit = "nats a token" if language else "percentage points"
    x, y = Axis(f"gain over the baseline, {unit}"), Axis("mistakes taken over, points")
    said = "; ".join(text for each in drawn for text in each.told)
    marks = [Mark("y", 0.0), Mark("x", 0.0)]
    plot = Plot("gates", "What a gate spares and what it costs", x, y, drawn, said, 3.2, True, marks=marks)
    return chart(plot, caption="Right is better, low is better; the upright lines are 95 % intervals of the excess.")


def table(rows: Sequence[dict[str, Any]], metric: str) -> Table:
    """One row a gate: quality, gap closed, negative transfer, calibration, bias."""
    shown = [
        [
            _name(row),
            told(row["quality"], lambda value: words.score(metric, value)),
            told(row["gap_closed"], lambda value: words.percent(value, 0)),
            told(row["negative_transfer"], pp),
            told(row.get("transfer_kept"), lambda value: words.percent(value, 0)),
            told(row["negative_transfer_ratio"], number),
            number(row["ece"]["value"]),
            _widest(row["bias"]),
        ]
        for row in rows
    ]
    headings = [
        "",
        metric,
        "gap closed",
        "excess, points",
        "transfer kept",
        "transfer ratio",
        "ECE",
        "widest gap between groups, points",
    ]
    return without_empty(Table(headings, shown))


def halves(rows: Sequence[dict[str, Any]]) -> str:
    """Whether a gate cuts the negative transfer at least by half and is not shown to cost quality."""
    gates = [row for row in rows if row["arm"].startswith("gate-")]
    why = next((row["transfer_kept"]["why"] for row in gates if row["transfer_kept"].get("why")), None)
    shown, measured = [], []
    for row in gates:
        kept, over = row["transfer_kept"], row["over_student"]
        if kept["value"] is None or (over.get("high") is not None and over["high"] < 0):
            continue
        name = row["arm"].removeprefix("gate-")
        if kept.get("high") is not None and kept["high"] <= HALF:
            shown.append(name)
        elif kept["value"] <= HALF:
            measured.append(name)
    if shown:
        return (
            f"Shown to cut the negative transfer at least by half, with no loss of quality shown: {', '.join(shown)}."
        )
    if measured:
        return (
            f"As measured, {', '.join(measured)} cut the negative transfer at least by half, with no loss of quality "
            "shown; the interval reaches beyond, so that the half is not shown."
        )
    if why is not None and all(row["transfer_kept"]["value"] is None for row in gates):
        return f"No gate could be shown to cut the negative transfer: {why}."
    return "No gate cut the negative transfer at least by half without being shown to lose quality."


def _name(row: dict[str, Any]) -> str:
    return "student (no gate)" if row["arm"] == "student" else str(row["arm"]).removeprefix("gate-")


def _widest(bias: dict[str, Any]) -> str:
    found = [
        (each["value"], f"{pp(each['value'])}\n{column}, {name.removesuffix('_difference').replace('_', ' ')}")
        for column, differences in bias.items()
        for name, each in differences.items()
        if each.get("value") is not None
    ]
    return max(found)[1] if found else ""
