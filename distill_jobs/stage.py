"""The record that ends a stage: what it was made from, what it made, what it used.

``stage.json`` is written last. A stage whose record carries the digest of today's inputs is done; any other is redone,
and the difference between the recorded inputs and today's is the reason why.
"""

from dataclasses import asdict, dataclass
from typing import Any

from cluster.errors import FileError
from cluster.files import Folder, digest

RECORD = "stage.json"
FOLDERS = {
    "prepare": "data",
    "teacher": "teacher",
    "capture": "store",
    "evaluate": "evaluation",
    "audit": "audit",
    "report": "report",
}
"""Where each stage leaves its record in the workdir; an arm of the training leaves it in a folder of its own name."""


@dataclass(frozen=True)
class StageRecord:
    """What ``stage.json`` holds. ``inputs`` is flat: dotted names to plain values."""

    stage: str
    digest: str
    inputs: dict[str, Any]
    made: dict[str, Any]
    usage: dict[str, Any]
    started: float
    ended: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def commit(self, folder: Folder) -> None:
        """Write the record: from here on the stage counts as done."""
        folder.write_json(RECORD, self.as_dict())

    @classmethod
    def read(cls, folder: Folder) -> "StageRecord | None":
        """The record in ``folder``; None where there is none or it is damaged (then the stage is simply redone)."""
        if not folder.exists(RECORD):
            return None
        try:
            return cls(**folder.read_json(RECORD))
        except (FileError, TypeError):
            return None


@dataclass(frozen=True)
class Status:
    """Whether a stage is done, and if not, why it has to run."""

    stage: str
    done: bool
    reason: str


def status(stage: str, folder: Folder, inputs: dict[str, Any]) -> Status:
    """Compare the record in ``folder`` with today's ``inputs``."""
    record = StageRecord.read(folder)
    if record is None:
        return Status(stage, False, "not done yet")
    if record.digest == digest(inputs):
        return Status(stage, True, "nothing it depends on has changed")
    return Status(stage, False, "redone, because " + _difference(record.inputs, inputs))


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one level of dotted names; lists and scalars are leaves."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    told = [f"{name} changed from {before.get(name)} to {now.get(name)}" for name in names[:3]]
    return ", ".join(told) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
