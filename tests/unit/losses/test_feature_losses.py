"""Feature losses against short float64 references, their gradients, and what changes nothing in them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill_jobs.losses import FEATURE_LOSSES


def pair(rows: int, mine: int, theirs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, width, generator=draw, dtype=torch.float64) for width in (mine, theirs))  # type: ignore[return-value]


def reference(name: str, student: np.ndarray, teacher: np.ndarray) -> float:
    if name == "mse":
        return float(np.mean([np.mean((s - t) ** 2) for s, t in zip(student, teacher, strict=True)]))
    if name == "cosine":
        both = zip(student, teacher, strict=True)
        return float(np.mean([1 - s @ t / np.sqrt((s @ s) * (t @ t)) for s, t in both]))
    # By the Gram matrices of the positions, as the Hilbert-Schmidt independence criterion has them.
    n = len(student)
    centre = np.eye(n) - np.ones((n, n)) / n
    k, m = (centre @ x @ x.T @ centre for x in (student, teacher))
    return float(1 - np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m)))


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_against_the_definition(name: str) -> None:
    kind = FEATURE_LOSSES[name]
    student, teacher = pair(9, 5, 5 if kind.aligned else 3)
    expected = reference(name, student.numpy(), teacher.numpy())
    assert float(kind(student, teacher)) == pytest.approx(expected, rel=1e-10)
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        found = kind(student.to(dtype), teacher.float())
        assert found.dtype == torch.float32 and float(found) == pytest.approx(expected, rel=close)


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_gradients(name: str) -> None:
    kind = FEATURE_LOSSES[name]
    student, teacher = pair(6, 4, 4 if kind.aligned else 3)
    assert torch.autograd.gradcheck(lambda x: kind(x, teacher), student.requires_grad_())


@pytest.mark.parametrize("name", FEATURE_LOSSES)
@pytest.mark.parametrize("rows", [0, 1])
def test_few_positions_give_a_number_and_a_gradient(name: str, rows: int) -> None:
    student, teacher = pair(rows, 4, 4)
    found = FEATURE_LOSSES[name](student.requires_grad_(), teacher)
    found.backward()  # type: ignore[no-untyped-call]
    assert bool(torch.isfinite(found)) and student.grad is not None and bool(torch.isfinite(student.grad).all())
    assert rows or found.item() == 0.0


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_equal_layers_cost_nothing_and_constant_ones_break_nothing(name: str) -> None:
    kind, (student, _) = FEATURE_LOSSES[name], pair(8, 4, 4)
    assert float(kind(student, student)) == pytest.approx(0.0, abs=1e-12)
    still = torch.zeros(8, 4, dtype=torch.float64, requires_grad=True)
    kind(still, student).backward()  # type: ignore[no-untyped-call]
    assert still.grad is not None and bool(torch.isfinite(still.grad).all())


@settings(deadline=None)
@given(seed=st.integers(0, 2**20), scale=st.floats(1e-3, 1e3), rows=st.integers(3, 12))
def test_cka_sees_neither_rotation_nor_scale_nor_shift(seed: int, scale: float, rows: int) -> None:
    student, teacher = pair(rows, 6, 4, seed)
    turn = torch.linalg.qr(pair(6, 6, 6, seed + 1)[0])[0]
    cka = FEATURE_LOSSES["cka"]
    before = float(cka(student, teacher))
    assert float(cka(scale * student @ turn + 3.0, teacher)) == pytest.approx(before, abs=1e-9)
    assert -1e-9 <= before <= 1 + 1e-9


@settings(deadline=None)
@given(seed=st.integers(0, 2**20), cut=st.integers(1, 8))
def test_the_mean_over_positions_is_that_of_its_pieces(seed: int, cut: int) -> None:
    """What accumulation and ranks rely on; cka is about a micro-batch, and says so."""
    student, teacher = pair(9, 4, 4, seed)
    for name in ("mse", "cosine"):
        kind = FEATURE_LOSSES[name]
        pieces = [(kind(student[s], teacher[s]), len(student[s])) for s in (slice(0, cut), slice(cut, None))]
        joined = sum(float(value) * count for value, count in pieces) / len(student)
        assert float(kind(student, teacher)) == pytest.approx(joined, rel=1e-10)
