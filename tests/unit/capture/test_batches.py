"""Windows and batches: every row once, bounded, trimmed, and back in its place."""

import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from capture_cases import LENGTH, columns_of, lm_facts, table_facts, text_facts
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jobs.capture import batches as under_test
from distill_jobs.capture.batches import Trim, Window, groups, windows
from distill_jobs.data.facts import DataFacts
from distill_jobs.store.codecs import Field

FIELDS = {"a": Field("uint16", 3), "b": Field("uint8", 1)}


def record_batches(facts: DataFacts, rows: int, seed: int = 0) -> list[pa.RecordBatch]:
    columns = columns_of(facts, rows, seed)
    arrays: dict[str, Any] = {"sample_id": pa.array(np.arange(rows) + 7, pa.int64())}
    arrays["source"] = pa.array([f"row {row}" for row in range(rows)])
    for name, values in columns.items():
        flat = pa.array(values.reshape(-1))
        arrays[name] = flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    whole = pa.RecordBatch.from_pydict(arrays)
    return [whole.slice(i, facts.rows_per_batch) for i in range(0, rows, facts.rows_per_batch)]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 200), st.integers(0, 9), st.sampled_from([lm_facts, text_facts]))
def test_every_row_is_in_one_batch_within_the_bound(rows: int, tokens: int, seed: int, kind: Any) -> None:
    facts = kind(rows)
    (window,) = windows(record_batches(facts, rows, seed), facts, FIELDS)
    seen: list[int] = []
    longest = LENGTH
    for group in groups(window, lambda: tokens, Trim()):
        assert len(group.rows) == 1 or group.size <= tokens
        assert group.batch.inputs["input_ids"].shape == (len(group.rows), group.longest)
        assert window.lengths[group.rows].max() <= group.longest <= longest, "the longest first, and none is cut"
        assert group.longest < window.lengths[group.rows].max() + 8
        longest = group.longest
        seen += group.rows.tolist()
    assert sorted(seen) == list(range(rows))


def test_scored_positions_find_their_places_again() -> None:
    facts = lm_facts(30)
    (window,) = windows(record_batches(facts, 30), facts, FIELDS)
    found = np.zeros(30 * LENGTH, dtype=np.int64)
    for group in groups(window, lambda: 100, Trim()):
        ids = group.batch.inputs["input_ids"].flatten()[group.scored]
        np.testing.assert_array_equal(window.columns["input_ids"].reshape(-1)[group.places()], ids)
        found[group.places()] += 1
    segments = window.columns["segments"]
    expected = np.zeros_like(segments)
    # The last token of each document foretells nothing, and neither does padding.
    expected[:, :-1] = (segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] != 0)
    np.testing.assert_array_equal(found, expected.reshape(-1))


def test_models_of_ones_own_get_whole_rows() -> None:
    facts = lm_facts(9)
    (window,) = windows(record_batches(facts, 9), facts, FIELDS)
    made = list(groups(window, lambda: 3 * LENGTH, Trim(whole=True)))
    assert [len(group.rows) for group in made] == [3, 3, 3]
    assert all(group.batch.inputs["input_ids"].shape[1] == LENGTH for group in made)


def test_a_row_alone_has_no_padding() -> None:
    # Padding counts positions on: beyond those that a model knows it would spoil a row that fits.
    facts = lm_facts(12)
    (window,) = windows(record_batches(facts, 12), facts, FIELDS)
    for group in groups(window, lambda: 1, Trim()):
        assert group.longest == window.lengths[group.rows[0]]


@pytest.mark.parametrize("kind", [lm_facts, table_facts])
def test_windows_are_bounded_and_keep_the_order(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = kind(2500)
    batches = record_batches(facts, 2500)
    monkeypatch.setattr(under_test, "TARGET_BYTES", 400 * 7 * facts.positions_per_row)
    made = list(windows(batches, facts, FIELDS))
    assert [window.rows for window in made] == [400] * 6 + [100]
    np.testing.assert_array_equal(np.concatenate([w.sample_ids for w in made]), np.arange(2500) + 7)
    assert made[1].source(3) == "row 403" and made[6].source(99) == "row 2499"
    monkeypatch.setattr(under_test, "INPUT_BYTES", 1)
    assert next(windows(batches, facts, FIELDS)).rows == 1, "a row is the least"


def test_bad_rows_are_left_out_with_their_targets() -> None:
    facts = lm_facts(10)
    (window,) = windows(record_batches(facts, 10), facts, FIELDS)
    for values in window.targets.values():
        values[:] = np.repeat(np.arange(10), LENGTH)[:, None]
    window.bad = {2: "bad", 9: "bad"}
    assert not {2, 9} & set(itertools.chain(*(g.rows.tolist() for g in groups(window, lambda: 64, Trim()))))
    rows, targets = window.kept()
    assert rows.column("sample_id").to_pylist() == [7 + row for row in (0, 1, 3, 4, 5, 6, 7, 8)]
    assert targets["a"].shape == (8 * LENGTH, 3)
    assert targets["b"].reshape(8, LENGTH)[:, 0].tolist() == [0, 1, 3, 4, 5, 6, 7, 8]


def test_no_rows_make_no_window() -> None:
    assert list(windows([], lm_facts(0), FIELDS)) == []


def test_lengths_count_to_the_last_token() -> None:
    facts = lm_facts(3)
    batches = record_batches(facts, 3)
    window = Window(batches, facts, FIELDS)
    for row in range(3):
        segments = window.columns["segments"][row]
        assert window.lengths[row] == np.flatnonzero(segments)[-1] + 1
