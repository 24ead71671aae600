"""How a model is trained: what the spec takes, and the sentence it gives for what it doesn't."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from distill_jobs.spec import Train


def parsed(**values: Any) -> Train:
    return Train.model_validate_json(json.dumps(values))


def test_workers_are_a_number_or_a_range() -> None:
    fixed, elastic = parsed(workers=2, batch_size=12), parsed(workers=[1, 4], batch_size=24, micro_batch=2)
    assert (fixed.least_workers, fixed.most_workers, fixed.accumulation) == (2, 2, 1)
    assert (elastic.least_workers, elastic.most_workers) == (1, 4)
    # The micro-batch stays the same, whatever the number of workers; a step's rows do too.
    assert elastic.gang_sizes == (1, 2, 3, 4)
    assert [elastic.accumulation_of(n) for n in elastic.gang_sizes] == [12, 6, 4, 3]
    assert parsed(workers=[1, 4], batch_size=64).gang_sizes == (1, 2, 4)
    assert parsed(workers=[1, 4], batch_size=64).rows_per_micro_batch == 16


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"workers": [3, 2]}, "3 is more than 2"),
        ({"workers": [3, 4]}, "can't be divided among the least workers, 3"),
        ({"workers": [0, 2]}, "greater than 0"),
        ({"schedule": "wsd", "warmup": 0.5, "decay": 0.6}, "take more than all steps together"),
        ({"offload": "optimizer"}, "offload: optimizer needs zero_stage 2 or 3, not 0"),
        ({"offload": "parameters", "zero_stage": 2}, "offload: parameters needs zero_stage 3, not 2"),
        ({"deepspeed": {"zero_optimisation": {}}}, "zero_optimisation is no key of DeepSpeed's; did you mean zero_opt"),
        (
            {"zero_stage": 2, "deepspeed": {"zero_optimization": {"stage": 3}}},
            "deepspeed.zero_optimization.stage is 3, but that is said by zero_stage, which makes it 2: remove one",
        ),
        ({"deepspeed": {"optimizer": {"type": "Lamb"}}}, "deepspeed.optimizer.type is Lamb, but that is said by opt"),
        ({"deepspeed": {"bf16": {"enabled": True}}}, "deepspeed.bf16.enabled is true, but that is said by precision"),
        ({"deepspeed": {"train_batch_size": 64}}, "is said by batch_size"),
        ({"checkpoint": {"keep": 0}}, "checkpoint.keep"),
        ({"on_bad_step": {"action": "pray"}}, "on_bad_step.action"),
        ({"ema": 1.0}, "ema"),
    ],
)
def test_a_mistake_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        parsed(**values)
    assert said in str(caught.value)


def test_deepspeed_keys_that_agree_or_say_more_are_taken() -> None:
    given = {
        "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": "auto"},
        "gradient_clipping": "auto",
        "fp16": {"enabled": True, "initial_scale_power": 8},
        "wall_clock_breakdown": True,
    }
    assert parsed(zero_stage=2, precision="fp16", deepspeed=given).deepspeed == given


def test_only_what_changes_the_result_is_digested() -> None:
    assert set(Train.model_fields) > Train.RESOURCES
    assert not {"deepspeed", "ema", "schedule", "precision", "batch_size", "on_bad_step"} & Train.RESOURCES
