"""The stores of several teachers over the same rows, read as one store of a teacher who is all of them.

Rows that any of the stores keeps in its quarantine are left out. Where a part has such rows in any store, its sample
ids are read once when the stores are opened; all other parts are known to agree by the data's fingerprint.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from distill_jobs.data.batch import batch_columns, next_tokens
from distill_jobs.data.facts import DataFacts
from distill_jobs.errors import StoreError
from distill_jobs.spec.teachers import ByLabel, TeacherStore
from distill_jobs.store.blend import blend
from distill_jobs.store.mixture import check_alike
from distill_jobs.store.reader import LogitStore
from distill_jobs.store.signal import TeacherSignal

_SLICE = "slice."


class EnsembleStore:
    """Several teachers' stores as one; rows are numbered 0 … ``rows``-1 through those that all of them hold.

    Attributes:
        facts, plan: the first store's.
        part_rows: [parts] rows of each part.
    """

    def __init__(
        self, stores: Sequence[LogitStore], teachers: Sequence[TeacherStore], by_label: ByLabel | None = None
    ) -> None:
        """Read ``stores`` together; ``teachers`` weighs them, in the same order.

        Raises:
            StoreError: they are not of the same data, differ in classes or tokenizer, some are dense and others
                sparse, a slice is unknown, or no row is in all of them.
        """
        first = stores[0]
        for other in stores[1:]:
            _check_same_rows(first, other)
        self.stores, self.teachers, self.by_label = list(stores), list(teachers), by_label
        self.plan, self.facts = first.plan, first.facts
        self._slices = sorted({name for teacher in teachers for name in teacher.slices})
        unknown = [name for name in self._slices if name not in self.facts.slices]
        if unknown:
            raise StoreError(
                f"distill.teachers weighs rows by the slice {unknown[0]!r}, but the data have "
                f"{', '.join(self.facts.slices) or 'no slices'}"
            )
        self._kept = _common_rows(stores)
        whole = first.table.part_rows + first.table.part_quarantined
        self.part_rows = np.array([len(self._kept.get(n, range(rows))) for n, rows in enumerate(whole.tolist())], int)
        self._starts = np.concatenate([[0], np.cumsum(self.part_rows)])
        self.rows = int(self._starts[-1])
        if not self.rows:
            raise StoreError("no row is in the stores of all teachers: each is in the quarantine of one of them")

    def take(self, indices: np.ndarray, soft: bool = True, columns: list[str] | None = None) -> dict[str, np.ndarray]:
        """Rows as ``LogitStore.take`` gives them; the teachers' columns carry the teacher's number in front of them."""
        numbers = self._numbers(np.asarray(indices, dtype=np.int64))
        names = batch_columns(self.facts) if columns is None else columns
        if soft:
            names = [*names, *(_SLICE + name for name in self._slices if _SLICE + name not in names)]
        taken: dict[str, np.ndarray] = self.stores[0].take(numbers[0], soft=False, columns=names)
        if soft:
            for i, (store, own) in enumerate(zip(self.stores, numbers, strict=True)):
                taken |= {f"{i}:{name}": values for name, values in store.take(own, columns=[]).items()}
        return taken

    def signal(
        self, columns: dict[str, np.ndarray], device: str | torch.device, keep: Tensor | None = None
    ) -> TeacherSignal:
        """All teachers at the positions of rows that ``take`` gave, as one; see ``LogitStore.signal`` and ``blend``."""
        signals = []
        for i, store in enumerate(self.stores):
            front = f"{i}:"
            own = {name.removeprefix(front): v for name, v in columns.items() if name.startswith(front)}
            signals.append(store.signal(own, device, keep))
        gold, row = self._gold(columns, keep)
        weights = torch.from_numpy(self._weights(columns))[:, row].to(device)
        return blend(signals, by_label(weights, signals, self.by_label), gold.to(device))

    def prefetch(self, parts: list[int], spare: list[int]) -> None:
        """See ``LogitStore.prefetch``."""
        for store in self.stores:
            store.prefetch(parts, spare)

    def _numbers(self, indices: np.ndarray) -> list[np.ndarray]:
        """Each store's own numbers of rows, [n] each."""
        if len(indices) and (indices.min() < 0 or indices.max() >= self.rows):
            raise IndexError(f"rows {indices.min()}…{indices.max()} of {self.rows} in an ensemble")
        if not self._kept:
            return [indices] * len(self.stores)
        part = np.searchsorted(self._starts, indices, side="right") - 1
        ids = (part << 32) + indices - self._starts[part]
        for number in np.unique(part).tolist():
            if number in self._kept:
                some = part == number
                ids[some] = self._kept[number][(indices - self._starts[part])[some]]
        return [store.rows_of(ids) for store in self.stores]

    def _gold(self, columns: dict[str, np.ndarray], keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """The right class of each position that is kept, negative for none, and the row that it is in: [N] each."""
        labels = _labels(columns, self.facts)
        chosen = torch.ones_like(labels, dtype=torch.bool) if keep is None else keep.reshape(labels.shape).cpu()
        return labels[chosen], chosen.nonzero()[:, 0]

    def _weights(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """[I, n] float32, each row's weights, adding up to 1."""
        rows = len(columns["sample_id"])
        weights = np.ones((len(self.teachers), rows), dtype=np.float32)
        for own, teacher in zip(weights, self.teachers, strict=True):
            own *= teacher.weight
            for name, factors in teacher.slices.items():
                own *= np.array([factors.get(str(value), 1.0) for value in columns[_SLICE + name]], dtype=np.float32)
        total = weights.sum(axis=0)
        if rows and not total.min() > 0:
            row = int(np.argmin(total))
            values = ", ".join(f"{name} {columns[_SLICE + name][row]!r}" for name in self._slices)
            raise StoreError(f"distill.teachers gives no teacher any weight for rows of {values}")
        return np.asarray(weights / total)


def by_label(weights: Tensor, signals: Sequence[TeacherSignal], how: ByLabel | None) -> Tensor:
    """Weights [I, N] changed by what each teacher says of the right class; see ``spec.teachers.ByLabel``."""
    if how is None:
        return weights
    known = signals[0].gold_rank >= 0
    said = torch.stack([signal.gold_logprob for signal in signals]).masked_fill(weights == 0, -torch.inf)
    if how == "probability":
        chosen = torch.softmax(weights.log() + said, dim=0)
    else:
        right = torch.stack([signal.gold_rank == 0 for signal in signals]) & (weights > 0)
        likeliest = torch.nn.functional.one_hot(said.argmax(dim=0), len(signals)).T.to(weights.dtype)
        shared = weights * right
        some = right.any(dim=0)
        chosen = torch.where(some, shared / shared.sum(dim=0).clamp(min=1e-30), likeliest)
    return torch.where(known, chosen, weights)


def _labels(columns: dict[str, np.ndarray], facts: DataFacts) -> Tensor:
    """[n, positions a row], -100 where nothing is right."""
    if facts.features == "documents":
        ids, segments = (
            torch.from_numpy(np.array(columns[name], dtype=np.int64)) for name in ("input_ids", "segments")
        )
        return next_tokens(ids, segments)
    return torch.from_numpy(np.array(columns["label"], dtype=np.int64))[:, None]


def _check_same_rows(own: LogitStore, other: LogitStore) -> None:
    where = other.table.folder
    if own.plan.data_fingerprint != other.plan.data_fingerprint:
        raise StoreError(
            f"{where} is of other rows than the job's own store (their data's fingerprints differ): capture that "
            f"teacher over the same prepared data"
        )
    check_alike(own.plan, other.plan, where, codec=False)
    dense = [store.plan.codec["name"] == "dense" for store in (own, other)]
    whole = [store.table.part_rows + store.table.part_quarantined for store in (own, other)]
    if dense[0] != dense[1]:
        raise StoreError(
            f"{where} can't be combined with the job's own store: one of them is dense and the other is not; capture "
            f"both with codec dense, or neither"
        )
    if not np.array_equal(*whole):
        raise StoreError(f"{where} doesn't hold the same rows in the same parts as the job's own store")


def _common_rows(stores: Sequence[LogitStore]) -> dict[int, np.ndarray]:
    """The sample ids that all stores hold, rising, for each part from which some store leaves rows out."""
    left_out = np.stack([store.table.part_quarantined for store in stores]).any(axis=0)
    common = {}
    for part in np.flatnonzero(left_out).tolist():
        held: np.ndarray | None = None
        for store in stores:
            rows = np.asarray(store.table.part_range(part), dtype=np.int64)
            ids = store.table.take(rows, ["sample_id"])["sample_id"] if len(rows) else rows
            held = np.array(ids) if held is None else np.intersect1d(held, ids)
        common[part] = held if held is not None else np.empty(0, dtype=np.int64)
    return common
