"""Does a language model keep packed documents apart? Asked of the model itself, not of its documentation."""

import torch
from torch import Tensor

from distill_jobs.data.facts import DataFacts
from distill_jobs.errors import ModelError
from distill_jobs.models.scorer import Scorer, flat, name_of

# Of the logits' own spread: far above fp32 rounding, far below what a single leaked token does.
_TOLERANCE = 1e-3


def check_packing(scorer: Scorer, facts: DataFacts) -> None:
    """Compare two documents packed in one row with the same two apart; and see that no token looks ahead.

    With ``packing: naive`` documents do see each other, and only looking ahead is refused. Runs the model four times
    on a few tokens.

    Raises:
        ModelError: attention or positions leak over the border between documents, or the model sees later tokens.
    """
    if facts.features != "documents":
        return
    length = min(int(facts.sequence_length or 8), 24)
    first, second = length // 3, length // 2
    generator = torch.Generator().manual_seed(1)
    vocabulary = int(facts.vocabulary or 2)
    packed_L = torch.randint(0, vocabulary, (length,), generator=generator)
    segments_L = torch.zeros(length, dtype=torch.long)
    segments_L[:first], segments_L[first : first + second] = 1, 2
    training = scorer.training
    scorer.eval()
    try:
        with torch.no_grad():
            _check_causal(scorer, packed_L, vocabulary)
            if facts.packing != "naive":
                _check_apart(scorer, packed_L, segments_L)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{name_of(scorer)} fails on packed documents: {flat(error)}; set data.features.documents.packing to naive"
        ) from None
    finally:
        scorer.train(training)


def _check_causal(scorer: Scorer, ids_L: Tensor, vocabulary: int) -> None:
    changed_L = ids_L.clone()
    changed_L[-1] = (changed_L[-1] + 1) % vocabulary
    one_L = torch.ones_like(ids_L)
    plain, other = _run(scorer, ids_L, one_L), _run(scorer, changed_L, one_L)
    if _apart(plain[:-1], other[:-1]):
        raise ModelError(f"{name_of(scorer)} is no causal language model: its logits depend on later tokens")


def _check_apart(scorer: Scorer, ids_L: Tensor, segments_L: Tensor) -> None:
    packed = _run(scorer, ids_L, segments_L)
    if not bool(packed.isfinite().all()):
        raise ModelError(f"{name_of(scorer)} gives logits that are not finite for packed documents")
    for number in (1, 2):
        inside = segments_L == number
        alone = _run(scorer, ids_L[inside], torch.ones_like(ids_L[inside]))
        if _apart(packed[inside], alone):
            raise ModelError(
                f"{name_of(scorer)} does not keep packed documents apart (its attention or its positions leak from "
                f"one into the next): set data.features.documents.packing to naive, or use another model"
            )


def _run(scorer: Scorer, ids_L: Tensor, segments_L: Tensor) -> Tensor:
    logits: Tensor = scorer(input_ids=ids_L[None], segments=segments_L[None])[0].float()
    return logits


def _apart(left: Tensor, right: Tensor) -> bool:
    return bool(((left - right).abs() > _TOLERANCE * right.std()).any())
