"""The report's pictures. Each takes plain values and gives an ``<svg>`` element."""

from collections import defaultdict
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, MaxNLocator

from distill_jobs import words
from distill_jobs.report.svg import FAINT, GRID, INK, MARKER, OTHER, ROLE, STUDENT, canvas, styled, to_svg

ROLES = ("teacher", "student", "baseline")
MOST_SLICES = 30
_LABEL = 26


def quality(metric: str, summary: dict[str, Any]) -> Markup:
    """Bars from zero for teacher, student and baseline, with each seed as a dot."""
    with styled():
        figure, axes = canvas(1.9)
        labels = []
        for place, role in enumerate(ROLES):
            seeds = summary[role].get("seeds", [])
            value = summary[role].get("value", summary[role].get("mean"))
            axes.barh(place, value, height=0.56, color=ROLE[role], alpha=0.55 if len(seeds) > 1 else 0.85)
            if len(seeds) > 1:
                jitter = place + np.linspace(-0.16, 0.16, len(seeds))
                axes.plot(
                    seeds, jitter, "o", color=ROLE[role], markersize=4.5, markeredgecolor=INK, markeredgewidth=0.6
                )
            labels.append(f"{role}\n{words.score(metric, value)}")
        axes.set_yticks(range(len(ROLES)), labels, color=INK)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        if metric == "accuracy":
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.0f} %"))
        axes.set_xlabel(f"{metric} on the held-out rows")
        said = ", ".join(label.replace("\n", " ") for label in labels)
        return to_svg(figure, "quality", f"Held-out {metric}", said)


def gain(metric: str, better: str, summary: dict[str, Any]) -> Markup:
    """The student's gain over the baseline: each seed, the mean, and its interval against zero."""
    found = summary["gain"]
    pairs = zip(summary["student"]["seeds"], summary["baseline"]["seeds"], strict=False)
    scale = 100 if metric == "accuracy" else 1
    seeds = [scale * (student - baseline) for student, baseline in pairs]
    mean, ends = scale * found["mean"], [scale * found[end] for end in ("low", "high") if found[end] is not None]
    with styled():
        figure, axes = canvas(1.55)
        axes.axvline(0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.plot(ends, [0.0] * len(ends), color=STUDENT, linewidth=5, alpha=0.45, solid_capstyle="round")
        axes.plot(mean, 0, "d", color=STUDENT, markersize=9)
        if len(seeds) > 1:
            axes.plot(seeds, np.full(len(seeds), 0.55), "o", color=FAINT, markersize=4.5)
        axes.set_yticks(
            [0, 0.55] if len(seeds) > 1 else [0], ["mean", "each seed"][: 2 if len(seeds) > 1 else 1], color=INK
        )
        axes.set_ylim(-0.5, 1.0 if len(seeds) > 1 else 0.5)
        reach = 1.25 * max(abs(v) for v in (mean, *ends, *seeds, 1e-9))
        axes.set_xlim(-reach, reach)
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(f"student minus baseline, {words.unit(metric)} ({better} is better)")
        text = ", ".join(
            f"{name} {words.difference(metric, found[name])}" for name in ("mean", "low", "high")[: 1 + len(ends)]
        )
        return to_svg(figure, "gain", "Gain of the student over the no-teacher baseline", text)


def slices(metric: str, found: dict[str, dict[str, Any]]) -> Markup:
    """Teacher, student and baseline for every value of every slice column, on one zoomed axis."""
    rows = [(column, value, scores) for column, values in found.items() for value, scores in values.items()]
    if len(rows) > MOST_SLICES:
        largest = sorted(rows, key=lambda row: -row[2]["rows"])[:MOST_SLICES]
        rows = [row for row in rows if row in largest]
    with styled():
        figure, axes = canvas(0.75 + 0.27 * len(rows))
        for place, (_, _, scores) in enumerate(rows):
            values = [scores[role] for role in ROLES]
            axes.plot([min(values), max(values)], [place, place], color=GRID, linewidth=3, solid_capstyle="round")
            for role in ROLES:
                axes.plot(scores[role], place, MARKER[role], color=ROLE[role], markersize=5.5, alpha=0.9)
        names = [_short(f"{column}: {value}") for column, value, _ in rows]
        axes.set_yticks(range(len(rows)), names, color=INK)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        if metric == "accuracy":
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.0f} %"))
        axes.set_xlabel(f"{metric} (the axis doesn't start at zero)")
        text = "; ".join(
            f"{column} {value}: " + ", ".join(f"{role} {words.score(metric, scores[role])}" for role in ROLES)
            for column, value, scores in rows
        )
        return to_svg(figure, "slices", f"{metric} by slice", text)


def curves(histories: dict[str, list[dict[str, Any]]]) -> list[tuple[str, Markup]]:
    """Loss over the steps of training: the teacher's, then students' and baselines' hard and soft loss.

    Hard-label loss is the same quantity for every arm; lines are training batches, dots the validation split.
    """
    # Sorted, so that students are drawn over baselines.
    arms = {name: histories[name] for name in sorted(histories) if name.split("/")[0] in ("baseline", "student")}
    panels = [
        ("Teacher: loss on hard labels", "hard", {"teacher": histories.get("teacher", [])}),
        ("Student and baseline: loss on hard labels", "hard", arms),
        (
            "Student: soft loss, T²·KL to the teacher",
            "soft",
            {n: s for n, s in arms.items() if n.startswith("student")},
        ),
    ]
    drawn = []
    for number, (title, key, some) in enumerate(panels):
        lines = {name: [(e["step"], e[key]) for e in steps if e.get(key) is not None] for name, steps in some.items()}
        lines = {name: points for name, points in lines.items() if points}
        if lines and (key != "soft" or any(value for points in lines.values() for _, value in points)):
            drawn.append((title, _curve(f"curve{number}", title, lines, some if key == "hard" else {})))
    return drawn


def costs(entries: list[dict[str, Any]]) -> Markup:
    """Money by stage, seeds of one arm together; wall time instead where nothing costs anything."""
    usd: dict[str, float] = defaultdict(float)
    wall: dict[str, float] = defaultdict(float)
    for entry in entries:
        stage, _, rest = entry["stage"].partition("/")
        name = stage if rest.isdigit() else entry["stage"]
        usd[name] += entry["usd"]
        wall[name] += entry["usage"]["wall_seconds"]
    free = not any(usd.values())
    sums = wall if free else usd
    total = sum(sums.values()) or 1.0
    said = {
        name: " · ".join(
            ([] if free else [words.money(usd[name])]) + ([words.duration(wall[name])] if wall[name] else [])
        )
        for name in sums
    }
    with styled():
        figure, axes = canvas(0.3 + 0.31 * len(sums))
        places = range(len(sums))
        colours = [ROLE.get(name, OTHER) for name in sums]
        axes.barh(places, list(sums.values()), height=0.62, color=colours, alpha=0.85)
        for place, (name, value) in enumerate(sums.items()):
            label = f"{said[name]} · {words.percent(value / total, 0)}"
            axes.annotate(label, (value, place), (6, 0), textcoords="offset points", va="center", fontsize=8.5)
        axes.set_yticks(places, [_short(name) for name in sums], color=INK)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.75 * max(sums.values()) or 1.0)
        axes.grid(visible=False)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        text = ", ".join(f"{name} {words_of}" for name, words_of in said.items())
        return to_svg(figure, "costs", "Wall time by stage" if free else "Money by stage", text)


def _curve(name: str, title: str, lines: dict[str, list[Any]], validated: dict[str, list[dict[str, Any]]]) -> Markup:
    with styled():
        figure, axes = canvas(2.4, 3.8)
        for arm, points in lines.items():
            steps, losses = np.array(points, dtype=float).T
            axes.plot(steps, losses, color=ROLE[arm.split("/")[0]], linewidth=1.2, alpha=0.8)
        for arm, history in validated.items():
            looks = [(e["step"], e["validation"]) for e in history if e.get("validation") is not None]
            if looks:
                role = arm.split("/")[0]
                axes.plot(*zip(*looks, strict=True), MARKER[role], color=ROLE[role], markersize=4)
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        ends = ", ".join(f"{arm} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for arm, points in lines.items())
        return to_svg(figure, name, title, ends)


def _short(text: str) -> str:
    clean = " ".join(text.split())
    return clean if len(clean) <= _LABEL else clean[: _LABEL - 1] + "…"
