"""The teacher's confident mistakes: how many it teaches, which of them the student takes over, and what gates do.

Reads ``negative`` and ``gates`` of ``audit.json`` (``distill_jobs/audit/stage.py`` says what they hold), and before
there is one ``store/negative.json``.
"""

from collections.abc import Sequence
from typing import Any

from distill_jobs.report.blocks import Block, Chart, Folded, Row, Table, Text, without_empty
from distill_jobs.report.estimates import flat, number, pp, reasons, series, share, told
from distill_jobs.report.live import chart
from distill_jobs.report.plot import Axis, Mark, Plot, Series
from distill_jobs.report.svg import OTHER

_STUDENTS = ("student", "baseline")
_SHOWN = 20


def stored(train: dict[str, Any]) -> Sequence[Block | None]:
    """What the store says of the teacher, known before a student is trained."""
    why = train.get("why")
    if why is None and train["rate"] is None:
        why = "the store says of no position what is right"
    if why is not None:
        return [Text(f"Nothing is known of the teacher's mistakes in what it teaches: {why}.", "faint")]
    rows = []
    for name, group in _flat(train["slices"]):
        if group["rate"] is not None:
            small = " (small)" if group["small"] else ""
            counts = [f"{group[what]:,}" for what in ("positions", "wrong", "mistakes")]
            rows.append([f"{name}{small}", *counts, share(group["rate"])])
    return [
        Text("In what it teaches", "heading"),
        Text(
            f"The teacher is confidently wrong at {train['mistakes']:,} of {train['positions']:,} positions of the "
            f"store ({share(train['rate'])}), and wrong at {train['wrong']:,}: known before a student is trained."
        ),
        Row([rates(train), Table(["slice", "positions", "wrong", "confidently", "rate"], rows)]) if rows else None,
    ]


def rates(train: dict[str, Any]) -> Chart:
    """The rate by slice."""
    groups = [each for each in _flat(train["slices"]) if each[1]["rate"] is not None and not each[1]["small"]]
    groups = sorted(groups, key=lambda each: -each[1]["rate"])[:_SHOWN]
    text = [
        f"{name}: {share(group['rate'])}, {group['mistakes']:,} of {group['positions']:,}" for name, group in groups
    ]
    shares = [group["rate"] for _, group in groups]
    bars = Series("", OTHER, shares, list(range(len(groups))), "bars", told=text)
    names = Axis(names=[name for name, _ in groups])
    marks = [Mark("x", train["rate"], "overall")]
    height = 0.8 + 0.28 * len(groups)
    rate = Axis("confidently wrong, share of positions", "percent")
    plot = Plot(
        "mistakes",
        "The teacher's confident mistakes by slice",
        rate,
        names,
        [bars],
        "; ".join(text),
        height,
        marks=marks,
    )
    return chart(plot)


def taken_over(negative: dict[str, Any]) -> Sequence[Block | None]:
    """How often student and baseline make the teacher's own mistakes again."""
    heldout = negative["heldout"]
    if heldout["small"]:
        count = heldout["mistakes"]
        return [Text(f"On held-out rows it is confidently wrong {count:,} times: too few to say what became of them.")]
    arms = heldout["arms"]
    student, baseline = arms["student"], arms["baseline"]
    return [
        Text("What the student takes over", "heading"),
        Text(
            f"Where the teacher is confidently wrong ({heldout['mistakes']:,} held-out positions), the student makes "
            f"the same mistake in {flat(student['repeats'], share)} of cases, and a baseline that never saw the "
            f"teacher in {flat(baseline['repeats'], share)}. The negative-transfer ratio is "
            f"{flat(student['negative_transfer_ratio'], number)}: {_ratio(student['negative_transfer_ratio'])}"
        ),
        Row([repeats(negative)], "wide"),
        Folded("By slice, with intervals", by_slice(negative)),
        Text(method(negative), "faint"),
    ]


def repeats(negative: dict[str, Any]) -> Chart:
    """The share of its confident mistakes that is made again, over all and by slice."""
    groups = [("all", negative["heldout"])]
    groups += [each for each in _flat(negative["slices"]) if not each[1]["small"]]
    groups = groups[:_SHOWN]
    drawn = []
    for role in _STUDENTS:
        rows = [(i, each["arms"][role]["repeats"]) for i, (_, each) in enumerate(groups)]
        drawn.append(series(role, [(i, one, f"{role}, {groups[i][0]}: {flat(one, share)}") for i, one in rows]))
    names = Axis(names=[name for name, _ in groups])
    said = "; ".join(text for each in drawn for text in each.told)
    axis = Axis("the teacher's mistake made again", "percent")
    plot = Plot(
        "repeats", "The teacher's mistakes, made again", axis, names, drawn, said, 1.1 + 0.34 * len(groups), True
    )
    return chart(plot, caption="Slices with too few mistakes are left out. Each line is a 95 % interval.")


def by_slice(negative: dict[str, Any]) -> Table:
    """A row for all, and for every slice."""
    groups = [("all", negative["heldout"]), *_flat(negative["slices"])]
    rows = []
    for name, each in groups:
        count = f"{each['mistakes']:,}"
        if each["small"]:
            rows.append([f"{name} (small)", count, told(each["rate"], share), "", "", "", ""])
            continue
        student, baseline = each["arms"]["student"], each["arms"]["baseline"]
        rows.append(
            [
                name,
                count,
                told(each["rate"], share),
                told(student["repeats"], share),
                told(baseline["repeats"], share),
                told(student["excess"], pp),
                told(student["negative_transfer_ratio"], number),
            ]
        )
    headings = [
        "",
        "mistakes",
        "rate",
        "student repeats",
        "baseline repeats",
        "excess, points",
        "negative-transfer ratio",
    ]
    return without_empty(Table(headings, rows))


def method(negative: dict[str, Any]) -> str:
    """What a confident mistake is, and what the ratios divide by what."""
    thresholds = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in negative["thresholds"].items())
    why = reasons(negative["heldout"]["arms"]["student"].values())
    return (
        f"Confident mistakes are those past the thresholds ({thresholds}). Excess is the student's repeats less the "
        "baseline's. The negative-transfer ratio is (student's repeats / its agreement with the teacher elsewhere) / "
        "(the same of the baseline): at 1 the student takes over no more of the mistakes than of all else. Intervals "
        f"of ratios are Fieller's.{' Not told: ' + '; '.join(why) + '.' if why else ''}"
    )


def _flat(slices: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return [(f"{column}: {value}", found) for column, values in slices.items() for value, found in values.items()]


def _ratio(ratio: dict[str, Any]) -> str:
    if ratio.get("low") is None or ratio.get("high") is None:
        return "whether it takes over more of them than its likeness accounts for can't be said."
    if ratio["low"] > 1:
        return "it takes over more of them than its likeness to the teacher accounts for."
    if ratio["high"] < 1:
        return "it takes over fewer of them than its likeness to the teacher accounts for."
    return "no more and no fewer than its likeness to the teacher accounts for, as far as can be told."
