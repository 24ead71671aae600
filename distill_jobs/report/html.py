"""One self-contained page of HTML from what a workdir holds: no scripts, no requests, light and dark, fit to print."""

import re
from collections.abc import Callable
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from cluster.files import Folder
from distill_jobs.report import charts, fidelity, findings, sections, training
from distill_jobs.report.artifacts import Artifacts, collect


def render(workdir: Folder) -> str:
    """The page for ``workdir``; stages that are not done yet, and files that are damaged, are named on it."""
    found = collect(workdir)
    page = _Page(found, _statistics(workdir, found))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    here = resources.files(__package__)
    template = environment.from_string(here.joinpath("template.html.j2").read_text(encoding="utf-8"))
    style = Markup(here.joinpath("style.css").read_text(encoding="utf-8"))
    text = template.render(style=style, **page.values()).strip() + "\n"
    # Names come from users' data: signs that no page may hold, and halves of characters, would make it unreadable.
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)


class _Page:
    """The template's values. A part that can't be made of what is there is None, and the page says so."""

    def __init__(self, found: Artifacts, statistics: dict[str, Any]) -> None:
        self.found, self.statistics = found, statistics
        self.damaged = list(found.damaged)

    def values(self) -> dict[str, Any]:
        found = self.found
        values = {
            "name": str(found.spec.get("name", "distillation")),
            "title": self._part("spec.yaml", lambda: findings.title(found)) or "A distillation",
            "data": self._part("data/manifest.json", lambda: sections.data_sentence(found)) if found.data else None,
            "tiles": self._part("evaluation.json", lambda: findings.tiles(found)) or [],
            "curves": self._part("history.json", lambda: charts.curves(found.histories)) or [],
            "paces": self._part("history.json", lambda: training.paces(found.histories)),
            "bad_steps": self._part("history.json", lambda: training.bad_steps(found.histories)),
            "provenance": self._part("data/manifest.json", lambda: sections.provenance(found)) or [],
            "stages": self._part("stage.json", lambda: sections.stages(found)),
            "ended": self._part("stage.json", lambda: sections.ended(found)),
            "spec": found.spec_text,
            **self._evaluation(),
            **self._costs(),
            **self._store(),
            **self._fidelity(),
        }
        return {**values, "damaged": sorted(set(self.damaged))}

    def _evaluation(self) -> dict[str, Any]:
        names = ("finding", "quality", "quality_chart", "gain_chart", "slices", "slices_chart")
        evaluation = self.found.evaluation
        if evaluation is None:
            return dict.fromkeys(names)
        metric, summary = evaluation.get("metric", ""), evaluation.get("summary", {})
        has_slices = bool(evaluation.get("slices"))
        made = (
            lambda: findings.finding(evaluation),
            lambda: sections.quality(evaluation),
            lambda: charts.quality(metric, summary),
            lambda: charts.gain(metric, evaluation["better"], summary),
            lambda: sections.slices(evaluation) if has_slices else None,
            lambda: charts.slices(metric, evaluation["slices"]) if has_slices else None,
        )
        return {name: self._part("evaluation.json", make) for name, make in zip(names, made, strict=True)}

    def _costs(self) -> dict[str, Any]:
        entries, total = self.found.entries, self.found.total
        if total is None:
            return dict.fromkeys(("costs", "costs_chart", "price_note"))
        return {
            "costs": self._part("ledger.json", lambda: sections.costs(entries, total)),
            "costs_chart": self._part("ledger.json", lambda: charts.costs(entries)),
            "price_note": self._part("ledger.json", lambda: sections.price_note(self.found)),
        }

    def _store(self) -> dict[str, Any]:
        if self.found.store is None:
            return {"store": None, "samples": None}
        return {
            "store": self._part("store/manifest.json", lambda: sections.store(self.found, self.statistics)),
            "samples": sections.samples(self.statistics) if self.statistics.get("samples") else None,
        }

    def _fidelity(self) -> dict[str, Any]:
        page, source = self.found.fidelity, "store/fidelity.json"
        if page is None or self.found.store is None:
            return dict.fromkeys(("fidelity", "fidelity_slices", "fidelity_kept", "fidelity_curves"))
        return {
            "fidelity": self._part(source, lambda: fidelity.own(page)),
            "fidelity_slices": self._part(source, lambda: fidelity.slices(page)),
            "fidelity_kept": self._part(source, lambda: fidelity.kept(page)),
            "fidelity_curves": self._part(source, lambda: fidelity.curves(page)),
        }

    def _part(self, source: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, ZeroDivisionError):
            # A file of another shape than this version writes: the rest of the page is still worth having.
            self.damaged.append(source)
            return None


def _statistics(workdir: Folder, found: Artifacts) -> dict[str, Any]:
    """What a look into the store itself says; nothing where the store can't be read."""
    if found.store is None:
        return {}
    from distill_jobs.store.inspect import describe

    try:
        return describe(workdir / "store", samples=3, data=workdir / "data")
    except Exception:  # whatever is wrong with the store is for `distill store verify` to say
        return {}
