"""Packing loses nothing, mixes no slices, and wastes little."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jobs.data.packing import Document, as_arrays, pack

documents = st.lists(
    st.builds(
        lambda size, key: (size, key),
        st.integers(1, 60),
        st.sampled_from(["a", "b"]),
    ),
    max_size=60,
).map(lambda sizes: [Document([i + 1] * n, key, f"f:{i}") for i, (n, key) in enumerate(sizes)])


@given(documents, st.integers(8, 32))
@settings(deadline=None)
def test_whole_packing(some, length):
    packed, dropped = pack(some, length)
    keys = {d.ids[0]: d.key for d in some}
    counted = dict.fromkeys(keys, 0)
    for sequence in packed:
        assert 1 < sequence.tokens <= length
        for piece in sequence.pieces:
            assert len(set(piece)) == 1
            assert keys[piece[0]] == sequence.key
            counted[piece[0]] += len(piece)
    assert sum(counted.values()) + dropped == sum(len(d.ids) for d in some)
    # Any two sequences of a slice would not fit into one: no more than twice the least possible number.
    for key in ("a", "b"):
        sizes = sorted(s.tokens for s in packed if s.key == key)
        assert len(sizes) < 2 or sizes[0] + sizes[1] > length
    ids, segments = as_arrays(packed, length, 0)
    assert ((ids == 0) == (segments == 0)).all()
    assert ids.dtype == segments.dtype == np.int32


@given(documents, st.integers(8, 32))
@settings(deadline=None)
def test_naive_packing(some, length):
    packed, dropped = pack(some, length, naive=True)
    for key in ("a", "b"):
        laid = [token for s in packed if s.key == key for token in s.pieces[0]]
        given_ids = [token for d in some if d.key == key for token in d.ids]
        assert given_ids[: len(laid)] == laid
        assert len(given_ids) - len(laid) <= 1
    assert sum(s.tokens for s in packed) + dropped == sum(len(d.ids) for d in some)
    for sequence in packed:
        named = {int(source.removeprefix("f:")) + 1 for source in sequence.sources}
        assert set(sequence.pieces[0]) == named


def test_source_is_readable():
    packed, _ = pack([Document([1] * 4, "", f"f:{i}") for i in range(3)], 12)
    assert [s.source for s in packed] == ["f:0 (+2)"]
