"""What tuning found: the score over T and alpha with the trials on it, what matters, and what capturing once saved.

Reads ``tune/trials.json``, ``tune/surface.json`` and ``tune/importance.json`` (``distill_jobs/tuning/results.py`` says
what they hold).
"""

from collections.abc import Sequence
from typing import Any

from distill_jobs import words
from distill_jobs.report.blocks import Block, Chart, Points, Row, Table, Text, without_empty
from distill_jobs.report.estimates import flat, told
from distill_jobs.report.live import chart
from distill_jobs.report.plot import Axis, Plot, Series, Surface
from distill_jobs.report.svg import BASELINE, INK, OTHER, STUDENT

_STATES = {
    "finished": ("came to its end", INK, "o"),
    "pruned": ("ended early", OTHER, "v"),
    "failed": ("failed", OTHER, "D"),
}


def blocks(
    trials: dict[str, Any], surface: dict[str, Any] | None, importance: dict[str, Any] | None
) -> Sequence[Block | None]:
    """Sentences, the surface and the importance as pictures, the finalists, and the method."""
    drawn = [
        response(surface, trials["metric"]) if surface and surface["trials"] else None,
        weights(importance["student"]) if importance and importance.get("student") else None,
    ]
    told_of = [role for role in ("student", "baseline") if trials[role] is not None]
    return [
        Points([*(sentence(trials, role) for role in told_of), saved(trials["saved"])]),
        Row(drawn) if any(drawn) else None,
        *(finalists(trials, role) for role in told_of),
        Text(method(trials, surface), "faint"),
    ]


def sentence(trials: dict[str, Any], role: str) -> str:
    """What was chosen, and by how much it is better than the spec's own settings."""
    judged, metric = trials[role], trials["metric"]
    count = sum(trial["role"] == role for trial in trials["trials"])
    if judged["best"] is None:
        return f"{role}: none of {count} trainings came to its end."
    chosen = ", ".join(f"{name.rpartition('.')[2]} {_short(value)}" for name, value in judged["settings"].items())
    if judged["best"] == judged["default"]:
        return f"{role}: none of the settings tried in {count} trainings was better than the spec's own."
    gain = flat(judged["gain"], lambda value: words.difference(metric, value), words.unit(metric))
    doubt = "" if judged["distinguishable"] else ", which is not distinguishable from nothing"
    return f"{role}: of {count} trainings the best settings are {chosen}; against the spec's own {gain}{doubt}."


def saved(found: dict[str, Any]) -> str:
    """The money that the one capture saved."""
    each, live = found["against_capture_each"], found["against_live"]
    if each["value"] is None:
        return f"What capturing once saved is not known: {each['why']}."
    less, than = ("saved", "against") if live["value"] >= 0 else ("cost", "more than")
    return (
        f"The teacher was captured once ({words.money(found['capture_usd'])}) for {found['trainings']} trainings: that "
        f"saved {words.money(each['value'])} against a capture for each, and {less} {words.money(abs(live['value']))} "
        f"{than} a teacher that answers live."
    )


def response(surface: dict[str, Any], metric: str) -> Chart:
    """The score over T and alpha, and where the trials were."""
    drawn = []
    for state, (name, colour, marker) in _STATES.items():
        own = [trial for trial in surface["trials"] if trial["state"] == state]
        text = [f"{trial['name']}: {_at(trial)}, {_score(metric, trial['score'])} ({name})" for trial in own]
        if own:
            drawn.append(_dots(name, colour, own, text, marker))
    chosen = dict(zip(("temperature", "alpha"), surface.get("chosen") or (), strict=False))
    said = f"{len(surface['trials'])} trials" + (f", chosen {_at(chosen)}" if chosen else "")
    if chosen:
        drawn.append(_dots("chosen", BASELINE, [chosen], [said], "*"))
    ground = None
    if surface["mean"] is not None:
        ground = Surface(
            surface["temperature"],
            surface["alpha"],
            surface["mean"],
            f"validation {metric}",
            surface.get("better", "higher") == "higher",
            "percent" if metric == "accuracy" else "number",
        )
    plot = Plot(
        "response", "The score over T and alpha", Axis("temperature T"), Axis("alpha"), drawn, said, 3.4, surface=ground
    )
    return chart(plot, caption=_worth(surface, metric))


def weights(found: dict[str, Any]) -> Chart | None:
    """The share of the scores' variance that each setting explains."""
    shown = {name: each for name, each in found["parameters"].items() if each["value"] is not None}
    if not shown:
        return None
    shown = dict(sorted(shown.items(), key=lambda item: -item[1]["value"]))
    names = list(shown)
    text = [f"{name}: {flat(each, lambda value: words.percent(value, 0))}" for name, each in shown.items()]
    bars = Series(
        "",
        STUDENT,
        [each["value"] for each in shown.values()],
        list(range(len(names))),
        "bars",
        low=[each["low"] for each in shown.values()],
        high=[each["high"] for each in shown.values()],
        told=text,
    )
    axis = Axis("share of the scores' variance", "percent")
    plot = Plot("importance", "What matters", axis, Axis(names=names), [bars], "; ".join(text), 0.9 + 0.4 * len(names))
    return chart(plot, caption=f"By functional ANOVA over {found['trials']} trials, with 95 % intervals.")


def finalists(trials: dict[str, Any], role: str) -> Table:
    """The settings that were trained again with several seeds, best first."""
    judged, metric = trials[role], trials["metric"]
    rows = []
    for each in sorted(judged["finalists"], key=lambda finalist: finalist["name"] != judged["best"]):
        settings = ", ".join(f"{name.rpartition('.')[2]} {_short(value)}" for name, value in each["settings"].items())
        name = "the spec's own" if each["name"] == judged["default"] else each["name"]
        mark = " (chosen)" if each["name"] == judged["best"] else ""
        mean = told(each.get("mean"), lambda value: _score(metric, value))
        rows.append([f"{name}{mark}", settings, ", ".join(_score(metric, s) for s in each["scores"]), mean])
    return without_empty(Table([role, "settings", f"validation {metric} by seed", "mean"], rows, kind="text"))


def method(trials: dict[str, Any], surface: dict[str, Any] | None) -> str:
    """By what split, how many, and what decides."""
    states = [trial["state"] for trial in trials["trials"]]
    none = f" No surface over T and alpha: {surface['why']}." if surface and surface.get("why") else ""
    return (
        f"{len(states)} trainings, {states.count('pruned')} ended early and {states.count('failed')} failed, in "
        f"{words.duration(trials['seconds'])} for {words.money(trials['usd'])}. Scores are of the "
        f"{trials['split']['name']} split ({trials['split']['rows']:,} rows); tuning never saw the test split. The "
        "best of many trials is partly luck: the finalists were trained again with other seeds, and their means "
        f"decide; intervals are 95 %, of the seeds.{none}"
    )


def _worth(surface: dict[str, Any], metric: str) -> str:
    if surface["mean"] is None:
        return f"No surface is drawn: {surface['why']}."
    explains = surface["explains"]
    foretells = f"{words.percent(explains, 0)} of the variance" if explains > 0 else "nothing of the variance"
    noise = f"{words.difference(metric, surface['noise'], signed=False)} {words.unit(metric)}"
    return (
        f"The more colour, the better. A Gaussian process: it foretells {foretells} of trials left out; one trial's "
        f"noise is {noise}."
    )


def _at(point: dict[str, Any]) -> str:
    return f"T {point['temperature']:.3g}, alpha {point['alpha']:.3g}"


def _dots(name: str, colour: str, points: list[dict[str, Any]], text: list[str], marker: Any) -> Series:
    x, y = ([float(point[axis]) for point in points] for axis in ("temperature", "alpha"))
    return Series(name, colour, x, y, told=text, marker=marker)


def _score(metric: str, value: float | None) -> str:
    return "–" if value is None else words.percent(value, 2) if metric == "accuracy" else f"{value:.4f}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
