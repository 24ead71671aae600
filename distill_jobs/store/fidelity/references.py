"""Other ways to store a teacher, for comparison at equal bytes: short, and as kind to each as its description allows.

Each gives what a reader would have of it as a ``TeacherSignal`` without a tail: a head that is everything there is, so
that it is renormalised wherever it is used. What they don't store (entropy, the gold class beyond the head) is unknown.
Shapes: N positions, V classes, K entries.
"""

import math
from typing import Any

import torch
from torch import Tensor

from distill_jobs.store.codecs.base import FLOOR
from distill_jobs.store.signal import TeacherSignal

_POWERS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)


def renormalised(logits: Tensor, gold: Tensor, k: int) -> TeacherSignal:
    """The ``k`` likeliest classes in fp16, and nothing of the rest."""
    logprob, ids = torch.log_softmax(logits.float(), dim=-1).topk(k, dim=-1)
    return _signal(ids, logprob.half().float(), gold, logits.shape[1])


def renormalised_bytes(k: int, classes: int) -> float:
    """Bytes of ``renormalised`` at a position: ids with as many bits as they need, and fp16."""
    return k * (_id_bits(classes) / 8 + 2)


def polynomial(logits: Tensor, gold: Tensor, k: int) -> TeacherSignal:
    """The ``k`` likeliest classes: an eighth of them exactly, a polynomial over the rank for the others.

    As in DistillKit's compression of log-probabilities (least squares over powers 0 to 4 and a root of the rank, of the
    entries in falling order; 16 exact of 128). The fit is made in float64 over a rank between 0 and 1, which is kinder
    than float32 over ranks up to k; terms and exact entries are fp16.
    """
    logprob, ids = torch.log_softmax(logits.float(), dim=-1).topk(k, dim=-1)
    exact = logprob[:, : k // 8].half().float()
    rest = logprob[:, k // 8 :].double().clamp(min=-1e4)
    rank = torch.linspace(0, 1, rest.shape[1], dtype=torch.float64, device=logits.device)
    powers = torch.stack([rank**power for power in _POWERS], dim=1)
    terms = (torch.linalg.pinv(powers) @ rest.T).half().double()
    return _signal(ids, torch.cat([exact, (powers @ terms).T.float()], dim=1), gold, logits.shape[1])


def polynomial_bytes(k: int, classes: int) -> float:
    """Bytes of ``polynomial`` at a position."""
    return k * _id_bits(classes) / 8 + 2 * (k // 8) + 2 * len(_POWERS)


def random_sampling(logits: Tensor, gold: Tensor, draws: int, seed: int) -> TeacherSignal:
    """``draws`` independent draws from the teacher, and how often each class was drawn.

    Random-sampling distillation (Anshumann et al. 2025, "Sparse Logit Sampling") as published: at T = 1 the shares of
    the draws are the target; there is nothing else to soften at another T but those shares.
    """
    probability = torch.softmax(logits.float(), dim=-1)
    generator = torch.Generator(device=logits.device).manual_seed(seed)
    drawn = torch.multinomial(probability, draws, replacement=True, generator=generator)
    counts = torch.zeros_like(probability).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=probability.dtype))
    found, ids = counts.topk(min(draws, logits.shape[1]), dim=-1)
    return _signal(ids, (found / draws).log().clamp(min=FLOOR), gold, logits.shape[1])


def random_sampling_bytes(draws: int, classes: int) -> float:
    """Bytes of ``random_sampling`` at a position, with a place of id and one byte for each draw."""
    return draws * (_id_bits(classes) / 8 + 1)


def _signal(ids: Tensor, logprob: Tensor, gold: Tensor, classes: int) -> TeacherSignal:
    logprob = logprob.clamp(min=FLOOR)
    nothing: dict[str, Any] = {
        "gold_logprob": torch.zeros_like(logprob[:, 0]),
        "entropy": torch.zeros_like(logprob[:, 0]),
    }
    held = ids == gold[:, None]
    rank = torch.where(held.any(dim=-1), held.int().argmax(dim=-1), -1)
    return TeacherSignal(ids, logprob, None, gold_rank=rank, classes=classes, **nothing)


def _id_bits(classes: int) -> int:
    return math.ceil(math.log2(classes))
