"""What worker code inside an actor hears and tells: that its actor has to go, and how far it has come.

Outside an actor nobody has to go and nobody listens, so that the same code runs in a test or a notebook. One actor is
one process, which is why this is the module's own state.
"""

import threading
import time
from collections.abc import Callable, Mapping

_TELL_SECONDS = 2.0

Send = Callable[[Mapping[str, float]], None]


class HandBack(Exception):
    """Raised by a worker that gives its shard back unfinished; another actor takes it, and no retry is counted."""


class _State:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.numbers: dict[str, float] = {}
        self.send: Send | None = None
        self.sent = float("-inf")
        self.leaving = False
        self.until: float | None = None


_state = _State()


def leaving() -> bool:
    """Whether this actor has been told to go (SIGTERM, or its node is being drained): finish or hand back soon."""
    return _state.leaving


def seconds_left() -> float | None:
    """Seconds until this actor's node is taken away, at least 0; None where nobody has said when."""
    return None if _state.until is None else max(0.0, _state.until - time.monotonic())


def tell(**numbers: float) -> None:
    """Tell the driver how far this worker has come: totals since it was made, which the driver sums over actors.

    Costs next to nothing, never waits and never raises: work must not stand on its display. Sent at most every two
    seconds; the last numbers also go with each result.
    """
    with _state.lock:
        _state.numbers.update(numbers)
        now = time.monotonic()
        if _state.send is None or now - _state.sent < _TELL_SECONDS:
            return
        _state.sent, send, told = now, _state.send, dict(_state.numbers)
    try:
        send(told)
    except Exception:  # the display's trouble alone
        return


def told() -> dict[str, float]:
    """The last numbers told."""
    with _state.lock:
        return dict(_state.numbers)


def listen(send: Send | None) -> None:
    """Have what is told sent by ``send`` from now on; for the actor around the worker."""
    _state.send = send


def leave(seconds: float | None = None) -> None:
    """Note that this actor has to go, within ``seconds`` where that is known; the earliest end counts.

    Takes no lock, since a signal handler calls it and may have interrupted ``tell``.
    """
    if seconds is not None:
        until = time.monotonic() + seconds
        _state.until = until if _state.until is None else min(until, _state.until)
    _state.leaving = True


def forget() -> None:
    """Begin anew, as in a fresh process."""
    global _state
    _state = _State()
