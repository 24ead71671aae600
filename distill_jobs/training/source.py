"""Rows for training, whether they come from the logit store or from prepared data."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.files import Folder
from distill_jobs.data.batch import IGNORED, Batch, batch_columns, make_batch
from distill_jobs.data.cache import PartCache, limit_of
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.reader import TableReader
from distill_jobs.errors import DataError, DistillError, StoreError
from distill_jobs.spec.reading import Mix, Reading
from distill_jobs.spec.teachers import Teachers
from distill_jobs.store.ensemble import EnsembleStore
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
        row_bytes: of a row as it is read, on average; 0 where that isn't known.
    """

    def __init__(
        self,
        facts: DataFacts,
        rows: int,
        take: Callable[[np.ndarray], Columns],
        signal: Callable[[Columns, Any, torch.Tensor], TeacherSignal] | None = None,
        order: Callable[[int], Order] | None = None,
        row_bytes: float = 0.0,
    ) -> None:
        self.row_bytes = row_bytes
        self.facts, self.rows, self._take, self._signal = facts, rows, take, signal
        self.order = order or partial(Order, rows)

    def columns(self, numbers: np.ndarray) -> Columns:
        """The rows ``numbers`` [n] as they are read, before they are a batch."""
        return self._take(numbers)

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
    order = partial(_order, table, table.prefetch, reading, DataError)
    return Source(facts, table.rows, take, order=order, row_bytes=_row_bytes(table))


def store_source(
    store: Folder,
    data: Folder,
    soft: bool,
    reading: Reading | None = None,
    mix: Sequence[Mix] = (),
    teachers: Teachers | None = None,
    layers: tuple[str, ...] = (),
) -> Source:
    """The rows of a logit store, mixed with those of others where ``mix`` names some.

    Where there are several ``teachers``, the rows are those that all of their stores hold, and the signal is of all.

    An epoch is one pass over the job's own store, the others' rows in their shares between its own.

    Args:
        soft: whether to read the teacher's signal; else its columns are never touched.
        layers: of the teacher, whose features are read with the signal.

    Raises:
        StoreError: a store is damaged, incomplete, or can't be mixed with the job's own.
    """
    reading = reading or Reading()
    if teachers is not None and teachers.teachers:
        several = open_teachers(store, data, reading, teachers)
        take = partial(several.take, soft=soft, columns=batch_columns(several.facts))
        return Source(several.facts, several.rows, take, several.signal if soft else None, _together(several, reading))
    stores = open_stores(store, data, reading, mix)
    orders = [partial(_order, s.table, s.prefetch, reading, StoreError) for s in stores]
    own = stores[0]
    names = batch_columns(own.facts)
    if not mix:
        own.check_layers(layers)
        take = partial(own.take, soft=soft, columns=names, layers=layers)
        read = _row_bytes(own.table if soft else TableReader(data / "train"))
        return Source(own.facts, own.rows, take, own.signal if soft else None, orders[0], read)
    mixed = MixedStore(stores)
    mixed.check_layers(layers)
    shares = [1.0 - sum(other.share for other in mix), *(other.share for other in mix)]

    def order(seed: int) -> Order:
        # Each store is shuffled in its own way, even where two are of one size.
        return MixedOrder([make(seed + i * 1_000_003) for i, make in enumerate(orders)], mixed.offsets, shares, seed)

    take = partial(mixed.take, soft=soft, columns=names, layers=layers)
    return Source(mixed.facts, order(0).rows, take, mixed.signal if soft else None, order)


def open_stores(store: Folder, data: Folder, reading: Reading, mix: Sequence[Mix]) -> list[LogitStore]:
    """The job's own store and those mixed into it, checked to fit one another."""
    others = ((Folder(other.store), Folder(other.data) if other.data else None) for other in mix)
    stores = _open([(store, data), *others], reading)
    for opened in stores:
        if not opened.rows:
            raise StoreError(f"{opened.table.folder} holds no rows")
    MixedStore(stores)
    return stores


def open_teachers(store: Folder, data: Folder, reading: Reading, teachers: Teachers) -> EnsembleStore:
    """The stores of several teachers, checked to be of the same rows; ``store`` is the job's own."""
    places = [
        (Folder(t.store), Folder(t.data) if t.data else data) if t.store is not None else (store, data)
        for t in teachers.teachers
    ]
    return EnsembleStore(_open(places, reading), teachers.teachers, teachers.by_label)


def _open(places: Sequence[tuple[Folder, Folder | None]], reading: Reading) -> list[LogitStore]:
    # One cache for all, so that none gives up what another is reading.
    cache = next(
        (_cache(folder, reading) for pair in places for folder in pair if folder and not folder.is_local), None
    )
    return [LogitStore.open(s, d, cache=cache, verify=reading.verify) for s, d in places]


def _together(several: EnsembleStore, reading: Reading) -> Callable[[int], Order]:
    """The order of rows that several stores hold; they are fetched together, as they have the same parts."""
    tables = [store.table for store in several.stores]
    if all(table.folder.is_local for table in tables):
        return partial(Order, several.rows)
    remote = [table for table in tables if not table.folder.is_local]
    window = _window(remote, several.part_rows, reading, StoreError)
    return partial(_windowed, several.part_rows, window, several.prefetch)


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
    return _windowed(table.part_rows, _window([table], table.part_rows, reading, error), prefetch, seed)


def _windowed(part_rows: np.ndarray, window: int, prefetch: Callable[[list[int], list[int]], None], seed: int) -> Order:
    """The order of parts that are fetched; where one window holds all of them, the same as of local ones."""
    filled = np.flatnonzero(part_rows).tolist()
    if len(filled) > window:
        return WindowOrder(part_rows, seed, window, prefetch)
    prefetch(filled, filled)
    return Order(int(part_rows.sum()), seed)


def _window(tables: Sequence[TableReader], part_rows: np.ndarray, reading: Reading, error: type[DistillError]) -> int:
    """How many parts are shuffled together, of each of ``tables``; refused where they don't fit into the cache."""
    filled = max(1, int(np.count_nonzero(part_rows)))
    window = min(reading.window_parts, filled)
    size = sum(found for table in tables if isinstance(found := table.facts.get("bytes"), int))
    limit = limit_of(int(reading.cache_gb * 1e9))
    if size / filled * window > limit:
        where = " and ".join(str(table.folder) for table in tables)
        raise error(
            f"{window} parts of {where} ({size / filled:,.0f} bytes each) don't fit into reading.cache_gb "
            f"{limit / 1e9:g}: raise it (or DISTILL_PART_CACHE_GB), or lower reading.window_parts"
        )
    return window


def _row_bytes(table: TableReader) -> float:
    size = table.facts.get("bytes")
    return size / max(1, table.rows) if isinstance(size, int) else 0.0


def _cache(folder: Folder, reading: Reading) -> PartCache | None:
    if folder.is_local:
        return None
    return PartCache(Path(reading.cache_dir) if reading.cache_dir else None, int(reading.cache_gb * 1e9))
