"""Forward KL and cross-entropy of some rows of logits, which are turned into their own gradient in place.

A block of rows is small enough for a core's cache, so that its passes cost little beside the product that made it.
Shapes: n rows, C classes that the teacher told apart, K head entries, D draws.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from distill_jobs.store.signal import TeacherSignal

# In nats: a class so far below the likeliest still has a probability that float32 holds in full.
_FAR = 40.0


@dataclass(frozen=True)
class Weights:
    """How the two losses of a row enter the total, and how its logits come about.

    Attributes:
        alpha: the soft part's share.
        temperature: T.
        share: what a row's gradient is multiplied with, 1/N for a mean.
        scale, softcap: what the model does to its head's output, see ``OutputHead``.
    """

    alpha: float
    temperature: float
    share: float = 1.0
    scale: float = 1.0
    softcap: float | None = None

    @property
    def gain(self) -> float:
        """What the head's output is to be multiplied with before it comes here: then it is z/T, or atanh(z/softcap)."""
        return self.scale / (self.softcap or self.temperature)

    def of_parts(self, kept: Tensor | None) -> tuple[float | Tensor, float | Tensor]:
        """The weights of a gradient by z/T of the soft loss and of one by z of the cross-entropy, in the gradient of
        the total by the head's output.

        Args:
            kept: [n], the share of alpha that a gate leaves to each row; then both are [n, 1].
        """
        alpha = self.alpha if kept is None else self.alpha * kept[:, None]
        return alpha * self.temperature * self.share * self.scale, (1 - alpha) * self.share * self.scale


@dataclass(frozen=True)
class SparseTarget:
    """What ``forward_kl`` pulls n rows towards, at one temperature: head, draws in the share ``trust``, tail bucket.

    Attributes:
        head_ids: [n, K] int64; head: [n, K], log-probabilities.
        tail: [n], log of the tail's mass, -inf for none.
        draw_ids: [n, D] int64; draws: [n, D], probabilities that stand for the tail; D may be 0.
        trust: [n], the share of the tail that is left to the draws.
        entropy: [n], of the target, for the share of the draws.
        drawn, bucketed: is there any row with, without full trust?
    """

    head_ids: Tensor
    head: Tensor
    tail: Tensor
    draw_ids: Tensor
    draws: Tensor
    trust: Tensor
    entropy: Tensor
    drawn: bool
    bucketed: bool

    @classmethod
    def of(cls, signal: TeacherSignal, temperature: float, dtype: torch.dtype) -> "SparseTarget":
        """The target of a signal with a head, softened by ``temperature``."""
        assert signal.head_ids is not None
        head, tail = signal.at(temperature)
        head = head.to(dtype)
        if tail is None:
            tail = torch.full_like(head[:, 0], -torch.inf)
        none = torch.zeros_like(tail, dtype=dtype)
        draw_ids, draws = signal.head_ids[:, :0], head[:, :0]
        trust, entropy, drawn = none, none, signal.draw_ids is not None
        if signal.draw_ids is not None:
            draw_ids, draws = signal.draw_ids, signal.draws_at(temperature).to(dtype).exp()
            trust, entropy = signal.trust_at(temperature).to(dtype), signal.entropy_at(temperature).to(dtype)
        bucketed = not drawn or temperature > 1
        return cls(signal.head_ids, head, tail.to(dtype), draw_ids, draws, trust, entropy, drawn, bucketed)

    @classmethod
    def nothing(cls, rows: int, device: torch.device, dtype: torch.dtype) -> "SparseTarget":
        """No target: only the cross-entropy is wanted."""
        ids, empty = torch.empty(rows, 0, dtype=torch.int64, device=device), torch.empty(rows, 0, device=device)
        none = torch.zeros(rows, dtype=dtype, device=device)
        return cls(ids, empty.to(dtype), none, ids, empty.to(dtype), none, none, False, False)

    def rows(self, rows: slice) -> "SparseTarget":
        """The target of some of the rows."""
        return replace(self, **_tensors(self, rows))


def signal_rows(signal: TeacherSignal, rows: slice) -> TeacherSignal:
    """The signal at some of its positions."""
    return replace(signal, **_tensors(signal, rows))


def sparse_rows_(
    z: Tensor, labels: Tensor, target: SparseTarget, w: Weights, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and ``forward_kl`` (without T²) of each row; ``z`` [n, C] becomes the gradient of the total.

    The wide passes make one softmax over the tail alone, so that a vanishing tail loses no digits; its normaliser gives
    all others. The few entries of head, draws and label are worked out apart and put in at the end.

    Args:
        z: [n, C] float32 or float64, the head's output (bias included) times ``w.gain``.
        labels: [n] int64.
        kept: [n], the share of alpha that a gate leaves to each row; all of it where it is None.

    Returns:
        Two [n], in nats.
    """
    slope = _cap_(z, w)
    t, k, d = w.temperature, target.head_ids.shape[1], target.draw_ids.shape[1]
    some = z.gather(1, torch.cat([target.head_ids, target.draw_ids, labels[:, None]], dim=1))
    z_head, z_draws, z_label = some[:, :k], some[:, k : k + d], some[:, -1] * t
    z.scatter_(1, target.head_ids, -torch.inf)
    outside, (plain, unit, outside_1) = _softmaxes_(z, t, open_end=k < z.shape[1])
    total = torch.logaddexp(torch.logsumexp(z_head, dim=-1), outside)
    total_1 = total if t == 1 else torch.logaddexp(torch.logsumexp(z_head * t, dim=-1), outside_1)

    soft, (of_all, of_tail), on_head = _kl(target, z_head, z_draws, outside, total)
    a, h = w.of_parts(kept)
    pull = a * (of_all * (outside - total).exp() + of_tail)[:, None]
    push = h * (unit - total_1).exp()[:, None]
    if plain is None:
        z.mul_(pull + push)
    else:
        z.mul_(pull).addcmul_(plain, push)
    z.scatter_(1, target.head_ids, a * on_head + h * (z_head * t - total_1[:, None]).exp())
    if target.drawn:
        z.scatter_add_(1, target.draw_ids, -a * target.trust[:, None] * target.draws)
    z.scatter_add_(1, labels[:, None], -h * torch.ones_like(z_label)[:, None])
    if slope is not None:
        z.mul_(slope)
    return total_1 - z_label, soft


def dense_rows_(
    z: Tensor, labels: Tensor, signal: TeacherSignal, w: Weights, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same for a signal of every class, by a few tensors of the rows' size."""
    slope = _cap_(z, w)
    t = w.temperature
    target, _ = signal.at(t)
    target = target.to(z.dtype)
    mass = target.exp()
    student = torch.log_softmax(z, dim=-1)
    soft = _cross(mass, target - student).sum(dim=-1)
    plain = student if t == 1 else torch.log_softmax(z * t, dim=-1)
    hard = -plain.gather(1, labels[:, None]).squeeze(1)
    # Of a target that adds up to 1 - ε the gradient still adds up to 0.
    a, h = w.of_parts(kept)
    torch.mul(student.exp(), mass.sum(dim=-1, keepdim=True), out=z).sub_(mass).mul_(a)
    if isinstance(h, Tensor):
        z.addcmul_(plain.exp(), h)
    else:
        z.add_(plain.exp(), alpha=h)
    z.scatter_add_(1, labels[:, None], -h * torch.ones_like(hard)[:, None])
    if slope is not None:
        z.mul_(slope)
    return hard, soft


def _cap_(z: Tensor, w: Weights) -> Tensor | None:
    """Cap in place, as the model does; then ``z`` holds the logits over T. Returns the cap's slope [n, C], if any."""
    if w.softcap is None:
        return None
    slope = z.tanh_().square().neg_().add_(1.0)
    z.mul_(w.softcap / w.temperature)
    return slope


def _softmaxes_(z: Tensor, t: float, open_end: bool) -> tuple[Tensor, tuple[Tensor | None, Tensor, Tensor]]:
    """``z`` [n, C], logits over T, becomes its softmax; what is at -inf takes no part.

    Args:
        open_end: whether there is any column that is not at -inf.

    Returns:
        log Σ exp z [n], -inf where there is no column; and the same at T = 1: exponentials [n, C] up to a factor (None:
        those in ``z``), the logarithm of the factor [n], log Σ exp(z · T) [n].
    """
    if not open_end:
        none = torch.full_like(z[:, 0], -torch.inf)
        return none, (None if t == 1 else z.zero_(), none, none)
    if t in (1, 2, 4):
        outside = _softmax_(z)
        if t == 1:
            return outside, (None, outside, outside)
        plain = torch.square(z)
        plain = plain.square_() if t == 4 else plain
        return outside, (plain, t * outside, t * outside + plain.sum(dim=-1).log())
    plain = z * t
    outside_1 = _softmax_(plain)
    return _softmax_(z), (plain, outside_1, outside_1)


def _softmax_(z: Tensor) -> Tensor:
    """Each row of ``z`` [n, C] becomes its softmax; returns log Σ exp z, [n]."""
    top = z.amax(dim=-1)
    if z.device.type == "cpu":
        # torch's softmax in place is the fastest there is. It keeps its normaliser to itself, but any class that is
        # known before and after tells it, if it doesn't become 0.
        step = max(1, z.shape[1] // 64)
        known, place = z[:, ::step].max(dim=-1)
        if bool((top - known < _FAR).all()):
            torch.softmax(z, dim=-1, out=z)
            return known - z.gather(1, place[:, None] * step).squeeze(1).log()
    z.sub_(top[:, None]).exp_()
    mass = z.sum(dim=-1)
    z.div_(mass[:, None])
    return top + mass.log()


def _kl(
    target: SparseTarget, z_head: Tensor, z_draws: Tensor, outside: Tensor, total: Tensor
) -> tuple[Tensor, tuple[Tensor | float, Tensor | float], Tensor]:
    """``forward_kl`` of each row, from the student's z/T of few entries and the normalisers at T.

    Returns:
        the values [n]; what the gradient off the head is a multiple of: the student's softmax over all classes and
        over the tail alone, [n] each; the gradient on the head [n, K]. Gradients by z/T.
    """
    mass = target.head.exp()
    student = (z_head - total[:, None]).exp()
    drawn, bucketed = torch.zeros_like(total), torch.zeros_like(total)
    of_all: Tensor | float = 0.0
    of_tail: Tensor | float = 0.0
    pull = 1 - target.trust
    if target.drawn:
        every = mass.sum(dim=-1) + target.draws.sum(dim=-1)
        crossed = _cross(mass, total[:, None] - z_head).sum(dim=-1)
        drawn = crossed + _cross(target.draws, total[:, None] - z_draws).sum(dim=-1) - target.entropy
        of_all = target.trust * every
        pull = pull + of_all
    if target.bucketed:
        tail = target.tail.exp()
        bucketed = _cross(mass, target.head - z_head + total[:, None]).sum(dim=-1)
        bucketed = bucketed + _cross(tail, target.tail - (outside - total))
        of_tail = (1 - target.trust) * ((outside - total).exp() - tail)
        if target.drawn:
            drawn, bucketed = _cross(target.trust, drawn), _cross(1 - target.trust, bucketed)
    return drawn + bucketed, (of_all, of_tail), student * pull[:, None] - mass


def _cross(weight: Tensor, value: Tensor) -> Tensor:
    """weight·value, and 0 where the weight is 0 even if the value is not finite."""
    return torch.where(weight > 0, weight * value, 0.0)


def _tensors(holder: SparseTarget | TeacherSignal, rows: slice) -> dict[str, Any]:
    values = {field.name: getattr(holder, field.name) for field in fields(holder)}
    return {name: value[rows] for name, value in values.items() if isinstance(value, Tensor)}
