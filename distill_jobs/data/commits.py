"""Which parts of a table are committed, for any number of parts: some 65 bytes each, and not a file opened for most.

The commit records are the truth. Beside them lies an index of what they said (``commit_index``), so that opening a
table reads the records alone that the index doesn't cover yet. What the index says of a part is believed only if one
look at the folder's names agrees: the record is there, so is the file of the very attempt, and none of another attempt.
Otherwise the record is read.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from cluster.errors import FileError, TransientFileError
from cluster.files import Folder, is_temporary
from distill_jobs.data import commit_index
from distill_jobs.data.commit_index import FIELDS, SHA_BYTES
from distill_jobs.data.table import MANIFEST, PartRecord, adopted, read_record, record_name
from distill_jobs.errors import DataError

_NAME = re.compile(r"part-(\d{5,18})\.(?:([0-9a-f]{8})\.arrow|json)")
_MISSING, _NEW, _INDEXED = 0, 1, 2
_AT_LEAST, _SHARE = 1000, 0.05
_AT_ONCE, _BLOCK, _PIECE = 16, 10_000, 100_000


class Commits:
    """The committed parts of a table. Made by ``open``; kept up by ``add``; ended by ``manifest``.

    Attributes:
        parts: how many parts the table is to have.
        rows, tokens, bytes, quarantined: totals of the committed ones.
    """

    def __init__(self, folder: Folder, parts: int, inputs: str | Callable[[int], str]) -> None:
        self.folder, self.parts = folder, parts
        self._inputs = inputs if callable(inputs) else lambda _: inputs
        self._state = np.zeros(parts, np.uint8)
        self._columns = {name: np.zeros((parts, *shape), dtype) for name, (dtype, shape) in FIELDS.items()}
        self.rows = self.tokens = self.bytes = self.quarantined = 0
        self._count = self._new = 0
        self._due = _AT_LEAST

    @classmethod
    def open(cls, folder: Folder, parts: int, inputs: str | Callable[[int], str]) -> "Commits":
        """Find the parts among ``range(parts)`` that are committed and were made from ``inputs``.

        Args:
            inputs: the digest that all parts are made from, or a function that gives a part's.

        A record that is damaged or of other inputs, or whose file is gone, counts as missing: its part is made again.
        """
        commits = cls(folder, parts, inputs)
        outdated = commits._read_index()
        doubtful, contradicted = commits._doubtful()
        for record in commits._read_records(doubtful):
            commits._set(record)
        commits._sum_up()
        if outdated or contradicted:
            # Else it might be believed once more, after the parts were made anew and the old inputs have come back.
            commit_index.remove(folder)
            commits._state[commits._state == _INDEXED] = _NEW
            commits._new = commits._count
        commits._flush_when_due()
        return commits

    def __len__(self) -> int:
        """How many parts are committed."""
        return self._count

    def __contains__(self, part: int) -> bool:
        return bool(self._state[part])

    def missing(self) -> np.ndarray:
        """The numbers of the parts that are not committed, int64, ascending."""
        return np.flatnonzero(self._state == _MISSING)

    def file(self, part: int) -> str | None:
        """The name of a committed part's file, None where it has no rows."""
        assert self._state[part], f"part {part} is not committed"
        return _file(part, self._columns["attempt"][part]) if self._columns["rows"][part] else None

    def quarantined_of(self, part: int) -> int:
        """How many rows of a part are in the quarantine; 0 while it is not committed."""
        return int(self._columns["quarantined"][part])

    def add(self, record: PartRecord) -> None:
        """Take note that a part has been committed. Of another attempt than was known, the record on disk decides."""
        part = record.part
        if not 0 <= part < self.parts:
            raise DataError(f"{self.folder} has {self.parts} parts, but a commit record speaks of part {part}")
        if self._state[part]:
            if self.file(part) == record.file:
                return
            record = adopted(self.folder, part, self._inputs(part)) or record
            self._forget(part)
        self._set(record)
        self._count += 1
        self._new += 1
        self._add_up(part, 1)
        self._flush_when_due()

    def flush(self) -> None:
        """Bring the index up to date, so that the next ``open`` has nothing to read but names."""
        new = np.flatnonzero(self._state == _NEW)
        for start in range(0, len(new), _PIECE):
            parts = new[start : start + _PIECE]
            columns = {name: column[parts] for name, column in self._columns.items()}
            commit_index.append(self.folder, parts, columns, [self._inputs(int(part)) for part in parts])
            self._state[parts] = _INDEXED
        self._new = 0
        self._due = max(_AT_LEAST, int(_SHARE * self._count))

    def records(self) -> Iterator[PartRecord]:
        """The commit records of the committed parts in the order of their numbers, each read when it is asked for."""
        for part in np.flatnonzero(self._state):
            record = read_record(self.folder, int(part))
            if record is None:
                raise DataError(f"{self.folder} has lost the commit record of part {part}; make the part again")
            yield record

    def manifest(self, **facts: Any) -> dict[str, Any]:
        """Sweep up what dead attempts left, then write the manifest: totals, ``facts``, and what each part holds.

        No attempt may be running any more. The index has served then, and goes too.

        Returns:
            the totals and ``facts``, without the lists of what each part holds.

        Raises:
            DataError: parts are missing.
        """
        missing = self.missing()
        if len(missing):
            few = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise DataError(f"{len(missing)} of {self.parts} parts of {self.folder} are missing ({few})")
        self._sweep()
        totals = {"parts": self.parts, "rows": self.rows, "tokens": self.tokens, "bytes": self.bytes}
        lists: dict[str, Any] = {
            "part_rows": _Items(self.parts, lambda part: int(self._columns["rows"][part])),
            "part_sha256": _Items(self.parts, self._sha256),
            "part_files": _Items(self.parts, self.file),
        }
        if self.quarantined:
            totals["quarantined"] = self.quarantined
            lists["part_quarantined"] = _Items(self.parts, self.quarantined_of)
        encoder = json.JSONEncoder(indent=1, sort_keys=True, allow_nan=False)
        with self.folder.create(MANIFEST) as stream:
            for block in _blocks(encoder.iterencode({**facts, **totals, **lists})):
                stream.write("".join(block).encode())
            stream.write(b"\n")
        commit_index.remove(self.folder)
        return {**facts, **totals}

    def _read_index(self) -> bool:
        """Take over what the index says; whether it says anything of parts of other inputs."""
        outdated = False
        for parts, columns, inputs in commit_index.read(self.folder):
            known = parts < self.parts
            fits = known.copy()
            fits[known] = [self._inputs(int(p)) == i for p, i in zip(parts[known], inputs[known], strict=True)]
            outdated = outdated or bool((known & ~fits).any())
            for name, column in self._columns.items():
                column[parts[fits]] = columns[name][fits]
            # A later piece of the index knows better than an earlier one.
            self._state[parts[known]] = _MISSING
            self._state[parts[fits]] = _INDEXED
        return outdated

    def _doubtful(self) -> tuple[np.ndarray, bool]:
        """Parts whose record must be read, and whether the folder's names contradict the index."""
        recorded, seen, other = (np.zeros(self.parts, bool) for _ in range(3))
        for parts, attempts in _listed(self.folder):
            parts, attempts = parts[known := parts < self.parts], attempts[known]
            recorded[parts[attempts < 0]] = True
            parts, attempts = parts[attempts >= 0], attempts[attempts >= 0]
            mine = (self._columns["attempt"][parts] == attempts) & (self._columns["rows"][parts] > 0)
            seen[parts[mine]] = True
            other[parts[~mine]] = True
        indexed = self._state == _INDEXED
        sure = indexed & recorded & ~other & (seen | (self._columns["rows"] == 0))
        self._state[indexed & ~sure] = _MISSING
        return np.flatnonzero(recorded & ~sure), bool((indexed & ~sure).any())

    def _read_records(self, parts: Iterable[int]) -> Iterator[PartRecord]:
        def one(part: int) -> PartRecord | None:
            return adopted(self.folder, int(part), self._inputs(int(part)))

        if self.folder.is_local:
            yield from (record for part in parts if (record := one(part)))
            return
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for block in _blocks(parts, 10 * _AT_ONCE):
                yield from (record for record in pool.map(one, block) if record)

    def _set(self, record: PartRecord) -> None:
        values = {
            **{name: getattr(record, name) for name in ("rows", "tokens", "bytes", "quarantined")},
            "attempt": int(record.file.split(".")[1], 16) if record.file else 0,
            "sha256": np.frombuffer(bytes.fromhex(record.sha256) or bytes(SHA_BYTES), np.uint8),
        }
        for name, value in values.items():
            self._columns[name][record.part] = value
        self._state[record.part] = _NEW

    def _forget(self, part: int) -> None:
        self._add_up(part, -1)
        self._count -= 1
        self._new -= int(self._state[part] == _NEW)
        self._state[part] = _MISSING

    def _add_up(self, part: int, sign: int) -> None:
        for name in ("rows", "tokens", "bytes", "quarantined"):
            setattr(self, name, getattr(self, name) + sign * int(self._columns[name][part]))

    def _sum_up(self) -> None:
        there = self._state != _MISSING
        for name in ("rows", "tokens", "bytes", "quarantined"):
            setattr(self, name, int(self._columns[name].sum(where=there, dtype=np.int64)))
        self._count, self._new = int(there.sum()), int((self._state == _NEW).sum())
        self._due = max(_AT_LEAST, int(_SHARE * (self._count - self._new)))

    def _flush_when_due(self) -> None:
        if self._new < self._due:
            return
        try:
            self.flush()
        except (FileError, TransientFileError):
            # Without the index nothing is lost but time: whatever ails the storage, a part's own writing will tell.
            self._due += _AT_LEAST

    def _sha256(self, part: int) -> str:
        return self._columns["sha256"][part].tobytes().hex() if self._columns["rows"][part] else ""

    def _sweep(self) -> None:
        """Remove every file of a part but its record and the file that this names, and unfinished files."""
        left: dict[str, int] = {}
        for name in self.folder.scan():
            named = _NAME.fullmatch(name)
            part = min(int(named[1]), self.parts) if named else self.parts
            if part < self.parts and name in (record_name(part), self.file(part)):
                continue
            if is_temporary(name) or name.startswith("part-"):
                left[name] = part
        # Two attempts may both have believed that they were the first: then the record that stayed decides.
        for part in {part for part in left.values() if part < self.parts}:
            record = adopted(self.folder, part, self._inputs(part))
            if record is None:
                raise DataError(f"part {part} of {self.folder} is not committed any more; run the same command again")
            if believed := self.file(part):
                left[believed] = part
            self.add(record)
        for name, part in left.items():
            if part == self.parts or name != self.file(part):
                self.folder.remove(name)


class _Items(list[Any]):
    """A list for the JSON encoder whose items are made when it comes to them."""

    def __init__(self, count: int, item: Callable[[int], Any]) -> None:
        super().__init__()
        self._count, self._item = count, item

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        return map(self._item, range(self._count))


def _file(part: int, attempt: int) -> str:
    return f"part-{part:05d}.{attempt:08x}.arrow"


def _listed(folder: Folder) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The numbers of the parts that the files of a folder are of, and of their attempts: -1 for a record."""
    for block in _blocks(folder.scan()):
        found = [named.groups() for name in block if (named := _NAME.fullmatch(name))]
        parts = np.array([int(part) for part, _ in found], np.int64)
        yield parts, np.array([int(attempt, 16) if attempt else -1 for _, attempt in found], np.int64)


def _blocks(items: Iterable[Any], size: int = _BLOCK) -> Iterator[list[Any]]:
    left = iter(items)
    while block := list(itertools.islice(left, size)):
        yield block
