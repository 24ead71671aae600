"""What counts as a bad step, which samples are named for it, and what a token costs."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cluster.peak import peak_flops
from distill_jobs.data.facts import DataFacts
from distill_jobs.models.flops import training_flops
from distill_jobs.spec.train import OnBadStep
from distill_jobs.training.culprits import SUSPECTS, culprits
from distill_jobs.training.guard import FEWEST, LARGEST, RECENT, Guard
from distill_jobs.training.pace import Pace


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_what_is_not_finite_is_bad_from_the_first_step(loss: float) -> None:
    found = Guard(OnBadStep()).look(loss)
    assert found is not None and found.what == "loss" and f"{loss}" in found.said()


def test_a_spike_is_told_by_the_recent_losses() -> None:
    draw = np.random.default_rng(3)
    guard = Guard(OnBadStep(action="skip", spike=6.0))
    for number in range(300):
        loss = 4.0 * math.exp(-number / 60) + 1 + draw.normal(0, 0.1)
        assert guard.look(loss) is None, "noise around a falling curve is no spike"
        guard.passed(loss)
    found = guard.look(2.5)
    assert found is not None and found.what == "spike" and found.limit is not None and 1.4 < found.limit < 2.2
    assert guard.look(1.3) is None


def test_nothing_is_a_spike_before_there_is_something_to_compare_with() -> None:
    guard = Guard(OnBadStep(action="skip", spike=3.0))
    for _ in range(FEWEST):
        assert guard.look(1e9) is None
        guard.passed(1.0)
    assert guard.look(1.02) is None and guard.look(1.04) is not None, "equal losses leave one per cent of room"


def test_its_state_is_plain_and_complete() -> None:
    guard = Guard(OnBadStep(action="skip", spike=3.0))
    for number in range(2 * RECENT):
        guard.passed(1.0 + 0.01 * (number % 7))
    guard.count()
    other = Guard(guard.spec)
    other.restore(json.loads(json.dumps(guard.state())))
    assert other.state() == guard.state() and len(other.state()["recent"]) == RECENT
    assert other.look(1.2) == guard.look(1.2) is not None


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from([LARGEST, 3.0]))
def test_halving_finds_every_bad_row_up_to_the_most(data: st.DataObject, limit: float) -> None:
    sizes = data.draw(st.lists(st.integers(0, 33), min_size=1, max_size=5))
    total = sum(sizes)
    bad = data.draw(st.sets(st.integers(0, max(0, total - 1)), max_size=4)) if total else set()
    losses = np.ones(max(1, total))
    losses[list(bad)] = math.nan if limit == LARGEST else 300.0
    groups = np.split(np.arange(total), np.cumsum(sizes)[:-1])
    calls = [0]

    def score(rows: np.ndarray) -> float:
        calls[0] += 1
        return float(losses[rows].mean())

    found = culprits(groups, score, limit, lambda count: count, np.zeros(1, dtype=int))
    assert {row for row, _ in found} == bad
    assert calls[0] <= len(sizes) + 2 * len(bad) * (1 + math.ceil(math.log2(max(2, *sizes, 2)))), "no row by row search"


def test_ranks_make_the_same_number_of_forward_passes() -> None:
    """Two ranks in lockstep, of which one has more to look at."""
    losses = np.ones(64)
    losses[[3, 17, 40]] = math.inf
    shares = [[np.arange(0, 16), np.arange(16, 32)], [np.arange(32, 48), np.arange(48, 64)]]
    calls: list[int] = []
    # The rounds that the busier rank needs, learnt by running it alone; the other is told them.
    needs: list[int] = []
    culprits(shares[0], lambda r: float(losses[r].mean()), LARGEST, lambda n: needs.append(n) or n, np.zeros(1, int))
    for share in shares:
        left, count = iter(needs), [0]

        def score(rows: np.ndarray, count: list[int] = count) -> float:
            count[0] += 1
            return float(losses[rows].mean())

        culprits(share, score, LARGEST, lambda n, left=left: max(n, next(left)), np.zeros(1, int))  # type: ignore[misc]
        calls.append(count[0])
    assert calls[0] == calls[1] == sum(needs)


def test_a_batch_that_is_bad_through_and_through_is_not_searched_for_long() -> None:
    calls = [0]

    def score(_: np.ndarray) -> float:
        calls[0] += 1
        return math.nan

    found = culprits([np.arange(4096)], score, LARGEST, lambda n: n, np.zeros(1, dtype=int))
    assert 0 < len(found) <= SUSPECTS and calls[0] < 16 * 13


class _Small(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(100, 8), nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 100, bias=False)
        if tied:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize("tied", [False, True])
def test_a_token_takes_six_operations_a_parameter(tied: bool) -> None:
    module = _Small(tied)
    facts = DataFacts("causal_lm", "documents", "x", sequence_length=4, vocabulary=100)
    assert training_flops(module, facts) == 6 * (64 + 800)
    module.body.weight.requires_grad_(False)
    assert training_flops(module, facts) == 6 * 800 + 4 * 64
    assert training_flops(nn.Conv2d(1, 1, 3), DataFacts("classification", "image", "x")) is None


def test_rates_and_the_share_of_the_peak() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756.5e12 and peak_flops("NVIDIA A100-SXM4-40GB", "fp32") == 19.5e12
    assert peak_flops("NVIDIA L4", "fp16") == 121e12 and peak_flops("NVIDIA L40S", "bf16") == 362.1e12
    assert peak_flops("Some GPU", "bf16") is None
    pace = Pace("cpu", 2, "bf16", 6e9)
    pace._peak = 1e12
    pace.add(100, 200, 1.5, 0.1)
    pace.add(100, 200, 0.5, 0.1)
    found = pace.take()
    assert found["positions_per_second"] == 100 and found["tokens_per_second"] == 200
    assert found["waiting"] == pytest.approx(0.1) and found["mfu"] == pytest.approx(0.6)
    assert pace.take()["tokens_per_second"] == 0
    assert "mfu" not in Pace("cpu", 1, "fp32", 6e9).take() and torch.get_default_dtype() == torch.float32
