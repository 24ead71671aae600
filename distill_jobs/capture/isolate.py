"""Which fault is whose: a batch that fails is halved until it fits, or until the row is found that can't be scored.

Faults of the data take one row out and leave the rest; faults of the machine end the attempt, and somebody else tries.
"""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch

from distill_jobs.capture.batches import Group, Trim
from distill_jobs.capture.sizes import Sizes
from distill_jobs.models.faults import Fault, fault_of
from distill_jobs.models.scorer import flat

Scored = TypeVar("Scored")


class NoRoomError(RuntimeError):
    """A single row doesn't fit into memory. Elsewhere, or later, it may: the shard is tried again."""


class DeviceLostError(RuntimeError):
    """The device is in a state that only a new process ends: the actor has to go, and the shard is tried again."""


class Isolation(Generic[Scored]):
    """Scores groups of rows; splits those that fail.

    Args:
        score: the teacher and the codec over one group.
        refuse: told the group of a single row that can't be scored, and why.
    """

    def __init__(
        self, score: Callable[[Group], Scored], sizes: Sizes, trim: Trim, refuse: Callable[[Group, str], None]
    ) -> None:
        self._score, self._sizes, self._trim, self._refuse = score, sizes, trim, refuse

    def __call__(self, group: Group) -> Iterator[Scored]:
        """What ``score`` makes of all rows that can be scored, in one piece where nothing is wrong.

        Raises:
            NoRoomError: a single row doesn't fit into memory.
            DeviceLostError: the device is lost to this process.
        """
        waiting = [group]
        while waiting:
            piece = waiting.pop()
            if len(piece.rows) > 1 and piece.size > self._sizes.tokens:
                waiting += reversed(piece.halves(self._trim))
                continue
            try:
                yield self._score(piece)
                continue
            except GeneratorExit:
                raise
            except Exception as error:
                fault, said = fault_of(error), f"{type(error).__name__}: {flat(error)}"
                if fault is Fault.OTHER:
                    raise
            # Only here, where the exception and all that its frames hold has gone.
            waiting += reversed(self._after(fault, said, piece))

    def _after(self, fault: Fault, said: str, piece: Group) -> list[Group]:
        if fault is Fault.DEVICE:
            raise DeviceLostError(f"the device is lost to this process: {said}")
        if fault is Fault.MEMORY:
            return self._smaller(said, piece)
        if len(piece.rows) == 1:
            self._refuse(piece, said)
            return []
        return piece.halves(self._trim)

    def _smaller(self, said: str, piece: Group) -> list[Group]:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(piece.rows) > 1:
            self._sizes.fewer_tokens(piece.size)
            return piece.halves(self._trim)
        if self._sizes.smaller_chunk():
            return [piece]
        raise NoRoomError(
            f"memory doesn't hold a single row of {piece.longest} tokens, with batches down to "
            f"{self._sizes.tokens} tokens and {self._sizes.chunk} positions through the output head at once "
            f"({said}); lower capture.batch_tokens or capture.chunk_positions, or give the actors more memory"
        )
