"""A list of entries as a whole distribution: against a dense float64 reference, at any T."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jobs.errors import DataError
from distill_jobs.store.codecs.topk import TopKCodec
from distill_jobs.store.exchange.sparse import ABSENT, listed, nothing_known, whole

TEMPERATURES = (0.5, 1.0, 2.0, 7.3)


def dense_reference(ids: list[int], probabilities: list[float], classes: int) -> np.ndarray:
    """The list, and what it lacks of 1 spread evenly over all other classes."""
    dense = np.zeros(classes)
    dense[ids] = probabilities
    others = np.setdiff1d(np.arange(classes), ids)
    if len(others) and dense.sum() < 1.0 - 1e-7:
        dense[others] = (1.0 - dense.sum()) / len(others)
    return dense


@st.composite
def lists(draw):
    classes = draw(st.integers(3, 60))
    width = draw(st.integers(1, min(12, classes)))
    k = draw(st.integers(1, 16))
    ids = draw(st.permutations(range(classes)))[:width]
    weights = draw(st.lists(st.floats(1e-6, 1.0), min_size=width, max_size=width))
    mass = draw(st.one_of(st.floats(0.3, 0.999), st.just(1.0)))
    probabilities = [mass * w / sum(weights) for w in weights]
    return classes, k, list(ids), probabilities, draw(st.integers(-1, classes - 1))


@settings(max_examples=60, deadline=None)
@given(lists())
def test_the_whole_distribution_at_every_temperature(case) -> None:
    classes, k, ids, probabilities, gold = case
    checked = listed(torch.tensor([ids]), torch.tensor([probabilities]).double().log(), "logprobs", classes, 1.02)
    signal = whole(*checked, torch.tensor([gold]), classes, k)
    kept = np.argsort(-np.array(probabilities), kind="stable")[:k]
    dense = dense_reference([ids[i] for i in kept], [probabilities[i] for i in kept], classes)
    assert signal.head_ids is not None and signal.head_ids.shape == (1, min(k, classes))
    assert len(set(signal.head_ids[0].tolist())) == min(k, classes)
    assert int(signal.head_ids.max()) < classes
    for temperature in TEMPERATURES:
        soft = dense ** (1 / temperature)
        soft /= soft.sum()
        head, tail = signal.at(temperature)
        np.testing.assert_allclose(head.exp()[0], soft[signal.head_ids[0]], atol=2e-5)
        outside = np.setdiff1d(np.arange(classes), signal.head_ids[0])
        assert tail is not None
        np.testing.assert_allclose(float(tail.exp()), soft[outside].sum(), atol=2e-4)
    positive = dense[dense > 0]
    assert float(signal.entropy) == pytest.approx(-(positive * np.log(positive)).sum(), abs=1e-4)
    if gold < 0:
        assert int(signal.gold_rank) == -1 and float(signal.gold_logprob) == 0.0
    elif dense[gold] > 0:
        # What the kept entries lack of 1 is known to float32's rounding of what they have.
        lacks = np.inf if gold in [ids[i] for i in kept] else dense[gold] * (classes - len(kept))
        assert float(signal.gold_logprob) == pytest.approx(np.log(dense[gold]), abs=1e-4 + 1e-7 / lacks)
        # Rounding may order classes of all but the same probability either way.
        low, high = (dense > dense[gold] * 1.0001).sum(), (dense > dense[gold] * 0.9999).sum()
        assert low <= int(signal.gold_rank) <= high


def test_it_survives_the_codec() -> None:
    torch.manual_seed(0)
    logprob = torch.log_softmax(4 * torch.randn(64, 300).double(), dim=-1)
    values, ids = logprob.topk(12)
    signal = whole(*listed(ids, values, "logprobs", 300, 1.02), ids[:, 3], 300, 16)
    codec = TopKCodec(16)
    back = codec.decode(codec.pack(signal), 300)
    torch.testing.assert_close(back.head_logprob, signal.head_logprob, atol=0.008, rtol=0)
    assert torch.equal(back.head_ids, signal.head_ids) and torch.equal(back.gold_rank, signal.gold_rank)
    for temperature in TEMPERATURES:
        torch.testing.assert_close(back.at(temperature)[1], signal.at(temperature)[1], atol=0.02, rtol=0)


def test_logits_and_probabilities_are_understood() -> None:
    ids = torch.tensor([[4, 1, 9]])
    logits = torch.tensor([[2.0, 5.0, -1.0]]).double()
    order, logprob = listed(ids, logits, "logits", 10, 1.02)
    assert order.tolist() == [[1, 4, 9]]
    torch.testing.assert_close(logprob, torch.log_softmax(logits, dim=-1)[:, [1, 0, 2]])
    assert torch.isneginf(whole(order, logprob, torch.tensor([1]), 10, 3).at(1.0)[1]).all()
    probabilities = torch.tensor([[0.5, 0.0, 0.25]]).double()
    order, logprob = listed(ids, probabilities, "probs", 10, 1.02)
    assert order.tolist() == [[4, 9, ABSENT]] and float(logprob.exp().sum()) == pytest.approx(0.75)


def test_a_mass_a_little_above_one_is_scaled_down() -> None:
    values = torch.tensor([[0.7, 0.31]]).double().log()
    _, logprob = listed(torch.tensor([[0, 1]]), values, "logprobs", 5, 1.02)
    assert float(logprob.exp().sum()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("ids", "values", "kind", "message"),
    [
        ([[0, 50]], [[-1.0, -2.0]], "logprobs", "class 50 is listed, but the tokenizer has 50"),
        ([[0, -7]], [[-1.0, -2.0]], "logprobs", "class 7"),
        ([[3, 3]], [[-1.0, -2.0]], "logprobs", "class 3 is listed twice"),
        ([[3, 4]], [[-1.0, float("nan")]], "logprobs", "NaN or infinite"),
        ([[3, 4]], [[-1.0, float("inf")]], "logits", "NaN or infinite"),
        ([[3, 4]], [[3.0, 1.0]], "logprobs", "add up to 22.8, not to at most 1"),
        ([[3, 4]], [[-0.5, 0.1]], "probs", "a probability is negative"),
    ],
)
def test_what_is_refused(ids, values, kind, message) -> None:
    with pytest.raises(DataError, match=message):
        listed(torch.tensor(ids), torch.tensor(values).double(), kind, 50, 1.02)


def test_nothing_known_is_uniform() -> None:
    signal = nothing_known(40, 8)
    head, tail = signal.at(3.0)
    assert tail is not None
    torch.testing.assert_close(head.exp(), torch.full((1, 8), 1 / 40))
    assert float(tail.exp()) == pytest.approx(32 / 40, abs=1e-4)
