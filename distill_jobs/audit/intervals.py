"""Intervals for means over held-out rows and training seeds."""

import numpy as np

LEVEL = 0.95


def paired_gain(
    student: np.ndarray, baseline: np.ndarray, weights: np.ndarray, *, draws: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """The student's mean minus the baseline's, and its interval, by a paired bootstrap over rows and seeds.

    Rows and seeds are drawn with replacement, each draw using the same rows and the same seeds for both arms (Efron &
    Tibshirani 1993, ch. 8; seeds are crossed with rows), so that what the arms share cancels.

    Args:
        student, baseline: sums per seed and row, [seeds, rows].
        weights: scored positions of each row, [rows].

    Returns:
        the difference, and the ends of its 95% interval (percentiles of the draws).
    """
    difference = student - baseline
    seeds, rows = difference.shape
    point = float(difference.mean(0).sum() / weights.sum())
    generator = np.random.default_rng(seed)
    drawn = np.empty(draws)
    for i in range(draws):
        counts = np.bincount(generator.integers(rows, size=rows), minlength=rows)
        arms = generator.integers(seeds, size=seeds)
        drawn[i] = (difference[arms].mean(0) @ counts) / (weights @ counts)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return point, float(low), float(high)
