"""How much the teacher takes at once: as the spec says, and less where memory once ran out.

What was found is remembered beside the store, by device and teacher, so that no actor after this one has to find it out
again: neither the next in the pool nor those of the same command run again.
"""

import os
from contextlib import suppress
from typing import Any

import torch

from cluster.errors import FileError, TransientFileError
from cluster.files import Folder, digest
from cluster.standing import STANDING

SIZES = "sizes"

_LEAST_CHUNK = 16


class Sizes:
    """Bounds of a batch and of what goes through the output head at once.

    Attributes:
        tokens: rows x longest row of a batch.
        chunk: scored positions whose logits exist at the same time.
    """

    def __init__(self, store: Folder, of: dict[str, Any], tokens: int, chunk: int) -> None:
        """Begin with what the spec asks for, or with less where that was found to be needed.

        Args:
            of: what the sizes depend on, in plain values: the device's name, the teacher, what the spec asks for.
        """
        self.tokens, self.chunk = tokens, chunk
        self._folder, self._name, self._of = store / SIZES, f"{digest(of)}.json", of
        self._recall()

    def fewer_tokens(self, failed: int) -> None:
        """A batch of ``failed`` tokens didn't fit: none of more than half from now on."""
        self.tokens = max(1, min(self.tokens, failed // 2))
        self._remember()

    def smaller_chunk(self) -> bool:
        """Even a single row didn't fit: fewer positions through the head at once. False when that is used up."""
        if self.chunk <= _LEAST_CHUNK:
            return False
        self.chunk = max(_LEAST_CHUNK, self.chunk // 2)
        self._remember()
        return True

    def _recall(self) -> None:
        try:
            page = self._folder.read_json(self._name) if self._folder.exists(self._name) else {}
            found = [page[name] for name in ("tokens", "chunk")] if page else []
        except (FileError, TransientFileError, TypeError, KeyError):
            return
        if found and all(map(_count, found)):
            self.tokens, self.chunk = min(self.tokens, found[0]), min(self.chunk, found[1])

    def _remember(self) -> None:
        STANDING.survived("batches_halved")
        # A shortcut for others, for which no capture should fail.
        with suppress(FileError, TransientFileError):
            self._folder.write_json(self._name, {**self._of, "tokens": self.tokens, "chunk": self.chunk})


def device_name(device: str, devices: float) -> str:
    """The device, and how much memory there is of it: what fits on one fits on all of the same name."""
    if device == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return f"CPU with {memory / 2**30:.0f} GiB"
    return f"{devices:g} x {torch.cuda.get_device_name(device)}"


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
