"""Several logit stores read as one: data mixes, added data, later rounds of on-policy text."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cluster.files import Folder
from distill_jobs.errors import StoreError
from distill_jobs.store.plan import StorePlan
from distill_jobs.store.reader import LogitStore
from distill_jobs.store.signal import TeacherSignal

_SAME_FACTS = ("task", "features", "classes", "sequence_length", "feature_width", "image_shape")


class MixedStore:
    """Stores of one kind behind one another: row numbers run through the first, then the second, and so on.

    Sample ids are each store's own and may come twice.

    Attributes:
        facts, plan: the first store's.
        offsets: the number of each store's first row.
        rows: of all stores together.
    """

    def __init__(self, stores: Sequence[LogitStore]) -> None:
        """Mix stores that say the same kind of thing about the same classes.

        Raises:
            StoreError: two of them differ in classes, tokenizer, positions a row, codec or features.
        """
        first = stores[0]
        for other in stores[1:]:
            check_alike(first.plan, other.plan, other.table.folder)
        self.stores, self.plan, self.facts = list(stores), first.plan, first.facts
        self._starts = np.cumsum([0, *(store.rows for store in stores)])
        self.offsets = [int(start) for start in self._starts[:-1]]
        self.rows = int(self._starts[-1])

    def take(
        self,
        indices: np.ndarray,
        soft: bool = True,
        columns: list[str] | None = None,
        layers: tuple[str, ...] = (),
    ) -> dict[str, np.ndarray]:
        """Rows as ``LogitStore.take`` gives them; columns that not all stores have must not be asked for."""
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and (indices.min() < 0 or indices.max() >= self.rows):
            raise IndexError(f"rows {indices.min()}…{indices.max()} of {self.rows} in a mixture")
        number = np.searchsorted(self._starts, indices, side="right") - 1
        out: dict[str, np.ndarray] = {}
        for which in np.unique(number).tolist():
            to = np.flatnonzero(number == which)
            own = indices[to] - self._starts[which]
            taken: dict[str, np.ndarray] = self.stores[which].take(own, soft, columns, layers)
            if len(to) == len(indices):
                return taken
            for name, values in taken.items():
                if name not in out:
                    out[name] = np.empty((len(indices), *values.shape[1:]), values.dtype)
                out[name][to] = values
        return out

    def check_layers(self, layers: tuple[str, ...]) -> None:
        """See ``LogitStore.check_layers``; all stores have to hold the same features."""
        for store in self.stores if layers else ():
            store.check_layers(layers)
            if store.plan.features != self.plan.features:
                raise StoreError(
                    f"{store.table.folder} can't be mixed with the job's own store: their features differ "
                    f"({_short(store.plan.features)}, not {_short(self.plan.features)}); capture both with the same "
                    f"capture.features"
                )

    def signal(
        self, columns: dict[str, np.ndarray], device: str | torch.device, keep: Tensor | None = None
    ) -> TeacherSignal:
        """See ``LogitStore.signal``: all stores have the same codec and classes."""
        return self.stores[0].signal(columns, device, keep)


def check_alike(own: StorePlan, other: StorePlan, where: Folder, *, codec: bool = True) -> None:
    """Refuse a store that can't be mixed with another; raises StoreError saying what differs.

    Args:
        codec: whether their codecs have to be the same.
    """
    pairs = {
        "classes": (own.classes, other.classes),
        "tokenizer": (own.tokenizer_sha, other.tokenizer_sha),
        "positions a row": (own.positions_per_row, other.positions_per_row),
        "codec": (own.codec, other.codec if codec else own.codec),
        **{name.replace("_", " "): (own.facts.get(name), other.facts.get(name)) for name in _SAME_FACTS},
    }
    for name, (mine, theirs) in pairs.items():
        if mine != theirs:
            raise StoreError(
                f"{where} can't be mixed with the job's own store: their {name} differ ({_short(theirs)}, not "
                f"{_short(mine)}); capture it with the same teacher's vocabulary, data settings and codec"
            )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
