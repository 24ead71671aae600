"""What a page is made of: sections, in them parts that each stand on one file, in these blocks for the template."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from markupsafe import Markup


@dataclass(frozen=True)
class Table:
    """A heading for each column, and rows of text; the first column names the row. ``last`` sets off the last row.

    ``kind``: classes of the style sheet: ``text`` for cells that wrap, ``mono`` for digests in the third column,
    ``labels`` where the last column holds words.
    """

    kinds: ClassVar[str] = "table"
    headings: list[str]
    rows: list[list[str]]
    last: bool = False
    kind: str = ""


@dataclass(frozen=True)
class Facts:
    """Pairs of a name and its value."""

    kinds: ClassVar[str] = "facts"
    pairs: list[tuple[str, str]]
    kind: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph. ``kind``: ``faint`` for how something was measured, ``warning``, ``heading`` for a small heading,
    ``finding`` for what a section comes to."""

    kinds: ClassVar[str] = "text"
    text: str
    kind: str = ""


@dataclass(frozen=True)
class Points:
    """A list of sentences."""

    kinds: ClassVar[str] = "points"
    sentences: list[str]
    kind: str = ""


@dataclass(frozen=True)
class Folded:
    """A long table, or text as it is, that stays folded until it is asked for."""

    kinds: ClassVar[str] = "folded"
    title: str
    inside: "Table | str"


@dataclass(frozen=True)
class Chart:
    """A picture. ``live`` is the same one to be explored with a mouse, as JSON that is safe inside a page."""

    kinds: ClassVar[str] = "chart"
    svg: Markup
    title: str = ""
    caption: str = ""
    legend: tuple[str, ...] = ()
    live: Markup | None = None


@dataclass(frozen=True)
class Legend:
    """The colours of the roles, for several charts at once."""

    kinds: ClassVar[str] = "legend"
    roles: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """Blocks side by side where there is room. ``kind``: ``three`` for narrow ones, ``wide`` for one alone."""

    kinds: ClassVar[str] = "row"
    blocks: Sequence["Block | None"]
    kind: str = ""


@dataclass(frozen=True)
class Answer:
    """A verdict: the answer in a word or two, the sentence, the reasons with where each stands, and what speaks
    against it. ``tone`` is a class of the style sheet."""

    kinds: ClassVar[str] = "answer"
    word: str
    goal: str
    sentence: str
    reasons: Sequence[tuple[str, str]]
    against: tuple[str, str] | None
    then: str | None
    tone: str = ""


Block = Answer | Table | Facts | Text | Points | Folded | Chart | Legend | Row


@dataclass(frozen=True)
class Part:
    """Blocks that stand on the file ``source``; None among them are left out, as are tables without rows."""

    source: str
    make: Callable[[], Sequence[Block | None]]


@dataclass(frozen=True)
class Section:
    """A heading with its parts. ``missing``: what is not there yet and the verb that makes it; without it an empty
    section is left out."""

    title: str
    name: str
    parts: Sequence[Part]
    missing: tuple[str, str] | None = None


@dataclass(frozen=True)
class Made:
    """A section as the template takes it."""

    title: str
    name: str
    blocks: list[Block]
    missing: tuple[str, str] | None


def made(sections: Sequence[Section], damaged: list[str]) -> list[Made]:
    """Make every part; one that can't be made of what is there costs only itself, and is named in ``damaged``."""
    found = []
    for section in sections:
        blocks = [block for part in section.parts for block in attempt(part.source, part.make, damaged) or ()]
        there = [block for block in blocks if block is not None and not _empty(block)]
        if there or section.missing:
            found.append(Made(section.title, section.name, there, section.missing))
    return found


def attempt(source: str, make: Callable[[], Any], damaged: list[str]) -> Any:
    """What ``make`` gives; None where the file it reads is of another shape than this version writes."""
    try:
        return make()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, ZeroDivisionError):
        damaged.append(source)
        return None


def without_empty(table: Table) -> Table:
    """The table without the columns in which no row has anything."""
    keep = [i for i in range(len(table.headings)) if i == 0 or any(row[i] for row in table.rows)]
    rows = [[row[i] or "–" for i in keep] for row in table.rows]
    return Table([table.headings[i] for i in keep], rows, table.last, table.kind)


def _empty(block: Block) -> bool:
    if isinstance(block, Table):
        return not block.rows
    if isinstance(block, Row):
        return all(each is None for each in block.blocks)
    return False
