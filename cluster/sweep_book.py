"""The book of a sweep: one JSON file for each trial, written when it begins, at each look, and when it ends.

It is all that a sweep needs to go on after it was killed: Ray Tune's own snapshots are pickles, and are not read.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from cluster.errors import FileError
from cluster.files import Folder

State = Literal["begun", "finished", "pruned", "failed"]


@dataclass
class Trial:
    """One trial, from its beginning on.

    Attributes:
        name: also the name of its file, and of all that is made for it.
        parameters: what was tried, by name.
        state: ``begun`` as long as it has not ended, or was cut off.
        score: the last one; of a ``finished`` trial the one that counts.
        curve: the looks: ``share`` (of the trial's own training), ``score``, and whatever was told with them.
        told: what the trial said at its end.
        usage: what it held, start-ups included, over all attempts.
        started, ended: seconds since the epoch, of the last attempt.
        why: what made it fail.
    """

    name: str
    parameters: dict[str, Any]
    state: State = "begun"
    score: float | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)
    told: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    started: float = 0.0
    ended: float = 0.0
    why: str | None = None


@dataclass(frozen=True)
class Event:
    """What Ray Tune's thread tells the caller's: a trial has begun, was looked at (or has ended by itself), or died."""

    kind: Literal["begun", "look", "died"]
    name: str
    parameters: dict[str, Any]
    result: dict[str, Any] = field(default_factory=dict)


class Book:
    """The trials of one sweep in a folder. Files that can't be read are as good as not there."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def write(self, trial: Trial) -> None:
        self.folder.write_json(f"{trial.name}.json", asdict(trial))

    def trials(self) -> list[Trial]:
        """All trials, by name."""
        found = (self._read(name) for name in self.folder.names(".json"))
        return [trial for trial in found if trial is not None]

    def _read(self, name: str) -> Trial | None:
        try:
            values = self.folder.read_json(name)
            return Trial(**values) if isinstance(values, Mapping) else None
        except (FileError, TypeError):
            return None
