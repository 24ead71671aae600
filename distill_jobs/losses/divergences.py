"""The soft losses as divergences between two distributions over the same cells (see ``cells``).

``t`` and ``s`` are the teacher's and the student's masses of the cells, both softened by T. Each function takes
``Cells`` and its arguments and returns [N], in nats unless it says otherwise, at each position and without the factor
T². Over a dense signal each is exact. Over a sparse one each is taken with one bucket for unknown classes on both
sides: a lower bound, 0 where student and teacher agree.
"""

import math

import torch
from torch import Tensor

from distill_jobs.losses.cells import LEAST, Cells

_NOTHING_WRONG = LEAST + 10.0


def forward_kl(cells: Cells) -> Tensor:
    """Σ t·log(t/s) (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network").

    ``soft.forward_kl`` takes its place where logits are not standardised: there draws stand for the tail.
    """
    return (cells.teacher.exp() * (cells.teacher - cells.student)).sum(dim=-1)


def reverse_kl(cells: Cells) -> Tensor:
    """Σ s·log(s/t): the student keeps to what the teacher finds likely (Gu et al. 2024, "MiniLLM").

    Teacher's masses below e^-64 count as e^-64, so that the loss is finite where a store says that there is no mass.
    """
    return (cells.student.exp() * (cells.student - cells.teacher)).sum(dim=-1)


def jensen_shannon(cells: Cells, beta: float) -> Tensor:
    """β·KL(t ‖ m) + (1-β)·KL(s ‖ m), m = β·t + (1-β)·s (Agarwal et al. 2024, "On-Policy Distillation", GKD).

    Divided by β it tends to the forward KL as β → 0, by 1-β to the reverse one as β → 1.
    """
    middle = _mixed(cells.teacher, cells.student, beta)
    towards_teacher = cells.teacher.exp() * (cells.teacher - middle)
    towards_student = cells.student.exp() * (cells.student - middle)
    return (beta * towards_teacher + (1 - beta) * towards_student).sum(dim=-1)


def skew_forward_kl(cells: Cells, skew: float) -> Tensor:
    """KL(t ‖ λ·t + (1-λ)·s), at most -log λ (Ko et al. 2024, "DistiLLM"; λ is ``skew``)."""
    return (cells.teacher.exp() * (cells.teacher - _mixed(cells.teacher, cells.student, skew))).sum(dim=-1)


def skew_reverse_kl(cells: Cells, skew: float) -> Tensor:
    """KL(s ‖ (1-λ)·t + λ·s), at most -log λ (Ko et al. 2024, "DistiLLM"; λ is ``skew``)."""
    return (cells.student.exp() * (cells.student - _mixed(cells.student, cells.teacher, skew))).sum(dim=-1)


def adaptive_kl(cells: Cells, mu: float) -> Tensor:
    """w·KL(t ‖ s) + (1-w)·KL(s ‖ t), w = g_head / (g_head + g_tail) (Wu et al. 2024, "Rethinking KL Divergence", AKL).

    The head is the likeliest classes whose masses t add up to at most μ, and always the likeliest; g is the sum of
    |t-s| over it and over the rest. No gradient flows through w. The bucket belongs to the rest, whatever its mass.
    Over a sparse signal w is that of the cells, too.
    """
    with torch.no_grad():
        teacher, gap = cells.teacher.exp(), (cells.teacher.exp() - cells.student.exp()).abs()
        singles = teacher[:, :-1] if cells.bucket else teacher
        sorted_masses, order = singles.sort(dim=-1, descending=True)
        in_head = sorted_masses.cumsum(dim=-1) <= mu
        in_head[:, :1] = True
        head = (gap.gather(1, order) * in_head).sum(dim=-1)
        whole = gap.sum(dim=-1)
        weight = torch.where(whole > 0, head / whole, 0.5)
    return weight * forward_kl(cells) + (1 - weight) * reverse_kl(cells)


def total_variation(cells: Cells) -> Tensor:
    """½·Σ |t-s|, in [0, 1] (Wen et al. 2023, "f-Divergence Minimization"). Its own scaling in the total loss is T."""
    return 0.5 * (cells.teacher.exp() - cells.student.exp()).abs().sum(dim=-1)


def decoupled(cells: Cells, alpha: float, beta: float) -> Tensor:
    """α·TCKD + β·NCKD (Zhao et al. 2022, "Decoupled Knowledge Distillation", DKD).

    TCKD is the KL between right and wrong as two classes, NCKD that among the wrong classes, whose masses are divided
    by their sum on both sides (that is the loss's definition: the bucket is one of them). KL(t ‖ s) is TCKD plus
    (1 - t of the right class) times NCKD. Over a sparse signal TCKD is as exact as the right class's stored
    log-probability, NCKD a lower bound. Where the teacher gives wrong classes less than e^-54 together, NCKD is 0:
    there is nothing to tell.
    """
    assert cells.gold is not None, "the decoupled loss needs labels"
    gold = cells.gold[:, None]
    right = cells.teacher.gather(1, gold)[:, 0], cells.student.gather(1, gold)[:, 0]
    apart = torch.zeros_like(cells.teacher, dtype=torch.bool).scatter_(1, gold, True)
    teacher, student = (side.masked_fill(apart, -torch.inf) for side in (cells.teacher, cells.student))
    wrong = torch.logsumexp(teacher, dim=-1), torch.logsumexp(student, dim=-1)
    target = right[0].exp() * (right[0] - right[1]) + wrong[0].exp() * (wrong[0] - wrong[1])
    told = (cells.teacher - wrong[0][:, None]).masked_fill(apart, LEAST)
    given = (cells.student - wrong[1][:, None]).masked_fill(apart, LEAST)
    among = (told.exp() * (told - given)).sum(dim=-1)
    return alpha * target + beta * torch.where(wrong[0] > _NOTHING_WRONG, among, 0.0)


def mse(cells: Cells) -> Tensor:
    """The mean over classes of (z_s - z_t)², of logits that are centred over the classes and divided by T.

    With its factor T² the temperature falls out: it is the squared error of the logits (Kim et al. 2021, "Comparing KL
    Divergence and Mean Squared Error"). A store holds log-probabilities, which are the logits but for a constant at
    each position: centring removes it on both sides. Only over dense signals; classes below e^-64 at T count as e^-64.
    """
    gap = cells.student - cells.teacher
    return (gap - gap.mean(dim=-1, keepdim=True)).square().mean(dim=-1)


def _mixed(first: Tensor, second: Tensor, share: float) -> Tensor:
    """log(share·exp(first) + (1-share)·exp(second))."""
    if share == 0:
        return second
    return torch.logaddexp(first + math.log(share), second + math.log1p(-share))
