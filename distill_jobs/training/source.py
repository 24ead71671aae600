"""Rows for training, whether they come from the logit store or from prepared data."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.files import Folder
from distill_jobs.data.batch import IGNORED, Batch, batch_columns, make_batch
from distill_jobs.data.cache import PartCache
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.reader import TableReader
from distill_jobs.errors import DataError, DistillError, StoreError
from distill_jobs.spec.reading import Mix, Reading
from distill_jobs.store.mixture import MixedStore
from distill_jobs.store.reader import LogitStore
from distill_jobs.store.signal import TeacherSignal
from distill_jobs.training.feed import MixedOrder, Order, WindowOrder

Columns = dict[str, np.ndarray]


class Source:
    """Loads any rows, by number, as a batch on the device, with the teacher's signal where there is one.

    Attributes:
        rows: samples in an epoch.
        order: the endless sequence of row numbers for a seed.
    """

    def __init__(
        self,
        facts: DataFacts,
        rows: int,
        take: Callable[[np.ndarray], Columns],
        signal: Callable[[Columns, Any, torch.Tensor], TeacherSignal] | None = None,
        order: Callable[[int], Order] | None = None,
    ) -> None:
        self.facts, self.rows, self._take, self._signal = facts, rows, take, signal
        self.order = order or partial(Order, rows)

    def load(
        self, numbers: np.ndarray, device: str, real: np.ndarray | None = None
    ) -> tuple[Batch, TeacherSignal | None]:
        """The rows ``numbers`` [n]: inputs and labels, and the signal at the scored positions (row-major).

        Args:
            real: [n] of bool; the other rows only fill up the batch, and nothing of them is scored.
        """
        columns = self._take(numbers)
        batch = make_batch(columns, self.facts)
        if real is not None and not real.all():
            batch.labels[torch.from_numpy(~real)] = IGNORED
        signal = None
        if self._signal is not None:
            signal = self._signal(columns, device, batch.keep)
        return _copied(batch, device), signal


def _copied(batch: Batch, device: str) -> Batch:
    if not device.startswith("cuda"):
        return batch.to(device)
    pinned = {name: tensor.pin_memory() for name, tensor in batch.inputs.items()}
    held = Batch(pinned, batch.labels.pin_memory(), batch.sample_ids.pin_memory())
    return held.to(device, non_blocking=True)


def split_source(data: Folder, split: str, reading: Reading | None = None) -> Source:
    """The rows of a prepared split, hard labels only."""
    reading, facts = reading or Reading(), DataFacts.load(data)
    if facts.splits.get(split, {}).get("rows", 0) == 0:
        return Source(facts, 0, lambda _: {})
    table = TableReader(data / split, cache=_cache(data, reading), verify=reading.verify)
    take = partial(table.take, columns=batch_columns(facts))
    return Source(facts, table.rows, take, order=partial(_order, table, table.prefetch, reading, DataError))


def store_source(
    store: Folder, data: Folder, soft: bool, reading: Reading | None = None, mix: Sequence[Mix] = ()
) -> Source:
    """The rows of a logit store, mixed with those of others where ``mix`` names some.

    An epoch is one pass over the job's own store, the others' rows in their shares between its own.

    Args:
        soft: whether to read the teacher's signal; else its columns are never touched.

    Raises:
        StoreError: a store is damaged, incomplete, or can't be mixed with the job's own.
    """
    reading = reading or Reading()
    stores = open_stores(store, data, reading, mix)
    orders = [partial(_order, s.table, s.prefetch, reading, StoreError) for s in stores]
    own = stores[0]
    names = batch_columns(own.facts)
    if not mix:
        take = partial(own.take, soft=soft, columns=names)
        return Source(own.facts, own.rows, take, own.signal if soft else None, orders[0])
    mixed = MixedStore(stores)
    shares = [1.0 - sum(other.share for other in mix), *(other.share for other in mix)]

    def order(seed: int) -> Order:
        # Each store is shuffled in its own way, even where two are of one size.
        return MixedOrder([make(seed + i * 1_000_003) for i, make in enumerate(orders)], mixed.offsets, shares, seed)

    take = partial(mixed.take, soft=soft, columns=names)
    return Source(mixed.facts, order(0).rows, take, mixed.signal if soft else None, order)


def open_stores(store: Folder, data: Folder, reading: Reading, mix: Sequence[Mix]) -> list[LogitStore]:
    """The job's own store and those mixed into it, checked to fit one another."""
    places = [(store, data), *((Folder(other.store), Folder(other.data) if other.data else None) for other in mix)]
    # One cache for all, so that none gives up what another is reading.
    cache = next(
        (_cache(folder, reading) for pair in places for folder in pair if folder and not folder.is_local), None
    )
    stores = [LogitStore.open(s, d, cache=cache, verify=reading.verify) for s, d in places]
    for opened in stores:
        if not opened.rows:
            raise StoreError(f"{opened.table.folder} holds no rows")
    MixedStore(stores)
    return stores


def _order(
    table: TableReader,
    prefetch: Callable[[list[int], list[int]], None],
    reading: Reading,
    error: type[DistillError],
    seed: int,
) -> Order:
    """A shuffle of all rows; for parts in an object store of a window of parts after another."""
    if table.folder.is_local:
        return Order(table.rows, seed)
    filled = max(1, int(np.count_nonzero(table.part_rows)))
    window = min(reading.window_parts, filled)
    size = table.facts.get("bytes")
    if isinstance(size, int) and size / filled * window > reading.cache_gb * 1e9:
        raise error(
            f"{window} parts of {table.folder} ({size / filled:,.0f} bytes each) don't fit into reading.cache_gb "
            f"{reading.cache_gb:g}: raise it, or lower reading.window_parts"
        )
    return WindowOrder(table.part_rows, seed, window, prefetch)


def _cache(folder: Folder, reading: Reading) -> PartCache | None:
    if folder.is_local:
        return None
    return PartCache(Path(reading.cache_dir) if reading.cache_dir else None, int(reading.cache_gb * 1e9))
