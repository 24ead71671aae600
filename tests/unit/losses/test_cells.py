"""The cells that a sparse signal leaves: each class once, all mass, and a bucket that rounding can't empty."""

import pytest
import torch
from loss_cases import SHAPES, known_of, merged, softened, sparse_signal

from distill_jobs.losses.cells import LEAST, make_cells
from distill_jobs.store.codecs import Codec
from distill_jobs.store.codecs.hybrid import HybridCodec
from distill_jobs.store.codecs.sampled import SampledCodec
from distill_jobs.store.draws import uniforms


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_class_once_and_all_mass(shape: str, temperature: float) -> None:
    torch.manual_seed(0)
    teacher, student, labels = 2 * torch.randn(20, 12), torch.randn(20, 12).double(), torch.randint(0, 12, (20,))
    signal = sparse_signal(shape, teacher, labels)
    for asked in (None, labels):
        cells = make_cells(student, signal, temperature, labels=asked)
        for side in (cells.teacher, cells.student):
            torch.testing.assert_close(side.exp().sum(-1), torch.ones(20).double(), rtol=1e-3, atol=1e-3)
        alive = cells.student > LEAST
        for row in range(20):
            known = known_of(signal, row, [] if asked is None else [int(labels[row])])
            mine = merged(softened(student[row], temperature), known)
            torch.testing.assert_close(cells.student[row][alive[row]].exp().sort()[0], mine.sort()[0])
            # Places that stand for nothing hold the same on both sides.
            assert bool((cells.teacher[row][~alive[row]] == LEAST).all())
        if asked is not None:
            assert cells.gold is not None
            own = softened(student, temperature).gather(1, labels[:, None])[:, 0]
            torch.testing.assert_close(cells.student.gather(1, cells.gold[:, None])[:, 0].exp(), own)


@pytest.mark.parametrize("sharp", [0.3, 1.0, 3.0, 6.0])
@pytest.mark.parametrize("codec", [SampledCodec(64), HybridCodec(48, 16), HybridCodec(12, 4)], ids=lambda c: c.name)
def test_rounding_moves_little_mass_into_the_bucket(codec: Codec, sharp: float) -> None:
    torch.manual_seed(0)
    teacher, labels = sharp * torch.randn(50, 300), torch.zeros(50, dtype=torch.int64)
    teacher[:10, 7] += 8 * sharp
    signal = codec.decode(codec.encode(teacher, labels, uniforms(0, torch.arange(50), 1)), 300)
    for temperature in (0.5, 1.0, 2.0):
        cells = make_cells(teacher, signal, temperature)
        bucket, own = cells.teacher[:, -1].exp(), cells.student[:, -1].exp()
        # Where one class stands far above the rest, the tail's own curve over T is the least exact (FORMAT.md).
        assert float((bucket - own).abs().max()) < 0.06 and float((bucket - own).abs().mean()) < 0.01
        # Never so little that a student's honest rest would look like a mistake of many nats.
        assert bool((cells.teacher[:, -1] > cells.student[:, -1] - 5).all() | (own < 1e-3).all())


def test_a_row_in_which_nothing_is_known() -> None:
    """No head and no draw: one bucket, which no student can miss."""
    torch.manual_seed(0)
    signal = sparse_signal("sampled", torch.randn(2, 12), torch.zeros(2, dtype=torch.int64))
    assert signal.draw_ids is not None
    bare = {**vars(signal), "draw_counts": torch.zeros(2, 7)}
    logits = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    cells = make_cells(logits, type(signal)(**bare), 1.0)
    torch.testing.assert_close(cells.teacher[:, -1].exp(), torch.ones(2).double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cells.student[:, -1], torch.zeros(2).double())
    (gradient,) = torch.autograd.grad(cells.student[:, -1].sum(), logits)
    assert float(gradient.abs().max()) < 1e-12
