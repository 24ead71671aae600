"""The loss of one batch, by the fused kernel where the model has an output head for it."""

from dataclasses import replace

from torch import Tensor

from cluster.engine import Engine
from distill_jobs.data.batch import IGNORED, Batch
from distill_jobs.losses import LossParts, SoftLoss, distillation_loss
from distill_jobs.losses.fused_head import FusedHead
from distill_jobs.store.signal import TeacherSignal
from distill_jobs.training.features import FeatureStudent


class BatchLoss:
    """Runs a batch through the engine's model and scores it.

    Args:
        soft: what takes the place of the KL.
        classes: number of real classes.
        head: the model's own, or None to make whole logits.
        student: what the engine trains, where it is taught by features, too.
    """

    def __init__(
        self,
        engine: Engine,
        soft: SoftLoss,
        classes: int,
        head: FusedHead | None = None,
        student: FeatureStudent | None = None,
    ) -> None:
        self.engine, self.soft, self.classes, self.head, self.student = engine, soft, classes, head, student

    def __call__(self, batch: Batch, signal: TeacherSignal | None, alpha: float, temperature: float) -> LossParts:
        """The parts of the loss, means over the batch's scored positions.

        Args:
            signal: the teacher at these positions; None with ``alpha`` 0.
        """
        rest = (signal, alpha, temperature, self.soft, self.classes)
        if self.head is not None:
            heard: list[Tensor] = []
            parts = self.head.loss(lambda: self._forward(batch, heard), batch.labels, *rest)
            return self._with_features(parts, heard, signal)
        logits, labels, heard = self._scored(batch)
        return self._with_features(distillation_loss(logits, labels, *rest), heard, signal)

    def look(self, batch: Batch) -> tuple[LossParts, Tensor | None]:
        """The hard-label loss, and the share of positions where the likeliest class is right.

        With a fused head there are no whole logits, and no share.
        """
        if self.head is not None:
            return self(batch, None, 0.0, 1.0), None
        logits, labels, _ = self._scored(batch)
        right = (logits[:, : self.classes].argmax(-1) == labels).double().mean() if len(labels) else None
        return distillation_loss(logits, labels, None, 0.0, 1.0, self.soft, self.classes), right

    def _scored(self, batch: Batch) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits and labels at the scored positions, and the student's features there."""
        heard: list[Tensor] = []
        keep = (batch.labels != IGNORED).flatten()
        return self._forward(batch, heard).flatten(0, -2)[keep], batch.labels.flatten()[keep], heard

    def _forward(self, batch: Batch, heard: list[Tensor]) -> Tensor:
        """The model's logits; the student's features are added to ``heard``."""
        if self.student is None:
            logits: Tensor = self.engine.forward(**batch.inputs)
            return logits
        logits, made = self.engine.forward(keep=(batch.labels != IGNORED).flatten(), **batch.inputs)
        heard.extend(made)
        return logits

    def _with_features(self, parts: LossParts, heard: list[Tensor], signal: TeacherSignal | None) -> LossParts:
        if self.student is None or signal is None or signal.features is None:
            return parts
        found = self.student.loss(heard, signal.features)
        return replace(parts, total=parts.total + self.student.wanted.weight * found, features=found.detach())
