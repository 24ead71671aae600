"""A matplotlib figure as SVG to stand inside a page: its colours follow the page's theme, its text stays text."""

import io
import re
from typing import Any

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.figure import Figure

# Stand-ins that no chart would use by chance; in the SVG each becomes a colour of the page's style sheet.
INK, FAINT, GRID = "#010101", "#020202", "#030303"
TEACHER, STUDENT, BASELINE, OTHER = "#040404", "#050505", "#060606", "#070707"
THEME = {
    INK: "currentColor",
    FAINT: "var(--faint)",
    GRID: "var(--grid)",
    TEACHER: "var(--teacher)",
    STUDENT: "var(--student)",
    BASELINE: "var(--baseline)",
    OTHER: "var(--neutral)",
}
ROLE = {"teacher": TEACHER, "student": STUDENT, "baseline": BASELINE}
MARKER = {"teacher": "s", "student": "o", "baseline": "D"}

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "distill-jobs",
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "axes.labelsize": 8.5,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.bottom": False,
    "ytick.left": False,
    "lines.linewidth": 1.6,
}


def styled() -> Any:
    """The block in which a chart is drawn."""
    return rc_context(_STYLE)


def canvas(height: float, width: float = 4.4) -> tuple[Figure, Any]:
    """A transparent figure of so many inches, and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    return figure, axes


def to_svg(figure: Figure, name: str, title: str, description: str) -> Markup:
    """The figure as an ``<svg>`` element.

    Args:
        name: unique on the page; ids inside the drawing begin with it.
        title, description: what a screen reader says.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, value in THEME.items():
        text = text.replace(colour, value)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None, "matplotlib writes a viewBox"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]} role="img" '
        f'aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(description)}</desc>'
    )
    return Markup(head + text[text.index(">") + 1 :].strip())
