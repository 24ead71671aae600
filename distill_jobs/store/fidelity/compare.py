"""One coding against the truth, at single positions.

The gradient is that of ``T²·KL(teacher_T ‖ student_T)`` at the student's logits: ``T·(Σt·s - t)``, for a target t and
the student's probabilities s, both at T. Shapes: N positions, V classes, K head entries.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill_jobs.store.signal import TeacherSignal

GRID = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0)
"""Temperatures at which log-partitions are compared."""

MOST_RANK = (1 << 16) - 2
"""Ranks from here on are stored as this."""

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Softened:
    """The teacher and some students at one temperature: what every coding is held against.

    Attributes:
        logprob, probability: the teacher's, [N, V].
        students: log-probabilities [N, V] by name.
        gradients: at each student's logits, [N, V].
    """

    temperature: float
    logprob: Tensor
    probability: Tensor
    students: Values
    gradients: Values

    @classmethod
    def make(cls, logits: Tensor, students: Values, temperature: float) -> "Softened":
        """From logits [N, V] at T = 1."""
        logprob = torch.log_softmax(logits / temperature, dim=-1)
        probability = logprob.exp()
        softened = {name: torch.log_softmax(z / temperature, dim=-1) for name, z in students.items()}
        gradients = {name: (s.exp() - probability) * temperature for name, s in softened.items()}
        return cls(temperature, logprob, probability, softened, gradients)

    def norms(self) -> Values:
        """[N] squared lengths of the gradients."""
        return {name: gradient.square().sum(dim=-1) for name, gradient in self.gradients.items()}


def at_temperature(signal: TeacherSignal, truth: Softened, gold: Tensor) -> tuple[Values, Values]:
    """What a reader of ``signal`` gets wrong at one temperature.

    Returns:
        [N] each: ``kl``, from the truth to what was decoded, over the head's classes and all others as one (infinite
        where those are given no mass, NaN without a head); ``tv``, total variation, what of the tail is not left to
        draws spread evenly; ``sure`` and ``right``, the target's largest probability and whether it lies on ``gold``
        [N]; and for each student the error of the gradient: ``error/NAME`` its squared length, ``along/NAME`` its
        product with the truth.
        [V] each, by student: the error summed over positions.
    """
    t, temperature = truth.probability, truth.temperature
    # What of a tail is not left to draws a student fills: an even one for what has to do with no student.
    filled = signal.head_ids is not None and signal.tail_nodes is not None
    target = signal.expand(temperature, torch.zeros_like(t) if filled else None)
    sure, place = target.max(dim=-1)
    found = {
        "kl": _kl(signal, truth),
        "tv": (target - t).abs().sum(dim=-1) / 2,
        "sure": sure,
        "right": (place == gold).float(),
    }
    summed = {}
    for name, student in truth.students.items():
        target = signal.expand(temperature, student) if filled else target
        error = torch.sub(t, target)
        error.addcmul_(student.exp(), target.sum(dim=-1, keepdim=True) - 1).mul_(temperature)
        found[f"error/{name}"] = error.square().sum(dim=-1)
        found[f"along/{name}"] = (error * truth.gradients[name]).sum(dim=-1)
        summed[name] = error.sum(dim=0, dtype=torch.float64)
    return found, summed


@dataclass(frozen=True)
class Kept:
    """What the teacher says whatever the temperature: the gold class's log-probability and rank [N], the largest logit
    [N], and log Σ p^(1/T) [N, temperatures of GRID]."""

    logits: Tensor
    gold: Tensor
    gold_logprob: Tensor
    rank: Tensor
    largest: Tensor
    partitions: Tensor

    @classmethod
    def make(cls, logits: Tensor, gold: Tensor) -> "Kept":
        """From logits [N, V] and right classes [N], negative where there is none."""
        logprob, place = torch.log_softmax(logits, dim=-1), gold.clamp(min=0)[:, None]
        return cls(
            logits=logits,
            gold=gold,
            gold_logprob=logprob.gather(1, place)[:, 0],
            rank=(logits > logits.gather(1, place)).sum(dim=-1).clamp(max=MOST_RANK),
            largest=logits.amax(dim=-1),
            partitions=torch.stack([torch.logsumexp(logprob / t, dim=-1) for t in GRID], dim=1),
        )


def at_any_temperature(signal: TeacherSignal, truth: Kept) -> Values:
    """What is kept whatever the temperature.

    Returns:
        [N] each: ``top1`` and ``rank``, whether the likeliest class and the gold class's rank are right (the rank NaN
        where there is no gold class); ``gold``, |Δ log-probability| of the gold class, NaN where it isn't known; and
        [N, temperatures of GRID]: ``partition``, |Δ log Σ p^(1/T)|.
    """
    known = (truth.gold >= 0) & (signal.gold_rank >= 0)
    off = (signal.gold_logprob - truth.gold_logprob).abs()
    nan = torch.full_like(off, torch.nan)
    partitions = torch.stack([_log_partition(signal, t) for t in GRID], dim=1)
    return {
        "top1": (truth.logits.gather(1, signal.top1[:, None])[:, 0] == truth.largest).float(),
        "rank": torch.where(truth.gold >= 0, (signal.gold_rank == truth.rank).float(), nan),
        "gold": torch.where(known & (signal.tail_nodes is not None or signal.head_ids is None), off, nan),
        "partition": (partitions - truth.partitions).abs(),
    }


def _kl(signal: TeacherSignal, truth: Softened) -> Tensor:
    head, mass = signal.at(truth.temperature)
    if signal.head_ids is None:
        return (truth.probability * (truth.logprob - head)).sum(dim=-1)
    if head.shape[1] == 0:
        return torch.full_like(truth.logprob[:, 0], torch.nan)
    inside = truth.logprob.gather(1, signal.head_ids)
    # Summed without the head, not as a difference from 1: a small tail keeps its digits.
    outside = torch.logsumexp(truth.logprob.scatter(1, signal.head_ids, -torch.inf), dim=-1)
    mass = torch.full_like(outside, -torch.inf) if mass is None else mass
    return _cross(inside, inside - head).sum(dim=-1) + _cross(outside, outside - mass)


def _log_partition(signal: TeacherSignal, temperature: float) -> Tensor:
    # Without a tail the head is everything, whatever it adds up to.
    head = signal.at(1.0)[0] if signal.tail_nodes is None else signal.head_logprob
    total = torch.logsumexp(head / temperature, dim=-1)
    return total if signal.tail_nodes is None else torch.logaddexp(total, signal.tail_at(temperature))


def _cross(log_weight: Tensor, value: Tensor) -> Tensor:
    weight = log_weight.exp()
    return torch.where(weight > 0, weight * value, torch.zeros_like(weight))
