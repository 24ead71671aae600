"""Gaps between groups, for teacher, student and baseline side by side, and where each comes from.

Reads ``bias`` of ``audit.json`` (``distill_jobs/audit/stage.py`` says what it holds).
"""

from collections.abc import Sequence
from typing import Any

from distill_jobs.audit.labels import AMPLIFIED, INHERITED, INTRODUCED, LABELS, NONE
from distill_jobs.report.blocks import Block, Chart, Folded, Row, Table, Text
from distill_jobs.report.estimates import ARMS, Say, flat, less_noise, number, pp, series, share, signed, told, unsigned
from distill_jobs.report.live import chart
from distill_jobs.report.plot import Axis, Mark, Plot

_SHOWN, _LISTED = 24, 12
_BAD = (AMPLIFIED, INHERITED, INTRODUCED)
_SHORT = {"true_positive_rate": "TPR", "false_positive_rate": "FPR", "selection_rate": "selected", "nll": "log loss"}


def blocks(bias: dict[str, Any]) -> Sequence[Block | None]:
    """What it comes to, the gaps as a picture and a table, the largest differences, every group, and the method."""
    gaps = [{**gap, "column": column} for column, each in bias["columns"].items() for gap in each["gaps"]]
    judged = sorted((gap for gap in gaps if gap["judged"]), key=_weight)
    listed = [gap for gap in judged if gap["label"] != NONE][:_LISTED]
    flagged = [gap for gap in gaps if not gap["judged"]]
    return [
        Text(comes_to(bias, len(judged)), "finding"),
        Text(over(bias["limit"]), "warning") if bias["limit"] and bias["limit"]["over"] else None,
        Row([picture(judged[:_SHOWN], len(judged))], "wide") if judged else None,
        gap_table(listed),
        Folded("All gaps that were judged, with intervals and labels", gap_table(judged)) if judged != listed else None,
        differences(bias),
        Folded("Every measure of every group", groups(bias)),
        Folded("Gaps that were not judged, and why", unjudged(flagged)) if flagged else None,
        Text(method(bias), "faint"),
    ]


def comes_to(bias: dict[str, Any], judged: int) -> str:
    """The labels, counted."""
    told = counted(bias)
    if not told:
        return "No gap between groups could be judged: the groups are too small."
    return f"Of {judged} gaps between groups: {told}."


def counted(bias: dict[str, Any]) -> str:
    """How many gaps bear each label, in the labels' own order; empty where none was judged."""
    return ", ".join(f"{bias['labels'][label]} {label}" for label in LABELS if bias["labels"].get(label))


def over(limit: dict[str, Any]) -> str:
    """What exceeds ``audit.max_gap``."""
    each = [
        f"{one['metric'].replace('_', ' ')} over {one['column']} is {flat(one['gap'], number)}, above {one['limit']:g}"
        for one in limit["over"]
    ]
    return f"Above audit.max_gap: {'; '.join(each)}."


def picture(gaps: Sequence[dict[str, Any]], of: int) -> Chart:
    """Gaps of all three arms with intervals, those that matter most on top."""
    language = any(gap["metric"] == "nll" for gap in gaps)
    scale, unit = (1.0, "nats") if language else (100.0, "percentage points")
    drawn = []
    for role in ARMS:
        text = [f"{role}, {_named(gap)}: {flat(gap[role], _say(gap['metric']))}; {gap['label']}" for gap in gaps]
        drawn.append(series(role, [(i, gap[role], text[i]) for i, gap in enumerate(gaps)], scale))
    plot = Plot(
        "gaps",
        "Gaps between a group and the rest",
        Axis(f"group less the rest of its column, {unit}"),
        Axis(names=[_named(gap) for gap in gaps]),
        drawn,
        "; ".join(text for each in drawn for text in each.told),
        height=0.9 + 0.34 * len(gaps),
        wide=True,
        marks=[Mark("x", 0.0)],
    )
    some = f" The {len(gaps)} of {of} that matter most." if of > len(gaps) else ""
    return chart(plot, caption=f"Each line is a 95 % interval; 0 is no gap.{some}")


def gap_table(gaps: Sequence[dict[str, Any]]) -> Table:
    """A row for each gap that was judged, with its label."""
    rows = []
    for gap in gaps:
        say = _say(gap["metric"])
        change = told(gap["change"], say)
        rows.append([_named(gap), *(told(gap[role], say) for role in ARMS), change, gap["label"]])
    return Table(["group less the rest", *ARMS, "student less baseline", "label"], rows, kind="labels")


def unjudged(gaps: Sequence[dict[str, Any]]) -> Table:
    """Why each gap was not judged."""
    return Table(["group less the rest", "why not"], [[_named(gap), gap["flag"]] for gap in gaps], kind="text")


def differences(bias: dict[str, Any]) -> Table:
    """The largest difference between two groups of a column, by measure: fairlearn's, and their like."""
    rows = []
    for column, each in bias["columns"].items():
        for name, found in each["differences"].items():
            say = number if name.startswith("nll") else unsigned
            cells = [told(less_noise(found[role]), say) for role in ARMS]
            rows.append([f"{column}: {name.replace('_', ' ')}", *cells, found["label"]])
    return Table(["largest difference, debiased", *ARMS, "label of the widest"], rows, kind="labels")


def groups(bias: dict[str, Any]) -> Table:
    """Every measure of every group."""
    rows = []
    for column, each in bias["columns"].items():
        for value, group in each["groups"].items():
            small = " (small)" if group["small"] else ""
            for metric in group["arms"]["student"]:
                say = share if metric not in ("nll", "perplexity") else number
                cells = [told(group["arms"][role][metric], say) for role in ARMS]
                rows.append([f"{column}: {value}{small}", metric.replace("_", " "), f"{group['rows']:,}", *cells])
    return Table(["group", "measure", "rows", *ARMS], rows)


def method(bias: dict[str, Any]) -> str:
    """How gaps were measured and labelled."""
    correction = bias["correction"]
    about = f" Rates are about the class {bias['positive']}." if bias["positive"] else ""
    return (
        "A gap is a group's measure less that of all other rows of its column; measures of classifiers are fairlearn's."
        f"{about} Labels come from {correction['tests']:,} paired tests (over rows and seeds), corrected together by "
        f"{correction['method']}'s method, so that the chance of any false label is at most "
        f"{correction['false_alarms']:.0%}. Inherited: the teacher has it, and the student has more of it than the "
        "baseline. Amplified: there without a teacher, and larger with one. Introduced: in neither. Repaired: smaller "
        f"with the teacher. Groups of fewer than {bias['min_slice_rows']:,} rows are flagged, not judged. Largest "
        "differences are debiased: noise alone makes them larger."
    )


def _weight(gap: dict[str, Any]) -> tuple[int, float]:
    rank = 0 if gap["label"] in _BAD else 2 if gap["label"] == NONE else 1
    return rank, -abs(gap["student"]["value"] or 0.0)


def _named(gap: dict[str, Any]) -> str:
    return f"{gap['column']}: {gap['group']}, {_SHORT.get(gap['metric'], gap['metric'])}"


def _say(metric: str) -> Say:
    return signed if metric == "nll" else pp
