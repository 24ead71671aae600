"""Threads beside the teacher: order, bounds, errors in either direction, and nothing left running."""

import threading
import time
from collections.abc import Iterator

import pytest

from distill_jobs.capture.overlap import Abandoned, Ahead, Behind


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def numbers(count: int, made: list[int], closed: list[bool] | None = None, fail_at: int | None = None) -> Iterator[int]:
    try:
        for number in range(count):
            if number == fail_at:
                raise OSError("the disk is gone")
            made.append(number)
            yield number
    finally:
        if closed is not None:
            closed.append(True)


def test_items_come_in_order_and_no_further_ahead_than_asked() -> None:
    made: list[int] = []
    with Ahead(numbers(20, made), depth=2) as items:
        got = []
        for item in items:
            time.sleep(0.002)
            got.append(item)
            # Two on their way, one in the maker's hands, one in ours.
            assert len(made) <= len(got) + 3
    assert got == list(range(20))


def test_an_error_of_the_source_comes_at_its_place() -> None:
    got = []
    with pytest.raises(OSError, match="disk is gone"), Ahead(numbers(9, [], fail_at=4), depth=2) as items:
        got.extend(items)
    # What was made before it may still be read first.
    assert got == [0, 1, 2, 3]


def test_leaving_early_stops_the_source_and_closes_it() -> None:
    made: list[int] = []
    closed: list[bool] = []
    with pytest.raises(ValueError, match="enough"), Ahead(numbers(10**9, made, closed), depth=3) as items:
        for item in items:
            if item == 5:
                raise ValueError("enough")
    assert closed == [True] and len(made) < 20


def test_the_consumer_gives_back_what_it_made() -> None:
    with Behind(lambda items: sum(items), depth=1) as behind:
        for number in range(100):
            behind.put(number)
        assert behind.result() == 4950


def test_a_consumer_that_fails_stops_the_one_who_puts() -> None:
    def consume(items: Iterator[int]) -> None:
        for item in items:
            if item == 3:
                raise OSError("no space left")

    put = 0
    with pytest.raises(OSError, match="no space left"), Behind(consume, depth=1) as behind:
        for number in range(10**6):
            behind.put(number)
            put += 1
    assert put < 10

    with pytest.raises(OSError, match="no space left"), Behind(consume, depth=8) as behind:
        for number in range(4):
            behind.put(number)
        behind.result()


def test_an_error_beside_it_makes_the_consumer_undo() -> None:
    undone: list[str] = []

    def consume(items: Iterator[int]) -> None:
        try:
            for _ in items:
                pass
        except Abandoned:
            undone.append("undone")
            raise

    with pytest.raises(ValueError, match="the teacher"), Behind(consume, depth=1) as behind:
        behind.put(1)
        raise ValueError("the teacher failed")
    assert undone == ["undone"]


def test_a_consumer_that_ends_early_is_no_success() -> None:
    with pytest.raises(RuntimeError, match="ended before"), Behind(lambda items: next(items), depth=1) as behind:
        for number in range(10):
            behind.put(number)
