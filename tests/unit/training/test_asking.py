"""What a live teacher is asked, and when: ahead of the reader, each micro-batch once, and nothing that piles up."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from distill_jobs.training.feed import Order, share_of_rank
from distill_jobs.training.live import STEPS_AHEAD, Asking, Foretelling

MICRO, WORLD, BATCH = 2, 2, 8


class Teacher:
    """Counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def ask(self, numbers: np.ndarray) -> Any:
        self.asked.append(numbers.tolist())
        return SimpleNamespace(wait=lambda: {"t.x": numbers * 10})


def reader(rank: int) -> tuple[Teacher, Asking, Foretelling]:
    teacher = Teacher()
    asking = Asking(lambda numbers: {"sample_id": numbers}, teacher.ask)
    place: Any = SimpleNamespace(rank=rank, world_size=WORLD)
    return teacher, asking, Foretelling(Order(30, 5), asking.expect, MICRO, place)


def test_micro_batches_are_asked_for_ahead_and_once() -> None:
    plain, shares = Order(30, 5), []
    for rank in range(WORLD):
        teacher, asking, order = reader(rank)
        for step in range(6):
            rows = order.take(step * BATCH, BATCH)
            assert np.array_equal(rows, plain.take(step * BATCH, BATCH))
            assert len(teacher.asked) == (step + 1 + STEPS_AHEAD) * 2
            for numbers in share_of_rank(rows, MICRO, rank, WORLD):
                taken = asking.take(numbers)
                assert (
                    taken["sample_id"].tolist() == numbers.tolist() and taken["t.x"].tolist() == (numbers * 10).tolist()
                )
                shares += numbers.tolist()
        assert len(teacher.asked) == (6 + STEPS_AHEAD) * 2, "a micro-batch was asked for twice"
    assert sorted(shares) == sorted(plain.take(0, 6 * BATCH).tolist())


def test_going_back_neither_loses_rows_nor_keeps_them() -> None:
    teacher, asking, order = reader(0)
    for start in (0, 800, 1600, 2400, 0):
        rows = order.take(start, BATCH)
    assert asking.take(share_of_rank(rows, MICRO, 0, WORLD)[0])["t.x"] is not None
    assert len(asking._open) <= 2 * 2 * (1 + STEPS_AHEAD)
    before = len(teacher.asked)
    assert asking.take(np.array([29, 3]))["t.x"].tolist() == [290, 30]  # nobody expected these
    assert len(teacher.asked) == before + 1
