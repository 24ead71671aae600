"""Codecs against a plain float64 reference: any teacher, any T in [0.5, 10]."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from store_cases import lm_facts, table_facts
from torch import Tensor

from distill_jobs.errors import CaptureError, StoreError
from distill_jobs.spec.capture import Codec as CodecSpec
from distill_jobs.spec.capture import TopK
from distill_jobs.store.codecs import CODECS, Codec, bytes_per_position, codec_from_plan, make_codec
from distill_jobs.store.codecs.dense import DenseCodec
from distill_jobs.store.codecs.hybrid import HybridCodec
from distill_jobs.store.codecs.sampled import SampledCodec
from distill_jobs.store.codecs.select import largest
from distill_jobs.store.codecs.topk import TopKCodec
from distill_jobs.store.draws import uniforms
from distill_jobs.store.tail import TAIL_BETAS, log_partition

CODECS_UNDER_TEST = [DenseCodec(), TopKCodec(4), SampledCodec(6), HybridCodec(4, 3)]
TEMPERATURES = (0.5, 0.6, 0.8, 1.0, 1.3, 2.0, 3.0, 4.5, 7.0, 10.0)


def chances(rows: int, seed: int = 0) -> Tensor:
    """Uniform numbers for ``rows`` positions."""
    return uniforms(seed, torch.arange(rows), 1)


def every_bit_set(column: Tensor) -> Tensor:
    return torch.full_like(column.view(torch.uint8), 255).view(column.dtype)


def teachers(rows: int, classes: int, seed: int = 0) -> dict[str, Tensor]:
    """Logits of teachers that are flat, random, peaked, heavy-tailed, and masked."""
    torch.manual_seed(seed)
    normal = torch.randn(rows, classes)
    zipf = -torch.arange(1, classes + 1).log()
    peaked = 3 * normal.clone()
    peaked[:, 0] = 40.0
    masked = 3 * normal.clone()
    masked[torch.rand(rows, classes) < 0.3] = -math.inf
    return {
        "constant": torch.zeros(rows, classes),
        "flat": 1e-3 * normal,
        "normal 1": normal,
        "normal 3": 3 * normal,
        "normal 6": 6 * normal,
        "zipf": 1.5 * zipf + 0.5 * normal,
        "steep zipf": 2.5 * zipf + 0.5 * normal,
        "student t": torch.distributions.StudentT(3.0).sample((rows, classes)),
        "laplace": torch.distributions.Laplace(0.0, 2.0).sample((rows, classes)),
        "peaked": peaked,
        "masked": masked,
    }


def reference(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Head log-probabilities and log tail mass at T, in float64 from all logits."""
    logprob = torch.log_softmax(logits.double() / temperature, dim=-1)
    return logprob.gather(1, ids), torch.logsumexp(logprob.scatter(1, ids, -math.inf), dim=-1)


def tail_error(logits: Tensor, signal, temperature: float) -> float:
    """Largest error of the log of the whole partition that comes from interpolating the tail's, in nats."""
    beta = 1 / temperature
    logprob = torch.log_softmax(logits.double(), dim=-1)
    head = torch.logsumexp(beta * logprob.gather(1, signal.head_ids), dim=-1)
    tail = torch.logsumexp((beta * logprob).scatter(1, signal.head_ids, -math.inf), dim=-1)
    found = log_partition(signal.tail_nodes.double(), beta)
    return float((torch.logaddexp(head, found) - torch.logaddexp(head, tail)).abs().max())


@pytest.mark.parametrize("classes", [2000, 49152])
def test_topk_is_right_at_every_temperature(classes: int) -> None:
    bound = 0.0
    for name, logits in teachers(8, classes).items():
        gold = torch.randint(0, classes, (8,))
        signal = TopKCodec(64).decode(TopKCodec(64).encode(logits, gold), classes)
        logprob = torch.log_softmax(logits.double(), dim=-1)
        torch.testing.assert_close(
            signal.entropy.double(), -torch.xlogy(logprob.exp(), logprob.exp()).sum(-1), atol=7e-4, rtol=1e-4
        )
        for temperature in TEMPERATURES:
            error = tail_error(logits, signal, temperature)
            bound = max(bound, error)
            assert error < 0.007, (name, temperature, error)
            head, tail = signal.at(temperature)
            assert tail is not None
            # Head and tail are normalised together, whatever was rounded.
            torch.testing.assert_close(head.exp().sum(-1) + tail.exp(), torch.ones(8), atol=2e-5, rtol=0)
            true_head, true_tail = reference(logits, signal.head_ids, temperature)
            reach = true_head > -15
            # fp16 near -10 rounds by up to 0.004, doubled at T = 0.5; the interpolation adds its own.
            assert float((head - true_head)[reach].abs().max()) < 0.008 / min(1, temperature) + 0.007, name
            at_nodes = min(abs(1 / temperature - b) for b in TAIL_BETAS) < 1e-9
            assert float((tail.exp() - true_tail.exp()).abs().max()) < (0.003 if at_nodes else 0.008), name
    print(f"\n{classes} classes: |Δ log-partition| at most {bound:.5f} nats for T in [0.5, 10]")


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    classes=st.integers(1, 90),
    k=st.integers(1, 100),
    scale=st.floats(0, 30),
    temperature=st.floats(0.5, 10),
    masked=st.booleans(),
)
def test_topk_of_any_shape(seed: int, classes: int, k: int, scale: float, temperature: float, masked: bool) -> None:
    torch.manual_seed(seed)
    logits = scale * torch.randn(4, classes)
    if masked and classes > 1:
        logits[:, 1:][torch.rand(4, classes - 1) < 0.5] = -math.inf
    gold = torch.randint(-1, classes, (4,))
    codec = TopKCodec(k)
    encoded = codec.encode(logits, gold)
    for name, field in codec.fields(classes).items():
        assert tuple(encoded[name].shape) == (4, field.width)
        assert str(encoded[name].dtype).removeprefix("torch.") == field.dtype
        if encoded[name].is_floating_point():
            assert torch.isfinite(encoded[name]).all(), name
    signal = codec.decode(encoded, classes)
    head, tail = signal.at(temperature)
    assert tail is not None and not torch.isnan(head).any() and not torch.isnan(tail).any()
    torch.testing.assert_close(head.exp().sum(-1) + tail.exp(), torch.ones(4), atol=1e-4, rtol=0)
    if k >= classes:
        assert torch.isneginf(tail).all()
        true, _ = reference(logits, signal.head_ids, temperature)
        likely = true > -8
        assert torch.allclose(head.double()[likely], true[likely], atol=0.02)
    has_gold = gold >= 0
    right = logits.gather(1, gold.clamp(min=0)[:, None])
    assert torch.equal(signal.gold_rank, torch.where(has_gold, (logits > right).sum(-1), -1))


def test_topk_equal_to_dense_when_it_holds_everything() -> None:
    logits, gold = 4 * torch.randn(6, 20), torch.randint(0, 20, (6,))
    all_of_it = TopKCodec(20).decode(TopKCodec(20).encode(logits, gold), 20)
    dense = DenseCodec().decode(DenseCodec().encode(logits, gold), 20)
    for temperature in TEMPERATURES:
        sparse, _ = all_of_it.at(temperature)
        torch.testing.assert_close(sparse, dense.at(temperature)[0].gather(1, all_of_it.head_ids))
    torch.testing.assert_close(all_of_it.top1, dense.top1)


def test_dense_is_exact_but_for_fp16() -> None:
    for name, logits in teachers(8, 300).items():
        gold = torch.randint(0, 300, (8,))
        encoded = DenseCodec().encode(logits, gold)
        assert torch.isfinite(encoded["logprob"]).all()
        signal = DenseCodec().decode(encoded, 300)
        for temperature in TEMPERATURES:
            found, tail = signal.at(temperature)
            true = torch.log_softmax(logits.double() / temperature, dim=-1)
            assert tail is None
            assert float((found.exp() - true.exp()).abs().max()) < 5e-3, (name, temperature)


def test_a_tail_of_no_account_stays_of_no_account() -> None:
    logits = torch.full((1, 100), -500.0)
    logits[0, 0] = 0.0
    signal = TopKCodec(1).decode(TopKCodec(1).encode(logits, torch.tensor([5])), 100)
    for temperature in TEMPERATURES:
        _, tail = signal.at(temperature)
        assert tail is not None
        # 16 bits reach 64 nats down: what lies below is stored as that, which no sum notices.
        true = math.log(99) - 500 / temperature
        torch.testing.assert_close(float(tail[0]), true, rtol=1e-4, atol=1e-2) if true > -60 else None
        assert float(tail[0]) < -45
    assert int(signal.gold_rank[0]) == 1
    assert float(signal.gold_logprob[0]) == pytest.approx(-64, abs=0.01)


@pytest.mark.parametrize("codec", CODECS_UNDER_TEST, ids=lambda c: c.name)
def test_broken_logits_are_named(codec: Codec) -> None:
    logits = torch.randn(10, 12)
    logits[2, 3] = math.nan
    logits[5, 0] = math.inf
    logits[7] = -math.inf
    with pytest.raises(CaptureError, match=r"3 of 10 positions: 2, 5, 7;"):
        codec.encode(logits, torch.zeros(10, dtype=torch.int64), chances(10))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_and_padded_slices(dtype: torch.dtype) -> None:
    wide = (3 * torch.randn(5, 64 * 50)).to(dtype)
    logits, gold = wide[:, :3000], torch.randint(0, 3000, (5,))
    kept = wide.clone()
    signal = TopKCodec(16).decode(TopKCodec(16).encode(logits, gold), 3000)
    assert torch.equal(wide, kept), "the caller's logits must stay as they are"
    true, _ = reference(logits, signal.head_ids, 2.0)
    assert float((signal.at(2.0)[0] - true).abs().max()) < 0.01


def test_largest_by_groups_is_exact() -> None:
    for logits in (torch.randn(3, 64 * 400), torch.zeros(3, 64 * 400), torch.randn(3, 64 * 400).round()):
        values, ids = largest(logits, 17)
        assert torch.equal(values, logits.topk(17).values)
        assert torch.equal(logits.gather(1, ids), values)
        assert all(len(set(row.tolist())) == 17 for row in ids)


@pytest.mark.parametrize("classes", [32_000, 65_536, 65_537, 131_072, 131_073, 151_669, 262_144])
@pytest.mark.parametrize("codec", [TopKCodec(8), SampledCodec(9), HybridCodec(10, 3)], ids=lambda c: c.name)
def test_ids_of_wide_vocabularies(codec: Codec, classes: int) -> None:
    logits = torch.randn(2, classes)
    logits[:, -1] = 50.0
    columns = codec.encode(logits, torch.tensor([classes - 1, -100]), chances(2))
    signal = codec.decode(columns, classes)
    codec.check(columns, classes)
    assert signal.top1.tolist() == [classes - 1] * 2
    assert signal.gold_rank.tolist() == [0, -1]
    ids = signal.draw_ids if signal.head_ids is None or not signal.head_ids.shape[1] else signal.head_ids
    assert ids is not None and ids[0, 0] == classes - 1 and int(ids.max()) < classes
    if classes & (classes - 1):
        with pytest.raises(StoreError, match="holds class"):
            codec.check({name: every_bit_set(column) for name, column in columns.items()}, classes)


def test_bytes_of_a_position() -> None:
    narrow, wide, widest = 65_536, 131_072, 262_144
    assert [bytes_per_position(HybridCodec(), v) for v in (narrow, wide, widest)] == [215, 223, 231]
    assert [bytes_per_position(HybridCodec(12, 4), v) for v in (narrow, wide, widest)] == [71, 73, 75]
    assert [bytes_per_position(HybridCodec(12, 3), v) for v in (narrow, wide, widest)] == [68, 70, 72]


def test_codecs_by_spec_and_plan() -> None:
    assert make_codec(None, table_facts()).name == "dense"
    assert make_codec(CodecSpec(topk=TopK(k=7)), lm_facts()) == TopKCodec(7)
    big = TopKCodec()
    assert codec_from_plan({"name": big.name, **big.arguments()}) == big
    assert make_codec(None, replace(lm_facts(), vocabulary=5000)) == HybridCodec(48, 16)
    assert bytes_per_position(big, 49152) == 64 * 4 + 14 + 6
    assert all(made.name == name for name, made in CODECS.items())
    for wrong in ({"name": "zip"}, {"name": "topk", "k": -1}, {"name": "topk", "q": 1}, [], {"name": ["x"]}):
        with pytest.raises(StoreError):
            codec_from_plan(wrong)


def test_temperature_outside_the_nodes() -> None:
    with pytest.raises(ValueError, match="outside"):
        log_partition(torch.zeros(1, len(TAIL_BETAS)), 1 / 11)


@pytest.mark.parametrize("codec", CODECS_UNDER_TEST, ids=lambda c: c.name)
def test_encoding_without_gradients_and_of_nothing(codec: Codec) -> None:
    logits, gold = torch.randn(900, 600), torch.randint(0, 600, (900,))
    plain, threads = codec.encode(logits, gold, chances(900)), torch.get_num_threads()
    with torch.inference_mode():
        inferred = codec.encode(logits.clone(), gold, chances(900))
    assert all(torch.equal(plain[name], inferred[name]) for name in plain)
    assert torch.get_num_threads() == threads
    nothing = codec.decode(codec.encode(logits[:0], gold[:0], chances(0)), 600)
    assert len(nothing) == 0 and nothing.at(2.0)[0].shape[0] == 0
