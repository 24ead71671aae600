"""The fidelity of a store on a terminal."""

from rich.console import Console
from rich.table import Table as RichTable

from distill_jobs.report import fidelity
from distill_jobs.report.blocks import Table
from distill_jobs.report.fidelity import Page


def print_page(page: Page) -> None:
    """What is kept at any temperature, the store's codec in full and by slice, and all codings side by side."""
    console = Console(highlight=False)
    console.print(fidelity.sentence(page), markup=False)
    for name, value in fidelity.kept(page):
        console.print(f"  {name}: {value}", markup=False)
    console.print(_rich("the store's codec against the teacher itself", fidelity.own(page)))
    by_slice = fidelity.slices(page)
    if by_slice.rows:
        console.print(_rich("by slice, T = 1", by_slice))
    console.print(_rich("all codings at the same positions: error of the gradient", fidelity.compared(page)))
    console.print(
        f"The last table has the {fidelity.judge(page)}. KL is over the head's classes and all others as one; – where "
        "a coding has no head, or gives no mass to classes that the teacher holds possible. The error of the sum is "
        "that of the gradient summed over positions: the noise of draws averages out there, and a bias does not.",
        markup=False,
    )


def _rich(title: str, table: Table) -> RichTable:
    made = RichTable(title=title, title_justify="left", box=None, padding=(0, 1), header_style="dim")
    for place, heading in enumerate(table.headings):
        made.add_column(heading, justify="right" if place else "left", no_wrap=not place)
    for row in table.rows:
        made.add_row(*row)
    return made
