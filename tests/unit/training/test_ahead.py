"""Reading ahead: the same rows as without, errors handed on, threads ended, and rows that are left out."""

import threading
import time
from typing import Any

import numpy as np
import pytest
from loop_cases import BATCH, ROWS, Said, rows

from distill_jobs.errors import StoreError
from distill_jobs.spec import Train
from distill_jobs.training.ahead import Ahead, Omissions
from distill_jobs.training.source import Source

TRAIN = Train.model_validate({"batch_size": BATCH, "micro_batch": 4})


def ahead(source: Source, steps: int = 20, consumed: int = 0, omitted: Omissions | None = None) -> Ahead:
    return Ahead(source, source.order(5), TRAIN, Said(), consumed, steps, omitted or Omissions())


def test_it_gives_what_the_order_says() -> None:
    source = rows()
    reader, order = ahead(source, consumed=BATCH), source.order(5)
    for step in range(1, 21):
        portion = reader.take()
        assert (portion.start, portion.end) == (step * BATCH, (step + 1) * BATCH)
        assert np.array_equal(np.concatenate([m.rows for m in portion.micros]), order.take(step * BATCH, BATCH))
        assert [m.batch.rows for m in portion.micros] == [4, 4] and sum(m.positions for m in portion.micros) == BATCH
    reader.close()


def test_it_reads_while_the_step_before_is_trained_on() -> None:
    source, load = rows(), rows().load

    def slow(*args: Any) -> Any:
        time.sleep(0.05)
        return load(*args)

    source.load = slow  # type: ignore[method-assign]
    reader = ahead(source, steps=8)
    reader.take()
    first = reader.waited
    assert first >= 0.09
    for _ in range(7):
        time.sleep(0.2)  # a step that takes twice as long as reading
        reader.take()
    assert reader.waited - first < 0.1
    reader.close()


def test_what_reading_raises_comes_out_where_the_rows_are_taken() -> None:
    source, load, calls = rows(), rows().load, [0]

    def broken(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] > 4:
            raise StoreError("part 3 is damaged")
        return load(*args)

    source.load = broken  # type: ignore[method-assign]
    reader = ahead(source)
    reader.take(), reader.take()
    with pytest.raises(StoreError, match="part 3 is damaged"):
        reader.take()
    reader.close()


@pytest.mark.parametrize("taken", [0, 1, 20])
def test_no_thread_outlives_it(taken: int) -> None:
    before = threading.active_count()
    reader = ahead(rows())
    for _ in range(taken):
        reader.take()
    reader.close()
    assert threading.active_count() == before


def test_rows_left_out_are_replaced_and_not_scored() -> None:
    source = rows()
    order = source.order(5)
    gone = order.take(0, BATCH)[[1, 6]].tolist()
    reader = ahead(source, omitted=Omissions(rows=gone))
    seen: list[int] = []
    for _ in range(ROWS // BATCH):
        portion = reader.take()
        seen += np.concatenate([m.rows for m in portion.micros]).tolist()
        for micro in portion.micros:
            scored = micro.batch.labels != -100
            assert micro.positions == int(scored.sum()) == len(micro.rows) and micro.batch.rows == 4
            assert (micro.batch.sample_ids[scored] - 1000).tolist() == micro.rows.tolist()
            assert not np.isin(micro.batch.sample_ids - 1000, gone).any(), "not even read"
    assert sorted(seen + gone) == list(range(ROWS))
    reader.close()


def test_batches_left_out_are_passed_over() -> None:
    order = rows().order(5)
    omitted = Omissions(rows=order.take(BATCH, BATCH).tolist(), batches=[2 * BATCH])
    assert omitted.take(order, 0, BATCH)[0] == 0
    start, found, real = omitted.take(order, BATCH, BATCH)
    assert start == 3 * BATCH and real.all() and np.array_equal(found, order.take(start, BATCH))
