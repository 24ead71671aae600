"""What a person sees while a job runs: one line a stage, and a bar with the expected end while it works."""

import math
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

Advance = Callable[..., None]


def duration(seconds: float) -> str:
    """Seconds as a person says them: ``8 s``, ``2 min 05 s``, ``3 h 10 min``."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s" if whole else f"{seconds:.1f} s"
    if whole < 6000:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """Bytes as a person says them."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def count(number: float) -> str:
    """A count in at most three digits and a letter: ``1,506``, ``442 K``, ``8.34 M``."""
    for unit, letter in ((1e9, " G"), (1e6, " M"), (1e4, " K")):
        if number >= unit:
            scale = 1e3 if letter == " K" else unit
            return f"{number / scale:.3g}{letter}"
    return f"{number:,.0f}"


def money(usd: float) -> str:
    """US dollars to the cent, and below a dollar to two digits that count."""
    return f"${usd:,.2f}" if usd >= 1 or usd == 0 else f"${usd:.{1 - math.floor(math.log10(usd))}f}"


class Console:
    """Prints to the terminal; to a file or a pipe, the same lines without the bars."""

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
        told = f"expected {duration(expected)}" if expected is not None else "duration not known yet"
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

            def advance(done: float, total: float, note: str = "") -> None:
                progress.update(task, completed=done, total=total, note=note)

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


def _name(stage: str) -> str:
    return f"{stage:<12}"
