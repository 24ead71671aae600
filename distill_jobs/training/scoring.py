"""The loss of one batch, by the fused kernel where the model has an output head for it."""

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
        keep = (batch.labels != IGNORED).flatten()
        logits = self.engine.forward(**batch.inputs).flatten(0, -2)[keep]
        return distillation_loss(logits, batch.labels.flatten()[keep], *rest)
