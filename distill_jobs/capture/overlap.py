"""Work that goes on beside other work: an iterator made ahead in a thread, and a consumer that runs behind in one.

Between two threads stands a bounded channel that either side can end: an error on one side is raised on the other, and
when a block is left, whether whole or by an error, its thread has ended.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


class Abandoned(Exception):
    """The other side has gone; nobody wants what this side makes."""


class Channel(Generic[Item]):
    """At most ``depth`` items on their way from one thread to another."""

    def __init__(self, depth: int) -> None:
        self._depth, self._items = depth, deque[Item]()
        self._changed = threading.Condition()
        self._ended = False
        self._error: BaseException | None = None
        self._abandoned = False

    def put(self, item: Item) -> None:
        """Hand over an item, waiting for room; raises Abandoned once the reader has gone."""
        with self._changed:
            self._changed.wait_for(lambda: self._abandoned or len(self._items) < self._depth)
            if self._abandoned:
                raise Abandoned
            self._items.append(item)
            self._changed.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        """Nothing comes any more; ``error`` is raised to the reader in place of the end."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def abandon(self) -> None:
        """The reader goes: what is on its way is dropped, and the writer is told."""
        with self._changed:
            self._abandoned = True
            self._items.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Item]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._ended or self._abandoned)
                if not self._items:
                    if self._error is not None:
                        raise self._error
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            yield item


class Ahead(Generic[Item]):
    """The items of ``source``, made in a thread up to ``depth`` before they are asked for.

    ``with Ahead(source, 2) as items: for item in items: ...``; an error of the source is raised at its place.
    """

    def __init__(self, source: Iterable[Item], depth: int) -> None:
        self._source, self._channel = source, Channel[Item](depth)
        self._thread = threading.Thread(target=self._make, name="ahead", daemon=True)

    def __enter__(self) -> Channel[Item]:
        self._thread.start()
        return self._channel

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.abandon()
        self._thread.join()

    def _make(self) -> None:
        iterator = iter(self._source)
        try:
            for item in iterator:
                self._channel.put(item)
        except Abandoned:
            pass
        except BaseException as error:
            self._channel.end(error)
        else:
            self._channel.end()
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()


class Behind(Generic[Item, Made]):
    """``consume`` runs in a thread on the items that ``put`` hands over.

    ``with Behind(consume, 1) as behind: behind.put(item); ...; behind.result()``. An error of the consumer is raised by
    the next ``put`` or by ``result``. When the block ends without ``result`` having been asked, the consumer's
    iterator raises Abandoned: it must undo what it has begun.
    """

    def __init__(self, consume: Callable[[Iterator[Item]], Made], depth: int) -> None:
        self._consume, self._channel = consume, Channel[Item](depth)
        self._thread = threading.Thread(target=self._run, name="behind", daemon=True)
        self._made: Made | None = None
        self._error: BaseException | None = None

    def put(self, item: Item) -> None:
        """Hand over an item, waiting for room."""
        try:
            self._channel.put(item)
        except Abandoned:
            self._thread.join()
            raise self._error or RuntimeError("the consumer ended before its items did") from None

    def result(self) -> Made:
        """End the items, wait for the consumer, and return what it made."""
        self._channel.end()
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._made  # type: ignore[return-value]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread.is_alive():
            self._channel.end(Abandoned())
            self._thread.join()

    def _run(self) -> None:
        try:
            self._made = self._consume(iter(self._channel))
        except BaseException as error:
            self._error = error
        finally:
            self._channel.abandon()
