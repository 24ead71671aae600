"""How far the work on a stage has come, how fast it goes, and when it is expected to end."""

import time
from collections import deque
from collections.abc import Callable

_LOOK_SECONDS, _LOOKS = 5.0, 60


class Progress:
    """One attempt at a stage, told of by ``advance`` and asked from any thread.

    Args:
        stage: its name.
        expected: seconds that it was predicted to take, where that is known.
        clock: seconds since the epoch.

    Attributes:
        began: when it began.
        done, total: in the stage's own unit; ``total`` is 0 until it is known.
        found: what was done already when it began; None until that is known.
        note: a few words beside the numbers.
    """

    def __init__(self, stage: str, expected: float | None = None, clock: Callable[[], float] = time.time) -> None:
        self.stage, self.expected, self._clock = stage, expected, clock
        self.began = clock()
        self.done = self.total = 0.0
        self.found: float | None = None
        self.note = "starting"
        # What an earlier run had done says nothing of this one's pace: the first look is where it begins.
        self._looks: deque[tuple[float, float]] = deque(maxlen=_LOOKS)

    def advance(self, done: float, total: float, note: str = "") -> None:
        """So much is done by now."""
        now = self._clock()
        if self._looks and done < self._looks[-1][1]:
            self._looks.clear()  # begun again, from what was last saved
        if not self._looks or now - self._looks[-1][0] >= _LOOK_SECONDS:
            self._looks.append((now, done))
        self.found = done if self.found is None else self.found
        self.done, self.total, self.note = done, total, note

    @property
    def rate(self) -> float | None:
        """Units a second, over the last minutes; None where nothing has moved yet."""
        try:
            since, before = self._looks[0]
        except IndexError:
            return None
        seconds = self._clock() - since
        return (self.done - before) / seconds if seconds > 0 and self.done > before else None

    @property
    def left(self) -> float | None:
        """Seconds until the end: by the pace, and before there is one by what was predicted, unless it is overdue."""
        rate = self.rate
        if rate is not None and self.total:
            return max(0.0, self.total - self.done) / rate
        left = -1.0 if self.expected is None else self.expected - (self._clock() - self.began)
        return left if left > 0 else None
