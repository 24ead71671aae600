"""Z-scored logits, and the tail's curve at a temperature of each position's own."""

import loss_cases
import pytest
import torch
from loss_cases import dense_signal, loss_of, sparse_signal

from distill_jobs.losses.standardise import standardise
from distill_jobs.losses.tail_rows import log_partition
from distill_jobs.store import tail


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_dense_is_the_papers_definition(temperature: float) -> None:
    torch.manual_seed(0)
    teacher, student, labels = 3 * torch.randn(4, 30), torch.randn(4, 30).double(), torch.arange(4)
    z_t, z_s = ((z - z.mean(-1, keepdim=True)) / z.std(-1, correction=0, keepdim=True) for z in (teacher, student))
    t, s = loss_cases.softened(z_t, temperature), loss_cases.softened(z_s, temperature)
    for name in ("forward_kl", "reverse_kl", "decoupled", "mse"):
        found = loss_of(name, standardise=True)(student, dense_signal(teacher, labels), temperature, labels)
        true = loss_cases.reference_rows(name, t, s, labels, dense_signal(teacher, labels))
        torch.testing.assert_close(found, true, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", ["dense", "topk", "hybrid", "sampled"])
def test_scale_and_shift_of_the_student_play_no_part(shape: str) -> None:
    torch.manual_seed(0)
    teacher, student, labels = 3 * torch.randn(4, 30), torch.randn(4, 30).double(), torch.arange(4)
    signal = dense_signal(teacher, labels) if shape == "dense" else sparse_signal(shape, teacher, labels)
    for name in ("forward_kl", "jensen_shannon"):
        plain, scored = loss_of(name), loss_of(name, standardise=True)
        moved = 1.7 * student + 5
        same = scored(moved, signal, 2.0, labels)
        torch.testing.assert_close(same, scored(student, signal, 2.0, labels), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(plain(moved, signal, 2.0, labels), plain(student, signal, 2.0, labels), rtol=1e-2)
        # A student that says the same at another scale costs nothing.
        assert float(scored(0.6 * teacher.double(), signal, 2.0, labels).abs().max()) < 2e-3


@pytest.mark.parametrize("shape", ["topk", "hybrid", "sampled"])
def test_sparse_scores_are_those_of_the_known_classes_on_both_sides(shape: str) -> None:
    torch.manual_seed(0)
    teacher, student, labels = 3 * torch.randn(6, 30), torch.randn(6, 30).double(), torch.arange(6)
    signal = sparse_signal(shape, teacher, labels)
    softened, softness = standardise(student, signal, 2.0)
    assert bool((softness >= 0.5).all()) and bool((softness <= 10).all())
    for row in range(6):
        head = signal.head_ids[row].tolist() or sorted(set(signal.draw_ids[row].tolist()))
        of_teacher, of_student = (2 * z[row, head].double().std(correction=0) for z in (teacher, student))
        torch.testing.assert_close(softness[row].double(), of_teacher.clamp(0.5, 10), rtol=1e-4, atol=1e-4)
        moved = of_student * of_teacher.clamp(0.5, 10) / of_teacher
        torch.testing.assert_close(softened[row], student[row] / moved, rtol=1e-4, atol=1e-4)
    # The cells are then those of each position's own temperature.
    t = torch.stack([loss_cases.softened(teacher[i], float(softness[i])) for i in range(6)])
    found = loss_of("reverse_kl", standardise=True)(student, signal, 2.0, labels)
    true = loss_cases.reference_rows("reverse_kl", t, torch.softmax(softened, -1), labels, signal)
    torch.testing.assert_close(found, true, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("shape", ["dense", "topk", "sampled"])
def test_a_student_that_has_learnt_nothing_yet(shape: str) -> None:
    """All logits equal: no deviation to divide by."""
    torch.manual_seed(0)
    teacher, labels = 3 * torch.randn(4, 30), torch.arange(4)
    signal = dense_signal(teacher, labels) if shape == "dense" else sparse_signal(shape, teacher, labels)
    logits = torch.zeros(4, 30, requires_grad=True)
    found = loss_of("forward_kl", standardise=True)(logits, signal, 2.0, labels)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert torch.isfinite(found).all() and 0 < float(gradient.abs().max()) < 20


def test_the_tail_by_rows_is_the_tail() -> None:
    torch.manual_seed(0)
    signal = sparse_signal("topk", torch.cat([3 * torch.randn(5, 500), torch.zeros(1, 500)]), torch.zeros(6).long())
    nodes = torch.cat([signal.tail_nodes, torch.full((1, len(tail.TAIL_BETAS)), tail.NO_TAIL)])
    for beta in [*tail.TAIL_BETAS, 0.12, 0.2, 0.3, 0.7, 1.05, 1.7]:
        found = log_partition(nodes, torch.full((7,), beta))
        torch.testing.assert_close(found, tail.log_partition(nodes, beta), rtol=1e-5, atol=1e-5)
    mixed = torch.tensor([0.1, 0.3, 0.5, 0.9, 1.5, 2.0, 1.0])
    alone = torch.stack([tail.log_partition(nodes[i : i + 1], float(mixed[i]))[0] for i in range(7)])
    torch.testing.assert_close(log_partition(nodes, mixed), alone, rtol=1e-5, atol=1e-5)
