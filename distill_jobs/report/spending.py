"""Where the money went, what was foreseen, and what the other ways would have cost.

Reads the entries of ``ledger.json``, ``plan.json`` and ``alternatives.json`` (``distill_jobs/costs`` says what they
hold: ``ledger.py``, ``plan.py``, ``options.py``).
"""

import math
from collections.abc import Sequence
from typing import Any

from distill_jobs import words
from distill_jobs.report.blocks import Block, Chart, Facts, Folded, Points, Row, Table, Text, without_empty
from distill_jobs.report.live import chart
from distill_jobs.report.plot import Axis, Mark, Plot, Series
from distill_jobs.report.svg import BASELINE, OTHER, STUDENT, TEACHER

_COLOURS = {
    "serve the teacher": TEACHER,
    "live teacher in every run": TEACHER,
    "train alone, serve that": BASELINE,
}
_NAMES = {"usd": "money", "seconds": "time", "kwh": "energy", "kg_co2e": "CO2e"}
_AXES = {"months": "months kept"}
_TITLES = {
    "requests": "Distil, or serve the teacher?",
    "students": "Store once, or ask a live teacher?",
    "months": "How long may the store be kept?",
}


def energy(total: dict[str, Any], grid: dict[str, Any] | None) -> Block | None:
    """Energy, carbon and the prices that were not taken, where the ledger knows of them."""
    if not total.get("kwh"):
        return None
    measured = total["kwh_measured"] / total["kwh"]
    counted = f"{words.percent(measured, 0)} measured by counters, the rest estimated"
    how = counted if measured else "all of it estimated"
    pairs = [
        ("energy", f"{words.energy(total['kwh'])}, {how}"),
        ("carbon", f"{words.carbon(total['kg_co2e'])} CO2e"),
        ("at on-demand prices", words.money(total["usd_on_demand"])),
        ("at spot prices", words.money(total["usd_spot"])),
        ("keeping what was made", f"{words.money(total['usd_month'])} a month for {words.size(total['bytes'])}"),
    ]
    if grid:
        pairs.append(("electricity", f"{grid['kg_per_kwh']:.3f} kg CO2e a kWh, {grid['source']}; PUE {grid['pue']:g}"))
    if total["usage"].get("wasted_core_seconds") or total["usage"].get("wasted_device_seconds"):
        cores, devices = (words.hours(total["usage"][f"wasted_{what}_seconds"]) for what in ("core", "device"))
        pairs.append(("came to nothing", f"{cores} core-hours, {devices} accelerator-hours of retries and lost work"))
    return Facts(pairs)


def by_device(total: dict[str, Any]) -> Block | None:
    """By node and kind of device."""
    rows = [
        [
            f"{part['node'] or 'not known'}: {part['device']}",
            str(part["model"]),
            words.hours(3600 * part["hours"]),
            words.money(part["usd"]),
            words.energy(part["kwh"]),
            words.carbon(part["kg_co2e"]),
            str(part["how"]),
        ]
        for part in total.get("parts", ())
    ]
    headings = ["node and device", "model", "hours held", "money", "energy", "CO2e", "how the energy is known"]
    return Folded("By node and kind of device", without_empty(Table(headings, rows, kind="labels"))) if rows else None


def foreseen(against: dict[str, Any], plan: dict[str, Any]) -> Sequence[Block | None]:
    """What was predicted before the run beside what it took, and what other sizes of cluster would take."""
    total = against["total"]
    done = {name: stage for name, stage in against["stages"].items() if stage["actual"] is not None}
    told = "Nothing that was predicted has been done yet."
    if total["actual"] is not None:
        predicted, actual = (
            f"{words.money(total[side]['usd'])} and {words.duration(total[side]['seconds'])}"
            for side in ("predicted", "actual")
        )
        ratios = f"{_times(total['ratio']['usd'])} the money and {_times(total['ratio']['seconds'])} the time"
        told = f"Predicted before the run were {predicted} for these stages. It took {actual}: {ratios}."
    return [
        Text("Predicted and actual", "heading"),
        Text(told),
        Row([_bars(done)], "wide") if done else None,
        _against(done, total) if done else None,
        Folded("Every prediction beside what it took", _everything(done)) if done else None,
        Folded("Predicted for other sizes of cluster", _sizes(plan)) if plan.get("sizes") else None,
        Text(
            "Predictions come from a short probe of real batches and closed formulas (2 FLOPs a parameter and token "
            f"forward, 6 in training); a total is taken to be right within a factor of {against['within']:g}. Entries "
            f"without a prediction, such as the probe: {words.money(sum(against['not_predicted'].values()))}.",
            "faint",
        ),
    ]


def alternatives(found: dict[str, Any]) -> Sequence[Block | None]:
    """The options side by side, their break-evens as sentences and curves, and the formulas."""
    if found["measured"] is None:
        return [Text("The alternatives", "heading"), Text(f"They can't be priced: {found['why']}.", "faint")]
    drawn = [_curve(each) for each in found["curves"]]
    formulas = [[name.replace("_", " "), formula] for name, formula in found["formulas"].items()]
    return [
        Text("The alternatives, at this job's own prices", "heading"),
        Points(_sentences(found)),
        Row(drawn, "three"),
        Folded("Formulas", Table(["", "how it is worked out"], formulas, kind="text")),
        Text(
            f"Rests on: {'; '.join(found['rests_on'])}. Each was measured once, so that there is no interval.", "faint"
        ),
    ]


def _bars(stages: dict[str, dict[str, Any]]) -> Chart:
    free = not any(stage["actual"]["usd"] for stage in stages.values())
    what, kind = ("seconds", "number") if free else ("usd", "money")
    drawn = []
    for side, colour in (("predicted", OTHER), ("actual", STUDENT)):
        values = [float(stage[side][what]) for stage in stages.values()]
        text = [f"{name}, {side}: {_say(what, value)}" for name, value in zip(stages, values, strict=True)]
        drawn.append(Series(side, colour, values, list(range(len(stages))), "bars", told=text))
    axis = Axis("seconds" if free else "US dollars", kind)  # type: ignore[arg-type]
    said = "; ".join(text for each in drawn for text in each.told)
    plot = Plot(
        "foreseen", "Predicted and actual", axis, Axis(names=list(stages)), drawn, said, 1.1 + 0.4 * len(stages)
    )
    return chart(plot)


def _against(stages: dict[str, dict[str, Any]], total: dict[str, Any]) -> Table:
    rows = []
    for name, stage in [*stages.items(), ("together", total)]:
        cells = [_say(what, stage[side][what]) for what in ("seconds", "usd") for side in ("predicted", "actual")]
        rows.append([name, *cells, _times(stage["ratio"]["usd"])])
    return Table(["", "time, predicted", "actual", "money, predicted", "actual", "actual / predicted"], rows, last=True)


def _everything(stages: dict[str, dict[str, Any]]) -> Table:
    rows = []
    for name, stage in stages.items():
        for what, predicted in stage["predicted"].items():
            if predicted or stage["actual"][what]:
                told = _say(what, predicted), _say(what, stage["actual"][what])
                rows.append([name, _NAMES.get(what, what.replace("_", " ")), *told, _times(stage["ratio"][what])])
    return Table(["stage", "what", "predicted", "actual", "actual / predicted"], rows)


def _sizes(plan: dict[str, Any]) -> Table:
    rows = []
    for size in plan["sizes"]:
        total = size["total"]
        told = [_say(what, total[what]) for what in ("seconds", "usd", "core_hours", "device_hours", "kwh")]
        rows.append([f"{size['times']:g} × the actors and ranks", *told])
    return without_empty(Table(["cluster", "time", "money", "core-hours", "device-hours", "energy"], rows))


def _curve(found: dict[str, Any]) -> Chart:
    drawn = []
    for name, usd in found["lines"].items():
        pairs = zip(found["at"], usd, strict=True)
        text = [f"{name}: {words.money(y)} at {words.plain(x)} {found['x']}" for x, y in pairs]
        dash: Any = "dash" if name in _COLOURS else "solid"
        drawn.append(Series(name, _COLOURS.get(name, STUDENT), found["at"], usd, "line", told=text, dash=dash))
    at = found["break_even"]
    marks = [Mark("x", at, f"break-even {words.plain(float(f'{at:.3g}'))}")] if at else []
    said = "; ".join(f"{each.name} {words.money(each.y[0])} to {words.money(each.y[-1])}" for each in drawn)
    title = _TITLES.get(found["name"], found["name"])
    plot = Plot(
        f"cost-{found['name']}",
        title,
        Axis(_AXES.get(found["name"], found["x"])),
        Axis(found["y"], "money"),
        drawn,
        said,
        2.6,
        marks=marks,
    )
    return chart(plot)


def _sentences(found: dict[str, Any]) -> list[str]:
    live, alone, serve = found["store_or_live"], found["distil_or_alone"], found["distil_or_serve"]
    less, more = words.money(abs(live["saved_usd"])), "less" if live["saved_usd"] >= 0 else "more"
    point = alone["usd_per_point"]
    ends = f" (95 % interval from {words.money(point['low'])})" if point.get("low") is not None else ""
    price = f"{words.money(point['value'])}{ends} for each point gained" if point["value"] is not None else point["why"]
    return [
        f"Storing the teacher's answers once cost {less} {more} than asking a live teacher in each of "
        f"{live['students']} trainings would have; "
        f"{_break_even(live['break_even_students'], 'trainings', 'the store is cheaper')}.",
        f"Distilling one student costs {words.money(alone['extra_usd'])} more than training it alone: {price}. The "
        f"teacher itself took {words.money(alone['teacher_usd'])}.",
        f"A million requests cost {words.money(1e6 * serve['teacher_request_usd'])} with the teacher and "
        f"{words.money(1e6 * serve['student_request_usd'])} with the student; "
        f"{_break_even(serve['break_even_requests'], 'requests', 'distilling has paid for itself')}.",
    ]


def _break_even(found: dict[str, Any], what: str, then: str) -> str:
    if found["value"] is None:
        return str(found["why"])
    return f"from {words.count(math.ceil(found['value']))} {what} on {then}"


_UNITS = {"bytes": words.size, "kwh": words.energy, "kg_co2e": words.carbon}


def _say(what: str, value: float) -> str:
    if what == "seconds":
        return words.duration(value)
    if what == "usd":
        return words.money(value)
    if what.endswith("hours"):
        return words.hours(3600 * value)
    if what in _UNITS:
        return _UNITS[what](value)
    return words.count(value) if value >= 100 else words.significant(value)


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}×"
