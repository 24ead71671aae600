"""The fused head and loss against the plain path: ``distillation_loss`` of whole logits, differentiated by autograd."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill_jobs.errors import VocabularyError
from distill_jobs.losses import LOSSES, LossParts, SoftLoss, distillation_loss, make_loss
from distill_jobs.losses.fused import fused_loss
from distill_jobs.losses.fused_head import FusedHead
from distill_jobs.losses.fused_task import OutputHead
from distill_jobs.spec.distill import Loss
from distill_jobs.spec.gate import Gate
from distill_jobs.store.codecs import Codec
from distill_jobs.store.codecs.dense import DenseCodec
from distill_jobs.store.codecs.hybrid import HybridCodec
from distill_jobs.store.codecs.sampled import SampledCodec
from distill_jobs.store.codecs.topk import TopKCodec
from distill_jobs.store.draws import uniforms
from distill_jobs.store.signal import TeacherSignal

CODECS = [DenseCodec(), TopKCodec(5), TopKCodec(60), HybridCodec(5, 4), SampledCodec(7), HybridCodec(60, 2)]
NAMES = ["dense", "topk", "topk all", "hybrid", "sampled", "hybrid all"]
N, H, C, V = 7, 6, 40, 43


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors as small as these are not worth sharing out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_signal(
    codec: Codec, rows: int = N, classes: int = C, scale: float = 2.0, gold: Tensor | None = None
) -> TeacherSignal:
    logits = scale * torch.randn(rows, classes)
    right = logits.argmax(-1) if gold is None else gold
    return codec.decode(codec.encode(logits, right, uniforms(0, torch.arange(rows), 1)), classes)


def make_head(bias: bool = False, dtype: torch.dtype = torch.float64, **post: float) -> OutputHead:
    weight = torch.randn(V, H, dtype=torch.float64).to(dtype)
    shift = torch.randn(V, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    return OutputHead(weight.requires_grad_(), shift, **post)


def plain_loss(hidden: Tensor, head: OutputHead, labels: Tensor, *rest: Any, **more: Any) -> LossParts:
    """What the fused loss has to equal, from its definition."""
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias) * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    more.pop("chunk", None)
    return distillation_loss(logits, labels, *rest, **more)


def outcome(loss: Callable[..., LossParts], hidden: Tensor, head: OutputHead, *rest: Any, **more: Any) -> list[Tensor]:
    """The parts of a loss, and the gradients of three times its total."""
    leaves = [hidden.detach().requires_grad_(), head.weight, *([] if head.bias is None else [head.bias])]
    parts = loss(leaves[0], head, *rest, **more)
    gradients = torch.autograd.grad(3.0 * parts.total, leaves)
    return [parts.total.detach(), parts.hard, parts.soft, *gradients]


def both_agree(hidden: Tensor, head: OutputHead, *rest: Any, tight: float = 1e-9, **more: Any) -> None:
    found, true = (outcome(loss, hidden, head, *rest, **more) for loss in (fused_loss, plain_loss))
    torch.testing.assert_close(found, true, rtol=tight, atol=tight)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7, 2.0, 4.0])
@pytest.mark.parametrize("codec", CODECS, ids=NAMES)
def test_equals_the_plain_path(codec: Codec, temperature: float) -> None:
    torch.manual_seed(0)
    hidden, labels = torch.randn(N, H, dtype=torch.float64), torch.randint(0, C, (N,))
    for alpha, more in ((0.3, {"chunk": 3}), (1.0, {})):
        both_agree(hidden, make_head(), labels, make_signal(codec), alpha, temperature, tight=2e-6, **more)


@pytest.mark.parametrize("post", [{}, {"scale": 0.7}, {"softcap": 1.5}, {"scale": 3.0, "softcap": 2.5}], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("codec", [CODECS[0], CODECS[3]], ids=["dense", "hybrid"])
def test_bias_scale_and_cap(codec: Codec, bias: bool, post: dict[str, float]) -> None:
    torch.manual_seed(1)
    hidden, labels = torch.randn(N, H, dtype=torch.float64), torch.randint(0, C, (N,))
    for temperature in (1.0, 2.0, 3.1):
        both_agree(hidden, make_head(bias, **post), labels, make_signal(codec), 0.6, temperature, tight=2e-6, chunk=4)
    both_agree(hidden, make_head(bias, **post), labels, None, 0.0, 2.0, classes=C, chunk=4)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    which=st.integers(0, len(CODECS) - 1),
    temperature=st.floats(0.5, 10),
    alpha=st.floats(0, 1),
    teacher=st.floats(0, 20),
    student=st.floats(0, 6),
)
def test_float32_is_as_close_as_the_plain_path(
    seed: int, which: int, temperature: float, alpha: float, teacher: float, student: float
) -> None:
    torch.manual_seed(seed)
    signal, head = make_signal(CODECS[which], scale=teacher), make_head(dtype=torch.float32)
    hidden, labels = student * torch.randn(N, H), torch.randint(0, C, (N,))
    both_agree(hidden, head, labels, signal, alpha, temperature, tight=2e-4)


class Again(torch.autograd.Function):
    """The loss and its gradient as a function that can be asked often, as gradcheck does; the fused loss only once."""

    @staticmethod
    def forward(ctx: Any, loss: Callable[..., Tensor], *leaves: Tensor) -> Tensor:
        ctx.loss = loss
        ctx.save_for_backward(*leaves)
        return loss(*leaves).detach()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [leaf.detach().requires_grad_() for leaf in ctx.saved_tensors]
        with torch.enable_grad():
            value = ctx.loss(*leaves)
        return None, *torch.autograd.grad(value, leaves, *upstream)


@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("codec", [DenseCodec(), TopKCodec(3), HybridCodec(3, 2)], ids=lambda c: c.name)
def test_gradcheck(codec: Codec, temperature: float) -> None:
    torch.manual_seed(2)
    signal, labels = make_signal(codec, 2, 6), torch.randint(0, 6, (2,))
    leaves = [torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((2, 2), (7, 2), (7,))]

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = OutputHead(weight, bias, 1.2, 3.0)
        return fused_loss(hidden, head, labels, signal, 0.6, temperature, chunk=1).total

    assert torch.autograd.gradcheck(lambda *inputs: Again.apply(loss, *inputs), leaves, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_bfloat16_is_as_near_to_the_truth_as_the_plain_path(alpha: float) -> None:
    """Products in bf16, all sums in fp32: the error against float64 is no larger than that of whole bf16 logits."""
    torch.manual_seed(3)
    rows = 600
    signal, labels = make_signal(HybridCodec(5, 4), rows), torch.randint(0, C, (rows,))
    half = make_head(dtype=torch.bfloat16)
    hidden = torch.randn(rows, H).bfloat16()
    exact = OutputHead(half.weight.detach().double().requires_grad_())
    rest = (labels, signal, alpha, 2.0)
    true = outcome(plain_loss, hidden.double(), exact, *rest, classes=C)
    errors = [
        [float((a.double() - b).norm() / b.norm().clamp(min=1e-9)) for a, b in zip(found, true, strict=True)]
        for found in (
            outcome(fused_loss, hidden, half, *rest, classes=C, chunk=64),
            outcome(plain_loss, hidden, half, *rest, classes=C),
        )
    ]
    for ours, theirs in zip(*errors, strict=True):
        assert ours < max(1.5 * theirs, 2e-3)


def test_float16_survives_a_loss_scale() -> None:
    """A mean over many positions makes gradients that fp16 can't hold; they are divided after the loss scale."""
    torch.manual_seed(4)
    rows, scale = 4000, 2.0**16
    labels, half = torch.randint(0, C, (rows,)), make_head(dtype=torch.float16)
    hidden = (0.1 * torch.randn(rows, H)).half().requires_grad_()
    parts = fused_loss(hidden, half, labels, None, 0.0, 1.0, classes=C, chunk=512)
    found = torch.autograd.grad(parts.total * scale, [hidden, half.weight])
    exact = OutputHead(half.weight.detach().double().requires_grad_())
    true = outcome(plain_loss, hidden.detach().double(), exact, labels, None, 0.0, 1.0, classes=C)[3:]
    for ours, wanted in zip(found, true, strict=True):
        assert float((ours.double() - wanted / 3 * scale).norm() / (wanted / 3 * scale).norm()) < 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jensen_shannon", "reverse_kl"])
def test_compiled_passes_give_the_same(name: str) -> None:
    torch.manual_seed(8)
    hidden, labels = torch.randn(N, H, dtype=torch.float64), torch.randint(0, C, (N,))
    rest = (labels, make_signal(HybridCodec(5, 4)), 0.5, 2.0, make_loss(Loss.model_validate(name)))
    head = make_head()
    found, eager = (outcome(fused_loss, hidden, head, *rest, compiled=compiled) for compiled in (True, False))
    torch.testing.assert_close(found, eager)


def test_the_head_tells_what_its_gate_changed() -> None:
    """Called inside a model, it gives all that ``fused_loss`` gives."""
    torch.manual_seed(9)
    layer, hidden, labels = torch.nn.Linear(H, C, bias=False), torch.randn(1, N, H), torch.randint(0, C, (1, N))
    signal = make_signal(HybridCodec(5, 4), gold=labels[0])
    soft = make_loss(gate=Gate.model_validate("drop").of("causal_lm"))
    parts = FusedHead(layer).loss(lambda: layer(hidden), labels, signal, 0.5, 1.0, soft)
    alone = fused_loss(hidden[0], OutputHead(layer.weight), labels[0], signal, 0.5, 1.0, soft)
    assert parts.gated is not None and alone.gated is not None
    torch.testing.assert_close((parts.total, parts.gated), (alone.total, alone.gated))


def test_autocast_gives_full_precision_gradients() -> None:
    torch.manual_seed(5)
    signal, labels = make_signal(HybridCodec(5, 4)), torch.randint(0, C, (N,))
    head, hidden = make_head(dtype=torch.float32), torch.randn(N, H)
    true = outcome(plain_loss, hidden, head, labels, signal, 0.5, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = outcome(fused_loss, hidden, head, labels, signal, 0.5, 1.0)
    assert all(value.dtype == torch.float32 for value in found)
    torch.testing.assert_close(found, true, rtol=0.05, atol=0.05)


def test_a_student_surer_than_float32_keeps_its_tail() -> None:
    signal = make_signal(TopKCodec(2), 1, 30, 1.0)
    weight = torch.full((30, 1), -60.0)
    weight[signal.head_ids[0]] = 60.0
    head = OutputHead(weight.requires_grad_())
    both_agree(torch.ones(1, 1), head, signal.head_ids[0, :1], signal, 0.5, 1.0, tight=1e-5)
    both_agree(torch.ones(1, 1), head, signal.head_ids[0, :1], signal, 0.5, 2.0, tight=1e-5)


@pytest.mark.parametrize("standardise", [False, True], ids=["plain", "standardised"])
@pytest.mark.parametrize("codec", [CODECS[0], CODECS[3]], ids=["dense", "hybrid"])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_runs_in_chunks(name: str, codec: Codec, standardise: bool) -> None:
    torch.manual_seed(6)
    kind = LOSSES[name]
    if kind.sparse == "refused" and codec.name != "dense":
        return
    hidden, labels = torch.randn(N, H, dtype=torch.float64), torch.randint(0, C, (N,))
    rest = (labels, make_signal(codec), 0.4, 2.0, SoftLoss(kind, kind.arguments(), standardise))
    both_agree(hidden, make_head(True, scale=0.9, softcap=4.0), *rest, tight=2e-6, chunk=3)


def test_padding_columns_get_no_gradient() -> None:
    torch.manual_seed(7)
    head, labels = make_head(True), torch.randint(0, C, (N,))
    parts = fused_loss(torch.randn(N, H, dtype=torch.float64), head, labels, make_signal(TopKCodec(5)), 0.5, 2.0)
    gradients = torch.autograd.grad(parts.total, [head.weight, head.bias])
    assert not any(gradient[C:].any() for gradient in gradients)
    assert all(gradient[:C].any() for gradient in gradients)


def test_nothing_to_score_and_nothing_to_learn() -> None:
    head, none = make_head(True), torch.zeros(0, dtype=torch.int64)
    hidden = torch.randn(0, H, dtype=torch.float64, requires_grad=True)
    parts = fused_loss(hidden, head, none, None, 0.0, 1.0)
    assert parts.positions == 0 and float(parts.total.detach()) == 0.0
    gradients = torch.autograd.grad(parts.total, [hidden, head.weight, head.bias])
    assert not any(gradient.any() for gradient in gradients)

    frozen = OutputHead(head.weight.detach())
    hidden, labels = torch.randn(N, H, dtype=torch.float64), torch.randint(0, C, (N,))
    with torch.no_grad():
        assert not fused_loss(hidden, head, labels, None, 0.0, 1.0).total.requires_grad
    leaf = hidden.clone().requires_grad_()
    fused_loss(leaf, frozen, labels, None, 0.0, 1.0).total.backward()
    assert leaf.grad is not None and frozen.weight.grad is None


def test_refusals() -> None:
    head, labels = make_head(), torch.randint(0, C, (N,))
    hidden = torch.randn(N, H, dtype=torch.float64, requires_grad=True)
    with pytest.raises(VocabularyError, match="43 logits"):
        fused_loss(hidden, head, labels, make_signal(TopKCodec(5), N, 50), 0.5, 1.0)
    with pytest.raises(VocabularyError, match="needs the teacher's signal"):
        fused_loss(hidden, head, labels, None, 0.5, 1.0)
    parts = fused_loss(hidden, head, labels, None, 0.0, 1.0)
    parts.total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        parts.total.backward()


def test_not_finite_logits_reach_the_caller() -> None:
    hidden = torch.randn(N, H, dtype=torch.float64)
    hidden[2] = torch.nan
    for signal, alpha in ((None, 0.0), (make_signal(HybridCodec(5, 4)), 0.5), (make_signal(DenseCodec()), 1.0)):
        assert not torch.isfinite(fused_loss(hidden, make_head(), torch.arange(N), signal, alpha, 1.0).total)


@pytest.mark.parametrize("gate", ["none", "revise", "selective"])
def test_no_tensor_of_all_positions_and_classes(gate: str) -> None:
    """The largest tensor that is ever made is the weight's gradient, or the chunk's buffer."""
    rows, classes = 900, 2000
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            largest.extend(r.untyped_storage().nbytes() for r in (result,) if isinstance(r, Tensor))
            return result

    head = OutputHead(torch.randn(classes, H).requires_grad_())
    signal = make_signal(TopKCodec(5), rows, classes)
    hidden, labels = torch.randn(rows, H, requires_grad=True), torch.randint(0, classes, (rows,))
    with Watch():
        soft = make_loss(gate=Gate.model_validate(gate))
        fused_loss(hidden, head, labels, signal, 0.5, 2.0, soft, chunk=50).total.backward()
    assert max(largest) <= 4 * classes * 50
