"""The fidelity of a store on a terminal."""

from rich.console import Console
from rich.table import Table as RichTable

from distill_jobs.report import fidelity
from distill_jobs.report.fidelity import Page
from distill_jobs.report.sections import Table


def print_page(page: Page) -> None:
    """Three tables: what is kept at any temperature, the store's codec in full, and all codings side by side."""
    console = Console(highlight=False)
    console.print(fidelity.sentence(page), markup=False)
    for name, value in fidelity.kept(page):
        console.print(f"  {name}: {value}", markup=False)
    console.print(_rich("the store's codec against the teacher itself", fidelity.own(page)))
    console.print(_rich("other codings at the same positions: relative error of the gradient", fidelity.compared(page)))
    console.print(
        "KL is over the head's classes and all others as one; – where a coding gives classes that the teacher holds "
        "possible no mass, or has no head. 'Of the sum': error of the gradient summed over positions, where the noise "
        "of draws averages out and a bias does not.",
        markup=False,
    )


def _rich(title: str, table: Table) -> RichTable:
    made = RichTable(title=title, title_justify="left", box=None, padding=(0, 1), header_style="dim")
    for place, heading in enumerate(table.headings):
        made.add_column(heading, justify="right" if place else "left", no_wrap=not place)
    for row in table.rows:
        made.add_row(*row)
    return made
