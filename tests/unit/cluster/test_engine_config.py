"""The parts of the engine that need no engine: the schedule, the precision, what is refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cluster.engine import resolve_precision
from cluster.engine_build import _groups
from cluster.engine_config import EngineConfig
from cluster.errors import ClusterError, ResourceError


def config(schedule: str, total: int = 10, warmup: int = 4) -> EngineConfig:
    return EngineConfig(1, 1, total, 2.0, schedule=schedule, warmup_steps=warmup)


def test_schedules_by_hand() -> None:
    warm = [0.5, 1.0, 1.5, 2.0]
    assert [config("constant").learning_rate_at(s) for s in range(10)] == warm + [2.0] * 6
    linear = [2.0 * (1 - k / 6) for k in range(6)]
    assert [config("linear").learning_rate_at(s) for s in range(10)] == pytest.approx(warm + linear)
    cosine = [1 + math.cos(math.pi * k / 6) for k in range(6)]
    assert [config("cosine").learning_rate_at(s) for s in range(10)] == pytest.approx(warm + cosine)


@given(
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    total=st.integers(1, 500),
    share=st.floats(0, 0.99),
    step=st.integers(0, 1000),
)
def test_the_rate_stays_between_zero_and_the_peak(schedule: str, total: int, share: float, step: int) -> None:
    settings = config(schedule, total, int(total * share))
    rate = settings.learning_rate_at(step)
    assert 0 <= rate <= 2.0
    assert settings.learning_rate_at(settings.warmup_steps) == 2.0
    if step < total:
        assert rate > 0  # no step is spent on nothing


def test_decay_spares_vectors_and_frozen_weights() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    matrices, vectors = _groups(model, 0.1)
    assert [tuple(p.shape) for p in matrices["params"]] == [(4, 3)] and matrices["weight_decay"] == 0.1
    assert len(vectors["params"]) == 3 and vectors["weight_decay"] == 0.0
    with pytest.raises(ClusterError, match="every one is frozen"):
        _groups(model.requires_grad_(False), 0.1)


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    for amx, avx, wanted in ((True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda found=amx: found)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=avx: found)
        assert resolve_precision("auto", "cpu") == wanted
        assert resolve_precision("fp32", "cpu") == "fp32" and resolve_precision("bf16", "cpu") == "bf16"
    assert resolve_precision("fp16", "cuda") == "fp16"
    with pytest.raises(ResourceError, match="fp16 needs a GPU"):
        resolve_precision("fp16", "cpu")
