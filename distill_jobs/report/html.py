"""One self-contained page of HTML from what a workdir holds: no requests, light and dark, fit to print."""

import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from cluster.files import Folder
from distill_jobs.report import contents, findings, live, sections
from distill_jobs.report.artifacts import Artifacts, collect
from distill_jobs.report.blocks import Block, Chart, Made, Row, attempt, made


def render(workdir: Folder) -> str:
    """The page for ``workdir``; stages that are not done yet, and files that are damaged, are named on it."""
    found = collect(workdir)
    damaged = list(found.damaged)
    statistics = _statistics(workdir, found)
    values = {
        "name": str(found.spec.get("name", "distillation")),
        "title": attempt("spec.yaml", lambda: findings.title(found), damaged) or "A distillation",
        "data": attempt("data/manifest.json", lambda: sections.data_sentence(found), damaged) if found.data else None,
        "tiles": attempt("evaluation.json", lambda: findings.tiles(found), damaged) or [],
        "ended": attempt("stage.json", lambda: sections.ended(found), damaged),
    }
    head = contents.head(found, damaged)
    return lay_out(values, head, made(contents.sections_of(found, statistics), damaged), damaged)


def lay_out(values: dict[str, Any], head: Sequence[Block], body: Sequence[Made], damaged: Sequence[str]) -> str:
    """A page of blocks.

    Args:
        values: ``name``, ``title``, ``data``, ``tiles`` and ``ended`` for its head; see ``page.html.j2``.
        damaged: files that are named as left out.
    """
    environment = Environment(
        loader=PackageLoader("distill_jobs.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["coded"] = _coded
    template = environment.get_template("page.html.j2")
    style = resources.files(__package__).joinpath("templates/style.css").read_text(encoding="utf-8")
    scripts = live.scripts() if _any_live([*head, *(block for section in body for block in section.blocks)]) else None
    text = template.render(
        **values,
        head=head,
        sections=body,
        damaged=sorted(set(damaged)),
        style=Markup(style),
        scripts=scripts,
        policy=scripts.policy if scripts else live.policy(),
    )
    # Names come from users' data: signs that no page may hold, and halves of characters, would make it unreadable.
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]", "\ufffd", text.strip() + "\n")


def _coded(text: str) -> Markup:
    """Text in which what stands between backticks is code."""
    pieces = [escape(piece) for piece in text.split("`")]
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(pieces))


def _any_live(blocks: Sequence[Any]) -> bool:
    rows = [each for block in blocks if isinstance(block, Row) for each in block.blocks]
    return any(isinstance(block, Chart) and block.live is not None for block in [*blocks, *rows])


def _statistics(workdir: Folder, found: Artifacts) -> dict[str, Any]:
    """What a look into the store itself says; nothing where the store can't be read."""
    if found.store is None:
        return {}
    from distill_jobs.store.inspect import describe

    try:
        return describe(workdir / "store", samples=3, data=workdir / "data")
    except Exception:  # whatever is wrong with the store is for `distill store verify` to say
        return {}
