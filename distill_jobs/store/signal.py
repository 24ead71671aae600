"""The teacher's signal: what a loss may ask of the teacher, wherever and however it was stored.

Shapes: N positions, V classes, K head entries, M tail nodes, D draws.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distill_jobs.store import tail

AVERAGED_OVER = 128
"""Positions over which a gradient is taken to be averaged, where noise is weighed against bias. At T = 2, on real
positions, their summed gradient is then as good as the bucket's alone; larger numbers trust the draws too far."""


@dataclass(frozen=True)
class TeacherSignal:
    """What the teacher said at N positions, right at any temperature in [0.5, 10].

    The *head* is exact. What lies outside it is the *tail*: its mass is known at any T, and where there are draws they
    stand for its classes.

    Attributes:
        head_ids: [N, K] int64, the classes of the head, no class twice; None when the head is every class in order.
            K may be 0.
        head_logprob: [N, K] float32, their log-probabilities at T = 1.
        tail_nodes: [N, M] float32, log Σ_tail p^β at each of ``tail.TAIL_BETAS``; None when there is no tail.
        gold_logprob: [N] float32, log-probability of the right class (0 where there is none).
        gold_rank: [N] int64, classes that are likelier than the right one (-1 where there is none).
        entropy: [N] float32, of the whole distribution at T = 1, in nats.
        classes: number of classes that the teacher told apart.
        top1_ids: [N] int64, the likeliest class, where it is known without a search.
        top1_logprob: [N] float32, its log-probability, given where there is no head.
        draw_ids: [N, D] int64, classes drawn from the tail with probability p, with repeats; None without draws.
        draw_logprob: [N, D] float32, their log-probabilities at T = 1.
        draw_counts: [N, D] float32, how often each was drawn (0 marks an unused place); None when each was drawn once.
        features: what layers of the teacher gave, by their names: [N, width] float32; None where nobody asked for them.
    """

    head_ids: Tensor | None
    head_logprob: Tensor
    tail_nodes: Tensor | None
    gold_logprob: Tensor
    gold_rank: Tensor
    entropy: Tensor
    classes: int
    top1_ids: Tensor | None = None
    top1_logprob: Tensor | None = None
    draw_ids: Tensor | None = None
    draw_logprob: Tensor | None = None
    draw_counts: Tensor | None = None
    features: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.head_logprob)

    @property
    def top1(self) -> Tensor:
        """[N] int64, the teacher's likeliest class."""
        if self.top1_ids is not None:
            return self.top1_ids
        best = self.head_logprob.argmax(dim=-1)
        return best if self.head_ids is None else self.head_ids.gather(1, best[:, None]).squeeze(1)

    def at(self, temperature: float) -> tuple[Tensor, Tensor | None]:
        """The distribution softened by ``temperature``: p^(1/T) / Σ p^(1/T).

        Returns:
            head log-probabilities [N, K] and the log of the tail's whole mass [N] (None when there is no tail). Both
            together are normalised; a head alone is never renormalised.
        """
        head = self.head_logprob * (1.0 / temperature)
        if self.tail_nodes is None:
            return torch.log_softmax(head, dim=-1), None
        rest = self.tail_at(temperature)
        total = torch.logaddexp(torch.logsumexp(head, dim=-1), rest)
        return head - total[:, None], rest - total

    def tail_at(self, temperature: float) -> Tensor:
        """[N], log Σ_tail p^(1/T): at T = 1 the log of the tail's mass. Only where there is a tail."""
        assert self.tail_nodes is not None
        return tail.log_partition(self.tail_nodes, 1.0 / temperature)

    def draws_at(self, temperature: float) -> Tensor:
        """[N, D], log of what each draw stands for: together the tail's whole mass at T. Only where there are draws.

        A class was drawn with probability p, but the target at T wants p^(1/T): each draw weighs p^(1/T)/p, normalised
        over the draws of its position. At T = 1 all weigh the same, and the sum over them of any function of the
        classes is unbiased (Anshumann et al. 2025, "Sparse Logit Sampling"); at other T it is consistent, and the
        noisier the further T is above 1: see ``trust_at``.
        """
        assert self.draw_logprob is not None
        _, mass = self.at(temperature)
        assert mass is not None
        weight = self.draw_logprob * (1.0 / temperature - 1.0)
        if self.draw_counts is not None:
            weight = weight + self.draw_counts.log()
        shares = torch.log_softmax(weight, dim=-1).nan_to_num(nan=-torch.inf)
        return shares + mass[:, None]

    def trust_at(self, temperature: float) -> Tensor:
        """[N], the share λ of the tail that is best left to the draws; the rest goes to the bucket. 1 for T ≤ 1.

        Drawn by p, a few draws say little about p^(1/T) for T > 1, which spreads far beyond them. λ makes the expected
        squared error of a gradient over ``AVERAGED_OVER`` positions smallest: with β = 1/T and D draws the draws have
        the variance (R/D)·Σ_tail p^(2β-1), R the tail's mass, and no bias; the bucket no variance, and a squared bias
        of up to Σ_tail p^(2β) (both over Z²). Both sums are log-partitions of the tail, which the store holds.
        """
        assert self.tail_nodes is not None
        assert self.draw_logprob is not None
        beta = 1.0 / temperature
        if beta >= 1.0:
            return torch.ones_like(self.entropy)
        draws = self.draw_logprob.shape[1] if self.draw_counts is None else self.draw_counts.sum(dim=-1)
        noise = self.tail_at(1.0) + tail.log_partition_below(self.tail_nodes, 2 * beta - 1)
        odds = noise - tail.log_partition(self.tail_nodes, 2 * beta)
        share = 1.0 / (1.0 + odds.exp() / (draws * AVERAGED_OVER))
        return share.masked_fill(tail.is_empty(self.tail_nodes), 1.0)

    def entropy_at(self, temperature: float) -> Tensor:
        """[N], entropy of the softened distribution in nats: exact at T = 1 and without a tail, else interpolated."""
        if temperature == 1.0:
            return self.entropy
        head, mass = self.at(temperature)
        entropy = _cross(head, -head).sum(dim=-1)
        if mass is None:
            return entropy
        assert self.tail_nodes is not None
        beta = 1.0 / temperature
        # Σ_tail t·log t with log t = β·log p - log Z, and f'(β) the tail's own mean of log p.
        log_z = torch.where(torch.isinf(mass), torch.zeros_like(mass), self.tail_at(temperature) - mass)
        inside = beta * tail.mean_logprob(self.tail_nodes, beta) - log_z
        return (entropy - _cross(mass, inside)).clamp(min=0.0)

    def expand(self, temperature: float, student_logprob: Tensor | None = None) -> Tensor:
        """The target at T over all classes, [N, V]: what the forward KL's gradient pulls the student towards.

        What of the tail is not left to draws lies as the student spreads its own tail, so that only the sum of it is
        pulled on; that needs ``student_logprob`` [N, V] at T.
        """
        head, mass = self.at(temperature)
        if self.head_ids is None:
            return head.exp()
        target = torch.zeros(len(self), self.classes, dtype=head.dtype, device=head.device)
        trust = torch.zeros_like(self.entropy) if self.draw_ids is None else self.trust_at(temperature)
        if mass is not None and bool((trust < 1).any()):
            assert student_logprob is not None, "a tail that is not left to draws needs the student"
            own = student_logprob.scatter(1, self.head_ids, -torch.inf)
            bucket = (1.0 - trust) * mass.exp()
            target = bucket[:, None] * torch.softmax(own, dim=-1).nan_to_num(nan=0.0).to(head.dtype)
        if self.draw_ids is not None:
            target.scatter_add_(1, self.draw_ids, trust[:, None] * self.draws_at(temperature).exp())
        return target.scatter_(1, self.head_ids, head.exp())

    def to(self, device: torch.device | str) -> "TeacherSignal":
        """The same signal on another device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        if self.features is not None:
            moved["features"] = {layer: values.to(device) for layer, values in self.features.items()}
        return replace(self, **moved)


def _cross(log_weight: Tensor, value: Tensor) -> Tensor:
    """exp(log_weight)·value, and 0 where the weight is 0 even if the value is not finite."""
    weight = log_weight.exp()
    return torch.where(weight > 0, weight * value, torch.zeros((), dtype=value.dtype, device=value.device))
