"""The last screen of ``distill tune``."""

from typing import Any

from cluster.files import Folder
from distill_jobs.console import Console
from distill_jobs.tuning.results import BEST, IMPORTANCE, PICTURE, SURFACE, TRIALS
from distill_jobs.tuning.space import told
from distill_jobs.words import difference, duration, money, percent, score, unit


def print_tuning(console: Console, folder: Folder) -> None:
    """What ``folder``, a workdir's ``tune/``, holds."""
    found = folder.read_json(TRIALS)
    console.say()
    for role in ("student", "baseline"):
        if found[role] is not None:
            console.table(
                f"{role}: validation {found['metric']}, {found['split']['rows']:,} rows", *_finalists(found, role)
            )
            console.say(verdict(found, role))
            console.say()
    if found["baseline"] is None:
        console.say("The baseline was not tuned: it is trained as student.train says.\n")
    shares = folder.read_json(IMPORTANCE)["student"]["parameters"]
    if (why := next(iter(shares.values())).get("why")) is not None:
        console.say(f"What matters can't be told: {why}.")
    else:
        console.table("what matters: share of the variance of the student's scores", *_importance(shares))
    console.say(surface_sentence(folder.read_json(SURFACE)))
    console.say(saved_sentence(found["saved"]))
    console.say(f"{trials_sentence(found)} Test scores: distill run {folder}/{BEST}")


def verdict(found: dict[str, Any], role: str) -> str:
    """Whether the best settings are better than those of the spec, in a sentence that knows its noise."""
    judged, metric = found[role], found["metric"]
    seeds = len(judged["finalists"][0]["scores"])
    if judged["best"] == judged["default"]:
        return f"No settings tried were better than the spec's own, by the mean over {seeds} {_plural('seed', seeds)}."
    gain = judged["gain"]
    lead = f"The best settings ({told(judged['settings'])})"
    if gain["value"] is None:
        return f"{lead} can't be compared with the spec's own: {gain['why']}."
    by = f"{difference(metric, gain['value'])} {unit(metric)}"
    if gain["low"] is None:
        return f"{lead} differ from the spec's own by {by}; with one seed nobody can tell whether that is noise."
    ends = f"95 % interval {difference(metric, gain['low'])} to {difference(metric, gain['high'])}"
    if not judged["distinguishable"]:
        return f"{lead} differ from the spec's own by {by} ({ends}): no more than the noise of {seeds} seeds."
    return f"{lead} beat the spec's own by {by} ({ends}, over {seeds} seeds)."


def surface_sentence(surface: dict[str, Any]) -> str:
    """What the response surface is worth."""
    if surface["why"] is not None:
        return f"No response surface over T and alpha: {surface['why']}."
    metric, mean = surface["metric"], [value for row in surface["mean"] for value in row]
    ends = [value for row in surface["high"] for value in row]
    reach = difference(metric, max(end - value for end, value in zip(ends, mean, strict=True)), signed=False)
    explains = surface["explains"]
    worth = f"{percent(explains, 0)} of the variance" if explains > 0 else "nothing"
    return (
        f"Over T and alpha, with the best of all else, validation {metric} goes from {score(metric, min(mean))} to "
        f"{score(metric, max(mean))}, each ± {reach} {unit(metric)} at most ({PICTURE}); what it comes from foretells "
        f"{worth} of trials left out."
    )


def saved_sentence(saved: dict[str, Any]) -> str:
    """What the one capture spared."""
    each, live = saved["against_capture_each"]["value"], saved["against_live"]["value"]
    if each is None:
        return f"What the one capture saved can't be told: {saved['against_capture_each']['why']}."
    lives = f"{money(live)} against" if live >= 0 else f"{money(-live)} more than"
    return (
        f"The one capture ({money(saved['capture_usd'])}) served {saved['trainings']} trainings: saved {money(each)} "
        f"against a capture for each, and {lives} a live teacher."
    )


def trials_sentence(found: dict[str, Any]) -> str:
    """How many trials there were, and what they took."""
    states = [trial["state"] for trial in found["trials"]]
    early = f", {states.count('pruned')} of them ended early" if "pruned" in states else ""
    failed = f", {states.count('failed')} failed" if "failed" in states else ""
    return f"{len(states)} trainings in {duration(found['seconds'])} for {money(found['usd'])}{early}{failed}."


def _finalists(found: dict[str, Any], role: str) -> tuple[list[str], list[list[Any]]]:
    judged, metric = found[role], found["metric"]
    search = {trial["name"]: trial["score"] for trial in found["trials"]}
    rows = []
    for each in sorted(judged["finalists"], key=lambda f: f["name"] != judged["best"]):
        mean = each.get("mean")
        ends = (
            f"{score(metric, mean['low'])} to {score(metric, mean['high'])}" if mean and mean["low"] is not None else ""
        )
        name = each["name"]
        single = search.get(f"{role}-{name}" if name == judged["default"] else name)
        rows.append(
            [
                "the spec's own" if name == judged["default"] else name.removeprefix(f"{role}-"),
                told(each["settings"]),
                score(metric, single) if single is not None else "–",
                score(metric, mean["value"]) if mean else "failed",
                ends,
            ]
        )
    seeds = len(judged["finalists"][0]["scores"])
    return ["", "settings", "in the search", f"mean of {seeds} {_plural('seed', seeds)}", "95 % interval"], rows


def _importance(shares: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    rows = [
        [name, percent(share["value"], 0), f"{percent(share['low'], 0)} to {percent(share['high'], 0)}"]
        for name, share in shares.items()
    ]
    return ["setting", "share", "95 % interval"], rows


def _plural(word: str, number: int) -> str:
    return word if number == 1 else f"{word}s"
