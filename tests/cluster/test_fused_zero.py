"""The fused head on two real ranks under ZeRO 0 to 3, with accumulation and recomputed layers, against plain torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cluster.engine import Engine
from cluster.engine_config import EngineConfig
from cluster.gang import Gang, Rank, run_gang
from cluster.session import Session
from distill_jobs.losses import LossParts, distillation_loss
from distill_jobs.losses.fused_head import FusedHead
from distill_jobs.store.codecs.hybrid import HybridCodec
from distill_jobs.store.draws import uniforms
from distill_jobs.store.signal import TeacherSignal

STEPS, RANKS, ACCUMULATION, ROWS, LENGTH, CLASSES = 4, 2, 2, 3, 5, 11
STAGES, ALPHA, TEMPERATURE = (0, 1, 2, 3), 0.6, 2.0
# The kinds of heads: tied as it stands; untied with bias, scale and soft cap, and padded.
HEADS = {"tied": (1.0, None), "untied": (0.8, 4.0)}
# What is also trained in half precision.
HALF = ("untied", 3)


class Model(nn.Module):
    """An embedding, two layers and a head, of which some outputs are padding."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embed = nn.Embedding(CLASSES + 2, 8)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(2)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, CLASSES + 2, bias=kind == "untied")
        if kind == "tied":
            self.head.weight = self.embed.weight
        self.scale, self.softcap = HEADS[kind]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        logits = self.head(self.norm(hidden)) * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def config(stage: int, precision: str = "fp32") -> EngineConfig:
    # Small parameters would stay whole on every rank: these must not.
    keys = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    return EngineConfig(
        ROWS,
        ACCUMULATION,
        STEPS,
        2e-2,
        0.1,
        "cosine",
        1,
        0.5,
        precision,
        stage,
        activation_checkpointing=True,
        deepspeed=keys,
    )


def batch(step: int, rank: int, micro: int) -> tuple[torch.Tensor, torch.Tensor, TeacherSignal]:
    """Ids, labels of which some aren't scored, and the teacher where they are; one batch has nothing to score."""
    draw = torch.Generator().manual_seed(1000 * step + 10 * rank + micro)
    ids, labels = (torch.randint(0, CLASSES, (ROWS, LENGTH), generator=draw) for _ in range(2))
    labels[torch.rand(ROWS, LENGTH, generator=draw) < 0.3] = -100
    if (step, rank, micro) == (1, 1, 0):
        labels[:] = -100
    count = int((labels != -100).sum())
    logits, codec = torch.randn(count, CLASSES, generator=draw), HybridCodec(3, 2)
    codes = codec.encode(logits, logits.argmax(-1), uniforms(0, torch.arange(count), 1))
    return ids, labels, codec.decode(codes, CLASSES)


def plain(model: nn.Module, step: int, rank: int, micro: int, forward: Any = None) -> LossParts:
    ids, labels, signal = batch(step, rank, micro)
    logits = (forward or model)(ids=ids)[labels != -100]
    return distillation_loss(logits, labels[labels != -100], signal, ALPHA, TEMPERATURE, classes=CLASSES)


def alone(kind: str) -> tuple[dict[str, np.ndarray], list[float]]:
    """The reference: the same global batches and the plain loss, one process, no engine."""
    model = Model(kind)
    spared = [p for name, p in model.named_parameters() if p.ndim < 2]
    decaying = [p for name, p in model.named_parameters() if p.ndim >= 2]
    optimizer = torch.optim.AdamW([{"params": decaying, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}])
    norms = []
    for step in range(STEPS):
        places = [(step, rank, micro) for rank in range(RANKS) for micro in range(ACCUMULATION)]
        loss = torch.stack([plain(model, *place).total for place in places]).mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        for group in optimizer.param_groups:
            group["lr"] = config(0).learning_rate_at(step)
        optimizer.step()
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}, norms


@contextmanager
def counted_gathers(found: list[int]) -> Iterator[None]:
    """Count how often ZeRO-3 gathers a parameter with as many elements as the head's weight."""
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    kind = coordinator.PartitionedParameterCoordinator
    own = kind._PartitionedParameterCoordinator__all_gather_params_

    def gather(self: Any, params: Any, *rest: Any, **named: Any) -> Any:
        found.extend(p.ds_numel for p in params)
        return own(self, params, *rest, **named)

    kind._PartitionedParameterCoordinator__all_gather_params_ = gather
    try:
        yield
    finally:
        kind._PartitionedParameterCoordinator__all_gather_params_ = own


def train(rank: Rank, kind: str, stage: int, fused: bool, precision: str) -> dict[str, Any]:
    model = Model(kind)
    size, head = model.head.weight.numel(), FusedHead(model.head, model.scale, model.softcap)
    engine = Engine(model, config(stage, precision), rank.device)
    engine.train()
    norms, gathers = [], []
    with counted_gathers(gathers):
        for step in range(STEPS):
            for micro in range(ACCUMULATION):
                if fused:
                    ids, labels, signal = batch(step, rank.rank, micro)
                    forward = lambda ids=ids: engine.forward(ids=ids)  # noqa: E731
                    parts = head.loss(forward, labels, signal, ALPHA, TEMPERATURE, classes=CLASSES)
                else:
                    parts = plain(model, step, rank.rank, micro, engine.forward)
                engine.backward(parts.total)
                engine.step()
            norms.append(engine.gradient_norm)
    state = engine.full_state()
    engine.barrier()
    engine.close()
    arrays = {name: value.float().numpy() for name, value in (state or {}).items()}
    return {"state": arrays, "norms": norms, "gathers": gathers.count(size)}


def everything(rank: Rank, jobs: list[tuple[str, int, bool, str]]) -> list[Any]:
    return [train(rank, *job) for job in jobs]


@pytest.fixture(scope="module")
def results(session: Session) -> dict[Any, Any]:
    jobs = [(kind, stage, True, "fp32") for kind in HEADS for stage in STAGES]
    jobs += [(kind, 3, False, "fp32") for kind in HEADS]
    jobs += [(*HALF, fused, "bf16") for fused in (True, False)]
    values, _ = run_gang(session, everything, jobs, Gang(RANKS), lambda _: None)
    return dict(zip(jobs, values, strict=True))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", HEADS)
def test_two_ranks_take_the_steps_of_one_process(results: dict[Any, Any], kind: str, stage: int) -> None:
    found = results[(kind, stage, True, "fp32")]
    state, norms = alone(kind)
    assert found["state"].keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_allclose(found["state"][name], value, rtol=2e-4, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(found["norms"], norms, rtol=1e-3)


@pytest.mark.parametrize("kind", HEADS)
def test_the_head_is_gathered_as_often_as_without_the_kernel(results: dict[Any, Any], kind: str) -> None:
    """However many chunks: the kernel asks for no gathering of its own."""
    fused, plain = (results[(kind, 3, fused, "fp32")]["gathers"] for fused in (True, False))
    assert 0 < fused <= plain


def test_in_half_precision_the_kernel_rounds_about_as_the_plain_loss(results: dict[Any, Any]) -> None:
    kind, stage = HALF
    state, norms = alone(kind)
    fused, plain = (results[(kind, stage, way, "bf16")] for way in (True, False))

    def off(found: dict[str, Any]) -> float:
        gaps = [(found["state"][name] - value).ravel() for name, value in state.items()]
        return float(np.sqrt(np.mean(np.concatenate(gaps) ** 2)))

    assert fused["state"].keys() == state.keys()
    assert 0 < off(fused) < 2 * off(plain)
    np.testing.assert_allclose(fused["norms"], norms, rtol=0.03)
