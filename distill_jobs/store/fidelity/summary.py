"""Numbers of single positions, gathered chunk by chunk, and their means: over all positions, and slice by slice."""

import math
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill_jobs.store.fidelity.compare import Values

BINS = 15
"""Equal bins of the expected calibration error."""


class Gathered:
    """What was measured of one coding: one number or short row a position, and sums over classes."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[np.ndarray]] = defaultdict(list)
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Values, prefix: str = "") -> None:
        """Numbers [N, ...] of further positions."""
        for name, value in values.items():
            self._pieces[prefix + name].append(value.double().cpu().numpy())

    def add_sums(self, values: Values, prefix: str = "") -> None:
        """[V] each, added to what is there."""
        for name, value in values.items():
            held = self._sums.get(prefix + name)
            self._sums[prefix + name] = value if held is None else held + value

    def of(self, name: str, where: np.ndarray | slice) -> np.ndarray:
        """All numbers under ``name`` at the positions ``where``."""
        values: np.ndarray = np.concatenate(self._pieces[name])[where]
        return values

    def length(self, name: str) -> float:
        """Euclidean length of the sum ``name``."""
        return float(torch.linalg.vector_norm(self._sums[name]))


EVERYWHERE = slice(None)


def at_temperature(found: Gathered, truth: Gathered, t: str, students: list[str], where: Any = EVERYWHERE) -> Any:
    """The means at temperature ``t`` (as in the names), as plain values; None for what isn't a finite number."""
    gold = truth.of("gold", where) >= 0
    sure, right = found.of(f"{t}/sure", where)[gold], found.of(f"{t}/right", where)[gold]
    made: dict[str, Any] = {
        "kl": plain(found.of(f"{t}/kl", where).mean()),
        "total_variation": plain(found.of(f"{t}/tv", where).mean()),
        "ece": calibration_error(sure, right),
    }
    for name in students:
        gradient = _gradient(found, truth, f"{t}/", name, where)
        if where is EVERYWHERE:
            length = truth.length(f"{t}/{name}")
            gradient["summed_error"] = plain(found.length(f"{t}/{name}") / length if length else math.nan)
        made[f"gradient_{name}"] = gradient
    return made


def whatever_temperature(found: Gathered, where: Any = EVERYWHERE) -> dict[str, Any]:
    """Shares kept, and how far log-partitions are off over all temperatures of the grid."""
    off = np.sort(found.of("partition", where).ravel())
    return {
        "top1_kept": plain(found.of("top1", where).mean()),
        "gold_rank_kept": _known_mean(found.of("rank", where)),
        "gold_logprob_off": _known_mean(found.of("gold", where)),
        "log_partition_off": {
            "p50": plain(np.percentile(off, 50)),
            "p99": plain(np.percentile(off, 99)),
            "max": plain(off[-1]),
        },
    }


def calibration_error(sure: np.ndarray, right: np.ndarray) -> float | None:
    """Mean |confidence - accuracy| over 15 equal bins, weighed by their size (Guo et al. 2017); None of nothing."""
    if not len(sure):
        return None
    bins = np.minimum((sure * BINS).astype(np.int64), BINS - 1)
    gaps = np.bincount(bins, weights=sure - right, minlength=BINS)
    return plain(np.abs(gaps).sum() / len(sure))


def plain(value: Any) -> float | None:
    """A number as JSON takes it."""
    return float(value) if math.isfinite(value) else None


def _gradient(found: Gathered, truth: Gathered, t: str, name: str, where: Any) -> dict[str, float | None]:
    error, along = found.of(f"{t}error/{name}", where), found.of(f"{t}along/{name}", where)
    norm = truth.of(f"{t}norm/{name}", where)
    single = [_error_and_angle(e, a, n) for e, a, n in zip(error, along, norm, strict=True) if n > 0]
    whole = _error_and_angle(error.sum(), along.sum(), norm.sum()) if norm.sum() > 0 else (math.nan, math.nan)
    medians = np.median(single, axis=0) if single else (math.nan, math.nan)
    return {
        "error": plain(whole[0]),
        "angle": plain(whole[1]),
        "median_error": plain(medians[0]),
        "median_angle": plain(medians[1]),
    }


def _error_and_angle(error: float, along: float, norm: float) -> tuple[float, float]:
    """|e| / |g| and the angle in degrees between g + e and g, from e², e·g and g²: small angles keep their digits."""
    across = math.sqrt(max(0.0, error - along**2 / norm))
    return math.sqrt(error / norm), math.degrees(math.atan2(across, math.sqrt(norm) + along / math.sqrt(norm)))


def _known_mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return plain(known.mean()) if len(known) else None
