"""The references give what their descriptions promise, at the bytes they say."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jobs.store.codecs import bytes_per_position
from distill_jobs.store.fidelity import references
from distill_jobs.store.fidelity.codings import BUDGETS, compared, family

CLASSES = 700


def logits_of(seed: int, rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, CLASSES, generator=generator)
    return logits, logits.topk(3).indices[:, 2].contiguous()


@given(seed=st.integers(0, 1000), temperature=st.sampled_from([1.0, 2.0]))
@settings(max_examples=10, deadline=None)
def test_a_renormalised_head_is_everything(seed: int, temperature: float) -> None:
    logits, gold = logits_of(seed)
    target = references.renormalised(logits, gold, 20).expand(temperature)
    expected = np.zeros(logits.shape)
    for n, row in enumerate(logits.double().numpy() / temperature):
        best = np.argsort(-row)[:20]
        expected[n, best] = np.exp(row[best]) / np.exp(row[best]).sum()
    assert target.numpy() == pytest.approx(expected, abs=2e-3)


def test_the_gold_class_is_known_only_in_the_head() -> None:
    logits, gold = logits_of(0)
    assert references.renormalised(logits, gold, 20).gold_rank.tolist() == [2] * 5
    assert references.renormalised(logits, logits.argmin(-1), 20).gold_rank.tolist() == [-1] * 5
    assert references.renormalised(logits, gold, 20).top1.tolist() == logits.argmax(-1).tolist()


def test_a_polynomial_follows_a_polynomial_exactly() -> None:
    # Log-probabilities that fall as the curve does are found again, but for the rounding to fp16.
    rank = torch.linspace(0, 1, 56, dtype=torch.float64)
    falling = torch.cat([-torch.arange(8) / 8, -1 - 2 * rank - rank**2 - rank.sqrt(), torch.full((100,), -30.0)])
    logits = falling.float()[None].repeat(3, 1)
    signal = references.polynomial(logits, torch.zeros(3, dtype=torch.int64), 64)
    truth = torch.log_softmax(logits, -1)[:, :64]
    assert signal.head_logprob.numpy() == pytest.approx(truth.numpy(), abs=0.02)


def test_random_sampling_is_right_on_average() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(4000, 1)
    signal = references.random_sampling(logits, torch.zeros(4000, dtype=torch.int64), 3, seed=0)
    target = signal.expand(1.0)
    assert target.sum(-1).numpy() == pytest.approx(1.0, abs=1e-5)
    assert target.mean(0).numpy() == pytest.approx(torch.softmax(logits[0], -1).numpy(), abs=0.02)


@pytest.mark.parametrize("classes", [5, 300, 49_152, 151_669])
def test_every_coding_keeps_to_a_budget(classes: int) -> None:
    codings = [*family(classes), *compared(classes)]
    assert all(coding.bytes <= 8 * max(BUDGETS) for coding in codings)
    if classes > 1000:
        by_family = {name: [c.bytes for c in codings if c.family == name] for name in {c.family for c in codings}}
        assert set(by_family) == {"hybrid", "topk", "sampled", "top-k renormalised", "polynomial", "random sampling"}
        for sizes in by_family.values():
            # Within the budget, and near it: no family is held to less than another.
            assert sizes == sorted(sizes)
            assert all(any(0 <= budget - size <= 12 for budget in BUDGETS) for size in sizes), by_family
    logits, gold = torch.randn(2, min(classes, 300)), torch.zeros(2, dtype=torch.int64)
    for coding in [*family(logits.shape[1]), *compared(logits.shape[1])]:
        signal = coding.signal(logits, gold, torch.tensor([0.25, 0.75], dtype=torch.float64))
        assert signal.expand(1.0, torch.zeros_like(logits)).sum(-1).tolist() == pytest.approx([1.0, 1.0], abs=2e-2)


def test_our_codecs_are_charged_for_all_they_store() -> None:
    for coding in family(49_152):
        assert coding.bytes == int(coding.bytes) and not coding.own
    dense = next(coding for coding in family(10) if coding.family == "dense")
    from distill_jobs.store.codecs.dense import DenseCodec

    assert dense.bytes == bytes_per_position(DenseCodec(), 10)
