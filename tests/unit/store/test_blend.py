"""Several teachers as one signal, against mixtures made by hand in float64."""

import math

import pytest
import torch
from torch import Tensor

from distill_jobs.errors import StoreError
from distill_jobs.losses import forward_kl
from distill_jobs.store.blend import EVENLY, blend
from distill_jobs.store.codecs import Codec
from distill_jobs.store.codecs.dense import DenseCodec
from distill_jobs.store.codecs.hybrid import HybridCodec
from distill_jobs.store.codecs.sampled import SampledCodec
from distill_jobs.store.codecs.select import select
from distill_jobs.store.codecs.topk import TopKCodec
from distill_jobs.store.draws import uniforms
from distill_jobs.store.signal import TeacherSignal
from distill_jobs.store.tail import TAIL_BETAS

N, V = 24, 300
SPARSE = [TopKCodec(12), HybridCodec(12, 6), SampledCodec(9)]


def teachers(count: int = 2, apart: float = 1.0, rows: int = N, classes: int = V) -> tuple[list[Tensor], Tensor]:
    """Logits [rows, classes] of teachers that agree but for ``apart`` nats a class, and the right classes."""
    torch.manual_seed(0)
    common = 2.5 * torch.randn(rows, classes)
    gold = torch.randint(-1, classes, (rows,))
    return [common + apart * torch.randn(rows, classes) for _ in range(count)], gold


def stored(codec: Codec, logits: Tensor, gold: Tensor, seed: int = 0) -> TeacherSignal:
    columns = codec.encode(logits, gold, uniforms(seed, torch.arange(len(logits)), 1))
    return codec.decode(columns, logits.shape[1])


def even(count: int, rows: int = N) -> Tensor:
    weights = torch.rand(count, rows) + 0.1
    return weights / weights.sum(dim=0)


def truth(logits: list[Tensor], weights: Tensor) -> Tensor:
    """The mixture, [N, V] float64."""
    return sum(w[:, None].double() * torch.softmax(z.double(), -1) for w, z in zip(weights, logits, strict=True))  # type: ignore[return-value]


def spread(signal: TeacherSignal, union: Tensor) -> Tensor:
    """What one sparse signal says of every class at T = 1 as ``blend`` takes it, row by row in float64."""
    assert signal.head_ids is not None
    target = torch.zeros(len(signal), signal.classes, dtype=torch.float64)
    for row, rest in enumerate(signal.tail_at(1.0).double().exp().tolist()):
        head = signal.head_ids[row].tolist()
        off = [v for v in range(signal.classes) if v not in head]
        if signal.draw_ids is None:
            taken = [v for v in off if v in union[row].tolist()]
            half = float(signal.head_logprob[row].double().min().exp()) / 2
            each = max(rest / len(off), min(half, rest / 2 / max(1, len(taken))))
            left = [v for v in off if v not in taken]
            target[row, taken] = each
            target[row, left] = (rest - each * len(taken)) / len(left)
        else:
            times = (
                [1.0] * len(signal.draw_ids[row]) if signal.draw_counts is None else signal.draw_counts[row].tolist()
            )
            for v, count in zip(signal.draw_ids[row].tolist(), times, strict=True):
                target[row, v] += rest * count / (sum(times) + EVENLY)
            target[row, off] += rest * EVENLY / len(off) / (sum(times) + EVENLY)
        target[row, head] = signal.head_logprob[row].double().exp()
    return target


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_dense_teachers_are_mixed_exactly(count: int, temperature: float) -> None:
    logits, gold = teachers(count)
    weights = even(count)
    exact = [TeacherSignal(None, torch.log_softmax(z, -1), None, *_statistics(z, gold), V) for z in logits]
    found, true = blend(exact, weights, gold), truth(logits, weights)
    softened = true ** (1 / temperature)
    softened /= softened.sum(-1, keepdim=True)
    torch.testing.assert_close(found.at(temperature)[0].exp().double(), softened, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.entropy.double(), -(true * true.log()).sum(-1), atol=1e-5, rtol=1e-5)
    right = true.gather(1, gold.clamp(min=0)[:, None])
    some = gold >= 0
    torch.testing.assert_close(found.gold_logprob[some].double(), right.log()[some, 0], atol=1e-5, rtol=1e-5)
    assert torch.equal(found.gold_rank, torch.where(some, (true > right).sum(-1), -1))
    assert torch.equal(found.top1, true.argmax(-1))


def _statistics(logits: Tensor, gold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    signal = select(logits, gold, 1)
    return signal.gold_logprob, signal.gold_rank, signal.entropy


@pytest.mark.parametrize("codec", SPARSE, ids=lambda codec: codec.name)
def test_at_one_a_sparse_mixture_is_the_weighted_sum(codec: Codec) -> None:
    """Class by class on the union of the heads, and in mass outside of it; nothing is lost or renormalised."""
    logits, gold = teachers()
    signals, weights = [stored(codec, z, gold, seed=i) for i, z in enumerate(logits)], even(2)
    found = blend(signals, weights, gold)
    ids = found.head_ids
    assert ids is not None
    expected = sum(w[:, None].double() * spread(s, ids) for w, s in zip(weights, signals, strict=True))
    assert isinstance(expected, Tensor)
    assert bool((ids[:, 1:] > ids[:, :-1]).all()) if ids.shape[1] else True
    held = torch.zeros(N, V, dtype=torch.bool).scatter_(1, ids, True)
    for signal in signals:
        assert bool(held.gather(1, signal.head_ids).all()), "a class of a head is not in the union"
    torch.testing.assert_close(found.head_logprob.double().exp(), expected.gather(1, ids), atol=1e-7, rtol=1e-5)
    outside = expected.masked_fill(held, 0.0)
    torch.testing.assert_close(found.tail_at(1.0).double().exp(), outside.sum(-1), atol=1e-5, rtol=1e-4)
    if found.draw_ids is not None:
        drawn = torch.zeros(N, V).scatter_add_(1, found.draw_ids, found.draws_at(1.0).exp())
        assert not bool(drawn[held].any())
        # The draws also stand for the bit that lies evenly.
        assert float((drawn - outside).abs().sum(-1).max()) <= 2 * EVENLY / (6 + EVENLY)
        torch.testing.assert_close(drawn.sum(-1).double(), outside.sum(-1), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("codec", SPARSE, ids=lambda codec: codec.name)
def test_a_teacher_alone_and_a_teacher_twice_say_what_it_says(codec: Codec) -> None:
    [logits], gold = teachers(1)
    signal = stored(codec, logits, gold)
    student = torch.log_softmax(torch.randn(N, V), dim=-1)
    for several, weights in (([signal], torch.ones(1, N)), ([signal, signal], even(2))):
        found = blend(several, weights, gold)
        torch.testing.assert_close(found.tail_nodes, signal.tail_nodes, atol=1e-4, rtol=1e-4)
        # Rounded codes of a head don't add up to what the exact entropy is of.
        torch.testing.assert_close(found.entropy, signal.entropy, atol=0.1, rtol=0.02)
        # Above T = 1 draws are trusted the more, the more there are.
        warm = [2.0, 4.0] if len(several) == 1 or signal.draw_ids is None else []
        for temperature in (0.5, 1.0, *warm):
            own, other = signal.expand(temperature, student), found.expand(temperature, student)
            torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-2)


def test_who_has_no_weight_has_no_part() -> None:
    logits, gold = teachers(3)
    signals = [stored(HybridCodec(12, 6), z, gold, seed=i) for i, z in enumerate(logits)]
    chosen = torch.arange(N) % 3
    found = blend(signals, torch.nn.functional.one_hot(chosen, 3).T.float(), gold)
    for i, signal in enumerate(signals):
        some = chosen == i
        torch.testing.assert_close(found.gold_logprob[some], signal.gold_logprob[some])
        torch.testing.assert_close(found.expand(1.0)[some], signal.expand(1.0)[some], atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("codec", [HybridCodec(12, 6), SampledCodec(9)], ids=lambda codec: codec.name)
def test_over_draws_the_target_is_the_true_mixture(codec: Codec) -> None:
    """The mean target over many seeds at T = 1, within the noise, the codec's rounding and the even bit."""
    logits, gold = teachers(rows=1)
    seeds, weights = 3000, torch.tensor([[0.3], [0.7]])
    signals = []
    for i, one in enumerate(logits):
        many = one.expand(seeds, V).contiguous()
        signals.append(stored(codec, many, gold.expand(seeds), seed=i))
    found = blend(signals, weights.expand(2, seeds), gold.expand(seeds)).expand(1.0).double()
    true = truth(logits, weights)[0]
    mass = max(float(signal.tail_at(1.0)[0].exp()) for signal in signals)
    noise = (true * mass / codec.draws / seeds).sqrt()
    allowed = 4.5 * noise + 3 * mass / codec.draws / seeds + 0.03 * true + mass * EVENLY / codec.draws
    assert bool(((found.mean(0) - true).abs() <= allowed).all())


@pytest.mark.parametrize("apart", [0.0, 0.5, 1.5])
def test_the_tail_at_other_temperatures_errs_within_its_bound(apart: float) -> None:
    """Hardly above the truth for T > 1, below it by less than its bound, and exact where teachers agree."""
    logits, gold = teachers(apart=apart, classes=4000)
    signals, weights = [stored(TopKCodec(40), z, gold) for z in logits], torch.full((2, N), 0.5)
    found, true = blend(signals, weights, gold), truth(logits, weights)
    assert found.head_ids is not None
    true.scatter_(1, found.head_ids, 0.0)
    for beta in (0.1, 0.25, 0.5, 1.0):
        off = found.tail_at(1 / beta).double() - (true**beta).sum(-1).log()
        # A class of one head that is in the other's tail counts as half of that head's least, not as what it is.
        assert float(off.max()) < 0.05, (beta, float(off.max()))
        assert float(off.min()) > -(1 - beta) * math.log(2) - 0.02 - 0.15 * apart, (beta, float(off.min()))
        if apart == 0.0:
            assert float(off.abs().max()) < 0.005
    assert found.tail_nodes is not None and found.tail_nodes.shape == (N, len(TAIL_BETAS))


def test_edges() -> None:
    logits, gold = teachers(classes=10)
    gold = gold.clamp(max=9)
    whole = [stored(HybridCodec(10, 3), z, gold) for z in logits]
    found = blend(whole, even(2), gold)  # heads that are everything
    torch.testing.assert_close(found.head_logprob.exp().sum(-1), torch.ones(N), atol=1e-2, rtol=0)
    assert bool(torch.isneginf(found.tail_at(2.0)).all())
    assert bool(torch.isfinite(forward_kl(torch.randn(N, 10), found, 2.0)).all())
    nothing = blend([stored(HybridCodec(4, 3), z, gold) for z in logits], even(2), gold)
    assert len(blend([_rows(s, 0) for s in whole], torch.ones(2, 0), gold[:0])) == 0
    assert bool(torch.isfinite(forward_kl(torch.randn(N, 10), nothing, 4.0)).all())
    with pytest.raises(StoreError, match="capture them with the same codec"):
        blend([whole[0], stored(DenseCodec(), logits[1], gold)], even(2), gold)


def _rows(signal: TeacherSignal, count: int) -> TeacherSignal:
    return TeacherSignal(**{n: v[:count] if isinstance(v, Tensor) else v for n, v in vars(signal).items()})
