"""What a codec keeps of the teacher, as tables and as the curve of bytes against the error of the gradient."""

import io
from collections import defaultdict
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from distill_jobs import words
from distill_jobs.report.blocks import Table
from distill_jobs.report.svg import BASELINE, FAINT, GRID, INK, OTHER, STUDENT, TEACHER, canvas, styled, to_svg

Page = dict[str, Any]

# Our codecs in colour, other ways in grey.
_LINES = {
    "hybrid": (STUDENT, "o", "-"),
    "topk": (TEACHER, "s", "-"),
    "sampled": (BASELINE, "D", "-"),
    "dense": (INK, "P", "-"),
    "top-k renormalised": (OTHER, "s", ":"),
    "polynomial": (OTHER, "^", "--"),
    "random sampling": (OTHER, "D", "-."),
}
_PRINTED = {
    INK: "#1d2329",
    FAINT: "#5c6670",
    GRID: "#d9dde1",
    STUDENT: "#1f7fbf",
    TEACHER: "#6f6a8f",
    BASELINE: "#c46a17",
    OTHER: "#8a939b",
}
_ON_WHITE = {
    "text.color": _PRINTED[INK],
    "axes.labelcolor": _PRINTED[FAINT],
    "axes.edgecolor": _PRINTED[GRID],
    "grid.color": _PRINTED[GRID],
    "xtick.color": _PRINTED[FAINT],
    "ytick.color": _PRINTED[FAINT],
}

ERRORS = {
    "error": "error of the gradient at single positions",
    "summed_error": "error of the gradient summed over positions",
}
"""What the curves show: with draws the first is mostly noise, which the second averages out; a bias stays in both."""


def sentence(page: Page) -> str:
    """The own codec in a line."""
    own = _own(page)
    at_one, student = own["at"]["1"], page["students"][-1]
    gradient = at_one[f"gradient_{student}"]
    return (
        f"{own['name']} at {page['positions']:,} {_split(page)}, T = 1: gradient of a {_named(student)} off by "
        f"{_percent(gradient['error'])} at single positions and by {_percent(gradient['summed_error'])} in their sum, "
        f"KL {_number(at_one['kl'], 6)}, top-1 kept at {_percent(own['top1_kept'])}"
    )


def own(page: Page) -> Table:
    """The store's codec over all positions: one row a number, one column a temperature."""
    entry = _own(page)
    columns = [_means(means, page["students"]) for means in entry["at"].values()]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return Table(["", *(f"T = {t}" for t in entry["at"])], rows)


def slices(page: Page) -> Table:
    """The store's codec by slice, T = 1."""
    student = page["students"][-1]
    headings = ["", "positions", "KL", "ECE", f"gradient, {_named(student)}"]
    rows = []
    for column, values in _own(page).get("slices", {}).items():
        for value, found in values.items():
            means = found["at"]["1"]
            told = [_number(means["kl"], 6), _number(means["ece"], 4), _percent(means[f"gradient_{student}"]["error"])]
            rows.append([f"{column}: {value}", f"{found['positions']:,}", *told])
    return Table(headings, rows)


def kept(page: Page) -> list[tuple[str, str]]:
    """What the store's codec keeps whatever the temperature, as pairs of a name and its value."""
    entry = _own(page)
    off = entry["log_partition_off"]
    return [
        ("measured at", f"{page['positions']:,} {_split(page)}"),
        ("top-1 kept", _percent(entry["top1_kept"])),
        ("gold rank kept", _percent(entry["gold_rank_kept"])),
        ("log-probability of the gold class off by", _number(entry["gold_logprob_off"], 5)),
        ("log-partition off, T from 0.5 to 10", " · ".join(f"{name} {_number(off[name], 4)}" for name in off)),
    ]


def compared(page: Page) -> Table:
    """All codings side by side: bytes, what is kept, and how far the gradient at the last student's logits is off."""
    temperatures = [t for t in _own(page)["at"] if sum(t in entry["at"] for entry in page["codings"]) > 1]
    headings = ["", "bytes", "rank kept", *(f"T = {t}" for t in temperatures), "sum, T = 1"]
    order = sorted(page["codings"], key=lambda entry: (list(_LINES).index(entry["family"]), entry["bytes"]))
    return Table(headings, [_compared(entry, page["students"][-1], temperatures) for entry in order])


def judge(page: Page) -> str:
    """The student at whose logits codings are compared."""
    return _named(page["students"][-1])


def curves(page: Page) -> list[Markup]:
    """One curve for each of ``ERRORS``; none where there is nothing to compare."""
    return [curve(page, which) for which in ERRORS] if len(page["codings"]) > 1 else []


def curve(page: Page, which: str) -> Markup:
    """Bytes against one of ``ERRORS`` at T = 1, for the page."""
    with styled():
        figure, axes = canvas(3.3)
        said = _draw(axes, page, which, {})
        figure.legend(
            *axes.get_legend_handles_labels(), frameon=False, fontsize=7.5, ncols=3, loc="outside lower center"
        )
        return to_svg(figure, f"fidelity-{which}", f"Bytes a position against the {ERRORS[which]}", said)


def picture(page: Page) -> bytes:
    """Both curves as a PNG file."""
    with styled(), rc_context(_ON_WHITE):
        figure = Figure(figsize=(10.5, 4.2), layout="constrained", dpi=150)
        figure.patch.set_facecolor("white")
        both = figure.subplots(1, 2)
        for axes, which in zip(both, ERRORS, strict=True):
            _draw(axes, page, which, _PRINTED)
        figure.legend(*both[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right upper")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        return buffer.getvalue()


def _draw(axes: Any, page: Page, which: str, colours: dict[str, str]) -> str:
    student = page["students"][-1]
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for entry in page["codings"]:
        error = entry["at"]["1"][f"gradient_{student}"][which]
        if error:
            lines[entry["family"]].append((entry["bytes"], error))
            if entry["own"]:
                axes.plot(entry["bytes"], error, "o", markersize=10, fillstyle="none", color=colours.get(INK, INK))
    for family in _LINES:
        if points := sorted(lines.get(family, [])):
            colour, marker, style = _LINES[family]
            colour = colours.get(colour, colour)
            axes.plot(*zip(*points, strict=True), style, marker=marker, color=colour, markersize=4, label=family)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(_apart(sorted({entry["bytes"] for entry in page["codings"]})))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("bytes a position (the ring is this store)")
    axes.set_ylabel(f"{_named(student)}, T = 1")
    axes.set_title(ERRORS[which])
    return "; ".join(
        f"{family}: " + ", ".join(f"{size:.0f} bytes {_percent(error)}" for size, error in sorted(points))
        for family, points in lines.items()
    )


def _compared(entry: dict[str, Any], student: str, temperatures: list[str]) -> list[str]:
    found = {t: means[f"gradient_{student}"] for t, means in entry["at"].items()}
    return [
        f"{entry['name']}{' (this)' if entry['own'] else ''}",
        f"{entry['bytes']:,.0f}",
        words.percent(entry["gold_rank_kept"], 1),
        *(words.percent(found[t]["error"], 1) if t in found else "–" for t in temperatures),
        words.percent(found["1"]["summed_error"], 1),
    ]


def _apart(ticks: list[float]) -> list[float]:
    """Ticks on a logarithmic axis with room for their labels."""
    chosen: list[float] = []
    for tick in ticks:
        if tick > 0 and (not chosen or tick > 1.35 * chosen[-1]):
            chosen.append(tick)
    return chosen


def _means(means: dict[str, Any], students: list[str]) -> dict[str, str]:
    told = {
        "KL": _number(means["kl"], 6),
        "total variation": _number(means["total_variation"], 4),
        "ECE": _number(means["ece"], 4),
    }
    for student in students:
        found = means[f"gradient_{student}"]
        name = f"gradient, {_named(student)}"
        told[f"{name}: error"] = _percent(found["error"])
        told[f"{name}: angle"] = f"{_number(found['angle'], 2)}°"
        told[f"{name}: median error"] = _percent(found["median_error"])
        told[f"{name}: median angle"] = f"{_number(found['median_angle'], 2)}°"
        told[f"{name}: error of the sum"] = _percent(found.get("summed_error"))
    return told


def _own(page: Page) -> dict[str, Any]:
    found: dict[str, Any] = next(entry for entry in page["codings"] if entry["own"])
    return found


def _named(student: str) -> str:
    return "random student" if student == "random" else "trained student"


def _split(page: Page) -> str:
    return "validation positions" if page["split"] == "validation" else f"{page['split']} positions (none held back)"


def _percent(value: float | None) -> str:
    return "–" if value is None else words.percent(value, 2)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
