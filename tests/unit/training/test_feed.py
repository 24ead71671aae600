"""The order of training rows: fixed by (seed, epoch), the same for any number of ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jobs.training.feed import (
    BLOCK,
    MixedOrder,
    Order,
    WindowOrder,
    even_shares,
    quotas,
    share_of_rank,
)
from distill_jobs.training.permutation import Permutation

PART_ROWS = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any).map(np.array)


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 9))
def test_a_permutation_holds_everything_once(size: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(Permutation(size, seed, epoch)(np.arange(size))), np.arange(size))


@pytest.mark.parametrize("size", [3, 7, 50])
def test_every_entry_lands_everywhere_equally_often(size: int) -> None:
    keys = 800
    counts = np.zeros((size, size))
    for key in range(keys):
        counts[np.arange(size), Permutation(size, 1, key)(np.arange(size))] += 1
    expected = keys / size
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


def test_neighbours_are_torn_apart() -> None:
    rows = Permutation(100_000_000, 0, 0)(np.arange(100_000))
    assert rows.min() >= 0 and rows.max() < 100_000_000 and len(np.unique(rows)) == 100_000
    assert abs(np.corrcoef(rows[1:], rows[:-1])[0, 1]) < 0.02
    assert abs(rows.mean() / 1e8 - 0.5) < 0.01


@settings(max_examples=25, deadline=None)
@given(PART_ROWS, st.integers(0, 99), st.integers(1, 5), st.integers(0, 100), st.integers(1, 100))
def test_windows_hold_every_row_once_and_few_parts_at_a_time(
    part_rows: np.ndarray, seed: int, window: int, consumed: int, count: int
) -> None:
    total = int(part_rows.sum())
    whole = WindowOrder(part_rows, seed, window).take(0, 2 * total + 200)
    for epoch in range(2):
        rows = whole[epoch * total : (epoch + 1) * total]
        assert np.array_equal(np.sort(rows), np.arange(total))
        parts = np.searchsorted(np.cumsum(part_rows), rows, side="right")
        for part in np.unique(parts):
            inside = np.flatnonzero(parts == part)
            assert len(np.unique(parts[inside[0] : inside[-1] + 1])) <= window
    piece = WindowOrder(part_rows, seed, window).take(consumed, count)
    assert np.array_equal(piece, whole[consumed : consumed + count])


def test_the_next_window_is_announced_once() -> None:
    told: list[tuple[list[int], list[int]]] = []
    order = WindowOrder(np.full(6, 10), 3, 2, lambda ahead, here: told.append((ahead, here)))
    for consumed in range(0, 60, 5):
        order.take(consumed, 5)
    assert len(told) == 3
    assert [len(here) for _, here in told] == [2, 2, 2]
    assert all(ahead[:2] == here for ahead, here in told)
    assert told[0][0][2:] == told[1][1] and told[1][0][2:] == told[2][1]
    assert sorted(part for _, here in told for part in here) == list(range(6))


@given(st.integers(500, 5000), st.integers(500, 5000), st.floats(0.01, 0.99), st.integers(0, 9))
@settings(max_examples=10, deadline=None)
def test_a_mixture_keeps_its_shares_and_each_order(one: int, other: int, share: float, seed: int) -> None:
    orders = [Order(one, seed), Order(other, seed + 1)]
    taken = MixedOrder(orders, [0, one], [1 - share, share], seed).take(0, 2 * BLOCK)
    amounts = quotas([1 - share, share])
    for block in (taken[:BLOCK], taken[BLOCK:]):
        assert (block < one).sum() == amounts[0]
    # Over all blocks each store's own sequence is used up without a gap or a repeat.
    for order, rows in zip(orders, (taken[taken < one], taken[taken >= one] - one), strict=True):
        assert np.array_equal(np.sort(rows), np.sort(order.take(0, len(rows))))
    piece = MixedOrder(orders, [0, one], [1 - share, share], seed).take(100, 77)
    assert np.array_equal(piece, taken[100:177])


@given(st.lists(st.floats(0.0005, 1.0), min_size=1, max_size=6))
def test_quotas_add_up(weights: list[float]) -> None:
    shares = np.array(weights) / sum(weights)
    found = quotas(shares.tolist())
    assert found.sum() == BLOCK and found.min() >= 1
    assert np.abs(found - shares * BLOCK).max() <= 6


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.integers(0, 2**31), st.integers(1, 5))
def test_every_epoch_holds_every_row_once(rows: int, seed: int, epochs: int) -> None:
    taken = Order(rows, seed).take(0, rows * epochs)
    for epoch in range(epochs):
        assert sorted(taken[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


@settings(max_examples=50, deadline=None)
@given(st.integers(5, 100), st.integers(0, 99), st.integers(0, 500), st.integers(1, 300))
def test_any_piece_is_what_the_whole_would_give(rows: int, seed: int, consumed: int, count: int) -> None:
    whole = Order(rows, seed).take(0, consumed + count)
    assert np.array_equal(Order(rows, seed).take(consumed, count), whole[consumed:])


def test_epochs_and_seeds_differ() -> None:
    order = Order(50, 1)
    assert not np.array_equal(order.take(0, 50), order.take(50, 50))
    assert not np.array_equal(order.take(0, 50), Order(50, 2).take(0, 50))


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))
def test_ranks_share_a_batch_out_completely(micro: int, world: int, accumulation: int) -> None:
    batch = np.arange(micro * world * accumulation)
    shares = [share_of_rank(batch, micro, rank, world) for rank in range(world)]
    assert all(len(share) == accumulation and all(len(m) == micro for m in share) for share in shares)
    rebuilt = [row for step in zip(*shares, strict=True) for part in step for row in part]
    assert rebuilt == batch.tolist()


@given(st.integers(1, 50), st.integers(1, 7), st.integers(1, 4))
def test_evaluation_sees_every_row_once_in_equally_many_batches(rows: int, micro: int, world: int) -> None:
    shares = [even_shares(rows, micro, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    seen = [n for share in shares for numbers, real in share for n in numbers[real].tolist()]
    assert sorted(seen) == list(range(rows))
