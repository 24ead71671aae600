"""Every soft loss, over dense and sparse signals, against dense float64 references straight from the definitions."""

import inspect
import math
import pickle

import loss_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import SHAPES, SPARSE, STORED, TEMPERATURES, dense_signal, loss_of, sparse_signal
from torch import Tensor

from distill_jobs.errors import SpecError, VocabularyError
from distill_jobs.losses import LOSSES, distillation_loss
from distill_jobs.spec.distill import Loss
from distill_jobs.store.signal import TeacherSignal

ARGUMENTS = {
    "jensen_shannon": {"beta": 0.2},
    "skew_forward_kl": {"skew": 0.3},
    "skew_reverse_kl": {"skew": 0.0},
    "adaptive_kl": {"mu": 0.8},
    "decoupled": {"alpha": 2.0, "beta": 0.5},
}


def case(rows: int = 5, classes: int = 12, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A teacher's logits, a student's, and labels of which the first is the likeliest class and the last the least."""
    torch.manual_seed(seed)
    teacher, student = 2 * torch.randn(rows, classes), 2 * torch.randn(rows, classes, dtype=torch.float64)
    labels = torch.randint(0, classes, (rows,))
    labels[0], labels[-1] = teacher[0].argmax(), teacher[-1].argmin()
    return teacher, student.requires_grad_(), labels


def signal_of(shape: str, teacher: Tensor, labels: Tensor) -> TeacherSignal:
    return dense_signal(teacher, labels) if shape == "dense" else sparse_signal(shape, teacher, labels)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("shape", ["dense", *SHAPES])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient(name: str, shape: str, temperature: float) -> None:
    if shape != "dense" and (name == "mse" or (name == "forward_kl" and SHAPES[shape][1])):
        pytest.skip("refused, or with draws in the bucket's place: test_draws.py")
    if shape == "sampled" and temperature < 1:
        pytest.skip("draws hold all but nothing, and the bucket's least mass shows: test_cells.py")
    teacher, student, labels = case()
    signal = signal_of(shape, teacher, labels)
    for arguments in ({}, ARGUMENTS.get(name, {})):
        found = loss_of(name, **arguments)(student, signal, temperature, labels)
        sides = loss_cases.softened(teacher, temperature), loss_cases.softened(student, temperature)
        true = loss_cases.reference_rows(name, *sides, labels, signal, **arguments)
        # fp16 log-probabilities of the dense codec; the tail's interpolation where it is not stored.
        loose = 2e-2 if shape == "dense" else 1e-4 if temperature in STORED else 1e-2
        torch.testing.assert_close(found, true, rtol=loose, atol=loose)
        upstream = torch.rand(len(found), dtype=torch.float64)
        (gradient,) = torch.autograd.grad((found * upstream).sum(), student)
        (expected,) = torch.autograd.grad((true * upstream).sum(), student)
        torch.testing.assert_close(gradient, expected, rtol=loose, atol=loose)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("shape", ["dense", *SHAPES])
def test_gradcheck(shape: str, temperature: float) -> None:
    teacher, student, labels = case(3, 12, seed=1)
    padded = torch.cat([student.detach(), torch.randn(3, 2, dtype=torch.float64)], dim=1).requires_grad_()
    signal = signal_of(shape, teacher, labels)
    for name in SPARSE if shape != "dense" else LOSSES:
        # The weight of the adaptive KL has no gradient, so no difference quotient will do.
        if name != "adaptive_kl":
            for standardise in (False, True):
                loss = loss_of(name, standardise)
                assert torch.autograd.gradcheck(
                    lambda z, loss=loss: loss(z, signal, temperature, labels), (padded,), atol=1e-5, fast_mode=True
                ), name


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    name=st.sampled_from([n for n in SPARSE if n not in ("adaptive_kl", "decoupled", "forward_kl")]),
    shape=st.sampled_from(list(SHAPES)),
    temperature=st.sampled_from(sorted(STORED)),
    sharp=st.floats(0, 8),
    student_sharp=st.floats(0, 8),
)
def test_cells_are_a_lower_bound(
    seed: int, name: str, shape: str, temperature: float, sharp: float, student_sharp: float
) -> None:
    torch.manual_seed(seed)
    teacher, student = sharp * torch.randn(3, 30), student_sharp * torch.randn(3, 30)
    labels = torch.zeros(3, dtype=torch.int64)
    found = loss_of(name)(student, sparse_signal(shape, teacher, labels, seed), temperature, labels)
    p, q = (loss_cases.softened(z, temperature).clamp(min=1e-26) for z in (teacher, student))
    whole = torch.stack([loss_cases.reference(name, a, b, 0) for a, b in zip(p, q, strict=True)])
    assert torch.isfinite(found).all()
    assert float(found.min()) > -1e-3
    assert bool((found.double() <= whole * 1.01 + 5e-3).all())


@pytest.mark.parametrize("name", LOSSES)
def test_the_same_distribution_costs_nothing(name: str) -> None:
    torch.manual_seed(0)
    teacher, labels = 2 * torch.randn(4, 60), torch.tensor([0, 1, 2, 3])
    shapes = ["dense", "topk", "hybrid", "sampled"]
    for shape in shapes if name in SPARSE and name != "forward_kl" else ["dense"]:
        signal = signal_of(shape, teacher, labels)
        for temperature in (0.5, 1.0, 4.0):
            for standardise in (False, True):
                logits = teacher.double().requires_grad_()
                found = loss_of(name, standardise)(logits, signal, temperature, labels)
                # The total variation is as far off as the teacher's masses, the others as their square.
                limit = {"total_variation": 5e-3, "decoupled": 8 * 5e-4}.get(name, 5e-4)
                limit *= 10 if shape == "sampled" else 1
                assert float(found.detach().abs().max()) < limit, shape


def test_only_draws_tell_what_lies_in_the_bucket() -> None:
    """A student that agrees on head and tail mass alone costs nothing without draws, and something with them."""
    torch.manual_seed(0)
    teacher, labels = 2 * torch.randn(50, 12), torch.zeros(50, dtype=torch.int64)
    student = teacher.clone()
    order = teacher.argsort(dim=-1)
    # The least and the greatest of the tail change places.
    student.scatter_(1, order[:, :1], teacher.gather(1, order[:, 7:8]))
    student.scatter_(1, order[:, 7:8], teacher.gather(1, order[:, :1]))
    for name in SPARSE:
        loss = loss_of(name)
        without, with_draws = (sparse_signal(shape, teacher, labels) for shape in ("topk", "hybrid"))
        if name != "decoupled":
            assert float(loss(student, without, 1.0, labels).abs().max()) < 1e-3, name
        assert float(loss(student, with_draws, 1.0, labels).mean()) > 5e-3, name


@pytest.mark.parametrize("name", SPARSE)
def test_nothing_wide_is_kept_but_the_logits(name: str) -> None:
    torch.manual_seed(0)
    teacher, labels = 2 * torch.randn(40, 3000), torch.arange(40)
    logits = torch.randn(40, 3000, requires_grad=True)
    kept: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() >= logits.numel():
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    for shape in ("topk", "hybrid", "sampled"):
        signal = sparse_signal(shape, teacher, labels)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss_of(name)(logits, signal, 2.0, labels).sum().backward()
        assert kept <= {logits.untyped_storage().data_ptr()}


@pytest.mark.parametrize("shape", ["dense", "hybrid", "sampled"])
@pytest.mark.parametrize("name", SPARSE)
def test_padding_and_nothing_at_all(name: str, shape: str) -> None:
    teacher, student, labels = case()
    signal, loss = signal_of(shape, teacher, labels), loss_of(name)
    padded = torch.cat([student.detach(), 50 * torch.randn(5, 4, dtype=torch.float64)], dim=1).requires_grad_()
    for standardise in (False, True):
        loss = loss_of(name, standardise)
        torch.testing.assert_close(loss(padded, signal, 2.0, labels), loss(student, signal, 2.0, labels))
    parts = distillation_loss(padded, labels, signal, 1.0, 2.0, loss)
    (gradient,) = torch.autograd.grad(parts.total, padded)
    assert not gradient[:, 12:].any() and gradient[:, :12].any()
    with pytest.raises(VocabularyError, match="11 logits"):
        loss(student[:, :11], signal, 1.0, labels)
    empty = signal_of(shape, torch.zeros(2, 12), labels[:2])
    nothing = TeacherSignal(**{k: v[:0] if isinstance(v, Tensor) else v for k, v in vars(empty).items()})
    none = torch.randn(0, 12, requires_grad=True)
    assert loss(none, nothing, 1.0, labels[:0]).shape == (0,)
    distillation_loss(none, labels[:0], nothing, 0.5, 2.0, loss).total.backward()


@pytest.mark.parametrize("shape", ["dense", "topk", "hybrid", "sampled"])
@pytest.mark.parametrize("name", SPARSE)
def test_sure_teachers_and_sure_students_stay_finite(name: str, shape: str) -> None:
    """Tails without mass, classes without mass, and a student that is sure of another class."""
    teacher = torch.full((4, 40), -math.inf)
    teacher[0, :2], teacher[1, :4], teacher[2, :9] = 1.0, torch.tensor([9.0, 3.0, 2.0, 1.0]), 0.5
    teacher[3] = torch.linspace(300, -300, 40)
    labels = torch.tensor([1, 0, 8, 30])
    signal = signal_of(shape, teacher, labels)
    for scale in (0.0, 1.0, 80.0):
        for temperature in (0.5, 1.0, 4.0):
            for standardise in (False, True):
                logits = (scale * torch.linspace(-1, 1, 40)).repeat(4, 1).requires_grad_()
                found = loss_of(name, standardise)(logits, signal, temperature, labels)
                (gradient,) = torch.autograd.grad(found.sum(), logits)
                assert torch.isfinite(found).all() and torch.isfinite(gradient).all()
                # A softmax's gradient adds up to nothing.
                assert float(gradient.sum(-1).abs().max()) < 1e-3 * max(1.0, float(gradient.abs().max()))


def test_limits_of_the_generalised_jensen_shannon_divergence() -> None:
    teacher, student, labels = case()
    signal = dense_signal(teacher, labels)
    low, high = (loss_of("jensen_shannon", beta=b)(student, signal, 1.0) for b in (1e-5, 1 - 1e-5))
    torch.testing.assert_close(low / 1e-5, loss_of("forward_kl")(student, signal, 1.0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(high / 1e-5, loss_of("reverse_kl")(student, signal, 1.0), rtol=1e-3, atol=1e-3)


def test_the_decoupled_loss_puts_the_kl_together() -> None:
    teacher, student, labels = case()
    for shape in ("dense", "topk"):
        signal = signal_of(shape, teacher, labels)
        target = loss_of("decoupled", alpha=1.0, beta=0.0)(student, signal, 2.0, labels)
        among = loss_of("decoupled", alpha=0.0, beta=1.0)(student, signal, 2.0, labels)
        wrong = 1 - loss_cases.softened(teacher, 2.0).gather(1, labels[:, None])[:, 0]
        sides = loss_cases.softened(teacher, 2.0), loss_cases.softened(student, 2.0)
        rows = [
            loss_cases.known_of(signal, i, [int(labels[i])]) if shape != "dense" else [*range(12)] for i in range(5)
        ]
        whole = [
            loss_cases.reference("forward_kl", *(loss_cases.merged(side[i], rows[i]) for side in sides), 0)
            for i in range(5)
        ]
        torch.testing.assert_close(target + wrong * among, torch.stack(whole), rtol=1e-2, atol=1e-2)


def test_mse_is_that_of_the_logits_at_any_temperature() -> None:
    teacher, student, labels = case()
    signal, loss = dense_signal(teacher, labels), loss_of("mse")
    apart = (student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
    for temperature in (1.0, 3.0):
        found = loss.scale(temperature) * loss(student, signal, temperature)
        torch.testing.assert_close(found, apart.square().mean(-1), rtol=1e-2, atol=1e-2)
    with pytest.raises(SpecError, match=r"distill\.loss mse compares all classes one by one"):
        loss(student, sparse_signal("topk", teacher, labels), 1.0)


def test_each_loss_says_its_own_scaling() -> None:
    assert {name: loss_of(name).scale(3.0) for name in LOSSES} == {
        name: 3.0 if name == "total_variation" else 9.0 for name in LOSSES
    }
    teacher, student, labels = case()
    signal, loss = dense_signal(teacher, labels), loss_of("total_variation")
    parts = distillation_loss(student, labels, signal, 0.25, 3.0, loss)
    torch.testing.assert_close(parts.soft, 3.0 * loss(student, signal, 3.0).mean().detach())
    torch.testing.assert_close(parts.total, 0.75 * parts.hard + 0.25 * parts.soft)


def test_the_spec_declares_what_is_registered() -> None:
    assert set(Loss.model_fields) == set(LOSSES)
    for name, kind in LOSSES.items():
        assert Loss.model_validate(name).chosen == kind.arguments()
        assert kind.name == name
        assert list(inspect.signature(kind.divergence).parameters)[1:] == list(kind.arguments.model_fields)
        assert name in loss_of(name).kind.name and pickle.loads(pickle.dumps(loss_of(name))) == loss_of(name)
    assert pickle.loads(pickle.dumps(loss_of("forward_kl"))).is_forward_kl
    assert not loss_of("forward_kl", standardise=True).is_forward_kl and not loss_of("reverse_kl").is_forward_kl
    assert [name for name, kind in LOSSES.items() if kind.sparse == "refused"] == ["mse"]
