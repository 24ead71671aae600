"""Where the checkpoints of one arm lie, on disk or in an object store, and which of them are whole.

``step-000123.<attempt>/`` holds what each rank has written: its part of the engine's state, its random numbers, and
last ``rank-00000.json``, the SHA-256 of these. ``step-000123.json`` is the commit record, written last of all, with
the loop's state and the SHA-256 of every file. An attempt is one start of a gang and has a name of its own, so that
what a killed one has left behind, or one that was cut off still writes, is never mixed with another's.
"""

import os
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pyarrow import fs

from cluster.commit import sync_folder
from cluster.errors import FileError
from cluster.faults import said
from cluster.files import Folder, sha256, store_folder
from cluster.node_cache import node_copy

Record = dict[str, Any]

_KEYS = {"digest", "step", "folder", "world", "best", "files", "loop", "usage"}
_OURS = re.compile(r"step-\d{6,}(\.[0-9a-f]{8}|\.json)")


class Shelf:
    """The checkpoints of one arm.

    Args:
        folder: where they lie.
        digest: of all that the arm depends on: those of another digest don't count.
        attempt: the name of this start of the gang.
    """

    def __init__(self, folder: Folder, digest: str, attempt: str) -> None:
        self.folder, self.digest, self.attempt = folder, digest, attempt

    def records(self) -> dict[int, Record]:
        """The commit records by step; what is damaged or another arm's is left out."""
        found = {}
        for name in self.folder.names(".json"):
            with suppress(FileError, TypeError, ValueError, AttributeError):
                record = self.folder.read_json(name)
                if record.keys() >= _KEYS and record["digest"] == self.digest and _record(record["step"]) == name:
                    found[int(record["step"])] = record
        return found

    def read(self, step: int) -> Record:
        """The commit record of a step."""
        return dict(self.folder.read_json(_record(step)))

    def put(self, step: int, rank: int, write: Callable[[Path], list[str]]) -> None:
        """Have ``write`` fill a local folder with files that no other rank writes, store them, and say so last."""
        inside = self.folder / self._name(step)
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as scratch:
            local = inside.path() if inside.is_local else Path(scratch)
            with said(str(inside)):
                local.mkdir(parents=True, exist_ok=True)
                names = write(local)
                for name in names:
                    _sync(local / name)
                sync_folder(local)
            files = {name: sha256(Folder(str(local)), name) for name in names}
            if not inside.is_local:
                store_folder(local, inside)
        inside.write_json(_mark(rank), {"files": files})

    def complete(self, step: int, world: int) -> dict[str, str] | None:
        """The SHA-256 of every file of a step once all ranks have put theirs; None before."""
        inside = self.folder / self._name(step)
        marks = [_mark(rank) for rank in range(world)]
        if not set(marks) <= set(inside.names(".json")):
            return None
        return {name: digest for mark in marks for name, digest in inside.read_json(mark)["files"].items()}

    def commit(self, record: Record) -> None:
        """Write the record that makes a step's files a checkpoint; ``digest`` and ``folder`` are added."""
        step = int(record["step"])
        self.folder.write_json(_record(step), {**record, "digest": self.digest, "folder": self._name(step)})

    def retain(self, keep: int) -> None:
        """Remove all but the last ``keep`` and the newest that was the best."""
        records = self.records()
        best = [step for step, record in records.items() if record["best"]]
        spared = {*sorted(records)[-keep:], *sorted(best)[-1:]}
        for step in records.keys() - spared:
            self.remove(records[step])

    def remove(self, record: Record) -> None:
        """Remove a checkpoint, its record first."""
        self.folder.remove(_record(record["step"]))
        (self.folder / record["folder"]).clear()

    def tidy(self) -> None:
        """Remove what no checkpoint of this arm needs: other arms', and what killed attempts have left unfinished."""
        known = {_record(step): record["folder"] for step, record in self.records().items()}
        spared = {*known, *known.values()}
        for info in self.folder.infos():
            if info.base_name in spared or not _OURS.fullmatch(info.base_name):
                continue
            if info.type == fs.FileType.Directory:
                (self.folder / info.base_name).clear()
            else:
                self.folder.remove(info.base_name)

    def damaged(self, record: Record, share: int = 0, shares: int = 1) -> int:
        """How many of a checkpoint's files, or of one share of them, are missing or not as they were written."""
        inside, files = self.folder / record["folder"], sorted(record["files"].items())
        return sum(not _is(inside, name, digest) for name, digest in files[share::shares])

    def copy(self, record: Record) -> Path:
        """A checkpoint's files on this machine."""
        return node_copy(self.folder / record["folder"], self.digest)

    def _name(self, step: int) -> str:
        return f"step-{step:06d}.{self.attempt}"


def _record(step: int) -> str:
    return f"step-{step:06d}.json"


def _mark(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _is(folder: Folder, name: str, digest: str) -> bool:
    try:
        return sha256(folder, name) == digest
    except FileError:
        return False


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
