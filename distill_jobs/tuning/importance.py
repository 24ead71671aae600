"""How much each setting matters: the share of the scores' variance that it explains, by functional ANOVA."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cluster.sweep import Trial
from distill_jobs.tuning.estimates import Estimate, estimates

LEVEL = 0.95
FEWEST, FEWEST_EACH = 10, 4
_DRAWS, _TREES = 30, 16


def importance(trials: Sequence[Trial], space: Mapping[str, Any], seed: int = 0, draws: int = _DRAWS) -> dict[str, Any]:
    """Each parameter's share, with its interval from a bootstrap over trials.

    A random forest is fitted to the scores, and its variance over the space is split among the parameters (Hutter,
    Hoos & Leyton-Brown 2014). Trials that were ended early count with the score carried on to their end. Shares are
    divided by the sum over all parameters, so that what they do together is left out.

    Args:
        trials: of one role.
        space: Optuna's distributions by parameter.

    Returns:
        ``parameters``: by name ``{"value", "low", "high", "level"}``; where there are too few trials nulls and ``why``.
    """
    told = estimates(trials, space)
    need = max(FEWEST, FEWEST_EACH * len(space))
    found: dict[str, Any] = {"method": "fANOVA", "trials": len(told), "needed": need}
    if len(space) == 1:
        return {**found, "parameters": _nothing(space, "only one setting was searched")}
    if len(told) < need:
        why = f"the importance of {len(space)} settings takes {need} trials, and there are {len(told)}"
        return {**found, "parameters": _nothing(space, why)}
    generator = np.random.default_rng(seed)
    shares = _shares(told, space, seed)
    resamples = ([told[i] for i in generator.integers(len(told), size=len(told))] for _ in range(draws))
    drawn = [own for again in resamples if (own := _shares(again, space, seed)) is not None]
    if shares is None or 2 * len(drawn) < draws:
        return {**found, "parameters": _nothing(space, "all trials, or all but a few, have the same score")}
    ends = {name: np.percentile([own[name] for own in drawn], [2.5, 97.5]) for name in space}
    parameters = {
        name: {"value": shares[name], "low": float(ends[name][0]), "high": float(ends[name][1]), "level": LEVEL}
        for name in sorted(space, key=lambda name: -shares[name])
    }
    return {**found, "parameters": parameters}


def _shares(trials: Sequence[Estimate], space: Mapping[str, Any], seed: int) -> dict[str, float] | None:
    """By parameter; None where the scores do not vary, or no tree sees that they do."""
    import optuna

    if np.ptp([each.score for each in trials]) == 0:
        return None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    for trial in trials:
        study.add_trial(
            optuna.trial.create_trial(value=trial.score, params=dict(trial.parameters), distributions=dict(space))
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=_TREES, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
        except RuntimeError:  # Encountered zero total variance in all trees.
            return None
    return {name: float(shares.get(name, 0.0)) for name in space}


def _nothing(space: Mapping[str, Any], why: str) -> dict[str, Any]:
    return {name: {"value": None, "low": None, "high": None, "level": LEVEL, "why": why} for name in space}
