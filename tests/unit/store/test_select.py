"""What is read off whole rows, by compiled code and by Torch's operators alike, against float64; and the compiler."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill_jobs.errors import CaptureError
from distill_jobs.store.codecs import native, select
from distill_jobs.store.codecs.native import Rows
from distill_jobs.store.draws import uniforms
from distill_jobs.store.tail import TAIL_BETAS

WAYS = {"Torch": select._passes}
if native.library() is not None:
    WAYS["compiled"] = select._compiled


@pytest.fixture
def afresh() -> Iterator[None]:
    """The compiler is looked for again, before and after."""
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def read(way: str, logits: Tensor, head: int, draws: int = 0, seed: int = 0) -> tuple[Rows, Tensor, Tensor]:
    """The rows, the gold logits and the uniform numbers that they were read with."""
    torch.manual_seed(seed)
    gold = logits.gather(1, torch.randint(logits.shape[1], (len(logits), 1)))
    uniform = uniforms(seed, torch.arange(len(logits)), 1)
    return WAYS[way](logits, min(head, logits.shape[1]), draws, gold, uniform), gold, uniform


def check(way: str, logits: Tensor, head: int, draws: int = 0, seed: int = 0) -> None:
    """All that is read, from every class in float64."""
    found, gold, uniform = read(way, logits, head, draws, seed)
    rows, classes = logits.shape
    kept, both = min(head, classes), min(head + 1, classes)
    exact = logits.double()
    assert torch.equal(found.top[:, :both].double(), exact.topk(both).values)
    assert torch.equal(exact.gather(1, found.ids[:, :both]), exact.topk(both).values)
    assert all(len(set(row)) == both for row in found.ids[:, :both].tolist())
    assert torch.equal(found.ranks, (logits > gold).sum(-1))
    tail = exact.scatter(1, found.ids[:, :kept], -math.inf)
    below = tail - tail.amax(dim=-1, keepdim=True).clamp(min=-1e30)
    powers = [(beta * below).exp().sum(-1) for beta in TAIL_BETAS]
    torch.testing.assert_close(found.sums.double(), torch.stack(powers, 1).clamp(min=1e-30), rtol=5e-5, atol=1e-30)
    mass = below.exp()
    weighted = (mass * below.clamp(min=-1e30)).sum(-1)
    torch.testing.assert_close(found.weighted.double(), weighted, rtol=5e-5, atol=1e-5)
    assert found.drawn.shape == (rows, draws)
    # Each tooth of the comb stands on the class that was drawn.
    ends = mass.cumsum(-1) / mass.sum(-1, keepdim=True).clamp(min=1e-300)
    teeth = (uniform[:, None] + torch.arange(draws)) / max(1, draws)
    after = ends.gather(1, found.drawn)
    before = after - (mass / mass.sum(-1, keepdim=True).clamp(min=1e-300)).gather(1, found.drawn)
    stands = (before - 3e-5 <= teeth) & (teeth <= after + 3e-5)
    assert bool((stands | (mass.sum(-1, keepdim=True) == 0)).all())


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    classes=st.integers(1, 400),
    head=st.integers(0, 100),
    draws=st.integers(0, 20),
    scale=st.floats(0, 30),
    masked=st.booleans(),
    rounded=st.booleans(),
)
def test_rows_of_any_shape(
    way: str, seed: int, classes: int, head: int, draws: int, scale: float, masked: bool, rounded: bool
) -> None:
    torch.manual_seed(seed)
    logits = scale * torch.randn(3, classes)
    logits = logits.round() if rounded else logits
    if masked and classes > 1:
        logits[:, 1:][torch.rand(3, classes - 1) < 0.5] = -math.inf
    check(way, logits, head, draws, seed)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("classes", [32_000, 49_152, 151_669])
def test_rows_of_a_vocabulary(way: str, classes: int) -> None:
    torch.manual_seed(0)
    zipf = -1.5 * torch.arange(1, classes + 1).log()
    few = torch.randn(2, classes)
    logits = torch.cat([few, 6 * few, zipf + few, torch.zeros(1, classes)])
    logits[0, ::3] = -math.inf
    check(way, logits, head=48, draws=16)
    check(way, logits.bfloat16(), head=64)


@pytest.mark.parametrize("way", WAYS)
def test_threads_share_rows_and_leave_them_as_they_were(way: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(150, 5000)
    kept, alone = logits.clone(), read(way, logits, 48, 16)[0]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        shared = read(way, logits, 48, 16)[0]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(kept, logits)
    assert all(torch.equal(one, other) for one, other in zip(vars(alone).values(), vars(shared).values(), strict=True))


@pytest.mark.parametrize("classes", [500, 5000])
def test_a_row_that_holds_no_number_is_refused_by_its_place(classes: int) -> None:
    logits = torch.randn(80, classes)
    logits[3, 7] = math.nan
    logits[66, classes - 1] = math.inf
    logits[79] = -math.inf
    with pytest.raises(CaptureError, match="3, 66, 79"):
        select.select(logits, torch.zeros(80, dtype=torch.int64), 48)


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("setting", [("PATH", ""), ("CXX", "false"), (native.OFF, "1")], ids=lambda pair: pair[0])
def test_without_a_compiler_it_is_the_same(setting: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    logits, gold = 3 * torch.randn(20, 5000), torch.randint(0, 5000, (20,))
    before = select.select(logits, gold, 48)
    native.library.cache_clear()
    monkeypatch.setenv(*setting)
    assert native.library() is None
    after = select.select(logits, gold, 48)
    assert torch.equal(before.head_ids, after.head_ids) and torch.equal(before.gold_rank, after.gold_rank)
    for name in ("head_logprob", "tail_nodes", "entropy", "gold_logprob"):
        torch.testing.assert_close(getattr(before, name), getattr(after, name), rtol=1e-5, atol=2e-5)
