"""One part from the data to the store, as three things at once: reading ahead, the teacher, and writing behind.

A thread reads windows of rows and makes batches of them; the actor's own thread runs the teacher and the codec; a
third lays finished windows out, hashes and writes them. Between them at most a window or two: never the part.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from cluster.notice import HandBack, leaving, seconds_left
from distill_jobs.capture.batches import Group, Trim, Window, groups, windows
from distill_jobs.capture.isolate import Isolation
from distill_jobs.capture.overlap import Ahead, Behind
from distill_jobs.capture.scoring import Encoded, Scoring
from distill_jobs.capture.sizes import Sizes
from distill_jobs.capture.transfer import Landing, Transfer
from distill_jobs.capture.watch import Watch
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.table import PartRecord
from distill_jobs.errors import CaptureError
from distill_jobs.store.codecs import Field
from distill_jobs.store.quarantine import Quarantined

_GRACE = 5.0
"""Seconds that an actor that was told to go, but not by when, may still take to finish."""

_TOLD = 3

Commit = Callable[[Iterator[Window], Callable[[], list[Quarantined]]], PartRecord]


@dataclass
class Tools:
    """What an actor holds for all of its parts.

    Attributes:
        unscorable: reasons by row number of a window's columns, for rows that must not reach the device.
        limit: rows of one part that may be put into quarantine before it is given up; None for any number.
    """

    facts: DataFacts
    fields: dict[str, Field]
    scoring: Scoring
    transfer: Transfer
    sizes: Sizes
    trim: Trim
    watch: Watch
    unscorable: Callable[[Window], dict[int, str]]
    limit: int | None = None


@dataclass
class Tally:
    """What an actor has done since it was made, for the progress line: totals."""

    tokens: int = 0
    padding: int = 0
    busy: float = 0.0


@dataclass
class PartCapture:
    """The capture of one part.

    Args:
        part, rows: its number, and how many rows of data it has.
        tell: called after every batch.
    """

    tools: Tools
    part: int
    rows: int
    tally: Tally
    tell: Callable[[], None]
    quarantine: list[Quarantined] = field(default_factory=list)

    def run(self, batches: Iterator[pa.RecordBatch], commit: Commit) -> PartRecord:
        """Score, encode, write and commit.

        Args:
            batches: the part's rows.
            commit: writes the windows it is given, with whatever is in quarantine in the end; runs in a thread.

        Raises:
            HandBack: the actor has to go before the part can be finished.
            CaptureError: too many rows can't be scored.
        """
        self._started, self._rows_done = time.monotonic(), 0
        self._landing: deque[Landing | Window] = deque()
        isolation = Isolation[Encoded](self.tools.scoring, self.tools.sizes, self.tools.trim, self._refuse)
        watch = self.tools.watch
        with (
            Ahead(self._prepared(batches), 2) as prepared,
            Behind[Window, PartRecord](lambda done: commit(done, lambda: self.quarantine), 1) as writer,
        ):
            waiting = iter(prepared)
            while True:
                with watch("read", host=True):
                    item = next(waiting, None)
                if item is None:
                    break
                if isinstance(item, Window):
                    self._landing.append(item)
                else:
                    self._stay_or_hand_back()
                    self._score(item, isolation)
                self._drain(writer, self.tools.transfer.depth)
            self._drain(writer, 0)
            with watch("write", host=True):
                return writer.result()

    def _prepared(self, batches: Iterator[pa.RecordBatch]) -> Iterator[Group | Window]:
        """The batches of each window, and the window itself after its last one."""
        for window in windows(batches, self.tools.facts, self.tools.fields):
            window.bad.update(self.tools.unscorable(window))
            yield from groups(window, lambda: self.tools.sizes.tokens, self.tools.trim)
            yield window

    def _score(self, group: Group, isolation: Isolation[Encoded]) -> None:
        for encoded in isolation(group):
            self._landing.append(self.tools.transfer.start(encoded))
            done = encoded.group
            self.tally.tokens += done.tokens
            self.tally.padding += done.size - done.tokens
        self._rows_done += len(group.rows)
        self.tell()

    def _drain(self, writer: Behind[Window, PartRecord], depth: int) -> None:
        while len(self._landing) > depth:
            first = self._landing.popleft()
            if isinstance(first, Landing):
                with self.tools.watch("copy", host=True):
                    first.land()
                continue
            self.quarantine += first.left_out()
            self._check_limit(self.quarantine)
            with self.tools.watch("write", host=True):
                writer.put(first)

    def _refuse(self, group: Group, reason: str) -> None:
        group.window.bad[int(group.rows[0])] = reason
        if self.tools.limit is not None:
            self._check_limit([*self.quarantine, *group.window.left_out()])

    def _check_limit(self, rows: list[Quarantined]) -> None:
        limit, count = self.tools.limit, len(rows)
        if limit is None or count <= limit:
            return
        few = "; ".join(f"sample {r.sample_id}{f' ({r.source})' if r.source else ''}: {r.reason}" for r in rows[:_TOLD])
        raise CaptureError(
            f"the teacher can't score {count} or more rows of part {self.part}, and capture.max_quarantined allows "
            f"{limit}: {few}{'; ...' if count > _TOLD else ''}. Mend the data or the teacher, or allow more"
        )

    def _stay_or_hand_back(self) -> None:
        """An actor that has to go finishes its part where there is time for that, and else gives it back."""
        if not leaving():
            return
        left = seconds_left()
        passed = time.monotonic() - self._started
        rest = passed / self._rows_done * (self.rows - self._rows_done) if self._rows_done else float("inf")
        if rest > (_GRACE if left is None else left - 1.0):
            raise HandBack(f"part {self.part} was {self._rows_done} of {self.rows} rows on its way")
