"""How T and alpha move over a student's training: pure functions of the step, so that a run can be resumed."""

import math

from cluster.engine_config import EngineConfig
from distill_jobs.spec.distill import Moving, Schedule


def value_at(value: Moving, step: int, config: EngineConfig) -> float:
    """What a number or schedule is at one optimizer step of a run.

    Args:
        step: from 1 to ``config.total_steps``; the first has the value ``from``, the last ``to``; under ``wsd`` what is
            left of the way is what is left of the learning rate's decay.
    """
    if not isinstance(value, Schedule):
        return float(value)
    start, end = value.ends
    steps = config.total_steps
    done = min(1.0, (step - 1) / (steps - 1)) if steps > 1 else 0.0
    gone = {
        "constant": 0.0,
        "linear": done,
        "cosine": 0.5 * (1.0 - math.cos(math.pi * done)),
        "wsd": _decayed(config, step - 1),
    }[value.schedule]
    return start + (end - start) * gone


def _decayed(config: EngineConfig, step: int) -> float:
    """The share of its decay that the learning rate has behind it at ``step``, counted from 0."""
    if step < config.decay_start or config.final == 1.0:
        return 0.0
    left = (config.learning_rate_at(step) / config.learning_rate - config.final) / (1.0 - config.final)
    return min(1.0, max(0.0, 1.0 - left))
