"""The forward KL where draws stand for the tail, against dense float64 references."""

import pytest
import torch
from torch import Tensor

from distill_jobs.losses import forward_kl
from distill_jobs.store.codecs import Codec
from distill_jobs.store.codecs.hybrid import HybridCodec
from distill_jobs.store.codecs.sampled import SampledCodec
from distill_jobs.store.draws import uniforms
from distill_jobs.store.signal import TeacherSignal

CODECS = [HybridCodec(5, 4), SampledCodec(7), HybridCodec(60, 2)]


def make_signal(codec: Codec, logits: Tensor, seed: int = 0) -> TeacherSignal:
    rows, classes = logits.shape
    chances = uniforms(seed, torch.arange(rows), 1)
    return codec.decode(codec.encode(logits, logits.argmax(-1), chances), classes)


@pytest.mark.parametrize("codec", CODECS, ids=["hybrid", "sampled", "hybrid all"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5, 2.0, 4.3, 10.0])
def test_gradient_pulls_towards_the_expanded_target(codec: Codec, temperature: float) -> None:
    torch.manual_seed(0)
    signal = make_signal(codec, 2 * torch.randn(6, 40))
    logits = (3 * torch.randn(6, 43, dtype=torch.float64)).requires_grad_()
    upstream = torch.rand(6, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((forward_kl(logits, signal, temperature) * upstream).sum(), logits)
    student = torch.log_softmax(logits.detach()[:, :40] / temperature, dim=-1)
    expected = (student.exp() - signal.expand(temperature, student).double()) / temperature * upstream[:, None]
    torch.testing.assert_close(gradient[:, :40], expected, rtol=1e-5, atol=2e-6)
    assert not bool(gradient[:, 40:].any())


@pytest.mark.parametrize("codec", CODECS, ids=["hybrid", "sampled", "hybrid all"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
def test_gradcheck(codec: Codec, temperature: float) -> None:
    torch.manual_seed(1)
    signal = make_signal(codec, 2 * torch.randn(3, 9))
    logits = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: forward_kl(z, signal, temperature), (logits,), atol=1e-5)


@pytest.mark.parametrize("codec", [HybridCodec(20, 6), SampledCodec(12)], ids=lambda c: c.name)
def test_value_and_gradient_are_unbiased_at_one(codec: Codec) -> None:
    """The mean over many draws is the dense KL, and so is its gradient."""
    torch.manual_seed(0)
    draws, classes = 3000, 200
    teacher, student = 2 * torch.randn(1, classes), torch.randn(1, classes)
    signal = make_signal(codec, teacher.expand(draws, -1).contiguous())
    logits = student.expand(draws, -1).contiguous().requires_grad_()
    values = forward_kl(logits, signal, 1.0)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    true, own = torch.log_softmax(teacher.double(), -1), torch.log_softmax(student.double(), -1)
    expected = float((true.exp() * (true - own)).sum())
    noise = float(values.detach().std()) / draws**0.5
    assert abs(float(values.detach().mean()) - expected) < 4 * noise + 2e-3
    dense = (own.exp() - true.exp())[0]
    mean = gradient.double().mean(0)
    # Noise falls with the root of the draws, a bias would not: over thirty times as many it falls to a fifth and less.
    few = gradient.double()[:100].mean(0)
    assert float((mean - dense).norm()) < 0.35 * float((few - dense).norm())
    assert float((mean - dense).norm() / dense.norm()) < 0.02


def test_bucket_alone_stays_biased_where_draws_are_not() -> None:
    """The check above can fail: a target that is the same every time misses the dense gradient for ever."""
    torch.manual_seed(0)
    teacher, student = 2 * torch.randn(1, 200), torch.randn(1, 200)
    dense = torch.softmax(student, -1) - torch.softmax(teacher, -1)
    signal = make_signal(HybridCodec(20, 6), teacher)
    bucket = TeacherSignal(**{**vars(signal), "draw_ids": None, "draw_logprob": None})
    logits = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(forward_kl(logits, bucket, 1.0).sum(), logits)
    assert float((gradient - dense).norm() / dense.norm()) > 0.02
