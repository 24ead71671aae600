"""T and alpha over training."""

import math

import pytest

from cluster.engine_config import EngineConfig
from distill_jobs.losses import value_at
from distill_jobs.spec.distill import AlphaSchedule, TemperatureSchedule, greatest


def config(**changes: object) -> EngineConfig:
    plain = {"rows_per_micro_batch": 1, "accumulation": 1, "total_steps": 11, "learning_rate": 3e-4}
    return EngineConfig(**{**plain, **changes})


def schedule(kind: str, start: float = 4.0, to: float = 1.0) -> TemperatureSchedule:
    return TemperatureSchedule.model_validate({"schedule": kind, "from": start, "to": to})


def test_a_number_stays() -> None:
    assert [value_at(2.0, step, config()) for step in (1, 5, 11)] == [2.0, 2.0, 2.0]
    assert value_at(schedule("constant", 2.0, 2.0), 7, config()) == 2.0


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_moving_all_the_time(kind: str) -> None:
    found = [value_at(schedule(kind), step, config()) for step in range(1, 12)]
    assert found[0] == 4.0 and found[-1] == 1.0 and found[5] == pytest.approx(2.5)
    assert found == sorted(found, reverse=True)
    quarter = 0.25 if kind == "linear" else 0.5 * (1 - math.cos(math.pi / 4))
    assert value_at(schedule(kind), 26, config(total_steps=101)) == pytest.approx(4 - 3 * quarter)
    assert value_at(schedule(kind), 1, config(total_steps=1)) == 4.0
    rising = AlphaSchedule.model_validate({"schedule": kind, "from": 0.0, "to": 1.0})
    assert value_at(rising, 6, config()) == pytest.approx(0.5) and greatest(rising) == 1.0


@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize("learning_rate", ["linear", "cosine", "wsd"])
def test_tied_to_the_learning_rates_decay(learning_rate: str, final: float) -> None:
    run = config(total_steps=100, warmup_steps=10, schedule=learning_rate, final=final)
    assert {value_at(schedule("wsd"), step, run) for step in range(1, run.decay_start + 1)} == {4.0}
    for step in range(run.decay_start + 1, 101):
        left = (run.learning_rate_at(step - 1) / run.learning_rate - final) / (1 - final)
        assert value_at(schedule("wsd"), step, run) == pytest.approx(1 + 3 * left)
    assert value_at(schedule("wsd"), 101, run) == pytest.approx(1.0)
    assert run.decay_start >= 10 and value_at(schedule("wsd"), 99, run) < 1.5
