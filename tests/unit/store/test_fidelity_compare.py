"""The numbers of fidelity against plain dense float64, and the gradient against what training really computes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill_jobs.losses import forward_kl
from distill_jobs.store.codecs import Codec
from distill_jobs.store.codecs.dense import DenseCodec
from distill_jobs.store.codecs.hybrid import HybridCodec
from distill_jobs.store.codecs.sampled import SampledCodec
from distill_jobs.store.codecs.topk import TopKCodec
from distill_jobs.store.draws import uniforms
from distill_jobs.store.fidelity.compare import GRID, Kept, Softened, at_any_temperature, at_temperature
from distill_jobs.store.fidelity.summary import Gathered, calibration_error
from distill_jobs.store.fidelity.summary import at_temperature as means_at
from distill_jobs.store.signal import TeacherSignal

CODECS = [DenseCodec(), TopKCodec(12), HybridCodec(9, 3), SampledCodec(24)]
CLASSES, POSITIONS = 90, 7


def made(codec: Codec, seed: int, spread: float = 2.0, classes: int = CLASSES) -> tuple[TeacherSignal, Tensor, Tensor]:
    """A decoded signal, and the logits [N, V] and right classes [N] that it was made from."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(POSITIONS, classes, generator=generator)
    gold = torch.randint(classes, (POSITIONS,), generator=generator)
    columns = codec.encode(logits, gold, uniforms(seed, torch.arange(1), POSITIONS))
    return codec.decode(columns, classes), logits, gold


def dense_target(signal: TeacherSignal) -> np.ndarray:
    """The target at T = 1, put together entry by entry in float64; a tail without draws lies evenly."""
    head, mass = signal.head_logprob.double().exp(), np.zeros(len(signal))
    if signal.head_ids is None:
        return (head / head.sum(-1, keepdim=True)).numpy()
    if signal.tail_nodes is not None:
        mass = signal.tail_at(1.0).double().exp().numpy()
    target = np.zeros((len(signal), signal.classes))
    for n in range(len(signal)):
        rest = [v for v in range(signal.classes) if v not in signal.head_ids[n].tolist()]
        if signal.draw_ids is None:
            target[n, rest] = mass[n] / len(rest)
        else:
            counts = torch.ones(signal.draw_ids.shape[1]) if signal.draw_counts is None else signal.draw_counts[n]
            for v, count in zip(signal.draw_ids[n].tolist(), counts.tolist(), strict=True):
                target[n, v] += mass[n] * count / float(counts.sum())
        target[n, signal.head_ids[n].numpy()] = head[n].numpy()
        target[n] /= head[n].sum().item() + mass[n]
    return target


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**20), temperature=st.sampled_from([0.5, 1.0, 2.0, 4.0, 10.0]))
def test_the_gradient_is_what_training_computes(codec: Codec, seed: int, temperature: float) -> None:
    signal, logits, gold = made(codec, seed)
    z = torch.randn(POSITIONS, CLASSES, generator=torch.Generator().manual_seed(seed + 1)).requires_grad_()
    (temperature**2 * forward_kl(z, signal, temperature).sum()).backward()
    truth = Softened.make(logits, {"random": z.detach()}, temperature)
    values, summed = at_temperature(signal, truth, gold)
    assert z.grad is not None
    error = (z.grad - truth.gradients["random"]).double()
    scale = float(truth.gradients["random"].norm())
    assert torch.allclose(values["error/random"].double(), error.square().sum(-1), atol=1e-4 * scale**2, rtol=1e-2)
    along = (error * truth.gradients["random"]).sum(-1)
    assert torch.allclose(values["along/random"].double(), along, atol=1e-4 * scale**2, rtol=1e-2)
    assert torch.allclose(summed["random"], error.sum(0), atol=1e-4 * scale)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_each_number_against_plain_float64(codec: Codec) -> None:
    signal, logits, gold = made(codec, 3)
    values, _ = at_temperature(signal, Softened.make(logits, {}, 1.0), gold)
    t, q = torch.softmax(logits.double(), -1).numpy(), dense_target(signal)
    assert values["tv"].numpy() == pytest.approx(np.abs(t - q).sum(-1) / 2, abs=2e-4)
    assert values["sure"].numpy() == pytest.approx(q.max(-1), abs=2e-4)
    for n in range(POSITIONS):
        if signal.head_ids is None:
            assert float(values["kl"][n]) == pytest.approx(float((t[n] * np.log(t[n] / q[n])).sum()), abs=2e-5)
        elif codec.name == "sampled":
            assert np.isnan(float(values["kl"][n]))
        else:
            head = signal.head_ids[n].numpy()
            p, d = t[n, head], q[n, head]
            kl = (p * np.log(p / d)).sum() + (1 - p.sum()) * np.log((1 - p.sum()) / (1 - d.sum()))
            assert float(values["kl"][n]) == pytest.approx(float(kl), abs=2e-5)


def test_nothing_is_wrong_with_the_truth_itself() -> None:
    _, logits, gold = made(DenseCodec(), 5)
    logprob = torch.log_softmax(logits, -1)
    rank = (logits > logits.gather(1, gold[:, None])).sum(-1)
    exact = TeacherSignal(None, logprob, None, logprob.gather(1, gold[:, None])[:, 0], rank, rank.float(), CLASSES)
    anywhere = at_any_temperature(exact, Kept.make(logits, gold))
    assert float(anywhere["top1"].min()) == float(anywhere["rank"].min()) == 1.0
    assert float(anywhere["partition"].max()) < 1e-5 and float(anywhere["gold"].max()) == 0.0
    for temperature in (1.0, 4.0):
        values, summed = at_temperature(
            exact, Softened.make(logits, {"s": torch.randn_like(logits)}, temperature), gold
        )
        assert float(values["error/s"].max()) < 1e-10 and float(values["tv"].max()) < 1e-6
        assert float(values["kl"].abs().max()) < 1e-6 and float(summed["s"].abs().max()) < 1e-5


def test_what_is_lost_is_seen() -> None:
    signal, logits, gold = made(TopKCodec(12), 6)
    assert signal.head_ids is not None
    wrong = replace(
        signal, top1_ids=signal.head_ids[:, 1], gold_rank=signal.gold_rank + 1, head_logprob=signal.head_logprob - 1
    )
    anywhere = at_any_temperature(wrong, Kept.make(logits, gold))
    assert float(anywhere["top1"].max()) == float(anywhere["rank"].max()) == 0.0
    assert float(anywhere["partition"][:, GRID.index(0.5)].min()) > 0.1
    without_gold = at_any_temperature(signal, Kept.make(logits, torch.full_like(gold, -100)))
    assert bool(without_gold["rank"].isnan().all())


def test_means_and_angles_of_a_gradient() -> None:
    # Two positions: at one the gradient is doubled, at the other turned by a right angle.
    found, truth = Gathered(), Gathered()
    truth.add({"gold": torch.tensor([0, 1])})
    truth.add({"norm/s": torch.tensor([4.0, 1.0])}, "1/")
    truth.add_sums({"s": torch.tensor([2.0, 1.0])}, "1/")
    # g = (2, 0), e = (2, 0); and g = (0, 1), e = (1, -1).
    found.add({"error/s": torch.tensor([4.0, 2.0]), "along/s": torch.tensor([4.0, -1.0])}, "1/")
    found.add({"kl": torch.tensor([0.1, 0.3]), "tv": torch.tensor([0.2, 0.4])}, "1/")
    found.add({"sure": torch.tensor([0.95, 0.95]), "right": torch.tensor([1.0, 0.0])}, "1/")
    found.add_sums({"s": torch.tensor([3.0, -1.0])}, "1/")
    means = means_at(found, truth, "1", ["s"])
    assert means["kl"] == pytest.approx(0.2) and means["total_variation"] == pytest.approx(0.3)
    assert means["ece"] == pytest.approx(0.45)
    gradient = means["gradient_s"]
    assert gradient["error"] == pytest.approx((6 / 5) ** 0.5)
    # cos = (g + e)·g / |g + e||g| over both: (8 + 0) / √(17·5).
    assert gradient["angle"] == pytest.approx(np.degrees(np.arccos(8 / 85**0.5)))
    assert gradient["median_error"] == pytest.approx((1 + 2**0.5) / 2)
    assert gradient["median_angle"] == pytest.approx(45.0)
    assert gradient["summed_error"] == pytest.approx(2**0.5)
    assert "summed_error" not in means_at(found, truth, "1", ["s"], np.array([True, False]))["gradient_s"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60))
def test_calibration_error_against_a_loop(pairs: list[tuple[float, bool]]) -> None:
    sure, right = np.array([p for p, _ in pairs]), np.array([float(r) for _, r in pairs])
    expected = 0.0
    for b in range(15):
        inside = [i for i, p in enumerate(sure) if min(int(p * 15), 14) == b]
        expected += abs(sum(sure[i] - right[i] for i in inside)) / len(pairs)
    assert calibration_error(sure, right) == pytest.approx(expected, abs=1e-12)
    assert calibration_error(sure[:0], right[:0]) is None
