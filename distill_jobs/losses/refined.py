"""Refined logit distillation: the soft loss of the gate ``rld``."""

import torch
from torch import Tensor

from distill_jobs.losses.cells import LEAST, Cells

_NOTHING_LEFT = LEAST + 10.0


def refined(cells: Cells, alpha: float, beta: float) -> Tensor:
    """α·SCD + β·MCD (Sun et al. 2024, "Knowledge Distillation with Refined Logits", RLD).

    SCD, sample confidence: the KL between (max t, 1 - max t) and (s of the right class, 1 - that): the student is to be
    as sure of the right class as the teacher is of its own. MCD, masked correlation: the KL among the classes that the
    teacher finds less likely than the right one, whose masses are divided by their sum on both sides (the loss's
    definition); the right class and all above it are masked. A teacher who is right gives TCKD and NCKD of the
    decoupled loss. The paper lets SCD have a temperature of its own; here both have T.

    Over a sparse signal SCD is as exact as the likeliest class's probability and MCD a lower bound, with the unknown
    classes as one. Where some of them are likelier than the right class, which is so only where that lies outside the
    head, they are masked altogether: the store can't tell which. 0 where nothing is left to compare, or less than
    e^-54 of the teacher's mass.
    """
    assert cells.gold is not None, "the refined loss needs labels"
    assert cells.top is not None
    assert cells.unsorted is not None
    gold = cells.gold[:, None]
    right = torch.zeros_like(cells.teacher, dtype=torch.bool).scatter_(1, gold, True)
    sure = cells.student.gather(1, gold)[:, 0]
    unsure = torch.logsumexp(cells.student.masked_fill(right, -torch.inf), dim=-1)
    top = cells.top.clamp(max=0.0)
    doubt = (-torch.expm1(top)).log().clamp(min=LEAST)
    confidence = top.exp() * (top - sure) + doubt.exp() * (doubt - unsure)

    masked = right | (cells.teacher >= cells.teacher.gather(1, gold))
    if cells.bucket:
        masked[:, -1] = cells.unsorted
    left = ~masked.all(dim=-1)
    # A sum over nothing has no gradient that is a number.
    masked &= left[:, None]
    whole, given = (
        torch.logsumexp(side.masked_fill(masked, -torch.inf), dim=-1) for side in (cells.teacher, cells.student)
    )
    told = (cells.teacher - whole[:, None]).masked_fill(masked, LEAST)
    among = (told.exp() * (told - (cells.student - given[:, None]).masked_fill(masked, LEAST))).sum(dim=-1)
    return alpha * confidence + beta * torch.where(left & (whole > _NOTHING_LEFT), among, 0.0)
