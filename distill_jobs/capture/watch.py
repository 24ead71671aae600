"""Where an actor's time goes, by name: on a GPU as its own clock tells, without waiting for it."""

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Watch:
    """Seconds by name, summed over all blocks ``with watch(name): ...``.

    Args:
        device: ``cpu``, or the GPU whose work in the block counts, rather than the time to ask for it.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._gpu = device != "cpu"
        self._seconds: dict[str, float] = defaultdict(float)
        self._running: deque[tuple[str, Any, Any]] = deque()

    @contextmanager
    def __call__(self, name: str, *, host: bool = False) -> Iterator[None]:
        """Measure the block; with ``host`` the time that passes here, whatever the device does."""
        if self._gpu and not host:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            try:
                yield
            finally:
                end.record()
                self._running.append((name, begin, end))
            return
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    @property
    def seconds(self) -> dict[str, float]:
        """What is known by now; work that a GPU has not ended yet is missing."""
        while self._running and self._running[0][2].query():
            name, begin, end = self._running.popleft()
            self._seconds[name] += begin.elapsed_time(end) / 1000
        return dict(self._seconds)
