"""Reading a logit store: rows by their numbers, and the teacher's signal at the positions that a loss wants."""

from dataclasses import replace
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cluster.errors import FileError
from cluster.files import Folder, sha256
from distill_jobs.data.cache import PartCache
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.reader import TableReader
from distill_jobs.data.table import MANIFEST
from distill_jobs.errors import DataError, StoreError
from distill_jobs.store.codecs import Field
from distill_jobs.store.codecs.fields import Statistics, statistics, unpack_statistics
from distill_jobs.store.plan import PARTS, SPLIT, StorePlan, refuse_cold
from distill_jobs.store.rows import check_rows, data_columns
from distill_jobs.store.signal import TeacherSignal
from distill_jobs.store.writer import PREFIX, SEAL, STAYS_IN_DATA, column_type, seal

_CHECKED_POSITIONS = 16_384


class LogitStore:
    """A complete logit store, with everything that training needs. Whatever is wrong with it is a StoreError.

    Attributes:
        plan: what it was made from.
        manifest: its totals.
        facts: the data's facts.
        rows: number of rows; they are numbered from 0 through all parts.
    """

    def __init__(self, plan: StorePlan, manifest: dict[str, Any], table: TableReader, pixels: TableReader | None):
        self.plan, self.manifest, self.table = plan, manifest, table
        self.facts = plan.make_facts()
        self.rows = table.rows
        self._pixels = pixels
        self._codec, self._features = plan.make_codec(), plan.make_features()
        self._fields = plan.fields()
        self._soft = [PREFIX + name for name in self._codec.fields(plan.classes)]
        table.inspect = self._check_part

    @classmethod
    def open(
        cls, folder: Folder, data: Folder | None = None, *, cache: PartCache | None = None, verify: bool = True
    ) -> Self:
        """Open a store; ``data`` is needed only where features stay there (images).

        Args:
            cache: where parts in an object store are kept; None takes the machine's common one.
            verify: False trusts the parts. Else each is checked the first time it is opened: its SHA-256, and that
                its columns hold nothing that no encoder writes.

        Raises:
            StoreError: the store is incomplete, damaged, of another schema version, or ``data`` is not what it was
                made from.
        """
        plan = StorePlan.load(folder)
        manifest = read_manifest(folder, plan)
        table = open_parts(folder, plan, manifest, cache=cache, verify=verify)
        pixels = _pixels(plan, table, data, cache, verify) if plan.facts["features"] == "image" else None
        return cls(plan, manifest, table, pixels)

    def rows_of(self, sample_ids: np.ndarray) -> np.ndarray:
        """The row numbers [n] of sample ids [n]; raises StoreError when the store has no such sample."""
        return self.table.rows_of(sample_ids)

    def take(
        self,
        indices: np.ndarray,
        soft: bool = True,
        columns: list[str] | None = None,
        layers: tuple[str, ...] = (),
    ) -> dict[str, np.ndarray]:
        """The rows ``indices`` (global numbers, any order): the data's columns and the soft target's (``t.<field>``).

        Args:
            soft: False leaves the soft target's columns unread.
            layers: the teacher's layers whose features are read, too; see ``check_layers``.
            columns: the data's columns to read; None reads all. Text is slow to read, and training needs none.

        Returns:
            [n] for a plain column, [n, width] for a list; soft targets are [n, positions_per_row · width]. A single
            row, and rows that lie behind one another, are read-only views of the mapped part.
        """
        known = self.table.schema.names if columns is None else columns
        names = [name for name in known if name != STAYS_IN_DATA and not name.startswith(PREFIX)]
        names += self._soft if soft else []
        if layers and self._features is not None:
            names += [PREFIX + name for name in self._features.fields(layers)]
        taken = self.table.take(indices, names)
        if self._pixels is not None and (columns is None or STAYS_IN_DATA in columns):
            taken |= self._pixels.take(self._in_data(indices), [STAYS_IN_DATA])
        return taken

    def _in_data(self, indices: np.ndarray) -> np.ndarray:
        """The data's row numbers of rows: the same ones, unless some stand in the quarantine."""
        if self._pixels is None or not self.table.part_quarantined.any():
            return indices
        return self._pixels.rows_of(self.table.take(indices, ["sample_id"])["sample_id"])

    def check_layers(self, layers: tuple[str, ...]) -> None:
        """Raise StoreError where the store doesn't hold the features of one of these layers of the teacher."""
        held = self._features.layers if self._features else ()
        for name in layers:
            if name not in held:
                raise StoreError(
                    f"{self.table.folder} holds no features of the teacher's layer {name} (it holds: "
                    f"{', '.join(held) or 'none'}); name it in capture.features.layers and capture again"
                )

    def check(self, columns: dict[str, np.ndarray]) -> None:
        """Refuse rows, as ``take`` gave them, in which the teacher's columns hold what no encoder writes.

        Raises:
            StoreError: naming the column.
        """
        raw = self._raw(columns, "cpu", None)
        self._codec.check(raw, self.plan.classes)
        if self._features is not None:
            self._features.check(raw)

    def features_told(self, columns: dict[str, np.ndarray]) -> list[str]:
        """A line about the features of each layer, and how far off rounding leaves those of rows that were taken."""
        if self._features is None:
            return []
        return self._features.told(self._raw(columns, "cpu", None))

    def prefetch(self, parts: list[int], spare: list[int]) -> None:
        """Have parts fetched ahead where the store lies in an object store, without giving up the parts ``spare``."""
        for table in (self.table, self._pixels):
            if table is not None:
                table.prefetch(parts, spare)

    def signal(
        self, columns: dict[str, np.ndarray], device: str | torch.device, keep: Tensor | None = None
    ) -> TeacherSignal:
        """The teacher at the positions of rows that ``take`` gave, with the features that were asked for.

        Args:
            keep: [n, positions_per_row] of bool; only these positions, in row-major order. None keeps all.

        Raises:
            StoreError: a column is missing, has another type, or holds values out of range.
        """
        chosen = None if keep is None or bool(keep.all()) else keep.reshape(-1).cpu().numpy().nonzero()[0]
        raw = self._raw(columns, device, chosen)
        signal = self._codec.decode(raw, self.plan.classes)
        if self._features is None or not any(PREFIX + name in columns for name in self._features.fields()):
            return signal
        return replace(signal, features=self._features.decode(raw))

    def statistics(self, indices: np.ndarray) -> Statistics:
        """``gold_logprob``, ``gold_rank`` and ``entropy`` at every position of rows, [n · positions_per_row] each.

        As in ``TeacherSignal``; of the soft target only these columns are read.
        """
        wanted = statistics()
        columns = self.table.take(indices, [PREFIX + name for name in wanted])
        positions = self.plan.positions_per_row
        return unpack_statistics(
            {name: as_tensor(_values(columns, name, field, positions)) for name, field in wanted.items()}
        )

    def _raw(
        self, columns: dict[str, np.ndarray], device: str | torch.device, chosen: np.ndarray | None
    ) -> dict[str, Tensor]:
        raw = {}
        for name, field in self._fields.items():
            if PREFIX + name not in columns and PREFIX + name not in self._soft:
                continue
            values = _values(columns, name, field, self.plan.positions_per_row)
            values = values if chosen is None else values.take(chosen, axis=0)
            raw[name] = as_tensor(values).to(device)
        return raw

    def _check_part(self, part: int) -> None:
        """Refuse a part that holds what no encoder and no preparing writes. In pieces: a part may be gigabytes."""
        numbers = np.asarray(self.table.part_range(part), dtype=np.int64)
        rows = max(1, _CHECKED_POSITIONS // self.plan.positions_per_row)
        for start in range(0, len(numbers), rows):
            names = [*data_columns(self.facts), *(PREFIX + name for name in self._fields)]
            columns = self.table.take(numbers[start : start + rows], names)
            try:
                check_rows(columns, self.facts)
                self.check(columns)
            except StoreError as error:
                raise StoreError(f"part {part} of {self.table.folder}: {error}") from None


def as_tensor(values: np.ndarray) -> Tensor:
    """Columns as ``take`` gave them as a tensor over the same memory, which is for reading only."""
    if not values.flags.writeable:
        values = values.view()
        try:
            # A mapped part: torch knows no read-only memory, and what were written here would not reach the file.
            values.flags.writeable = True
        except ValueError:
            values = values.copy()
    return torch.from_numpy(values)


def read_manifest(folder: Folder, plan: StorePlan, cold: bool = False) -> dict[str, Any]:
    """The store's manifest; its presence means complete.

    Args:
        cold: read it even where the store is in cold form.

    Raises:
        StoreError: it is missing, damaged, or belongs to another plan; or the store is in cold form.
    """
    if not cold:
        refuse_cold(folder)
    if not folder.exists(MANIFEST):
        raise StoreError(f"the logit store in {folder} is not complete: it has no {MANIFEST}; run capture again")
    try:
        manifest = folder.read_json(MANIFEST)
    except FileError as error:
        raise StoreError(str(error)) from None
    names = ("parts", "rows", "tokens", "bytes", "quarantined")
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(name), int) for name in names):
        raise StoreError(f"{folder}/{MANIFEST} is not a valid manifest of a logit store; run capture again")
    if manifest.get(SEAL) != seal(manifest):
        raise StoreError(f"{folder}/{MANIFEST} was damaged or edited: its digest doesn't fit it; run capture again")
    if manifest.get("plan") != plan.digest:
        raise StoreError(f"{folder}: the manifest belongs to another plan than the one beside it; run capture again")
    return manifest


def open_parts(
    folder: Folder,
    plan: StorePlan,
    manifest: dict[str, Any],
    *,
    cache: PartCache | None = None,
    verify: bool = True,
) -> TableReader:
    """The parts of a store as a table; ``cache`` and ``verify`` as for ``LogitStore.open``.

    Raises:
        StoreError: the parts are not those that plan and manifest speak of.
    """
    if sha256(folder / PARTS, MANIFEST) != manifest.get("table_sha256"):
        raise StoreError(f"{folder}/{PARTS}/{MANIFEST} is not the file that was written; run capture again")
    table = TableReader(folder / PARTS, StoreError, cache=cache, verify=verify)
    counted = (table.parts, table.rows, int(table.part_quarantined.sum()))
    if counted != (plan.parts, manifest["rows"], manifest["quarantined"]):
        raise StoreError(
            f"{folder}: manifest, plan and parts disagree about rows, parts or the quarantine; capture again"
        )
    if table.rows:
        _check_schema(table.schema, plan, folder)
    return table


def _values(columns: dict[str, np.ndarray], name: str, field: Field, positions: int) -> np.ndarray:
    values = columns.get(PREFIX + name)
    if values is None:
        raise StoreError(f"the store has no column {PREFIX}{name}; capture again")
    if values.dtype != np.dtype(field.dtype) or values.ndim != 2 or values.shape[1] != positions * field.width:
        raise StoreError(
            f"the store is damaged: {PREFIX}{name} is {values.dtype} {list(values.shape)}, not {field.dtype} "
            f"[rows, {positions * field.width}]"
        )
    return values.reshape(-1, field.width)


def _check_schema(schema: pa.Schema, plan: StorePlan, folder: Folder) -> None:
    soft = {PREFIX + name: column_type(field, plan.positions_per_row) for name, field in plan.fields().items()}
    for name, expected in {**data_columns(plan.make_facts()), **soft}.items():
        at = schema.get_field_index(name)
        if at < 0 or schema.field(at).type != expected:
            found = "missing" if at < 0 else str(schema.field(at).type)
            raise StoreError(f"{folder}: column {name} is {found}, but by the plan it is {expected}")


def _pixels(
    plan: StorePlan, table: TableReader, data: Folder | None, cache: PartCache | None, verify: bool
) -> TableReader:
    if data is None:
        raise StoreError("this store's pixels stay in data/: open it together with the data it was made from")
    try:
        facts = DataFacts.load(data)
    except DataError as error:
        raise StoreError(str(error)) from None
    if facts.fingerprint != plan.data_fingerprint:
        raise StoreError(f"{data} is not what the store was made from (its fingerprint differs); capture again")
    reader = TableReader(data / SPLIT, StoreError, cache=cache, verify=verify)
    if not np.array_equal(reader.part_rows, table.part_rows + table.part_quarantined):
        raise StoreError(f"{data} and the store don't hold the same rows in the same parts; capture again")
    return reader
