"""The response surface as a picture."""

import io
from typing import Any

import numpy as np

_NAMES = {"finished": ("o", "came to its end"), "pruned": ("x", "ended early"), "failed": ("+", "failed")}


def picture(surface: dict[str, Any], metric: str, best: tuple[float, float] | None) -> bytes:
    """A PNG: the mean score over T and alpha, half the width of its interval beside it, and the trials on both.

    Args:
        surface: as ``tune/surface.json`` holds it, with a surface.
        best: T and alpha of the settings that were chosen.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.4), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    mean, low, high = (np.array(surface[name]) for name in ("mean", "low", "high"))
    grids = [(mean, f"validation {metric}", "viridis"), ((high - low) / 2, "95 % interval, ±", "magma_r")]
    for axis, (values, title, colours) in zip(axes, grids, strict=True):
        drawn = axis.contourf(surface["temperature"], surface["alpha"], values, levels=14, cmap=colours)
        figure.colorbar(drawn, ax=axis)
        _trials(axis, surface["trials"])
        if best is not None:
            axis.plot(*best, marker="*", markersize=17, color="white", markeredgecolor="black", ls="", label="chosen")
        axis.set(title=title, xlabel="temperature T")
    axes[0].set_ylabel("alpha")
    axes[0].legend(loc="lower right", fontsize=8, framealpha=0.8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _trials(axis: Any, trials: list[dict[str, Any]]) -> None:
    for state, (marker, name) in _NAMES.items():
        own = [trial for trial in trials if trial["state"] == state]
        if own:
            where = [trial["temperature"] for trial in own], [trial["alpha"] for trial in own]
            axis.plot(*where, marker=marker, ls="", color="black", markerfacecolor="white", markersize=6, label=name)
