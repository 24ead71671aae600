"""Tensors of a batch against a plain loop."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distill_jobs.data.batch import make_batch
from distill_jobs.data.facts import DataFacts

FACTS = DataFacts(task="causal_lm", features="documents", fingerprint="x", sequence_length=12, vocabulary=99)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_labels_and_positions_stay_within_documents(sizes):
    sizes = [size for i, size in enumerate(sizes) if sum(sizes[: i + 1]) <= 12]
    segments = np.zeros((1, 12), np.int32)
    ids = np.arange(1, 13, dtype=np.int32)[None]
    labels, positions, at = [-100] * 12, {}, 0
    for number, size in enumerate(sizes, 1):
        for i in range(size):
            segments[0, at + i] = number
            positions[at + i] = i
            if i + 1 < size:
                labels[at + i] = int(ids[0, at + i + 1])
        at += size
    batch = make_batch({"sample_id": np.array([7]), "input_ids": ids, "segments": segments}, FACTS)
    assert batch.labels[0].tolist() == labels
    assert batch.positions == sum(size - 1 for size in sizes)
    assert batch.keep.shape == (1, 12)
    for index, position in positions.items():
        assert batch.inputs["position_ids"][0, index] == position


def test_classification_batches():
    facts = DataFacts(
        task="classification", features="image", fingerprint="x", image_shape=(1, 2, 3), classes=("a", "b")
    )
    columns = {
        "sample_id": np.arange(2),
        "pixels": np.arange(12, dtype=np.float32).reshape(2, 6),
        "label": np.array([1, 0]),
    }
    batch = make_batch(columns, facts)
    assert batch.inputs["pixels"].shape == (2, 1, 2, 3)
    assert batch.keep.shape == (2, 1)
    assert batch.positions == batch.rows == 2
