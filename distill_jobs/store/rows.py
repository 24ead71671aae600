"""The data's own columns in a store: those that training from it stands on, and what they may hold."""

import numpy as np
import pyarrow as pa

from distill_jobs.data.facts import DataFacts
from distill_jobs.errors import StoreError


def data_columns(facts: DataFacts) -> dict[str, pa.DataType]:
    """The columns, with their types, that every part has beside the soft target; a store of other data is none.

    Pixels stay in ``data/``, and ``source`` and the slices are for people: none of them is here.

    Raises:
        StoreError: the facts are of no kind of data that there is.
    """
    length, width = facts.sequence_length or 0, facts.feature_width or 0
    kinds: dict[str, dict[str, pa.DataType]] = {
        "documents": {"input_ids": _list(pa.int32(), length), "segments": _list(pa.int32(), length)},
        "text": {"input_ids": _list(pa.int32(), length), "tokens": pa.int32(), "label": pa.int64()},
        "tabular": {"features": _list(pa.float32(), width), "label": pa.int64()},
        "image": {"label": pa.int64()},
    }
    if facts.features not in kinds or (facts.features == "documents") != (facts.task == "causal_lm"):
        raise StoreError(f"a store of {facts.features!r} for {facts.task!r} is unknown to this release")
    return {"sample_id": pa.int64(), **kinds[facts.features]}


def check_rows(columns: dict[str, np.ndarray], facts: DataFacts) -> None:
    """Refuse rows that lead a model astray: tokens outside the vocabulary, labels that are no class, no numbers.

    Raises:
        StoreError: naming the column.
    """
    below = {"input_ids": facts.vocabulary or 0, "label": len(facts.classes)}
    for name, most in below.items():
        values = columns.get(name)
        if values is not None and values.size and not 0 <= int(values.min()) <= int(values.max()) < most:
            raise StoreError(f"the store is damaged: {name} holds values outside 0 … {most - 1}")
    if "features" in columns and not np.isfinite(columns["features"]).all():
        raise StoreError("the store is damaged: features holds values that are not finite")


def _list(kind: pa.DataType, width: int) -> pa.DataType:
    sound = isinstance(width, int) and 0 <= width < 1 << 31
    if not sound:
        raise StoreError(f"rows of {width!r} values are unknown to this release")
    return pa.list_(kind, width)
