"""Several pipelines on one page: quality against cost with the Pareto front, what differs, costs by stage, verdicts."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from distill_jobs import words
from distill_jobs.report.blocks import Chart, Part, Points, Row, Section, Table, Text, made, without_empty
from distill_jobs.report.estimates import Estimate, flat, told
from distill_jobs.report.html import lay_out
from distill_jobs.report.live import chart
from distill_jobs.report.plot import Axis, Plot, Series
from distill_jobs.report.svg import BASELINE, INK, MARKER, OTHER, ROLE, STUDENT, TEACHER

ROLES = ("teacher", "student", "baseline")
_GROUPS = {"teacher": TEACHER, "capture": INK, "student": STUDENT, "baseline": BASELINE, "other": OTHER}
_PLACES = ("workdir", "tracking", "cluster")


@dataclass(frozen=True)
class Pipeline:
    """What the comparison takes of a pipeline.

    Attributes:
        name: unique among those compared.
        metric, better: ``accuracy`` and ``higher``, or ``perplexity`` and ``lower``; empty before its evaluation.
        quality: an estimate for each of ``ROLES`` that was evaluated; gain: the student's over the baseline.
        latency_ms: of one row, by role.
        usd: by stage, with arms as ``student/0``.
        settings: the spec, flat.
        verdict, sentence: the answer and its sentence; empty where there is none. audit: what it found, in words.
    """

    name: str
    run_id: str
    metric: str = ""
    better: str = "higher"
    quality: Mapping[str, Estimate] = field(default_factory=dict)
    gain: Estimate | None = None
    latency_ms: Mapping[str, float] = field(default_factory=dict)
    usd: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    verdict: str = ""
    sentence: str = ""
    audit: str = ""
    ended: float | None = None

    @property
    def total_usd(self) -> float:
        return sum(self.usd.values())

    def made_for(self, role: str) -> float:
        """US dollars to make one model of that role: its own training and all that it needs before.

        A teacher: data and its training, or what it is declared to have cost. A baseline: data and its training, on
        average over the seeds. A student: the same, the teacher and the capture. The gang's start-up is shared evenly
        among the arms.
        """
        own: dict[str, list[float]] = defaultdict(list)
        for stage, usd in self.usd.items():
            own[stage.partition("/")[0] if stage.partition("/")[2].isdigit() else stage].append(usd)
        arms = sum(len(values) for stage, values in own.items() if stage in ("student", "baseline") or "gate-" in stage)
        need = {
            "teacher": ("prepare", "teacher", "teacher/declared"),
            "student": ("prepare", "teacher", "teacher/declared", "capture"),
            "baseline": ("prepare",),
        }
        usd = sum(sum(own[stage]) for stage in need[role])
        if role == "teacher":
            return usd
        each = own[role]
        return usd + (sum(each) / len(each) if each else 0.0) + sum(own["train/start-up"]) / max(1, arms)


@dataclass(frozen=True)
class Point:
    """A model of a pipeline, by what it takes and how good it is."""

    pipeline: Pipeline
    role: str
    cost: float
    quality: Estimate

    @property
    def name(self) -> str:
        return f"{self.pipeline.name}, {self.role}"


def page(pipelines: Sequence[Pipeline]) -> str:
    """The page as HTML."""
    evaluated = [pipeline for pipeline in pipelines if pipeline.quality]
    sections = [
        Section(f"{metric.capitalize()} against cost", metric, [Part("quality", partial(_fronts, some))])
        for metric, some in by_metric(evaluated).items()
    ]
    sections += [
        Section("Verdicts", "verdicts", [Part("verdicts", lambda: [verdicts(pipelines)])]),
        Section("Settings that differ", "settings", [Part("settings", lambda: _settings(pipelines))]),
        Section("Costs by stage", "costs", [Part("costs", lambda: [_bars(pipelines), _stages(pipelines)])]),
        Section("The runs", "runs", [Part("runs", lambda: [_runs(pipelines)])]),
    ]
    title = f"{len(pipelines)} pipelines compared"
    values: dict[str, Any] = {"name": "distill compare", "title": title, "data": None, "tiles": [], "ended": None}
    damaged: list[str] = []
    return lay_out(values, [Points(findings(pipelines), "finding")], made(sections, damaged), damaged)


def by_metric(pipelines: Sequence[Pipeline]) -> dict[str, list[Pipeline]]:
    """Pipelines that can be compared with each other."""
    found: dict[str, list[Pipeline]] = {}
    for pipeline in pipelines:
        found.setdefault(pipeline.metric, []).append(pipeline)
    return found


def points_of(pipelines: Sequence[Pipeline]) -> list[Point]:
    """Every model that was evaluated."""
    return [Point(p, role, p.made_for(role), p.quality[role]) for p in pipelines for role in ROLES if role in p.quality]


def front(points: Sequence[Point], better: str) -> list[Point]:
    """The Pareto front: those than which none is both as cheap and better, or as good and cheaper. Cheapest first."""
    sign = 1.0 if better == "higher" else -1.0
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, -sign * point.quality["value"])):
        if not found or sign * point.quality["value"] > sign * found[-1].quality["value"]:
            found.append(point)
    return found


def findings(pipelines: Sequence[Pipeline]) -> list[str]:
    """What the comparison comes to, in sentences; differences within the intervals are told as such."""
    said = []
    for metric, some in by_metric([p for p in pipelines if p.quality]).items():
        on = front(points_of(some), some[0].better)
        best = on[-1]
        named = "; ".join(f"{p.name} ({words.score(metric, p.quality['value'])}, {words.money(p.cost)})" for p in on)
        said.append(f"{metric.capitalize()}: the Pareto front, cheapest first: {named}.")
        rivals = [p for p in on[:-1] if _overlap(p.quality, best.quality)]
        if rivals:
            close = ", ".join(p.name for p in rivals)
            said.append(f"The interval of {best.name} overlaps that of {close}, which cost less.")
    without = [p.name for p in pipelines if not p.quality]
    if without:
        said.append(f"Not evaluated yet: {', '.join(without)}.")
    return said


def verdicts(pipelines: Sequence[Pipeline]) -> Table:
    """A row for each pipeline: what was decided, and the gain that it rests on."""
    rows = []
    for p in pipelines:
        gain = told(p.gain, partial(words.difference, p.metric))
        student = told(p.quality.get("student"), partial(words.score, p.metric))
        rows.append([p.name, student, gain, words.money(p.total_usd), p.verdict or "none", p.sentence or "–", p.audit])
    headings = ["", "student", "gain over the baseline", "money", "verdict", "because", "gaps between groups"]
    return without_empty(Table(headings, rows, kind="text"))


def settings_that_differ(pipelines: Sequence[Pipeline]) -> dict[str, list[str]]:
    """By dotted path the value of each pipeline (empty where it has none); places and resources left out."""
    keys = sorted(
        {key for p in pipelines for key in p.settings if key.partition(".")[0] not in _PLACES and key != "name"}
    )
    values = {key: [p.settings.get(key, "") for p in pipelines] for key in keys}
    return {key: each for key, each in values.items() if len(set(each)) > 1}


def _settings(pipelines: Sequence[Pipeline]) -> list[Table | Text]:
    rows = [[key, *(value or "–" for value in values)] for key, values in settings_that_differ(pipelines).items()]
    if not rows:
        return [Text("None: these are repetitions of one spec.")]
    return [Table(["setting", *(p.name for p in pipelines)], rows, kind="text")]


def _fronts(pipelines: Sequence[Pipeline]) -> list[Any]:
    metric, better = pipelines[0].metric, pipelines[0].better
    points = points_of(pipelines)
    serving = [
        Point(p.pipeline, p.role, p.pipeline.latency_ms[p.role], p.quality)
        for p in points
        if p.role in p.pipeline.latency_ms
    ]
    drawn = [_front(points, metric, better, "money", Axis("US dollars to make one", "money", log=_log(points)))]
    if serving:
        drawn.append(_front(serving, metric, better, "latency", Axis("milliseconds a row", log=_log(serving))))
    on = front(points, better)
    rows = [
        [
            p.name,
            words.money(p.cost),
            told(p.quality, partial(words.score, metric)),
            "yes" if p in on else "",
        ]
        for p in sorted(points, key=lambda p: p.cost)
    ]
    return [
        Row(drawn),
        Table(["model", "money to make one", metric, "on the front"], rows),
        Text(
            "Money to make one: a teacher's is data and its training; a baseline's data and training; a student's "
            "both, the teacher and the capture. What only compares (evaluation, audit, report) is left out. Lines are "
            "95 % intervals where the audit gave one.",
            "faint",
        ),
    ]


def _front(points: Sequence[Point], metric: str, better: str, name: str, axis: Axis) -> Chart:
    drawn = []
    for role in ROLES:
        own = [p for p in points if p.role == role]
        if own:
            drawn.append(_dots(role, own, metric, axis))
    on = front(points, better)
    drawn.append(
        Series("Pareto front", INK, [p.cost for p in on], [p.quality["value"] for p in on], "line", dash="dot")
    )
    said = "; ".join(text for each in drawn for text in each.told)
    kind: Any = "percent" if metric == "accuracy" else "number"
    title = {"money": "What it costs to make", "latency": "How fast it answers"}[name]
    plot = Plot(f"{metric}-{name}", title, axis, Axis(f"{metric} ({better} is better)", kind), drawn, said, 3.4)
    return chart(plot)


def _dots(role: str, points: Sequence[Point], metric: str, axis: Axis) -> Series:
    say = words.money if axis.kind == "money" else lambda value: f"{value:.3g} ms"
    return Series(
        role,
        ROLE[role],
        [p.cost for p in points],
        [p.quality["value"] for p in points],
        low=[p.quality.get("low") for p in points],
        high=[p.quality.get("high") for p in points],
        told=[f"{p.name}: {flat(p.quality, partial(words.score, metric))}, {say(p.cost)}" for p in points],
        marker=MARKER[role],  # type: ignore[arg-type]
        labels=[p.pipeline.name for p in points] if role == "student" else (),
    )


def _bars(pipelines: Sequence[Pipeline]) -> Row:
    sums = [_grouped(p) for p in pipelines]
    places = list(range(len(pipelines)))
    drawn = []
    for group, colour in _GROUPS.items():
        usd = [each.get(group, 0.0) for each in sums]
        text = [f"{p.name}, {group}: {words.money(value)}" for p, value in zip(pipelines, usd, strict=True)]
        if any(usd):
            drawn.append(Series(group, colour, usd, places, "bars", told=text))
    names = Axis(names=[p.name for p in pipelines])
    said = "; ".join(text for each in drawn for text in each.told)
    height = 1.2 + 0.42 * len(pipelines)
    plot = Plot("stages", "Where the money went", Axis("US dollars", "money"), names, drawn, said, height, True, True)
    return Row([chart(plot)], "wide")


def _grouped(pipeline: Pipeline) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for stage, usd in pipeline.usd.items():
        first = stage.partition("/")[0]
        sums[first if first in _GROUPS else "other"] += usd
    return sums


def _stages(pipelines: Sequence[Pipeline]) -> Table:
    names = list(dict.fromkeys(stage for p in pipelines for stage in p.usd))
    rows = [[stage, *(words.money(p.usd[stage]) if stage in p.usd else "–" for p in pipelines)] for stage in names]
    rows.append(["total", *(words.money(p.total_usd) for p in pipelines)])
    return Table(["stage", *(p.name for p in pipelines)], rows, last=True)


def _runs(pipelines: Sequence[Pipeline]) -> Table:
    rows = [[p.name, words.when(p.ended) if p.ended else "still open", p.run_id] for p in pipelines]
    return Table(["", "ended", "MLflow run"], rows, kind="text mono")


def _overlap(one: Estimate, other: Estimate) -> bool:
    ends = [each.get(end) for each in (one, other) for end in ("low", "high")]
    if any(end is None for end in ends):
        return False
    return bool(one["low"] <= other["high"] and other["low"] <= one["high"])


def _log(points: Sequence[Point]) -> bool:
    costs = [p.cost for p in points]
    return min(costs) > 0 and max(costs) > 20 * min(costs)
