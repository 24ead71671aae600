"""Quality with its intervals: the way from the baseline to the teacher, likeness to the teacher, calibration.

Reads ``ceiling`` and ``calibration`` of ``audit.json`` (``distill_jobs/audit/stage.py`` says what they hold).
"""

from collections.abc import Sequence
from typing import Any

from distill_jobs import words
from distill_jobs.report.blocks import Block, Chart, Points, Row, Table, Text, without_empty
from distill_jobs.report.estimates import ARMS, flat, less_noise, number, pp, reasons, series, share, signed, told
from distill_jobs.report.live import chart
from distill_jobs.report.plot import Axis, Mark, Plot, Series
from distill_jobs.report.svg import MARKER, ROLE

_CONTRASTS = {
    "gain": "student over baseline",
    "student_over_teacher": "student over teacher",
    "teacher_over_baseline": "teacher over baseline",
}
_FEW = 30


def blocks(audit: dict[str, Any]) -> Sequence[Block | None]:
    """Sentences, the contrasts and the reliability diagram as pictures, the table of all arms, and the method."""
    found, calibration = audit["ceiling"], audit["calibration"]
    return [
        Text("How far to the ceiling", "heading"),
        Points(list(found["sentences"])),
        Row([contrasts(found), reliability(calibration)]),
        table(found, calibration),
        fidelity(found),
        Text(method(found), "faint"),
    ]


def contrasts(found: dict[str, Any]) -> Chart:
    """What lies between the arms, with intervals against nothing; positive is better."""
    language = found["metric"] == "perplexity"
    scale, unit = (1.0, "nats a token") if language else (100.0, "percentage points")
    say = signed if language else pp
    names = list(_CONTRASTS.values())
    rows = [(i, found[key], f"{names[i]}: {flat(found[key], say, unit)}") for i, key in enumerate(_CONTRASTS)]
    plot = Plot(
        "contrasts",
        "What lies between them",
        Axis(f"{unit}, more is better"),
        Axis(names=names),
        [series("student", rows, scale, named=False)],
        "; ".join(text for _, _, text in rows),
        height=2.0,
        marks=[Mark("x", 0.0)],
    )
    caption = "The line is the 95 % interval, over held-out rows and seeds. Where it crosses 0, there may be nothing."
    return chart(plot, caption=caption)


def reliability(calibration: dict[str, Any]) -> Chart:
    """Confidence against the share that is right, by bins of confidence."""
    arms = [role for role in ARMS if role in calibration]
    drawn: list[Series] = []
    for role in arms:
        bins = [each for each in calibration[role]["bins"] if each["count"] >= _FEW]
        x, y = [each["confidence"] for each in bins], [each["accuracy"] for each in bins]
        drawn.append(Series("", ROLE[role], x, y, "line"))
        text = [
            f"{role}: {each['count']:,} at {share(each['confidence'])}, right {share(each['accuracy'])}"
            for each in bins
        ]
        drawn.append(Series(role, ROLE[role], x, y, told=text, marker=MARKER[role]))  # type: ignore[arg-type]
    ece = ", ".join(f"{role} {flat(calibration[role]['ece'], number)}" for role in arms)
    confidence, right = Axis("confidence in the first choice", "percent"), Axis("share that is right", "percent")
    plot = Plot("reliability", "Reliability", confidence, right, drawn, f"ECE: {ece}", height=2.9, diagonal=True)
    caption = f"Below the diagonal: too sure of itself. Bins of fewer than {_FEW} positions are left out."
    return chart(plot, "Can its confidence be believed?", caption)


def table(found: dict[str, Any], calibration: dict[str, Any]) -> Table:
    """Every arm by every measure, intervals below the numbers."""
    metric = found["metric"]
    rows = []
    for role, arm in in_order(found["arms"]):
        rows.append(
            [
                role,
                told(arm["quality"], lambda value: words.score(metric, value)),
                told(arm["nll"], number),
                told(arm["kl_to_teacher"], number) if role != "teacher" else "",
                told(arm["agreement"], share) if role != "teacher" else "",
                number(calibration[role]["ece"]["value"]),
                told(less_noise(calibration[role]["ece"]), number),
            ]
        )
    headings = ["", metric, "log loss", "KL to teacher", "agrees with teacher", "ECE", "ECE, debiased"]
    return without_empty(Table(headings, rows))


def fidelity(found: dict[str, Any]) -> Row:
    """Agreement with the teacher where it is right, and where it is wrong."""
    names = ["where the teacher is right", "where it is wrong"]
    arms = [role for role, _ in in_order(found["arms"]) if role != "teacher"]
    drawn, rows = [], []
    for role in arms:
        pair = [found["arms"][role][name] for name in ("fidelity_right", "fidelity_wrong")]
        texts = [f"{role}, {name}: {flat(each, share)}" for name, each in zip(names, pair, strict=True)]
        if role in ARMS:
            drawn.append(series(role, list(zip(range(2), pair, texts, strict=True))))
        rows.append([role, *(told(each, share) for each in pair)])
    said = "; ".join(text for each in drawn for text in each.told)
    shares = Axis("same first choice", "percent")
    shown = Plot("fidelity", "Same first choice", shares, Axis(names=names), drawn, said, 2.2)
    caption = (
        "A student that only imitates follows its teacher into its errors; a baseline shows what is easy to get wrong."
    )
    return Row([chart(shown, "Does it follow the teacher?", caption), Table(["", *names], rows)])


def method(found: dict[str, Any]) -> str:
    """How the intervals were made, and what they rest on."""
    why = reasons([found["gap_closed"], *(found[name] for name in _CONTRASTS)])
    told_why = f" Not told: {'; '.join(why)}." if why else ""
    return (
        f"Measured on {found['rows']:,} held-out rows ({found['positions']:,} positions), {found['seeds']} seeds of "
        f"each arm. Intervals are 95 %, from {found['draws']:,} bootstrap resamples of {found['units']:,} "
        f"{found['unit']}s crossed with the seeds, each arm on the same ones (paired), with Student's t for the few "
        "seeds. Gap closed is (student − baseline) / (teacher − baseline), with Fieller's interval. ECE has 15 bins of "
        "equal width over the confidence in the first choice; debiased, less what noise within bins adds to it. Log "
        f"loss and KL are in nats.{told_why}"
    )


def in_order(arms: dict[str, Any]) -> list[tuple[str, Any]]:
    """Teacher, student and baseline first, then the gates."""
    return sorted(arms.items(), key=lambda item: (ARMS.index(item[0]) if item[0] in ARMS else len(ARMS), item[0]))
