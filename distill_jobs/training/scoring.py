"""The loss of one batch, by the fused kernel where the model has an output head for it."""

from torch import Tensor

from cluster.engine import Engine
from distill_jobs.data.batch import IGNORED, Batch
from distill_jobs.losses import LossParts, SoftLoss, distillation_loss
from distill_jobs.losses.fused_head import FusedHead
from distill_jobs.store.signal import TeacherSignal


class BatchLoss:
    """Runs a batch through the engine's model and scores it.

    Args:
        soft: what takes the place of the KL.
        classes: number of real classes.
        head: the model's own, or None to make whole logits.
    """

    def __init__(self, engine: Engine, soft: SoftLoss, classes: int, head: FusedHead | None = None) -> None:
        self.engine, self.soft, self.classes, self.head = engine, soft, classes, head

    def __call__(self, batch: Batch, signal: TeacherSignal | None, alpha: float, temperature: float) -> LossParts:
        """The parts of the loss, means over the batch's scored positions.

        Args:
            signal: the teacher at these positions; None with ``alpha`` 0.
        """
        rest = (signal, alpha, temperature, self.soft, self.classes)
        if self.head is not None:
            return self.head.loss(lambda: self.engine.forward(**batch.inputs), batch.labels, *rest)
        logits, labels = self._scored(batch)
        return distillation_loss(logits, labels, *rest)

    def look(self, batch: Batch) -> tuple[LossParts, Tensor | None]:
        """The hard-label loss, and the share of positions where the likeliest class is right.

        With a fused head there are no whole logits, and no share.
        """
        if self.head is not None:
            return self(batch, None, 0.0, 1.0), None
        logits, labels = self._scored(batch)
        right = (logits[:, : self.classes].argmax(-1) == labels).double().mean() if len(labels) else None
        return distillation_loss(logits, labels, None, 0.0, 1.0, self.soft, self.classes), right

    def _scored(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits and labels at the scored positions."""
        keep = (batch.labels != IGNORED).flatten()
        return self.engine.forward(**batch.inputs).flatten(0, -2)[keep], batch.labels.flatten()[keep]
