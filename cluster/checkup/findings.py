"""What a look at a machine or cluster found: each finding one line with its remedy, each check for itself."""

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from cluster.errors import ClusterError, one_line

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        check: what was looked at, in a word or two.
        level: a ``problem`` keeps work from running or from coming to its end, a ``warning`` may.
        text: what was found.
        remedy: what to do; empty where there is nothing to do.
    """

    check: str
    level: Level
    text: str
    remedy: str = ""


Check = Callable[[], Iterable[Finding]]


def ok(check: str, text: str) -> Finding:
    """All is well."""
    return Finding(check, "ok", text)


def warning(check: str, text: str, remedy: str) -> Finding:
    """It may go wrong."""
    return Finding(check, "warning", text, remedy)


def problem(check: str, text: str, remedy: str) -> Finding:
    """It will go wrong."""
    return Finding(check, "problem", text, remedy)


def examine(checks: Mapping[str, Check], seconds: float = 120.0) -> list[Finding]:
    """What all checks find, in their order. They run side by side, and none can harm another.

    One that fails, or is not done after so many seconds, is a finding itself.
    """
    found: dict[str, list[Finding]] = {}

    def run(name: str, check: Check) -> None:
        try:
            found[name] = list(check())
        except ClusterError as error:
            found[name] = [problem(name, str(error), "")]
        except Exception as error:
            found[name] = [warning(name, f"could not be looked at: {one_line(error)}", "look at it by hand")]

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in checks.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        # All share the time: what hangs does so beside the others.
        thread.join(seconds)
    late = f"no answer within {seconds:.0f} s"
    return [
        each
        for name in checks
        for each in found.get(name, [warning(name, late, "look at it by hand: something there hangs")])
    ]
