"""How much sooner a student gets where a baseline ends: from the looks that training takes at the validation split."""

import math
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from cluster.errors import FileError
from cluster.files import Folder
from distill_jobs.costs.reckon import DECLARED
from distill_jobs.costs.verdict import Estimate, Iteration

LEVEL = 0.95


def iteration(workdir: Folder, seeds: tuple[int, ...], usd: dict[str, float]) -> Iteration | None:
    """What the teacher saves in each further student, by seed and with a t-interval over seeds.

    Both arms' looks are at the loss on hard labels, of the same rows. A student that never gets to the baseline's final
    loss saves what its whole run costs less than the baseline's, as a rule less than nothing.

    Args:
        usd: money by stage, from the ledger.

    Returns:
        None where no seed has been trained in both arms.
    """
    saved, alone, reached = [], [], 0
    for seed in seeds:
        student, baseline = (_looks(workdir, f"{role}/{seed}") for role in ("student", "baseline"))
        if not student or not baseline or not {f"student/{seed}", f"baseline/{seed}"} <= usd.keys():
            continue
        step = steps_to(student, baseline[-1][1])
        reached += step is not None
        share = (step or student[-1][0]) / student[-1][0]
        alone.append(usd[f"baseline/{seed}"])
        saved.append(alone[-1] - share * usd[f"student/{seed}"])
    if not saved:
        return None
    upfront = math.fsum(usd.get(stage, 0.0) for stage in ("teacher", DECLARED, "capture"))
    return Iteration(mean_interval(saved, "ledger.json"), upfront, float(np.mean(alone)), reached, len(saved))


def steps_to(looks: list[tuple[int, float]], loss: float) -> int | None:
    """The first step of (step, validation loss) pairs at which the loss is no more than ``loss``; None for never."""
    return next((step for step, seen in looks if seen <= loss), None)


def mean_interval(values: list[float], source: str) -> Estimate:
    """The mean with Student's t-interval; without ends for a single value."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Estimate(mean, None, None, source)
    half = float(student_t.ppf(0.5 + LEVEL / 2, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
    return Estimate(mean, mean - half, mean + half, source)


def _looks(workdir: Folder, arm: str) -> list[tuple[int, float]]:
    name = f"{arm}/history.json"
    try:
        history: list[dict[str, Any]] = workdir.read_json(name) if workdir.exists(name) else []
    except FileError:
        return []
    return [(int(entry["step"]), float(entry["validation"])) for entry in history if "validation" in entry]
