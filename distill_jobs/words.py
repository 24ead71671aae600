"""Numbers and models as people read them. A no-break space keeps a number and its unit on one line."""

import math
import time
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

NB = "\u00a0"
"""Keeps a number and its unit on one line."""


def count(value: float) -> str:
    """``812``, ``12.4 K``, ``1.34 M``."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "K")):
        if abs(value) >= limit:
            return f"{_three(value / (limit if unit != 'K' else 1e3))}{NB}{unit}"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else _three(value)


def size(value: float) -> str:
    """Bytes: ``512 B``, ``3.20 MB``."""
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f}{NB}B" if unit == "B" else f"{_three(value)}{NB}{unit}"
        value /= 1000
    return f"{_three(value)}{NB}TB"


def ago(when: float) -> str:
    """How long since a moment in seconds since the epoch: ``3 min 10 s ago``."""
    return f"{duration(max(0.0, time.time() - when))} ago"


def duration(seconds: float) -> str:
    """``8.1 s``, ``2 min 05 s``, ``3 h 10 min``."""
    whole = round(seconds)
    if whole < 100:
        return f"{seconds:.1f}{NB}s"
    if whole < 6000:
        return f"{whole // 60}{NB}min{NB}{whole % 60:02d}{NB}s"
    return f"{whole // 3600}{NB}h{NB}{whole % 3600 // 60:02d}{NB}min"


def hours(seconds: float) -> str:
    """Core or device hours, with the digits that small runs need."""
    value = seconds / 3600
    return "0" if value == 0 else f"{value:.4f}" if value < 0.1 else f"{value:,.2f}"


def money(usd: float) -> str:
    """US dollars and cents; below ten cents two significant digits."""
    if usd >= 0.1 or usd <= 0:
        return f"${usd:,.2f}"
    return f"${usd:.{min(9, 1 - math.floor(math.log10(usd)))}f}"


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}{NB}%"


def score(metric: str, value: float) -> str:
    """A quality in its own unit: accuracy in percent, perplexity and nll as they are."""
    if metric == "nll":
        return f"{value:.4f}"
    return percent(value, 2) if metric == "accuracy" else f"{value:,.2f}" if value < 1e5 else f"{value:.3g}"


def difference(metric: str, value: float, signed: bool = True) -> str:
    """A difference of two qualities: percentage points, perplexity or nats. The minus is a real one."""
    number = 100 * value if metric == "accuracy" else value
    return f"{number:{'+' if signed else ''}.{4 if metric in ('nll', 'nats a token') else 2}f}".replace("-", "−")


def unit(metric: str) -> str:
    """What ``difference`` is counted in."""
    return "percentage points" if metric == "accuracy" else metric


def when(seconds: float) -> str:
    """A moment in UTC, to the minute."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def model_name(model: Any) -> str:
    """A model of the spec in a few words."""
    if not isinstance(model, dict) or not model:
        return "a model"
    kind, value = next(iter(model.items()))
    if kind == "mlp":
        return "MLP " + "×".join(str(width) for width in value.get("hidden", ()))
    if kind == "cnn":
        return "CNN " + "-".join(str(width) for width in value.get("channels", ()))
    if kind in ("hf", "gguf"):
        return PurePosixPath(str(value)).name.removesuffix(".gguf")
    if kind == "config":
        return f"{value.get('model_type', 'transformer')} from a config"
    if kind == "saved":
        return "/".join(PurePosixPath(str(value).rstrip("/").removesuffix("/model")).parts[-2:])
    if kind == "factory":
        return str(value.get("target", "factory")).rpartition(":")[2]
    if kind == "init_from_teacher":
        return f"{len(value.get('layers', ()))} of the teacher's layers"
    if kind == "prune_teacher":
        return "the teacher, pruned"
    return str(kind)


def _three(value: float) -> str:
    """Three significant digits, without an exponent."""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(digits, 6)}f}"


def plain(value: float) -> str:
    """A tick of an axis: ``0.25``, ``12``, ``3 M``."""
    if value == 0 or 1e-4 <= abs(value) < 1e4:
        return f"{value:.4g}".replace("-", "−")
    return count(value) if abs(value) >= 1e4 else f"{value:.0e}".replace("-", "−")


def share(value: float) -> str:
    """A tick in percent, with no more digits than it needs."""
    return f"{100 * value:.4g}{NB}%".replace("-", "−")


def dollars(value: float) -> str:
    """A tick in US dollars, over many orders of magnitude."""
    sign = "−" if value < 0 else ""
    size = abs(value)
    if size >= 1000:
        return f"{sign}${count(size) if size >= 1e4 else f'{size:,.0f}'}"
    return f"{sign}${size:.3g}" if size == 0 or size >= 1e-4 else f"{sign}${size:.0e}"


def significant(value: float) -> str:
    """Three significant digits, however small."""
    return f"{value:.3g}" if value and abs(value) < 1e-3 else _three(value)


def ordinary(text: str) -> str:
    """``text`` with plain spaces, for where people search in it."""
    return text.replace("\u00a0", " ")


def energy(kwh: float) -> str:
    """``1.20 kWh``, ``35.1 Wh``, ``0.420 mWh``."""
    return _scaled(kwh, "kWh", "Wh", "mWh")


def carbon(kg: float) -> str:
    """A mass: ``1.20 kg``, ``35.1 g``, ``0.420 mg``."""
    return _scaled(kg, "kg", "g", "mg")


def _scaled(value: float, whole: str, thousandth: str, millionth: str) -> str:
    if not value:
        return f"0{NB}{thousandth}"
    for unit, scale in ((whole, 1.0), (thousandth, 1e3)):
        if value * scale >= 1:
            return f"{_three(value * scale)}{NB}{unit}"
    return f"{_three(value * 1e6)}{NB}{millionth}"
