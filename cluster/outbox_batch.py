"""Entries of an outbox that are sent, written down and removed together: one JSON file, and the bytes they carry."""

import logging
import time
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import FileError
from cluster.files import Folder

Entry = dict[str, Any]
_log = logging.getLogger(__name__)


class RefusedError(Exception):
    """The server has answered, and will never take this entry."""


class ElsewhereError(Exception):
    """What is to be sent belongs to another server than this one."""


class LaterError(Exception):
    """A batch is to wait, and others are not."""


@dataclass(eq=False)
class Batch:
    """Some entries, in order.

    Attributes:
        entries: None when they lie in the folder alone.
        old: an earlier process has left it.
        open: more may be added.
        held: it is another server's, or can't be read.
        gone: it is delivered.
        tried: the next entry was tried without success.
        sent: how many of the entries are delivered.
        weight: entries and points.
        written: the weight when it was written down.
        due: the time before which it is not to be tried.
        late: the run of the uploads that were put off.
    """

    name: str
    place: Any = None
    entries: list[Entry] | None = None
    old: bool = False
    open: bool = False
    held: bool = False
    gone: bool = False
    tried: bool = False
    sent: int = 0
    weight: int = 0
    written: int = 0
    due: float = 0.0
    late: str = ""
    since: float = field(default_factory=time.monotonic)
    last: dict[str, Entry] = field(default_factory=dict)
    blobs: set[str] = field(default_factory=set)


def load(folder: Folder, batch: Batch) -> list[Entry]:
    """The entries of a batch that lie in the folder alone.

    Raises:
        ElsewhereError: they can't be read; the file stays as it is.
    """
    try:
        found = folder.read_json(batch.name)
        entries, batch.place = list(found["entries"]), found["place"]
        if not all(isinstance(each["do"], str) and isinstance(each["run"], str) for each in entries):
            raise TypeError("an entry lacks its names")
        batch.blobs |= {str(each["data"]) for each in entries if "data" in each}
    except (FileError, TypeError, LookupError, AttributeError) as error:
        _log.warning("%s/%s can't be read and stays as it is (%s)", folder, batch.name, error)
        raise ElsewhereError from None
    return entries


def store(folder: Folder, batch: Batch, entries: list[Entry]) -> None:
    """Write down a batch's entries, which are changed: bytes go to files of their own, by whose names they go on."""
    for i, entry in enumerate(entries):
        if isinstance(entry.get("data"), bytes):
            blob = f"{batch.name.removesuffix('.json')}-{i}.bin"
            if blob not in batch.blobs:
                folder.write(blob, entry["data"])
                batch.blobs.add(blob)
            entry["data"] = blob
    folder.write_json(batch.name, {"place": batch.place, "entries": entries})
