"""A student that is taught by features, too: its layers are listened to, and linear layers of their own compare them.

These are trained with the student, under the same engine, and so are in its checkpoints and moving averages; the saved
student is without them. Shapes: N scored positions, K stored numbers of a feature.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distill_jobs.data.facts import DataFacts
from distill_jobs.losses import FEATURE_LOSSES
from distill_jobs.models.scorer import Scorer
from distill_jobs.models.taps import Taps, widths
from distill_jobs.spec.features import MatchedFeatures

_STUDENT = "scorer."


class FeatureStudent(nn.Module):
    """A scorer with what compares its layers with the teacher's.

    Args:
        width: K.
        seed: what the linear layers start from; no other random number is touched.

    Raises:
        SpecError: the student has no such layer.
        ModelError: a layer gives no rows of numbers.
    """

    def __init__(self, scorer: Scorer, wanted: MatchedFeatures, width: int, facts: DataFacts, seed: int) -> None:
        super().__init__()
        self.scorer, self.wanted, self.kind = scorer, wanted, FEATURE_LOSSES[wanted.loss]
        self.taps = Taps(scorer, tuple(wanted.pairs), "distill.features.pairs")
        found = widths(scorer, self.taps, facts)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = [nn.Linear(found[name], width) if self.kind.aligned else nn.Identity() for name in wanted.pairs]
        self.projections = nn.ModuleList(made)

    def forward(self, keep: Tensor, **inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The scorer's logits, and each layer at the positions ``keep`` [B·P] of bool, [N, K] each (D for ``cka``).

        The linear layers are called in every pass, evaluation too: ZeRO-3 learns the order in which layers come.
        """
        with self.taps.listening(inputs) as heard:
            logits = self.scorer(**inputs)
        pairs = zip(self.wanted.pairs, self.projections, strict=True)
        return logits, [project(heard[name][keep]) for name, project in pairs]

    def loss(self, made: list[Tensor], features: Mapping[str, Tensor]) -> Tensor:
        """The feature loss of what ``forward`` made, the mean over the pairs, without its weight.

        Args:
            features: of the teacher's layers at the same positions, [N, K] each.
        """
        pairs = zip(made, self.wanted.pairs.values(), strict=True)
        return torch.stack([self.kind(mine, features[theirs]) for mine, theirs in pairs]).mean()


def students_own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of a ``FeatureStudent``'s state is the scorer's."""
    return {name.removeprefix(_STUDENT): value for name, value in state.items() if name.startswith(_STUDENT)}
