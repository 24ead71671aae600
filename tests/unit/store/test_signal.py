"""What every codec's signal keeps to, whatever the teacher; and that draws are unbiased and their own position's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill_jobs.store.codecs import Codec
from distill_jobs.store.codecs.dense import DenseCodec
from distill_jobs.store.codecs.hybrid import HybridCodec
from distill_jobs.store.codecs.sampled import SampledCodec
from distill_jobs.store.codecs.select import select
from distill_jobs.store.codecs.topk import TopKCodec
from distill_jobs.store.draws import uniforms
from distill_jobs.store.signal import TeacherSignal


def signal_of(codec: Codec, logits: Tensor, gold: Tensor, seed: int = 0) -> TeacherSignal:
    rows, classes = logits.shape
    return codec.decode(codec.encode(logits, gold, uniforms(seed, torch.arange(rows), 1)), classes)


codecs = st.one_of(
    st.just(DenseCodec()),
    st.builds(TopKCodec, st.integers(1, 100)),
    st.builds(SampledCodec, st.integers(1, 60)),
    st.builds(HybridCodec, st.integers(1, 100), st.integers(1, 20)),
)


@settings(max_examples=100, deadline=None)
@given(
    codec=codecs,
    seed=st.integers(0, 2**31),
    classes=st.integers(1, 90),
    scale=st.floats(0, 30),
    temperature=st.floats(0.5, 10),
    masked=st.booleans(),
)
def test_invariants_of_every_signal(
    codec: Codec, seed: int, classes: int, scale: float, temperature: float, masked: bool
) -> None:
    torch.manual_seed(seed)
    logits = scale * torch.randn(5, classes)
    if masked and classes > 1:
        logits[:, 1:][torch.rand(5, classes - 1) < 0.5] = -math.inf
    gold = torch.randint(-1, classes, (5,))
    columns = codec.encode(logits, gold, uniforms(seed, torch.arange(5), 1))
    for name, field in codec.fields(classes).items():
        assert tuple(columns[name].shape) == (5, field.width)
        assert str(columns[name].dtype).removeprefix("torch.") == field.dtype
    codec.check(columns, classes)
    signal = codec.decode(columns, classes)
    true = torch.log_softmax(logits.double(), dim=-1)

    # Head and tail hold all the mass, at any T; no class twice in a head; draws lie in the tail and stand for it.
    head, mass = signal.at(temperature)
    rest = mass.exp() if mass is not None else 0.0
    torch.testing.assert_close(head.exp().sum(-1) + rest, torch.ones(5), atol=1e-4, rtol=0)
    if signal.head_ids is not None:
        ids = signal.head_ids.sort(dim=-1).values
        assert not bool((ids[:, 1:] == ids[:, :-1]).any())
    if signal.draw_ids is not None:
        assert mass is not None and signal.head_ids is not None
        weights = signal.draws_at(temperature).exp()
        torch.testing.assert_close(weights.sum(-1), mass.exp(), atol=1e-5, rtol=1e-4)
        live = weights > 0
        in_head = (signal.draw_ids[:, :, None] == signal.head_ids[:, None, :]).any(-1)
        assert not bool((live & in_head).any())
        assert bool(torch.isfinite(true.gather(1, signal.draw_ids))[live].all()), "a class without mass was drawn"
        trust = signal.trust_at(temperature)
        assert bool(((trust >= 0) & (trust <= 1)).all())
        assert temperature > 1 or bool((trust == 1).all())
    expanded = signal.expand(temperature, torch.log_softmax(torch.randn(5, classes), dim=-1))
    torch.testing.assert_close(expanded.sum(-1), torch.ones(5), atol=1e-4, rtol=0)

    # The statistics.
    right = logits.gather(1, gold.clamp(min=0)[:, None])
    assert torch.equal(signal.gold_rank, torch.where(gold >= 0, (logits > right).sum(-1), -1))
    gold_logprob = torch.where(gold >= 0, true.gather(1, gold.clamp(min=0)[:, None])[:, 0], 0.0)
    torch.testing.assert_close(signal.gold_logprob.double(), gold_logprob.clamp(min=-64), atol=2e-3, rtol=1e-5)
    torch.testing.assert_close(signal.entropy.double(), -torch.xlogy(true.exp(), true.exp()).sum(-1), atol=2e-3, rtol=0)
    best = logits.gather(1, signal.top1[:, None])[:, 0]
    rounded = 0.05 if codec.name == "dense" else 0.0  # fp16 makes near classes equal.
    assert bool((best >= logits.amax(-1) - rounded * max(1.0, scale)).all())
    entropy = signal.entropy_at(temperature)
    assert bool(((entropy >= 0) & torch.isfinite(entropy)).all())


def test_draws_are_unbiased() -> None:
    """Over many seeds the mean weight of each class is its probability, within four standard errors."""
    torch.manual_seed(0)
    classes, seeds = 300, 4000
    logits = 2 * torch.randn(1, classes)
    true = torch.softmax(logits.double(), dim=-1)[0]
    many = logits.expand(seeds, classes).contiguous()
    gold = torch.zeros(seeds, dtype=torch.int64)
    for codec in (HybridCodec(20, 5), SampledCodec(9)):
        signal = signal_of(codec, many, gold, seed=3)
        target = signal.expand(1.0).double()
        weight = float(signal.tail_at(1.0)[0].exp()) / codec.draws
        noise = (true * weight / seeds).sqrt()  # each draw is a coin toss for each class, at most
        in_head = torch.zeros(classes, dtype=torch.bool)
        in_head[signal.head_ids[0]] = True
        # Beside the noise: the tail's mass is rounded to 0.0005 nats; an entry of the head to a byte, but always alike.
        rounded = torch.where(in_head, 0.03, 1e-3) * true
        error = (target.mean(0) - true).abs()
        assert bool((error <= 4.5 * noise + 3 * weight / seeds + rounded).all()), codec.name


def test_systematic_draws_come_as_often_as_they_should() -> None:
    torch.manual_seed(1)
    logits, draws = 2 * torch.randn(40, 1000), 50
    signal = select(logits, torch.zeros(40, dtype=torch.int64), 0, draws, uniforms(0, torch.arange(40), 1))
    assert signal.draw_ids is not None
    counts = torch.zeros(40, 1000).scatter_add_(1, signal.draw_ids, torch.ones(40, draws))
    expected = draws * torch.softmax(logits, dim=-1)
    assert bool(((counts >= (expected - 1e-3).floor()) & (counts <= (expected + 1e-3).ceil())).all())


def test_draws_belong_to_their_position_alone() -> None:
    """The same whatever the batch they came in; others for another seed."""
    torch.manual_seed(0)
    rows, positions, classes = 6, 4, 2000
    logits = 2 * torch.randn(rows * positions, classes)
    gold = torch.zeros(rows * positions, dtype=torch.int64)
    sample_ids = torch.tensor([7, 1, 1 << 33, 5, 3, 2])
    codec = HybridCodec(8, 16)
    whole = codec.encode(logits, gold, uniforms(11, sample_ids, positions))
    for row in range(rows):
        some = slice(row * positions, (row + 1) * positions)
        alone = codec.encode(logits[some], gold[some], uniforms(11, sample_ids[row : row + 1], positions))
        assert all(torch.equal(alone[name], whole[name][some]) for name in whole)
    other = codec.encode(logits, gold, uniforms(12, sample_ids, positions))
    assert not torch.equal(other["ids"], whole["ids"])


def test_uniforms_are_uniform_and_differ() -> None:
    found = uniforms(5, torch.arange(20_000), 10)
    assert float(found.min()) >= 0 and float(found.max()) < 1
    assert len(torch.unique(found)) == len(found)
    histogram = torch.histc(found, 20, 0, 1)
    assert float(((histogram - 10_000) ** 2 / 10_000).sum()) < 50  # chi-square with 19 degrees of freedom
    assert not torch.equal(uniforms(6, torch.arange(5), 1), uniforms(5, torch.arange(5), 1))
    assert torch.equal(uniforms(-1, torch.arange(3), 2), uniforms((1 << 64) - 1, torch.arange(3), 2))


@pytest.mark.parametrize("temperature", [1.5, 2.0, 4.0, 10.0])
def test_trusting_the_bucket_beats_draws_alone_above_one(temperature: float) -> None:
    """Over a batch the blended gradient is nearer to the dense one than the draws' own."""
    torch.manual_seed(0)
    logits = 2.5 * torch.randn(400, 3000)
    signal = signal_of(HybridCodec(48, 16), logits, torch.zeros(400, dtype=torch.int64))
    student = torch.log_softmax(torch.randn(400, 3000) / temperature, dim=-1)
    true = torch.softmax(logits / temperature, dim=-1)
    drawn = torch.zeros_like(true)
    assert signal.draw_ids is not None and signal.head_ids is not None
    drawn.scatter_add_(1, signal.draw_ids, signal.draws_at(temperature).exp())
    drawn.scatter_(1, signal.head_ids, signal.at(temperature)[0].exp())
    blended = signal.expand(temperature, student)
    assert float((blended - true).norm()) < float((drawn - true).norm())


@pytest.mark.parametrize("codec", [TopKCodec(30), HybridCodec(30, 10), SampledCodec(20)], ids=lambda c: c.name)
def test_entropy_at_other_temperatures(codec: Codec) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(50, 4000)
    signal = signal_of(codec, logits, torch.zeros(50, dtype=torch.int64))
    for temperature in (0.7, 1.0, 1.4, 2.0, 4.0, 8.0):
        true = torch.softmax(logits.double() / temperature, dim=-1)
        expected = -(true * true.clamp(min=1e-300).log()).sum(-1)
        assert float((signal.entropy_at(temperature) - expected).abs().max()) < 0.2, temperature
