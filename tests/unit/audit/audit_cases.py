"""Made-up evaluations: what models would have said of made-up rows."""

import numpy as np

from distill_jobs.audit.scores import Scores

Generator = np.random.Generator


def classified(
    label: np.ndarray, confident: dict[str, np.ndarray], groups: dict[str, np.ndarray] | None = None
) -> Scores:
    """Scores of two classes from the probability [rows] that each model gives to class 1."""
    rows = len(label)
    columns: dict[str, np.ndarray] = {
        "sample_id": np.arange(rows),
        "positions": np.ones(rows, dtype=np.int64),
        "label": label.astype(np.int64),
        **{f"slice.{name}": values for name, values in (groups or {}).items()},
    }
    teacher = confident["teacher"]
    for name, one in confident.items():
        gold, of_teacher = np.where(label == 1, one, 1 - one), (teacher > 0.5).astype(np.int64)
        said = (one > 0.5).astype(np.int64)
        columns |= {
            f"{name}.nll": -np.log(gold),
            f"{name}.correct": (said == label).astype(float),
            f"{name}.agree": (said == of_teacher).astype(float),
            f"{name}.kl": teacher * np.log(teacher / one) + (1 - teacher) * np.log((1 - teacher) / (1 - one)),
            f"{name}.entropy": -one * np.log(one) - (1 - one) * np.log(1 - one),
            f"{name}.predicted": said,
            f"{name}.confidence": np.maximum(one, 1 - one),
        }
    return Scores.of(columns)


def noisy(right: np.ndarray, share: float | np.ndarray, generator: Generator) -> np.ndarray:
    """Probabilities of class 1 of a model that says ``right`` [rows] but for a ``share`` of the rows."""
    said = np.where(generator.random(len(right)) < share, 1 - right, right)
    return np.where(said == 1, 1.0, 0.0) * 0.4 + 0.3 + generator.uniform(-0.2, 0.2, len(right))
