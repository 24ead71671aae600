"""What fairlearn says of one model's predictions by group."""

from typing import Any

import numpy as np
from fairlearn import metrics
from sklearn.metrics import accuracy_score

RATES = ("accuracy", "true_positive_rate", "false_positive_rate", "selection_rate")


def by_group(
    truth: np.ndarray, said: np.ndarray, groups: np.ndarray, positive: int | None
) -> dict[str, dict[str, float]]:
    """Accuracy, and with a positive class the rates, of every group.

    Args:
        truth, said: right and predicted classes, [rows].
        groups: [rows] of text.
        positive: the class that counts as positive against all others; None leaves the rates out.
    """
    found = _frame({"accuracy": accuracy_score}, truth, said, groups)
    if positive is not None:
        rates = {name: getattr(metrics, name) for name in RATES[1:]}
        found |= _frame(rates, np.equal(truth, positive).astype(int), np.equal(said, positive).astype(int), groups)
    return found


def _frame(of: dict[str, Any], truth: np.ndarray, said: np.ndarray, groups: np.ndarray) -> dict[str, dict[str, float]]:
    # Rows that are alike count together, as weights: fairlearn takes each row in hand, and there may be millions.
    names, group = np.unique(groups.astype(str), return_inverse=True)
    cells, counts = np.unique(np.stack([group, truth, said]), axis=1, return_counts=True)
    frame = metrics.MetricFrame(
        metrics=of,
        y_true=cells[1],
        y_pred=cells[2],
        sensitive_features=names[cells[0]],
        sample_params={name: {"sample_weight": counts} for name in of},
    )
    return {name: {str(k): float(v) for k, v in frame.by_group[name].items()} for name in of}
