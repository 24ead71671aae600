"""The fused loss inside a model's own output head.

While the model's forward runs, its head makes, in place of logits, the loss of the scored positions and its gradients.
So the head is called where and when the model calls it: under ZeRO-3 its weight, tied to the embedding or not, is there
as for any other layer, gathered once for all chunks, and hooks of others see a layer at work. Shapes: B rows, L tokens
of a row, H hidden width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from distill_jobs.data.facts import DataFacts
from distill_jobs.errors import ModelError
from distill_jobs.losses.fused import anchored_loss
from distill_jobs.losses.fused_task import OutputHead
from distill_jobs.losses.kinds import SoftLoss
from distill_jobs.losses.total import PLAIN, LossParts
from distill_jobs.models.head import split_head
from distill_jobs.models.scorer import Scorer
from distill_jobs.store.signal import TeacherSignal


class FusedHead:
    """The output layer of a language model, taught to give the loss.

    Args:
        layer: as it stands in the model.
        scale, softcap: what the model does to its output, see ``OutputHead``.
        compiled: see ``fused_loss``.
    """

    def __init__(
        self, layer: nn.Linear, scale: float = 1.0, softcap: float | None = None, compiled: bool = False
    ) -> None:
        self.layer, self.scale, self.softcap, self.compiled = layer, scale, softcap, compiled

    def loss(
        self,
        forward: Callable[[], Tensor],
        labels: Tensor,
        signal: TeacherSignal | None,
        alpha: float,
        temperature: float,
        soft: SoftLoss = PLAIN,
        classes: int | None = None,
    ) -> LossParts:
        """``distillation_loss`` of the model's logits at its scored positions.

        Args:
            forward: runs the model, which calls its head once, and returns what it makes of the head's output.
            labels: [B, L] int64, -100 where nothing is scored.
            signal: the teacher at the scored positions, row by row.

        Raises:
            ModelError: the model does not call its head once with the hidden states of all positions.
            VocabularyError: as ``fused_loss``.
        """
        made: list[LossParts] = []
        keep = labels != -100

        def score(hidden_BLH: Tensor) -> Tensor:
            if hidden_BLH.shape[:-1] != labels.shape:
                raise ModelError(
                    f"the model gives its output head hidden states {list(hidden_BLH.shape)} for labels "
                    f"{list(labels.shape)}: the loss can't be made there"
                )
            head = OutputHead(self.layer.weight, self.layer.bias, self.scale, self.softcap)
            scored = hidden_BLH[keep]
            parts, anchor = anchored_loss(
                scored, head, labels[keep], signal, alpha, temperature, soft, classes, compiled=self.compiled
            )
            made.append(parts)
            return anchor.to(hidden_BLH.dtype).expand(*labels.shape, 1)

        with _forward_of(self.layer, score):
            zeros = forward()
        if len(made) != 1:
            raise ModelError(f"the model calls its output head {len(made)} times in a forward pass, not once")
        [parts] = made
        # Through these zeros, which went through the rest of the model, all that others do before a layer's backward
        # pass is done for the head too: under ZeRO-3 its weight is gathered when its gradient arrives.
        return replace(parts, total=parts.total + 0.0 * zeros.float().sum())


def fused_head(scorer: Scorer, facts: DataFacts, compiled: bool = False) -> FusedHead | None:
    """The model's output layer as a ``FusedHead``, proven on a few tokens to be one; None where there is none.

    To be asked before anybody shards the model. Classifiers, factories, and models that do to their logits what is not
    known here, go without.
    """
    training = scorer.training
    try:
        # Dropout would make two forward passes differ.
        split = split_head(scorer.eval(), facts)
    except ModelError:
        return None
    finally:
        scorer.train(training)
    return None if split is None else FusedHead(split.head, split.scale, split.softcap, compiled)


@contextmanager
def _forward_of(layer: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a layer do something else for a while; it stays in its place, and so do its parameters and hooks."""
    own: Any = layer.__dict__.get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own
