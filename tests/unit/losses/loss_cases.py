"""Teachers in every shape that a store gives them back in, and each loss once more, straight from its definition."""

import torch
from torch import Tensor

from distill_jobs.losses import LOSSES, SoftLoss, make_loss
from distill_jobs.spec.distill import Loss
from distill_jobs.store.codecs.dense import DenseCodec
from distill_jobs.store.codecs.select import select
from distill_jobs.store.draws import uniforms
from distill_jobs.store.signal import TeacherSignal

# Head entries and draws.
SHAPES = {"topk": (4, 0), "hybrid": (4, 5), "sampled": (0, 7), "topk all": (12, 0), "hybrid all": (12, 3)}
TEMPERATURES = [0.5, 1.0, 2.0, 4.0]
# At these a tail is stored, at others it is interpolated.
STORED = {0.5, 1.0, 4.0}
SPARSE = [name for name in LOSSES if name != "mse"]


def loss_of(name: str, standardise: bool = False, **arguments: float) -> SoftLoss:
    return make_loss(Loss.model_validate({name: arguments}), standardise)


def dense_signal(logits: Tensor, gold: Tensor) -> TeacherSignal:
    codec = DenseCodec()
    return codec.decode(codec.encode(logits, gold), logits.shape[1])


def sparse_signal(shape: str, logits: Tensor, gold: Tensor, seed: int = 0) -> TeacherSignal:
    """Exact: no codec has rounded it."""
    head, draws = SHAPES[shape]
    return select(logits, gold, head, draws, uniforms(seed, torch.arange(len(logits)), 1))


def softened(logits: Tensor, temperature: float) -> Tensor:
    return torch.softmax(logits.double() / temperature, dim=-1)


def known_of(signal: TeacherSignal, row: int, extra: list[int]) -> list[int]:
    """The classes of a row that are cells of their own."""
    known = set(extra) | set(signal.head_ids[row].tolist())
    if signal.draw_ids is not None and signal.head_ids.shape[1] < signal.classes:
        known |= set(signal.draw_ids[row].tolist())
    return sorted(known)


def merged(p: Tensor, known: list[int]) -> Tensor:
    """A distribution [V] with every class but ``known`` in one bucket, which comes last."""
    others = [v for v in range(len(p)) if v not in known]
    return torch.cat([p[known], p[others].sum()[None]]) if others else p[known]


def reference(name: str, p: Tensor, q: Tensor, gold: int, bucket: bool = False, **arguments: float) -> Tensor:
    """The loss between a teacher ``p`` and a student ``q`` over the same few classes, in float64."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a > 0, a * (a / b).log(), 0.0).sum()

    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "total_variation":
        return (p - q).abs().sum() / 2
    if name == "mse":
        gap = (q.log() - q.log().mean()) - (p.log() - p.log().mean())
        return (gap**2).mean()
    if name == "jensen_shannon":
        beta = arguments.get("beta", 0.5)
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    if name == "skew_forward_kl":
        share = arguments.get("skew", 0.1)
        return kl(p, share * p + (1 - share) * q)
    if name == "skew_reverse_kl":
        share = arguments.get("skew", 0.1)
        return kl(q, (1 - share) * p + share * q)
    if name == "adaptive_kl":
        order = sorted(range(len(p) - bucket), key=lambda i: -float(p[i]))
        head = [i for n, i in enumerate(order) if n == 0 or float(p[order[: n + 1]].sum()) <= arguments.get("mu", 0.5)]
        gap = (p - q).abs().detach()
        weight = gap[head].sum() / gap.sum()
        return weight * kl(p, q) + (1 - weight) * kl(q, p)
    assert name == "decoupled"
    wrong = [i for i in range(len(p)) if i != gold]
    right = torch.stack([p[gold], p[wrong].sum()]), torch.stack([q[gold], q[wrong].sum()])
    among = kl(p[wrong] / p[wrong].sum(), q[wrong] / q[wrong].sum())
    return arguments.get("alpha", 1.0) * kl(*right) + arguments.get("beta", 8.0) * among


def reference_rows(
    name: str, teacher: Tensor, student: Tensor, labels: Tensor, signal: TeacherSignal, **arguments: float
) -> Tensor:
    """``reference`` of every row of two distributions [N, V], over the cells that ``signal`` leaves."""
    values = []
    for row, (p, q) in enumerate(zip(teacher, student, strict=True)):
        gold = int(labels[row])
        if signal.head_ids is None:
            values.append(reference(name, p, q, gold, **arguments))
            continue
        known = known_of(signal, row, [gold] if LOSSES[name].needs_labels else [])
        place = known.index(gold) if gold in known else -1
        bucket = len(known) < len(p)
        values.append(reference(name, merged(p, known), merged(q, known), place, bucket, **arguments))
    return torch.stack(values)
