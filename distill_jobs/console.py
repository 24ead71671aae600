"""What a person sees while a job runs: one line a stage, and a bar with the expected end while it works."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console as Rich
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table

from cluster.meter import Usage
from distill_jobs.progress import Progress
from distill_jobs.stage import Status
from distill_jobs.words import duration, money

Advance = Callable[..., None]
_LINE_SECONDS = 30.0


class Console:
    """Prints to the terminal; to a file or a pipe, lines now and then in place of the bars.

    Attributes:
        on_stage: gets the progress of each stage that begins, and None when it has come to its end.
    """

    def __init__(self, rich: Rich | None = None) -> None:
        self.rich = rich or Rich(highlight=False, soft_wrap=True)
        self.on_stage: Callable[[Progress | None], None] = lambda _: None

    def say(self, text: str = "") -> None:
        self.rich.print(text, markup=False)

    def pass_on(self, text: str) -> None:
        """What another process has printed, as it is."""
        self.rich.file.write(text)
        self.rich.file.flush()

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
        with Bar(
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
        ) as bar:
            task, progress = bar.add_task(f"{stage}", total=None, note="starting"), Progress(stage, expected)
            lines = _Lines(progress, self)

            def advance(done: float, total: float, note: str = "") -> None:
                bar.update(task, completed=done, total=total, note=note)
                progress.advance(done, total, note)
                if not self.rich.is_terminal:
                    lines.tell()

            self.on_stage(progress)
            yield advance
            self.on_stage(None)

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

    def __init__(self, progress: Progress, console: Console) -> None:
        self._progress, self._console = progress, console
        self._last = time.monotonic()

    def tell(self) -> None:
        now, progress = time.monotonic(), self._progress
        if now - self._last < _LINE_SECONDS or not progress.total:
            return
        self._last = now
        left = f", about {duration(progress.left)} left" if progress.left and progress.rate else ""
        share, note = f"{progress.done / progress.total:.0%}", progress.note
        self._console.say(f"{_name(progress.stage)} {share}{left}{'; ' if note else ''}{note}")


def _name(stage: str) -> str:
    return f"{stage:<12}"
