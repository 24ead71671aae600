"""Logit standardisation (Sun et al. 2024): z-scores of the logits in the place of the logits, on both sides.

(z - mean) / deviation, softened by T, is z softened by T times the deviation: standardising gives each position a
temperature of its own on each side, and student and teacher need agree only in their relations. Mean and deviation
(that of the population) are taken over the classes that the signal knows exactly: all of a dense one, which is the
paper's definition; the head of a sparse one, on both sides, or the drawn classes where there is no head.

A deviation counts as 0.05 at least, so that the gradient is finite where all logits are equal. The temperature of a
sparse teacher is kept within [0.5, 10], the span in which a store is right, and the student's is moved with it.
"""

from torch import Tensor

from distill_jobs.losses.cells import LEAST, single_classes
from distill_jobs.store.signal import TeacherSignal

_SPAN = (0.5, 10.0)
_LEAST_DEVIATION = 0.05


def standardise(logits: Tensor, signal: TeacherSignal, temperature: float) -> tuple[Tensor, Tensor]:
    """The student's softened logits [N, V], and the teacher's temperature at each position [N].

    The student's come as a new tensor of [N, V], which has a gradient of its own: one of each more than without.
    """
    if signal.head_ids is None:
        teacher = temperature * _deviation(signal.head_logprob.clamp(min=LEAST))
        return logits / (temperature * _deviation(logits))[:, None], teacher
    ids, alive, logprob = single_classes(signal, None)
    width = signal.head_ids.shape[1]
    if width:
        ids, alive, logprob = ids[:, :width], alive[:, :width], logprob[:, :width]
    teacher = temperature * _deviation(logprob.clamp(min=LEAST), alive)
    student = temperature * _deviation(logits.gather(1, ids), alive)
    softness = teacher.clamp(*_SPAN)
    return logits / (student * (softness / teacher))[:, None], softness


def _deviation(values: Tensor, alive: Tensor | None = None) -> Tensor:
    """[N], the standard deviation of each row of [N, E] over the places that are ``alive``, or over all."""
    kept = values.new_ones(values.shape) if alive is None else alive.to(values.dtype)
    count = kept.sum(dim=-1).clamp(min=1)
    mean = (values * kept).sum(dim=-1) / count
    variance = ((values - mean[:, None]) * kept).square().sum(dim=-1) / count
    return variance.clamp(min=_LEAST_DEVIATION**2).sqrt()
