"""Which rows a model can't score, told by the rows alone: on a GPU one such row would poison the whole process.

Shapes: B rows, L tokens of a row.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from distill_jobs.data.batch import IGNORED, positions_in_segments
from distill_jobs.data.facts import DataFacts
from distill_jobs.models.scorer import Scorer


def unscorable(columns: Mapping[str, np.ndarray], scorer: Scorer, facts: DataFacts) -> dict[int, str]:
    """The rows that must not reach the device, each with one reason.

    Those with token ids that have no embedding or are not in the data's vocabulary, more tokens than the model takes,
    features or pixels that are not finite, or a label that is no class.

    Args:
        columns: NumPy arrays as ``data.batch.make_batch`` takes them.

    Returns:
        reasons by row number, counted from 0 within ``columns``; empty for nearly every batch.
    """
    found: dict[int, str] = {}
    if "input_ids" in columns:
        found |= _beyond("token id", columns["input_ids"], _embedded(scorer, facts))
        found |= _long_rows(columns, scorer, facts)
    for name in ("features", "pixels"):
        if name in columns:
            found |= _not_finite(name, columns[name])
    if facts.features != "documents" and "label" in columns:
        labels_B = np.asarray(columns["label"])
        found |= _beyond("label", np.where(labels_B == IGNORED, 0, labels_B)[:, None], len(facts.classes))
    return found


def longest_row(core: nn.Module) -> int | None:
    """The most tokens of one text or document that a Hugging Face model takes; None where it has no limit.

    RoBERTa and its kin begin to count behind the padding's own id, and so take fewer than their configuration says.
    """
    limit = getattr(getattr(core, "config", None), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    embeddings = getattr(getattr(core, "base_model", None), "embeddings", None)
    learned = getattr(embeddings, "position_embeddings", None)
    if isinstance(learned, nn.Embedding) and learned.num_embeddings == limit and learned.padding_idx is not None:
        return limit - learned.padding_idx - 1
    return limit


def _embedded(scorer: Scorer, facts: DataFacts) -> int:
    """How many token ids are usable: none that lacks an embedding, and none that a target can't be stored for."""
    known = facts.vocabulary or 0
    if scorer.origin["kind"] != "hf":
        return known
    core: Any = scorer.core
    embedded = int(core.get_input_embeddings().num_embeddings)
    return min(known, embedded) if known else embedded


def _beyond(what: str, values_BL: np.ndarray, count: int) -> dict[int, str]:
    if values_BL.size == 0 or (values_BL.min() >= 0 and values_BL.max() < count):
        return {}
    wrong_BL = (values_BL < 0) | (values_BL >= count)
    rows = np.flatnonzero(wrong_BL.any(axis=1))
    firsts = values_BL[rows, wrong_BL[rows].argmax(axis=1)]
    return {
        int(row): f"{what} {int(value)} is not one of the {count} that there are"
        for row, value in zip(rows, firsts, strict=True)
    }


def _long_rows(columns: Mapping[str, np.ndarray], scorer: Scorer, facts: DataFacts) -> dict[int, str]:
    limit = longest_row(scorer.core) if scorer.origin["kind"] == "hf" else None
    if limit is None or columns["input_ids"].shape[1] <= limit:
        return {}
    lengths_B = _lengths(columns, facts)
    return {
        int(row): f"it has {int(lengths_B[row])} tokens in a row, and the model takes at most {limit}"
        for row in np.flatnonzero(lengths_B > limit)
    }


def _lengths(columns: Mapping[str, np.ndarray], facts: DataFacts) -> np.ndarray:
    """The tokens of each row that one attention spans, [B]: those of its longest document where documents are apart."""
    if facts.features == "text":
        return np.asarray(columns["tokens"]).reshape(-1)
    segments_BL = np.asarray(columns["segments"], dtype=np.int64)
    apart = facts.packing != "naive"
    place_BL = positions_in_segments(segments_BL) if apart else np.arange(segments_BL.shape[1])[None]
    lengths_B: np.ndarray = np.where(segments_BL != 0, place_BL + 1, 0).max(axis=1)
    return lengths_B


def _not_finite(name: str, values: np.ndarray) -> dict[int, str]:
    flat = np.asarray(values).reshape(len(values), -1)
    if flat.dtype.kind != "f" or np.isfinite(flat).all():
        return {}
    wrong = ~np.isfinite(flat)
    rows = np.flatnonzero(wrong.any(axis=1))
    places = wrong[rows].argmax(axis=1)
    return {
        int(row): f"{name} hold {flat[row, place]} at place {int(place)}; numbers must be finite"
        for row, place in zip(rows, places, strict=True)
    }
