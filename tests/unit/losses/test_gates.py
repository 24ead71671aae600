"""Gates against their formulas: written out once more on whole distributions, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import SHAPES, STORED, dense_signal, known_of, merged, reference, softened, sparse_signal
from test_fused import CODECS, NAMES, C, H, N, both_agree, make_head, make_signal, outcome, plain_loss
from torch import Tensor

from distill_jobs.losses import GATES, LOSSES, Gate, SoftLoss, distillation_loss, make_loss
from distill_jobs.losses.fused import fused_loss
from distill_jobs.losses.fused_task import OutputHead
from distill_jobs.spec import gate as spec
from distill_jobs.spec.distill import Loss
from distill_jobs.store import tail
from distill_jobs.store.blend import blend
from distill_jobs.store.codecs.base import FLOOR
from distill_jobs.store.codecs.hybrid import HybridCodec
from distill_jobs.store.signal import TeacherSignal

ROWS, CLASSES = 24, 12
ASKED = {
    "drop": {"confidence": 0.5, "gold": 0.3, "entropy": 2.0},
    "downweight": {"power": 1.5},
    "swap": {},
    "revise": {"eta": 0.9},
    "rld": {"alpha": 1.5, "beta": 3.0},
    "selective": {"k": 1, "rejected": 0.25},
}
SPARSE = [*SHAPES]


def loss_behind(name: str, loss: str = "forward_kl", **arguments: float) -> SoftLoss:
    asked = spec.Gate.model_validate({name: arguments or ASKED.get(name, {})})
    return make_loss(Loss.model_validate(loss), False, asked)


def gate(name: str, **arguments: float) -> Gate:
    return loss_behind(name, **arguments).gate


def case(seed: int, rows: int = ROWS, scale: float = 2.5) -> tuple[Tensor, Tensor, Tensor]:
    """A teacher's and a student's logits [rows, CLASSES], and labels: right, nearly right and badly wrong ones."""
    torch.manual_seed(seed)
    teacher = scale * torch.randn(rows, CLASSES)
    order = teacher.argsort(dim=-1, descending=True)
    rank = torch.arange(rows) % CLASSES
    return teacher, torch.randn(rows, CLASSES, dtype=torch.float64), order.gather(1, rank[:, None])[:, 0]


def plain(name: str, p: Tensor, gold: int, guess: int) -> tuple[Tensor, float]:
    """What a gate makes of one distribution [V]: another one, and the share of alpha that is kept."""
    top = int(p.argmax())
    if name == "selective":
        return p, 1.0 if guess == top else 0.25
    if top == gold:
        return p, 1.0
    if name == "drop":
        entropy = -float((p * p.log()).sum())
        return p, 0.0 if p[top] >= 0.5 and p[gold] <= 0.3 and entropy <= 2.0 else 1.0
    if name == "downweight":
        return p, float((p[gold] / p[top]) ** 1.5)
    changed = p.clone()
    if name == "swap":
        changed[[gold, top]] = p[[top, gold]]
    if name == "revise":
        share = 0.9 / (p[top] - p[gold] + 1)
        changed = share * p
        changed[gold] += 1 - share
    return changed, 1.0


def again(p: Tensor, temperature: float) -> Tensor:
    return torch.softmax(p.log() / temperature, dim=-1)


def of_gold(signal: TeacherSignal, labels: Tensor) -> Tensor:
    """[N], the head's entry of the right class, -inf where it has none."""
    if signal.head_ids is None:
        return signal.head_logprob.gather(1, labels[:, None])[:, 0]
    return signal.head_logprob.masked_fill(signal.head_ids != labels[:, None], -torch.inf).amax(dim=-1)


def refined_by_hand(p: Tensor, q: Tensor, gold: int, rest: list[int] | None = None) -> Tensor:
    """Refined logit distillation between softened distributions, MCD over ``rest``."""
    below = [v for v in range(len(p)) if p[v] < p[gold]] if rest is None else rest
    sure, right = torch.stack([p.max(), 1 - p.max()]), torch.stack([q[gold], 1 - q[gold]])
    among = torch.zeros((), dtype=q.dtype)
    if below:
        among = reference("forward_kl", p[below] / p[below].sum(), q[below] / q[below].sum(), gold)
    return 1.5 * reference("forward_kl", sure, right, gold) + 3.0 * among


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("alpha", [0.4, 1.0])
@pytest.mark.parametrize("name", sorted(ASKED))
def test_dense_equals_the_formula(name: str, alpha: float, temperature: float) -> None:
    teacher, logits, labels = case(1)
    signal = dense_signal(teacher, labels)
    logits.requires_grad_()
    parts = distillation_loss(logits, labels, signal, alpha, temperature, loss_behind(name))
    total, soft, touched = logits.new_zeros(()), 0.0, 0
    for row in range(ROWS):
        gold, p = int(labels[row]), torch.softmax(signal.head_logprob[row].double(), dim=-1)
        target, kept = plain(name, p, gold, int(logits[row].argmax()))
        q = torch.softmax(logits[row] / temperature, dim=-1)
        if name == "rld":
            value = refined_by_hand(again(p, temperature), q, gold)
        else:
            value = reference("forward_kl", again(target, temperature), q, gold)
        hard = -torch.log_softmax(logits[row], dim=-1)[gold]
        total = total + (1 - alpha * kept) * hard + alpha * kept * temperature**2 * value
        soft += float(kept * temperature**2 * value.detach())
        touched += (name == "rld" and int(p.argmax()) != gold) or kept < 1 or not torch.equal(target, p)
    assert float(parts.total.detach()) == pytest.approx(float(total.detach()) / ROWS, rel=2e-5)
    assert float(parts.soft) == pytest.approx(soft / ROWS, rel=2e-5)
    assert parts.gated is not None and float(parts.gated) == pytest.approx(touched / ROWS)
    found, wanted = (torch.autograd.grad(value, logits)[0] for value in (parts.total, total / ROWS))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("name", ["swap", "revise"])
@pytest.mark.parametrize("shape", ["topk", "topk all"])
def test_a_bucketed_target_is_the_changed_distribution(shape: str, name: str, temperature: float) -> None:
    """Wherever the right class lies: in the head, or known by its stored probability alone."""
    assert temperature in STORED
    teacher, logits, labels = case(2)
    signal = gate(name)(sparse_signal(shape, teacher, labels), labels).signal
    found = LOSSES["forward_kl"].direct
    assert found is not None
    values = found(logits, signal, temperature)
    for row in range(ROWS):
        p = softened(teacher[row], 1.0)
        target = again(plain(name, p, int(labels[row]), 0)[0], temperature)
        known = known_of(signal, row, [])
        q = softened(logits[row], temperature)
        wanted = reference("forward_kl", merged(target, known), merged(q, known), 0)
        assert float(values[row]) == pytest.approx(float(wanted), abs=2e-4), row


@pytest.mark.parametrize("name", ["swap", "revise"])
@pytest.mark.parametrize("shape", ["hybrid", "sampled", "hybrid all"])
def test_draws_stand_for_the_changed_tail(shape: str, name: str) -> None:
    """Over many draws the target at T = 1 is the changed distribution, without bias; its entropy is exact."""
    teacher, _, labels = case(3, 12)
    many = 4000
    for row in (0, 1, 4, 7, 11):
        rows, gold = teacher[row].expand(many, -1), labels[row].expand(many)
        signal = gate(name)(sparse_signal(shape, rows, gold, seed=row), gold).signal
        wanted, _ = plain(name, softened(teacher[row], 1.0), int(gold[0]), 0)
        mean = signal.expand(1.0, torch.zeros(many, CLASSES)).double().mean(dim=0)
        # Where draws that fell on the right class are left out the others are fewer: a bias of the order of 1/D.
        loose = 0.02 if (name, shape) == ("revise", "sampled") else 6e-3
        torch.testing.assert_close(mean, wanted, atol=loose, rtol=0.05)
        entropy = -float((wanted * wanted.log()).sum())
        assert float(signal.entropy[0]) == pytest.approx(entropy, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from(SPARSE),
    name=st.sampled_from(["swap", "revise"]),
    scale=st.floats(0.1, 8),
    eta=st.floats(0.05, 1),
    temperature=st.floats(0.5, 10),
)
def test_masses_add_up_and_the_right_class_leads(
    seed: int, shape: str, name: str, scale: float, eta: float, temperature: float
) -> None:
    teacher, _, labels = case(seed, scale=scale)
    before = sparse_signal(shape, teacher, labels)
    asked = gate(name, eta=eta) if name == "revise" else gate(name)
    after = asked(before, labels).signal
    assert after.tail_nodes is not None and after.head_ids is not None
    whole = after.head_logprob.exp().sum(dim=-1) + after.tail_at(1.0).exp()
    torch.testing.assert_close(whole, torch.ones(ROWS), atol=3e-3, rtol=0)
    head, rest = after.at(temperature)
    assert rest is not None
    torch.testing.assert_close(head.exp().sum(dim=-1) + rest.exp(), torch.ones(ROWS))
    assert all(len(set(ids)) == len(ids) for ids in after.head_ids.tolist())
    if after.draw_ids is not None and bool((after.draw_logprob > FLOOR / 2).any()):
        shares = after.draws_at(temperature).exp().sum(dim=-1)
        stood_for = shares > 0
        torch.testing.assert_close(shares[stood_for], rest.exp()[stood_for], rtol=1e-4, atol=1e-6)
    if shape != "sampled" or name == "revise":
        wrong = before.gold_rank > 0
        assert bool((of_gold(after, labels) >= after.head_logprob.amax(dim=-1) - 1e-5)[wrong].all())
    assert bool((after.gold_rank == 0).all())


def test_on_par_at_eta_1() -> None:
    teacher, _, labels = case(4)
    signal = dense_signal(teacher, labels)
    after = gate("revise", eta=1.0)(signal, labels).signal.head_logprob
    torch.testing.assert_close(after.gather(1, labels[:, None])[:, 0], after.amax(dim=-1))


@pytest.mark.parametrize("shape", ["dense", *SPARSE])
@pytest.mark.parametrize("name", ["none", "drop", "downweight", "swap", "revise"])
def test_a_teacher_who_is_right_is_left_alone(name: str, shape: str) -> None:
    teacher, logits, _ = case(5)
    labels = teacher.argmax(dim=-1)
    signal = dense_signal(teacher, labels) if shape == "dense" else sparse_signal(shape, teacher, labels)
    gated = gate(name)(signal, labels)
    assert not gated.touched.any()
    assert gated.weight is None or bool((gated.weight == 1).all())
    for temperature in (1.0, 2.0):
        free, behind = (
            distillation_loss(logits, labels, signal, 0.7, temperature, loss)
            for loss in (make_loss(), loss_behind(name))
        )
        # A headless signal that is to be revised knows the right class apart, whether the teacher is right or not.
        tight = 0.3 if (name, shape) == ("revise", "sampled") else 1e-6
        assert float(behind.total) == pytest.approx(float(free.total), rel=tight)


def test_nobody_is_judged_without_a_right_class() -> None:
    teacher, _, labels = case(6)
    unknown = sparse_signal("hybrid", teacher, torch.full_like(labels, -1))
    for name in ("drop", "downweight", "swap", "revise"):
        assert not gate(name)(unknown, labels).touched.any(), name


@pytest.mark.parametrize("shape", SPARSE)
@pytest.mark.parametrize("name", ["swap", "revise"])
@pytest.mark.parametrize("loss", ["reverse_kl", "jensen_shannon", "decoupled", "total_variation"])
def test_other_losses_see_the_changed_teacher(loss: str, name: str, shape: str) -> None:
    teacher, logits, labels = case(7)
    signal = sparse_signal(shape, teacher, labels)
    soft = loss_behind(name, loss)
    after = soft.gate(signal, labels).signal
    kind = LOSSES[loss]
    cells_free = soft(logits, after, 1.0, labels)
    for row in range(ROWS):
        gold = int(labels[row])
        target, _ = plain(name, softened(teacher[row], 1.0), gold, 0)
        known = [gold] if kind.needs_labels else []
        drawn = (
            set()
            if after.draw_ids is None
            else {int(i) for i, n in zip(after.draw_ids[row], _counts(after, row), strict=True) if n > 0}
        )
        everyone = sorted({*known, *after.head_ids[row].tolist(), *drawn})
        place = everyone.index(gold) if gold in everyone else -1
        q = softened(logits[row], 1.0)
        bucket = len(everyone) < CLASSES
        wanted = reference(loss, merged(target, everyone), merged(q, everyone), place, bucket)
        assert float(cells_free[row]) == pytest.approx(float(wanted), abs=5e-3, rel=5e-3), row


def _counts(signal: TeacherSignal, row: int) -> list[float]:
    assert signal.draw_ids is not None and signal.tail_nodes is not None
    if bool(tail.is_empty(signal.tail_nodes)[row]):
        return [0.0] * signal.draw_ids.shape[1]
    return [1.0] * signal.draw_ids.shape[1] if signal.draw_counts is None else signal.draw_counts[row].tolist()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("shape", SPARSE)
def test_refined_over_cells(shape: str, temperature: float) -> None:
    """MCD is among what is surely less likely than the right class, unknown classes as one where all of them are."""
    teacher, logits, labels = case(8)
    signal = sparse_signal(shape, teacher, labels)
    values = loss_behind("rld")(logits, signal, temperature, labels)
    for row in range(ROWS):
        p, q, gold = softened(teacher[row], temperature), softened(logits[row], temperature), int(labels[row])
        known = known_of(signal, row, [gold])
        others = [v for v in range(CLASSES) if v not in known]
        below = [i for i, v in enumerate(known) if p[v] < p[gold]]
        if others and all(p[v] < p[gold] for v in others):
            below.append(len(known))
        wide_p, wide_q = (torch.cat([side[known], side[others].sum()[None]]) for side in (p, q))
        top = torch.stack([p.max(), 1 - p.max()]), torch.stack([q[gold], 1 - q[gold]])
        wanted = 1.5 * reference("forward_kl", *top, 0)
        if below:
            small, given_ = wide_p[below], wide_q[below]
            wanted = wanted + 3.0 * reference("forward_kl", small / small.sum(), given_ / given_.sum(), 0)
        assert float(values[row]) == pytest.approx(float(wanted), rel=3e-2, abs=3e-3), row


def test_refined_is_decoupled_where_the_teacher_is_right() -> None:
    teacher, logits, _ = case(9)
    labels = teacher.argmax(dim=-1)
    for shape in SPARSE:
        signal = sparse_signal(shape, teacher, labels)
        decoupled = make_loss(Loss.model_validate({"decoupled": {"alpha": 1.5, "beta": 3.0}}))
        ours, theirs = loss_behind("rld")(logits, signal, 2.0, labels), decoupled(logits, signal, 2.0, labels)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shape", ["dense", *SPARSE])
@pytest.mark.parametrize("name", [n for n in sorted(ASKED) if n != "selective"])
def test_gradcheck(name: str, shape: str) -> None:
    teacher, _, labels = case(10, 6)
    signal = dense_signal(teacher, labels) if shape == "dense" else sparse_signal(shape, teacher, labels)
    soft = loss_behind(name)
    logits = torch.randn(6, CLASSES, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z: distillation_loss(z, labels, signal, 0.6, 2.0, soft).total, [logits], atol=1e-5, fast_mode=True
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.1])
@pytest.mark.parametrize("codec", CODECS, ids=NAMES)
@pytest.mark.parametrize("name", sorted(ASKED))
def test_the_fused_kernel_knows_gates(name: str, codec: object, temperature: float) -> None:
    torch.manual_seed(11)
    hidden, labels = torch.randn(N, H, dtype=torch.float64), torch.randint(0, C, (N,))
    signal, soft = make_signal(codec, gold=labels), loss_behind(name)
    for alpha, bias, more in ((0.3, True, {"chunk": 3}), (1.0, False, {})):
        head = make_head(bias, scale=0.8, softcap=3.0)
        both_agree(hidden, head, labels, signal, alpha, temperature, soft, tight=3e-6, **more)


@pytest.mark.parametrize("name", sorted(ASKED))
def test_the_fused_kernel_knows_gates_in_half_precision(name: str) -> None:
    torch.manual_seed(16)
    rows = 400
    labels, half = torch.randint(0, C, (rows,)), make_head(dtype=torch.bfloat16)
    signal, hidden = make_signal(HybridCodec(5, 4), rows, gold=labels), torch.randn(rows, H).bfloat16()
    rest = (labels, signal, 0.5, 2.0, loss_behind(name))
    found = outcome(fused_loss, hidden, half, *rest, chunk=64)
    true = outcome(plain_loss, hidden.double(), OutputHead(half.weight.detach().double().requires_grad_()), *rest)
    for ours, wanted in zip(found, true, strict=True):
        # A guess on the edge may tip over when it is rounded.
        assert float((ours.double() - wanted).norm() / wanted.norm()) < (0.1 if name == "selective" else 0.01)


def test_the_fused_kernel_weighs_other_losses() -> None:
    torch.manual_seed(12)
    hidden, labels = torch.randn(N, H, dtype=torch.float64), torch.randint(0, C, (N,))
    for codec in CODECS[:4]:
        signal = make_signal(codec, gold=labels)
        for name in ("downweight", "revise", "selective"):
            soft = loss_behind(name, "jensen_shannon")
            both_agree(hidden, make_head(True), labels, signal, 0.6, 2.0, soft, tight=3e-6, chunk=3)


@pytest.mark.parametrize("shape", ["dense", "topk", "hybrid", "sampled"])
@pytest.mark.parametrize("name", ["drop", "downweight", "swap", "revise", "rld"])
def test_the_mixture_of_several_teachers_is_gated(name: str, shape: str) -> None:
    torch.manual_seed(17)
    labels, weights = torch.randint(0, CLASSES, (ROWS,)), torch.rand(1, ROWS)
    signals = [
        dense_signal(logits, labels) if shape == "dense" else sparse_signal(shape, logits, labels, seed=seed)
        for seed, logits in enumerate(2.0 * torch.randn(2, ROWS, CLASSES))
    ]
    mixture = blend(signals, torch.cat([weights, 1 - weights]), labels)
    soft = loss_behind(name)
    after = soft.gate(mixture, labels).signal
    if after.head_ids is not None and after.tail_nodes is not None:
        assert all(len(set(ids)) == len(ids) for ids in after.head_ids.tolist())
        whole = after.head_logprob.exp().sum(dim=-1) + after.tail_at(1.0).exp()
        torch.testing.assert_close(whole, torch.ones(ROWS), atol=5e-3, rtol=0)
    if name in ("swap", "revise") and shape != "sampled":
        wrong = mixture.gold_rank > 0
        assert bool((of_gold(after, labels) >= after.head_logprob.amax(dim=-1) - 1e-5)[wrong].all())
    hidden, head = torch.randn(ROWS, H, dtype=torch.float64), make_head(True)
    short = OutputHead(head.weight[:CLASSES], None)
    both_agree(hidden, short, labels, mixture, 0.6, 2.0, soft, tight=3e-6, chunk=5)


def test_a_dropped_position_learns_as_a_baseline_does() -> None:
    teacher, logits, labels = case(13)
    signal = sparse_signal("hybrid", teacher, labels)
    soft = loss_behind("drop", confidence=0.0, gold=1.0)
    bad = soft.gate(signal, labels).touched
    logits.requires_grad_()
    found, plainly = (
        torch.autograd.grad(distillation_loss(logits, labels, s, a, 2.0, soft).total, logits)[0]
        for s, a in ((signal, 0.9), (None, 0.0))
    )
    assert bool(bad.any()) and not bool(bad.all())
    torch.testing.assert_close(found[bad], plainly[bad])
    assert float((found - plainly)[~bad].abs().max()) > 1e-3


def test_selective_reads_the_teachers_top_k() -> None:
    teacher, _, labels = case(14)
    order = teacher.argsort(dim=-1, descending=True)
    for shape in ("dense", "topk", "hybrid"):
        signal = dense_signal(teacher, labels) if shape == "dense" else sparse_signal(shape, teacher, labels)
        for place in (0, 2, 3, 4):
            weight = gate("selective", k=4)(signal, labels, order[:, place]).weight
            assert weight is not None
            assert bool((weight == float(place < 4)).all()), (shape, place)


def test_a_part_that_is_dropped_spoils_nothing() -> None:
    teacher, logits, labels = case(15, 4)
    signal = dense_signal(teacher, labels)
    broken = SoftLoss(LOSSES["mse"], LOSSES["mse"].arguments(), gate=gate("drop", confidence=0.0, gold=1.0))
    logits[0, 0] = math.inf
    assert not torch.isfinite(distillation_loss(logits, labels, signal, 0.5, 1.0, broken).total)
    assert set(GATES) == set(spec.Gate.model_fields)
