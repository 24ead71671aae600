"""The losses against dense float64 references."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill_jobs.errors import VocabularyError
from distill_jobs.losses import LOSSES, distillation_loss, forward_kl
from distill_jobs.store.codecs import Codec
from distill_jobs.store.codecs.dense import DenseCodec
from distill_jobs.store.codecs.topk import TopKCodec
from distill_jobs.store.signal import TeacherSignal


def make_signal(codec: Codec, rows: int, classes: int, scale: float = 2.0) -> TeacherSignal:
    logits = scale * torch.randn(rows, classes)
    return codec.decode(codec.encode(logits, logits.argmax(-1)), classes)


def bucketed_kl(logits: Tensor, signal: TeacherSignal, temperature: float) -> Tensor:
    """The KL over head entries and one tail bucket, straight from its definition."""
    head, tail = signal.at(temperature)
    student = torch.log_softmax(logits[:, : signal.classes].double() / temperature, dim=-1)
    if signal.head_ids is None:
        return (head.double().exp() * (head.double() - student)).sum(-1)
    inside = student.gather(1, signal.head_ids)
    kl = (head.double().exp() * (head.double() - inside)).sum(-1)
    if signal.head_ids.shape[1] < signal.classes:
        outside = torch.logsumexp(student.scatter(1, signal.head_ids, -math.inf), dim=-1)
        kl = kl + tail.double().exp() * (tail.double() - outside)
    return kl


@pytest.mark.parametrize("codec", [DenseCodec(), TopKCodec(5), TopKCodec(40)], ids=["dense", "topk", "topk all"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.3, 10.0])
def test_forward_kl_and_its_gradient(codec: Codec, temperature: float) -> None:
    torch.manual_seed(0)
    signal = make_signal(codec, 6, 40)
    logits = (3 * torch.randn(6, 40, dtype=torch.float64)).requires_grad_()
    upstream = torch.rand(6, dtype=torch.float64)
    found, true = forward_kl(logits, signal, temperature), bucketed_kl(logits, signal, temperature)
    torch.testing.assert_close(found, true, rtol=1e-6, atol=1e-7)
    (gradient,) = torch.autograd.grad((found * upstream).sum(), logits)
    (expected,) = torch.autograd.grad((true * upstream).sum(), logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("codec", [DenseCodec(), TopKCodec(3), TopKCodec(9)], ids=["dense", "topk", "topk all"])
def test_gradcheck(codec: Codec, temperature: float) -> None:
    torch.manual_seed(1)
    signal = make_signal(codec, 3, 9)
    logits = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: forward_kl(z, signal, temperature), (logits,), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    classes=st.integers(2, 60),
    k=st.integers(1, 64),
    temperature=st.floats(0.5, 10),
    teacher=st.floats(0, 20),
    student=st.floats(0, 20),
)
def test_float32_is_close_and_never_below_zero(
    seed: int, classes: int, k: int, temperature: float, teacher: float, student: float
) -> None:
    torch.manual_seed(seed)
    signal = make_signal(TopKCodec(k), 4, classes, teacher)
    logits = (student * torch.randn(4, classes)).requires_grad_()
    found = forward_kl(logits, signal, temperature)
    true = bucketed_kl(logits.detach(), signal, temperature)
    torch.testing.assert_close(found.double(), true, rtol=1e-4, atol=1e-4)
    assert float(found.detach().min()) > -1e-4
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert torch.isfinite(gradient).all()
    # A softmax's gradient adds up to nothing.
    assert float(gradient.sum(-1).abs().max()) < 1e-4


def test_a_student_surer_than_float32_keeps_its_tail() -> None:
    signal = make_signal(TopKCodec(2), 1, 30, 1.0)
    logits = torch.full((1, 30), -60.0)
    logits[0, signal.head_ids[0]] = 60.0
    logits.requires_grad_()
    found = forward_kl(logits, signal, 1.0)
    torch.testing.assert_close(found.double(), bucketed_kl(logits.detach(), signal, 1.0), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    off_head = gradient[0].clone()
    off_head[signal.head_ids[0]] = 0.0
    torch.testing.assert_close(float(off_head.sum()), -float(signal.at(1.0)[1].exp()), rtol=1e-4, atol=1e-6)


def test_same_distribution_costs_nothing() -> None:
    torch.manual_seed(0)
    teacher = 3 * torch.randn(5, 200)
    for codec in (DenseCodec(), TopKCodec(20)):
        signal = codec.decode(codec.encode(teacher, teacher.argmax(-1)), 200)
        for temperature in (0.5, 1.0, 2.0, 10.0):
            assert float(forward_kl(teacher, signal, temperature).abs().max()) < 1e-4


@pytest.mark.parametrize("codec", [DenseCodec(), TopKCodec(4)], ids=["dense", "topk"])
def test_padding_columns_take_no_part(codec: Codec) -> None:
    signal = make_signal(codec, 5, 20)
    logits, labels = torch.randn(5, 20), torch.randint(0, 20, (5,))
    padded = torch.cat([logits, 100 * torch.randn(5, 7)], dim=1).requires_grad_()
    narrow = distillation_loss(logits, labels, signal, 0.7, 2.0)
    wide = distillation_loss(padded, labels, signal, 0.7, 2.0)
    torch.testing.assert_close(wide.total, narrow.total)
    (gradient,) = torch.autograd.grad(wide.total, padded)
    assert not gradient[:, 20:].any() and gradient[:, :20].any()
    without = distillation_loss(padded, labels, None, 0.0, 2.0, classes=20)
    torch.testing.assert_close(without.total, torch.nn.functional.cross_entropy(logits, labels))
    with pytest.raises(VocabularyError, match="19 logits"):
        forward_kl(logits[:, :19], signal, 1.0)


def test_the_convention() -> None:
    torch.manual_seed(0)
    signal, temperature, alpha = make_signal(TopKCodec(4), 6, 20), 3.0, 0.25
    logits, labels = torch.randn(6, 20, requires_grad=True), torch.randint(0, 20, (6,))
    parts = distillation_loss(logits, labels, signal, alpha, temperature)
    hard = torch.nn.functional.cross_entropy(logits, labels)
    soft = temperature**2 * forward_kl(logits, signal, temperature).mean()
    torch.testing.assert_close(parts.total, (1 - alpha) * hard + alpha * soft)
    torch.testing.assert_close((parts.hard, parts.soft), (hard.detach(), soft.detach()))
    assert parts.positions == 6 and LOSSES["forward_kl"].direct is forward_kl

    only_soft = distillation_loss(logits, labels, signal, 1.0, temperature)
    torch.testing.assert_close(only_soft.hard, hard.detach())
    torch.testing.assert_close(
        torch.autograd.grad(only_soft.total, logits), torch.autograd.grad(soft, logits), rtol=1e-6, atol=1e-8
    )
    only_hard = distillation_loss(logits, labels, None, 0.0, temperature)
    assert float(only_hard.soft) == 0.0
    torch.testing.assert_close(only_hard.total, hard)


def test_no_positions_and_no_signal() -> None:
    logits = torch.randn(0, 20, requires_grad=True)
    parts = distillation_loss(logits, torch.zeros(0, dtype=torch.int64), None, 0.0, 1.0)
    parts.total.backward()
    assert parts.positions == 0 and float(parts.total.detach()) == 0.0
    with pytest.raises(VocabularyError, match="needs the teacher's signal"):
        distillation_loss(torch.randn(2, 20), torch.zeros(2, dtype=torch.int64), None, 0.5, 1.0)


def test_a_loss_that_is_not_finite_reaches_the_caller() -> None:
    signal = make_signal(TopKCodec(4), 2, 20)
    logits = torch.randn(2, 20)
    logits[0, 3] = math.nan
    assert not torch.isfinite(distillation_loss(logits, torch.tensor([1, 2]), signal, 0.5, 2.0).total)
