"""Gates: what a student is spared of a teacher who is wrong. GATES.md tells which to take, and why.

A gate looks at the teacher's signal at some positions and at their right classes, and gives the signal that the soft
loss is to see and how much of alpha each position keeps. What it takes from the soft part the hard label gets: at a
position that keeps the share w the loss is (1-αw)·CE + αw·scale·soft loss, so that every position has the same weight
in the mean, and one that is dropped learns from its label as a baseline's does. No loss knows of gates.

The teacher is *wrong* where a class is likelier to it than the right one. Where nobody knows what it gave the right
class (rank -1), and where it is right, no gate but ``selective`` changes anything. Probabilities are those at T = 1:
what is swapped or mixed there is softened afterwards, as one distribution, and softening changes no order.

A new gate is a function here and one line in ``GATES``. Shapes: N positions, V classes, K head entries, D draws.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from distill_jobs.losses.promote import gold_place, with_gold
from distill_jobs.spec.base import Part
from distill_jobs.spec.gate import NoGate
from distill_jobs.store import tail
from distill_jobs.store.signal import TeacherSignal


@dataclass(frozen=True)
class Gated:
    """What a gate makes of N positions.

    Attributes:
        signal: what the soft loss sees.
        touched: [N] of bool, where the gate changes anything.
        weight: [N] float32 in [0, 1], the share of alpha that a position keeps; None where all keep all of it.
    """

    signal: TeacherSignal
    touched: Tensor
    weight: Tensor | None = None


@dataclass(frozen=True)
class GateKind:
    """One line of ``GATES``.

    Attributes:
        make: (signal, labels [N], **arguments) -> ``Gated``.
        asks_student: whether it depends on the student's likeliest classes [N]; then these come third.
    """

    make: Callable[..., Gated]
    asks_student: bool = False


def none(signal: TeacherSignal, labels: Tensor) -> Gated:
    """The teacher as it is."""
    return Gated(signal, torch.zeros_like(labels, dtype=torch.bool))


@dataclass(frozen=True)
class Gate:
    """A gate with its arguments, ready to be asked. Plain data: it can be sent to a gang."""

    kind: GateKind = GateKind(none)
    arguments: Part = field(default_factory=NoGate)

    @property
    def stands_open(self) -> bool:
        """Whether it lets everything through."""
        return self.kind.make is none

    def __call__(self, signal: TeacherSignal, labels: Tensor, guess: Tensor | None = None) -> Gated:
        """What it makes of N positions.

        Args:
            labels: [N] int64, the right classes.
            guess: [N] int64, the student's likeliest classes, for a gate that asks for them.
        """
        asked = (guess,) if self.kind.asks_student else ()
        return self.kind.make(signal, labels, *asked, **self.arguments.model_dump())


def wrong(signal: TeacherSignal, labels: Tensor) -> Tensor:
    """[N] of bool, where the teacher finds another class likelier than the right one."""
    # What is stored is rounded: the likeliest class that it shows may be the right one after all.
    return (signal.gold_rank > 0) & (signal.top1 != labels)


def top1_logprob(signal: TeacherSignal) -> Tensor:
    """[N], the log-probability of the teacher's likeliest class at T = 1."""
    if signal.head_logprob.shape[1]:
        return signal.head_logprob.amax(dim=-1)
    assert signal.top1_logprob is not None
    return signal.top1_logprob


def gold_logprob(signal: TeacherSignal, labels: Tensor) -> Tensor:
    """[N], the log-probability of the right class at T = 1: as the head has it, else as it is stored beside it."""
    if signal.head_ids is None:
        return signal.head_logprob.gather(1, labels[:, None])[:, 0]
    inside, place = gold_place(signal, labels)
    if not signal.head_ids.shape[1]:
        return signal.gold_logprob
    return torch.where(inside, signal.head_logprob.gather(1, place[:, None])[:, 0], signal.gold_logprob)


def drop(signal: TeacherSignal, labels: Tensor, confidence: float, gold: float, entropy: float | None) -> Gated:
    """w = 0 where the teacher is confidently wrong, else 1.

    That is where it is wrong, max_v p_v ≥ ``confidence``, p_gold ≤ ``gold`` and its entropy is at most ``entropy``
    nats. Leaving out what a teacher gets wrong is an old habit without one source; Lan et al. 2024 ("Improve Knowledge
    Distillation via Label Revision and Data Selection") also let only a part of the data be taught, chosen by
    influence, and Wang et al. 2021 ("Selective Knowledge Distillation for Neural Machine Translation") by how hard the
    words are to the student. The thresholds here are ours.
    """
    bad = wrong(signal, labels) & (top1_logprob(signal).exp() >= confidence)
    bad &= gold_logprob(signal, labels).exp() <= gold
    if entropy is not None:
        bad &= signal.entropy <= entropy
    return Gated(signal, bad, (~bad).float())


def downweight(signal: TeacherSignal, labels: Tensor, power: float) -> Gated:
    """w = (p_gold / max_v p_v)^``power``: 1 where the teacher is right, 0.5 where it finds another class twice as
    likely, near 0 where it is surely wrong.

    The formula is ours. That a teacher should weigh the more the nearer it comes to the label is the idea of Zhang et
    al. 2022 ("Confidence-Aware Multi-Teacher Knowledge Distillation"), for several teachers.
    """
    bad = wrong(signal, labels)
    odds = (power * (gold_logprob(signal, labels) - top1_logprob(signal))).clamp(max=0.0).exp()
    return Gated(signal, bad, torch.where(bad, odds, 1.0))


def swap(signal: TeacherSignal, labels: Tensor) -> Gated:
    """Where the teacher is wrong, the right class and the likeliest exchange their probabilities (Wen et al. 2021,
    "Preparing Lessons: Improve Knowledge Distillation with Better Supervision", probability shift).

    The two classes only change names: in a sparse signal the head's entries, the draws and the tail's mass stay what
    they are. It is as exact as the signal is, at every T and wherever the right class lies.
    """
    bad, top = wrong(signal, labels), signal.top1
    other = torch.where(bad, top, labels)

    def renamed(ids: Tensor) -> Tensor:
        to, gold = other[:, None], labels[:, None]
        return torch.where(ids == to, gold, torch.where(ids == gold, to, ids))

    best = top1_logprob(signal)
    changes: dict[str, Any] = {
        "gold_logprob": torch.where(bad, best, signal.gold_logprob),
        "gold_rank": torch.where(bad, 0, signal.gold_rank),
    }
    if signal.top1_ids is not None:
        changes["top1_ids"] = torch.where(bad, labels, top)
    if signal.head_ids is None:
        pair, exchanged = torch.stack([labels, other], dim=1), torch.stack([other, labels], dim=1)
        changes["head_logprob"] = signal.head_logprob.scatter(1, pair, signal.head_logprob.gather(1, exchanged))
    else:
        changes["head_ids"] = renamed(signal.head_ids)
    if signal.draw_ids is not None:
        changes["draw_ids"] = renamed(signal.draw_ids)
    return Gated(replace(signal, **changes), bad)


def revise(signal: TeacherSignal, labels: Tensor, eta: float) -> Gated:
    """Where the teacher is wrong, p' = β·p + (1-β)·label with β = ``eta`` / (max_v p_v - p_gold + 1) (Lan et al. 2024,
    "Improve Knowledge Distillation via Label Revision and Data Selection").

    At β = 1 / (max p - p_gold + 1) the right class is on par with the teacher's likeliest; ``eta`` ≤ 1 keeps it there
    or above. The paper mixes what is softened already, here the mixture is softened, by T, as one distribution: for
    T = 1 both are the same.

    In a sparse signal the right class takes a place in the head (see ``promote``), head, draws and the tail's
    log-partitions are multiplied by β, and 1-β is added to the right class's entry.
    """
    bad = wrong(signal, labels)
    gold = gold_logprob(signal, labels)
    share = torch.where(bad, eta / (top1_logprob(signal).exp() - gold.exp() + 1.0).clamp(min=1.0), 1.0)
    signal = with_gold(signal, labels, bad)
    log_share, rest = share.log(), torch.log1p(-share)
    led = torch.logaddexp(gold + log_share, rest)
    head = signal.head_logprob + log_share[:, None]
    place = labels if signal.head_ids is None else gold_place(signal, labels)[1]
    kept = head.gather(1, place[:, None])[:, 0]
    changes: dict[str, Any] = {
        "head_logprob": head.scatter(1, place[:, None], torch.where(bad, led, kept)[:, None]),
        "gold_logprob": torch.where(bad, led, signal.gold_logprob),
        "gold_rank": torch.where(bad, 0, signal.gold_rank),
        "entropy": torch.where(bad, _revised_entropy(signal.entropy, gold, led, log_share), signal.entropy),
    }
    if signal.top1_ids is not None:
        changes["top1_ids"] = torch.where(bad, labels, signal.top1_ids)
    if signal.top1_logprob is not None:
        changes["top1_logprob"] = torch.where(bad, led, signal.top1_logprob)
    if signal.tail_nodes is not None:
        betas = torch.tensor(tail.TAIL_BETAS, dtype=torch.float32, device=head.device)
        nodes = signal.tail_nodes + betas * log_share[:, None]
        changes["tail_nodes"] = torch.where(tail.is_empty(signal.tail_nodes)[:, None], signal.tail_nodes, nodes)
    if signal.draw_logprob is not None:
        changes["draw_logprob"] = signal.draw_logprob + log_share[:, None]
    return Gated(replace(signal, **changes), bad)


def _revised_entropy(entropy: Tensor, gold: Tensor, led: Tensor, log_share: Tensor) -> Tensor:
    """[N], of p' at T = 1, from that of p: all classes but the right one are only multiplied by β."""
    scaled = gold + log_share
    others = log_share.exp() * (entropy - log_share) + scaled.exp() * scaled
    return (others - led.exp() * led).clamp(min=0.0)


def rld(signal: TeacherSignal, labels: Tensor, **_: float) -> Gated:
    """The signal as it is: refined logit distillation is a soft loss in the KL's place, ``refined.refined`` (Sun et al.
    2024, "Knowledge Distillation with Refined Logits"). Where the teacher is right that is the decoupled loss.
    """
    return Gated(signal, wrong(signal, labels))


def selective(signal: TeacherSignal, labels: Tensor, guess: Tensor, k: int, rejected: float) -> Gated:  # noqa: ARG001
    """w = 1 where the student's likeliest class is among the teacher's ``k`` likeliest, else ``rejected``.

    The greedy variant of Huang et al. 2025 ("SelecTKD: Selective Token-Weighted Knowledge Distillation for LLMs"): the
    student proposes, the teacher verifies. It asks nothing of the label. No gradient flows through the guess.
    """
    if k == 1:
        likely = signal.top1[:, None]
    else:
        likely = signal.head_logprob.topk(min(k, signal.head_logprob.shape[1]), dim=-1).indices
        likely = likely if signal.head_ids is None else signal.head_ids.gather(1, likely)
    rejects = ~(likely == guess[:, None]).any(dim=-1)
    return Gated(signal, rejects, torch.where(rejects, rejected, 1.0))
