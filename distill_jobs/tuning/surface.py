"""The response surface: the score over T and alpha as a Gaussian process sees it, and how sure it is."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cluster.sweep import Trial, within
from distill_jobs.tuning.estimates import Estimate, estimates

T, ALPHA = "distill.temperature", "distill.alpha"
LEVEL = 0.95
_Z = 1.959964
_GRID = 25
FEWEST = 8


def surface(
    trials: Sequence[Trial], space: Mapping[str, Any], best: Mapping[str, Any], seed: int = 0
) -> dict[str, Any]:
    """The score over the searched range of T and alpha, all else as in ``best``.

    A Gaussian process (Rasmussen & Williams 2006, ch. 2 and 5): Matérn 5/2 with a length for each parameter, and noise
    of its own, both by the greatest marginal likelihood. Trials that were ended early count with the score carried on
    to their end, and the noise that adds. The interval is that of the mean score, not of one more trial. ``explains``
    is the share of the scores' variance that the process foretells for a trial left out; at or below 0 the picture
    says nothing.

    Args:
        trials: of the student.
        space: Optuna's distributions by parameter.
        best: parameters of the best trial.

    Returns:
        ``temperature`` [n] and ``alpha`` [m], the grid; ``mean``, ``low``, ``high``, each [m][n]; ``at``: the other
        parameters; ``noise``: the standard deviation of one trial's score; ``trials``: each with its T, alpha, score
        and state. Without a surface these are null and ``why`` says so.
    """
    shown = [_shown(trial) for trial in trials if is_point(trial.parameters)]
    told = estimates(trials, space)
    nothing: dict[str, Any] = dict.fromkeys(("temperature", "alpha", "mean", "low", "high", "noise", "explains"))
    nothing |= {"level": LEVEL, "trials": shown, "at": {}}
    why = _refusal(told, space)
    if why is not None:
        return {**nothing, "why": why}
    codes = _Codes(space)
    inputs = np.stack([codes.of(trial.parameters) for trial in told])
    scores = np.array([trial.score for trial in told])
    process = _fit(inputs, scores, np.array([trial.variance for trial in told]), seed)
    grid_t, grid_a = (np.linspace(space[name].low, space[name].high, _GRID) for name in (T, ALPHA))
    if not within({**best, T: space[T].low, ALPHA: space[ALPHA].low}, space):
        best = told[0].parameters
    points = [codes.of({**best, T: float(t), ALPHA: float(a)}) for a in grid_a for t in grid_t]
    mean, deviation = process.predict(np.stack(points), return_std=True)
    scale = float(process._y_train_std)
    noise = float(np.sqrt(process.kernel_.k2.noise_level)) * scale
    # What is asked for is the mean score there: without the noise that one more trial would add.
    deviation = np.sqrt(np.maximum(0.0, deviation**2 - noise**2))
    mean, spread = mean.reshape(_GRID, _GRID), _Z * deviation.reshape(_GRID, _GRID)
    return {
        "temperature": grid_t.tolist(),
        "alpha": grid_a.tolist(),
        "mean": mean.tolist(),
        "low": (mean - spread).tolist(),
        "high": (mean + spread).tolist(),
        "level": LEVEL,
        "noise": noise,
        "explains": _explains(process, scores),
        "at": {name: value for name, value in best.items() if name not in (T, ALPHA)},
        "trials": shown,
        "why": None,
    }


def is_point(values: Mapping[str, Any]) -> bool:
    """Whether T and alpha are both given, and as numbers, not as schedules."""
    return all(isinstance(values.get(name), int | float) for name in (T, ALPHA))


class _Codes:
    """Parameters as points of the unit cube: ranges from 0 to 1 (evenly in the logarithm where searched so), choices
    one of so many."""

    def __init__(self, space: Mapping[str, Any]) -> None:
        self.space = space

    def of(self, parameters: Mapping[str, Any]) -> np.ndarray:
        """[width]"""
        found: list[float] = []
        for name, distribution in self.space.items():
            choices = getattr(distribution, "choices", None)
            if choices is not None:
                found += [float(parameters[name] == choice) for choice in choices]
                continue
            ends = np.array([distribution.low, distribution.high, parameters[name]], dtype=float)
            low, high, value = np.log(ends) if getattr(distribution, "log", False) else ends
            found.append(float((value - low) / (high - low)))
        return np.array(found)


def _fit(inputs: np.ndarray, scores: np.ndarray, variances: np.ndarray, seed: int) -> Any:
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    smooth = ConstantKernel(1.0, (1e-2, 1e2)) * Matern(np.full(inputs.shape[1], 0.5), (0.05, 20.0), nu=2.5)
    kernel = smooth + WhiteKernel(0.1, (1e-4, 2.0))
    # In the units of the scores as the process takes them, with mean 0 and variance 1.
    own = variances / scores.var() + 1e-10
    process = GaussianProcessRegressor(kernel, alpha=own, normalize_y=True, n_restarts_optimizer=4, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lengths at the end of their range: the parameter then plays no part
        return process.fit(inputs, scores)


def _explains(process: Any, scores: np.ndarray) -> float:
    """1 - (squared errors for each trial left out) / (squared distances from the mean of the others).

    Without fitting again: the residual of trial i left out is [K⁻¹y]ᵢ / [K⁻¹]ᵢᵢ (Rasmussen & Williams 2006, eq. 5.12).
    """
    centred = (scores - process._y_train_mean) / process._y_train_std
    inverse = np.linalg.inv(process.kernel_(process.X_train_) + np.diag(process.alpha))
    left_out = (inverse @ centred) / np.diag(inverse)
    alone = centred * len(scores) / (len(scores) - 1)
    return float(1.0 - (left_out**2).sum() / (alone**2).sum())


def _refusal(told: Sequence[Estimate], space: Mapping[str, Any]) -> str | None:
    if not all(hasattr(space.get(name), "low") for name in (T, ALPHA)):
        return "T and alpha were not both searched over a range"
    need = max(FEWEST, 2 * (len(space) + 1))
    if len(told) < need:
        return f"a surface over {len(space)} settings takes {need} trials, and there are {len(told)}"
    if np.ptp([trial.score for trial in told]) == 0:
        return "all trials have the same score"
    return None


def _shown(trial: Trial) -> dict[str, Any]:
    own = trial.parameters
    return {"name": trial.name, "temperature": own[T], "alpha": own[ALPHA], "score": trial.score, "state": trial.state}
