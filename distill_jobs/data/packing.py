"""Documents packed into sequences of fixed length.

``documents``: a document longer than a sequence is cut in pieces; the pieces are then packed best-fit decreasing, each
whole within one sequence and numbered there from 1, so that a model can keep them apart. ``naive``: the documents are
laid end to end and cut at the sequence length, wherever that falls; all is one segment.

Only documents of the same *key* (their slice values) share a sequence, so that a sequence belongs to one slice.
"""

from bisect import bisect_left, insort
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Sequence:
    """One packed sequence: pieces of token ids, and the source of each."""

    key: Hashable
    pieces: list[list[int]] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.pieces))

    @property
    def source(self) -> str:
        """For people: the first document, and how many more there are."""
        distinct = list(dict.fromkeys(self.sources))
        return distinct[0] if len(distinct) == 1 else f"{distinct[0]} (+{len(distinct) - 1})"


@dataclass(frozen=True)
class Document:
    """Token ids of one document, end-of-sequence token included."""

    ids: list[int]
    key: Hashable
    source: str


def pack(documents: list[Document], length: int, naive: bool = False) -> tuple[list[Sequence], int]:
    """Pack documents into sequences of at most ``length`` tokens.

    Returns:
        The sequences, the same for the same documents in the same order; and the number of pieces of a single token
        that were left out, as nothing in them can be foretold.
    """
    groups: dict[Hashable, list[Document]] = {}
    for document in documents:
        groups.setdefault(document.key, []).append(document)
    packed: list[Sequence] = []
    dropped = 0
    for key, group in groups.items():
        sequences, lost = (_naive if naive else _whole)(key, group, length)
        packed += sequences
        dropped += lost
    return packed, dropped


def as_arrays(sequences: list[Sequence], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Input ids and segments, both [n, length] int32; segments count from 1, 0 is padding."""
    ids = np.full((len(sequences), length), pad_id, dtype=np.int32)
    segments = np.zeros((len(sequences), length), dtype=np.int32)
    for row, sequence in enumerate(sequences):
        at = 0
        for number, piece in enumerate(sequence.pieces, 1):
            ids[row, at : at + len(piece)] = piece
            segments[row, at : at + len(piece)] = number
            at += len(piece)
    return ids, segments


def _whole(key: Hashable, documents: list[Document], length: int) -> tuple[list[Sequence], int]:
    pieces = [
        (document.ids[at : at + length], document.source)
        for document in documents
        for at in range(0, len(document.ids), length)
    ]
    whole = [piece for piece in pieces if len(piece[0]) > 1]
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, bin), sorted: the first that fits is the fullest that fits
    for number in sorted(range(len(whole)), key=lambda n: -len(whole[n][0])):
        size = len(whole[number][0])
        at = bisect_left(free, (size, -1))
        if at == len(free):
            bins.append([number])
            room, target = length - size, len(bins) - 1
        else:
            room, target = free.pop(at)
            bins[target].append(number)
            room -= size
        if room > 1:
            insort(free, (room, target))
    # Back to the order of the source, so that neighbours stay neighbours.
    ordered = sorted((sorted(members) for members in bins), key=lambda members: members[0])
    packed = [Sequence(key, [whole[n][0] for n in members], [whole[n][1] for n in members]) for members in ordered]
    return packed, len(pieces) - len(whole)


def _naive(key: Hashable, documents: list[Document], length: int) -> tuple[list[Sequence], int]:
    packed: list[Sequence] = []
    run: list[int] = []
    sources: list[str] = []
    for document in documents:
        run += document.ids
        sources.append(document.source)
        whole = len(run) // length * length
        for at in range(0, whole, length):
            packed.append(Sequence(key, [run[at : at + length]], sources))
            sources = [document.source]
        run = run[whole:]
        sources = sources if run else []
    if len(run) > 1:
        packed.append(Sequence(key, [run], sources))
    return packed, int(len(run) == 1)
