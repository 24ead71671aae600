"""The parts of the engine that need no engine: schedule, precision, what is refused, groups, recomputed layers."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cluster.engine import resolve_precision
from cluster.engine_build import _groups, build_optimizer, recompute
from cluster.engine_config import EngineConfig, refusals, settings_of
from cluster.errors import ClusterError, ResourceError


def config(schedule: str, total: int = 10, warmup: int = 4) -> EngineConfig:
    return EngineConfig(1, 1, total, 2.0, schedule=schedule, warmup_steps=warmup)


def test_schedules_by_hand() -> None:
    warm = [0.5, 1.0, 1.5, 2.0]
    assert [config("constant").learning_rate_at(s) for s in range(10)] == warm + [2.0] * 6
    linear = [2.0 * (1 - k / 6) for k in range(6)]
    assert [config("linear").learning_rate_at(s) for s in range(10)] == pytest.approx(warm + linear)
    wsd = [1 - math.sqrt(k / 2) for k in range(2)]
    found = [config("wsd").learning_rate_at(s) for s in range(10)]
    assert found == pytest.approx(warm + [2.0] * 4 + [2.0 * value for value in wsd])
    # A floor: every form but the constant one ends there, as a share of the peak.
    for schedule in ("linear", "cosine", "wsd"):
        assert replace(config(schedule), final=0.1).learning_rate_at(10) == pytest.approx(0.2)
    cosine = [1 + math.cos(math.pi * k / 6) for k in range(6)]
    assert [config("cosine").learning_rate_at(s) for s in range(10)] == pytest.approx(warm + cosine)


@given(
    schedule=st.sampled_from(["constant", "linear", "cosine", "wsd"]),
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


class ImageNorm(nn.Module):
    """A norm whose parameters are no vectors, as torch's LayerNorm over several dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))


def test_decay_spares_norms_biases_vectors_and_frozen_weights() -> None:
    model = nn.Sequential(
        nn.Linear(3, 4), nn.LayerNorm(4), ImageNorm(), nn.Linear(4, 5, bias=False), nn.Embedding(6, 4)
    )
    model[3].requires_grad_(False)
    model[4].bias = nn.Parameter(torch.zeros(6, 4))
    decaying, spared = _groups(model, 0.1)
    assert [tuple(p.shape) for p in decaying["params"]] == [(4, 3), (6, 4)] and decaying["weight_decay"] == 0.1
    assert [tuple(p.shape) for p in spared["params"]] == [(4,), (4,), (4,), (2, 2), (6, 4)]
    assert spared["weight_decay"] == 0.0
    with pytest.raises(ClusterError, match="every one is frozen"):
        _groups(model.requires_grad_(False), 0.1)


def test_the_fused_optimizer_takes_the_same_steps() -> None:
    ends = []
    for optimizer in ("adamw", "adamw_fused", "auto"):
        torch.manual_seed(1)
        model = nn.Linear(5, 7)
        stepping = build_optimizer(model, EngineConfig(1, 1, 9, 0.1, 0.1, optimizer=optimizer))
        for _ in range(5):
            stepping.zero_grad()
            model(torch.ones(2, 5)).square().sum().backward()
            stepping.step()
        assert bool(stepping.defaults["fused"]) == (optimizer != "adamw")
        ends.append(model.weight.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(ends[1], ends[2])


class Block(nn.Module):
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(4, 8), nn.Dropout(0.4), nn.Linear(8, 4)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        Block.calls += 1
        found: torch.Tensor = hidden + self.second(self.drop(self.first(hidden).relu()))
        return found


def test_recomputed_layers_give_the_same_gradients() -> None:
    gradients, calls = [], []
    for recomputed in (False, True):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(3, 4), nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])}))
        layers = model[1]["layers"]
        if recomputed:
            recompute(model)
            assert isinstance(layers[0], Block) and type(layers[0]).__name__ == "Block"
        Block.calls = 0
        hidden = model[0](torch.ones(2, 3))
        for layer in layers:
            hidden = layer(hidden)
        hidden.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        calls.append(Block.calls)
        model.eval()
        layers[0](hidden)
        assert Block.calls == calls[-1] + 1
    assert calls == [2, 4]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_model_without_layers_can_not_be_recomputed() -> None:
    with pytest.raises(ResourceError, match="no stack of layers"):
        recompute(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"zero_optimization": {"stage": 3}}, "deepspeed.zero_optimization.stage is 3, but that is said by zero_stage"),
        ({"gradient_clipping": 2}, "deepspeed.gradient_clipping is 2, but that is said by clip, which makes it 1.0"),
        ({"scheduler": {"type": "WarmupLR"}}, "deepspeed.scheduler.type is WarmupLR, but that is said by schedule"),
        ({"optimizer": {}}, "deepspeed.optimizer is {}, but that is said by optimizer"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "is nvme, but that is said by offload"),
        ({"fp16": {"enabled": True}}, "deepspeed.fp16.enabled is true, but that is said by precision"),
        ({"gradient_cliping": 1.0}, "gradient_cliping is no key of DeepSpeed's; did you mean gradient_clipping?"),
    ],
)
def test_a_deepspeed_key_that_contradicts_is_named_with_what_it_contradicts(given: dict[str, Any], said: str) -> None:
    found = refusals(EngineConfig(1, 1, 9, 0.1, clip=1.0, zero_stage=2, deepspeed=given))
    assert len(found) == 1 and said in found[0]


def test_deepspeed_keys_come_on_top_of_what_is_derived() -> None:
    given = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 9, "overlap_comm": "auto"},
        "gradient_clipping": 1.0,
    }
    settings = EngineConfig(1, 1, 9, 0.1, clip=1.0, zero_stage=2, deepspeed={**given, "wall_clock_breakdown": True})
    assert refusals(settings) == []
    made = settings_of(settings, 1001)
    assert made["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 9, "allgather_bucket_size": 1002}
    assert made["wall_clock_breakdown"] is True and made["gradient_clipping"] == 1.0
    assert settings_of(EngineConfig(1, 1, 9, 0.1), 4)["zero_optimization"]["reduce_bucket_size"] == 4


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    for amx, avx, wanted in ((True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda found=amx: found)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=avx: found)
        assert resolve_precision("auto", "cpu") == wanted
        assert resolve_precision("fp32", "cpu") == "fp32" and resolve_precision("bf16", "cpu") == "bf16"
    assert resolve_precision("fp16", "cuda") == "fp16"
    with pytest.raises(ResourceError, match="fp16 needs a GPU"):
        resolve_precision("fp16", "cpu")
