"""The order of training rows: fixed by (seed, epoch), the same for any number of ranks."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distill_jobs.training.feed import Order, even_shares, share_of_rank


@given(st.integers(1, 200), st.integers(0, 2**31), st.integers(1, 5))
def test_every_epoch_holds_every_row_once(rows: int, seed: int, epochs: int) -> None:
    taken = Order(rows, seed).take(0, rows * epochs)
    for epoch in range(epochs):
        assert sorted(taken[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


@given(st.integers(1, 100), st.integers(0, 99), st.integers(0, 500), st.integers(1, 300))
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
