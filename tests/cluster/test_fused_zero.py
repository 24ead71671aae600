"""The fused head, and features, on two real ranks under ZeRO 0 to 3, with accumulation and recomputed layers, against
plain torch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cluster.engine import Engine
from cluster.engine_config import EngineConfig
from cluster.gang import Gang, Rank, run_gang
from cluster.session import Session
from distill_jobs.data.batch import Batch
from distill_jobs.data.facts import DataFacts
from distill_jobs.losses import LossParts, distillation_loss
from distill_jobs.losses.fused_head import FusedHead
from distill_jobs.losses.total import PLAIN
from distill_jobs.models.scorer import Scorer
from distill_jobs.spec.features import MatchedFeatures
from distill_jobs.store.codecs.hybrid import HybridCodec
from distill_jobs.store.draws import uniforms
from distill_jobs.store.signal import TeacherSignal
from distill_jobs.training.features import FeatureStudent
from distill_jobs.training.scoring import BatchLoss

STEPS, RANKS, ACCUMULATION, ROWS, LENGTH, CLASSES = 4, 2, 2, 3, 5, 11
# With features beside: the loss, the stage, and whether the head is fused.
FEATURES = [("mse", 0, True), ("cosine", 2, True), ("mse", 3, True), ("cosine", 3, False)]
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
    return stepped(model, lambda *place: plain(model, *place).total)


def stepped(
    model: nn.Module, loss_at: Callable[[int, int, int], torch.Tensor]
) -> tuple[dict[str, np.ndarray], list[float]]:
    """The steps of plain torch: the weights at the end, and the gradients' norms."""
    spared = [p for name, p in model.named_parameters() if p.ndim < 2]
    decaying = [p for name, p in model.named_parameters() if p.ndim >= 2]
    optimizer = torch.optim.AdamW([{"params": decaying, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}])
    norms = []
    for step in range(STEPS):
        places = [(step, rank, micro) for rank in range(RANKS) for micro in range(ACCUMULATION)]
        loss = torch.stack([loss_at(*place) for place in places]).mean()
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


class Hearing(Model):
    """The same, called as a scorer calls it."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids)


def feature_student(loss: str) -> FeatureStudent:
    """Features of a recomputed layer and of the norm behind all of them."""
    pairs = {"layers.0": "teacher.0", "norm": "teacher.1"}
    wanted = MatchedFeatures.model_validate({"weight": 0.5, "loss": loss, "pairs": pairs})
    sizes: dict[str, Any] = {"sequence_length": LENGTH, "vocabulary": CLASSES, "packing": "documents"}
    facts = DataFacts("causal_lm", "documents", "made up", **sizes)
    scorer = Scorer(Hearing("tied"), {"kind": "factory", "target": "x:y"}, "documents", "documents")
    return FeatureStudent(scorer, wanted, 6, facts, seed=3)


def feature_batch(step: int, rank: int, micro: int) -> tuple[Batch, TeacherSignal]:
    ids, labels, signal = batch(step, rank, micro)
    draw = torch.Generator().manual_seed(5000 + 1000 * step + 10 * rank + micro)
    features = {name: torch.randn(len(signal), 6, generator=draw) for name in ("teacher.0", "teacher.1")}
    inputs = {"input_ids": ids, "segments": torch.ones_like(ids)}
    return Batch(inputs, labels, torch.arange(ROWS)), replace(signal, features=features)


def train_with_features(rank: Rank, loss: str, stage: int, fused: bool) -> dict[str, Any]:
    student = feature_student(loss)
    core: Any = student.scorer.core
    engine = Engine(student, config(stage), rank.device)
    score = BatchLoss(engine, PLAIN, CLASSES, FusedHead(core.head) if fused else None, student)
    engine.train()
    norms = []
    for step in range(STEPS):
        for micro in range(ACCUMULATION):
            engine.backward(score(*feature_batch(step, rank.rank, micro), ALPHA, TEMPERATURE).total)
            engine.step()
        norms.append(engine.gradient_norm)
        # A look at other rows in between, as the validation takes it.
        engine.eval()
        with torch.no_grad():
            score(feature_batch(step, 0, 0)[0], None, 0.0, 1.0)
        engine.train()
    state = engine.full_state()
    engine.barrier()
    engine.close()
    return {"state": {name: value.numpy() for name, value in (state or {}).items()}, "norms": norms}


def features_alone(loss: str) -> tuple[dict[str, np.ndarray], list[float]]:
    """The reference: one process, no engine, hooks of torch's own and the loss as it is defined."""
    student = feature_student(loss)
    core: Any = student.scorer.core
    heard: dict[str, torch.Tensor] = {}
    for name in student.wanted.pairs:
        core.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: heard.update({name: out}))

    def total(step: int, rank: int, micro: int) -> torch.Tensor:
        rows, signal = feature_batch(step, rank, micro)
        keep = rows.labels != -100
        logits = core(rows.inputs["input_ids"])[keep]
        plain = distillation_loss(logits, rows.labels[keep], signal, ALPHA, TEMPERATURE, classes=CLASSES).total
        if not bool(keep.any()):
            return plain
        parts = []
        for (name, theirs), linear in zip(student.wanted.pairs.items(), student.projections, strict=True):
            mine, target = linear(heard[name][keep]), signal.features[theirs]  # type: ignore[index]
            same = 1 - nn.functional.cosine_similarity(mine, target, dim=1)
            parts.append(same.mean() if loss == "cosine" else (mine - target).square().mean())
        return plain + student.wanted.weight * sum(parts) / len(parts)

    return stepped(student, total)


def everything(rank: Rank, jobs: list[Any]) -> list[Any]:
    return [(train if job[0] in HEADS else train_with_features)(rank, *job) for job in jobs]


@pytest.fixture(scope="module")
def results(session: Session) -> dict[Any, Any]:
    jobs = [(kind, stage, True, "fp32") for kind in HEADS for stage in STAGES]
    jobs += [(kind, 3, False, "fp32") for kind in HEADS]
    jobs += [(*HALF, fused, "bf16") for fused in (True, False)]
    jobs += FEATURES
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


@pytest.mark.parametrize("job", FEATURES)
def test_features_are_learnt_from_as_in_one_process(results: dict[Any, Any], job: tuple[str, int, bool]) -> None:
    found = results[job]
    state, norms = features_alone(job[0])
    assert found["state"].keys() == state.keys() and "projections.1.weight" in state
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
