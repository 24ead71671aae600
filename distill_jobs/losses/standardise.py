"""Logit standardisation (Sun et al. 2024): z-scores of the logits in the place of the logits, on both sides.

(z - mean) / deviation, softened by T, is z softened by T times the deviation: standardising gives each position a
temperature of its own on each side, and student and teacher need agree only in their relations. Mean and deviation
(that of the population) are taken over the classes that the signal knows exactly: all of a dense one, which is the
paper's definition; the head of a sparse one, on both sides, or the drawn classes where there is no head. The product of
T and the deviation is then kept within [0.5, 10], the span in which a store is right, again on both sides.
"""

from torch import Tensor

from distill_jobs.losses.cells import LEAST, single_classes
from distill_jobs.store.signal import TeacherSignal

_SPAN = (0.5, 10.0)
_TINY = 1e-7


def standardise(logits: Tensor, signal: TeacherSignal, temperature: float) -> tuple[Tensor, Tensor]:
    """The student's softened logits [N, V], and the teacher's temperature at each position [N].

    The student's come as a new tensor of [N, V], which has a gradient of its own: one of each more than without.
    """
    if signal.head_ids is None:
        teacher = _deviation(signal.head_logprob.clamp(min=LEAST), None)
        return logits / (temperature * _deviation(logits, None))[:, None], temperature * teacher
    ids, alive, logprob = single_classes(signal, None)
    width = signal.head_ids.shape[1]
    if width:
        ids, alive, logprob = ids[:, :width], alive[:, :width], logprob[:, :width]
    teacher = _deviation(logprob.clamp(min=LEAST), alive)
    student = _deviation(logits.gather(1, ids), alive)
    low, high = _SPAN
    return logits / (temperature * student).clamp(low, high)[:, None], (temperature * teacher).clamp(low, high)


def _deviation(values: Tensor, alive: Tensor | None) -> Tensor:
    """[N], the standard deviation of each row of [N, E] over the places that are ``alive``."""
    if alive is None:
        return (values.var(dim=-1, correction=0) + _TINY**2).sqrt()
    count = alive.sum(dim=-1, keepdim=True).clamp(min=1)
    mean = (values * alive).sum(dim=-1, keepdim=True) / count
    variance = ((values - mean) * alive).square().sum(dim=-1) / count[:, 0]
    return (variance + _TINY**2).sqrt()
