"""What a person sees while a job runs: one line a stage, and a bar with the expected end while it works."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console as Rich
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from cluster.meter import Usage
from distill_jobs.stage import Status
from distill_jobs.words import duration, money

Advance = Callable[..., None]
_LINE_SECONDS = 30.0


class Console:
    """Prints to the terminal; to a file or a pipe, lines now and then in place of the bars."""

    def __init__(self, rich: Rich | None = None) -> None:
        self.rich = rich or Rich(highlight=False, soft_wrap=True)

    def say(self, text: str = "") -> None:
        self.rich.print(text, markup=False)

    def skipped(self, status: Status) -> None:
        self.rich.print(f"[dim]{_name(status.stage)} skipped: {status.reason}[/dim]")

    def finished(self, stage: str, usage: Usage, usd: float, note: str) -> None:
        took = f"done in {duration(usage.wall_seconds)}, {money(usd)}"
        self.rich.print(f"[green]{_name(stage)}[/green] {took}{': ' if note else ''}{note}")

    @contextmanager
    def bar(self, stage: str, expected: float | None, reason: str) -> Iterator[Advance]:
        """A progress bar; the block gets ``advance(done, total, note)``."""
        told = f"expected {duration(expected)}" if expected is not None else "takes a moment"
        self.rich.print(f"[bold]{_name(stage)}[/bold] {told} ({reason})")
        with Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[note]}"),
            console=self.rich,
            transient=True,
            disable=not self.rich.is_terminal,
        ) as progress:
            task = progress.add_task(f"{stage}", total=None, note="starting")
            lines = _Lines(stage, self)

            def advance(done: float, total: float, note: str = "") -> None:
                progress.update(task, completed=done, total=total, note=note)
                if not self.rich.is_terminal:
                    lines.tell(done, total, note)

            yield advance

    def table(self, title: str, columns: list[str], rows: list[list[Any]]) -> None:
        """A table; columns of numbers are right-aligned."""
        table = Table(title=title, title_justify="left", title_style="bold")
        for i, column in enumerate(columns):
            numbers = all(str(row[i])[:1].strip("$") in "0123456789" for row in rows)
            table.add_column(column, justify="right" if numbers else "left")
        for row in rows:
            table.add_row(*(str(cell) for cell in row))
        self.rich.print(table)


class _Lines:
    """How far a stage is, as a line every half a minute: for logs, which show no bar."""

    def __init__(self, stage: str, console: Console) -> None:
        self._stage, self._console = stage, console
        self._began = self._last = time.monotonic()
        self._first: float | None = None

    def tell(self, done: float, total: float, note: str) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = done  # what an earlier run had done says nothing about this one's pace
        if now - self._last < _LINE_SECONDS or not total:
            return
        self._last = now
        pace = (done - self._first) / (now - self._began)
        left = f", about {duration((total - done) / pace)} left" if pace > 0 else ""
        self._console.say(f"{_name(self._stage)} {done / total:.0%}{left}{'; ' if note else ''}{note}")


def _name(stage: str) -> str:
    return f"{stage:<12}"
