"""What the page holds, in its order: each section with its parts, and the file that each part stands on."""

from collections.abc import Sequence
from typing import Any

from distill_jobs.report import (
    bias,
    ceiling,
    charts,
    fidelity,
    findings,
    gates,
    negative,
    sections,
    spending,
    training,
    tuned,
    verdict,
)
from distill_jobs.report.artifacts import Artifacts
from distill_jobs.report.blocks import Block, Chart, Facts, Folded, Legend, Part, Row, Section, Text, attempt

Blocks = Sequence[Block | None]


def head(found: Artifacts, damaged: list[str]) -> list[Block]:
    """What comes first: the verdict, and until there is one what the evaluation says."""
    judged, evaluation = found.verdict, found.evaluation
    told = attempt("verdict.json", lambda: verdict.answer(judged), damaged) if judged is not None else None
    if told is not None:
        return [told]
    said = attempt("evaluation.json", lambda: findings.finding(evaluation), damaged) if evaluation is not None else None
    if said is None:
        return [Text("Not evaluated yet, so there is nothing to say about what the teacher was worth.", "finding")]
    return [Text(said.sentence, f"finding {said.verdict}")]


def sections_of(found: Artifacts, statistics: dict[str, Any]) -> list[Section]:
    """The page's sections. ``statistics``: what a look into the store itself says."""
    return [
        Section(
            "Costs",
            "costs",
            [
                Part("ledger.json", lambda: _costs(found)),
                Part("plan.json", lambda: _foreseen(found)),
                Part("alternatives.json", lambda: _alternatives(found)),
            ],
            ("No stage has been entered in the ledger", "run"),
        ),
        Section(
            "Quality on held-out rows",
            "quality",
            [Part("evaluation.json", lambda: _quality(found)), Part("audit.json", lambda: _ceiling(found))],
            ("Teacher, student and baseline have not been evaluated", "evaluate"),
        ),
        Section(
            "Learning curves",
            "curves",
            [Part("history.json", lambda: _curves(found)), Part("history.json", lambda: _training(found))],
            ("Nothing has been trained", "train"),
        ),
        Section(
            "Tuning",
            "tuning",
            [Part("tune/trials.json", lambda: _tuning(found))],
        ),
        Section(
            "Slices and bias",
            "bias",
            [Part("evaluation.json", lambda: _slices(found)), Part("audit.json", lambda: _bias(found))],
        ),
        Section(
            "The teacher's mistakes",
            "negative",
            [
                Part("store/negative.json", lambda: _stored_mistakes(found)),
                Part("audit.json", lambda: _mistakes(found)),
                Part("audit.json", lambda: _gates(found)),
            ],
        ),
        Section(
            "The logit store",
            "store",
            [
                Part("store/manifest.json", lambda: _store(found, statistics)),
                Part("store/fidelity.json", lambda: _fidelity(found)),
            ],
            None if _is_live(found) else ("The teacher has not been captured", "capture"),
        ),
        Section(
            "Provenance",
            "provenance",
            [
                Part("data/manifest.json", lambda: [Facts(sections.provenance(found), "mono")]),
                Part("stage.json", lambda: [sections.stages(found)]),
                Part("spec.yaml", lambda: [_folded("The resolved job spec", found.spec_text)]),
            ],
        ),
    ]


def _folded(title: str, text: str) -> Folded | None:
    return Folded(title, text) if text else None


def _costs(found: Artifacts) -> Blocks:
    if found.total is None:
        return []
    chart = Chart(charts.costs(found.entries), "Money and wall time by stage")
    return [
        Row([chart, Text(sections.price_note(found), "faint")]),
        sections.costs(found.entries, found.total),
        spending.energy(found.total, found.grid),
        spending.by_device(found.total),
    ]


def _foreseen(found: Artifacts) -> Blocks:
    if found.foreseen is None or found.against is None:
        return []
    return spending.foreseen(found.against, found.foreseen)


def _alternatives(found: Artifacts) -> Blocks:
    return [] if found.alternatives is None else spending.alternatives(found.alternatives)


def _quality(found: Artifacts) -> Blocks:
    evaluation = found.evaluation
    if evaluation is None:
        return []
    metric, summary = evaluation["metric"], evaluation["summary"]
    worth = "The band is the mean's interval. Where it crosses the dashed line, the gain can't be told from nothing."
    return [
        Row(
            [
                Chart(charts.quality(metric, summary), "Teacher, student, baseline"),
                Chart(charts.gain(metric, evaluation["better"], summary), "What the teacher was worth", worth),
            ]
        ),
        sections.quality(evaluation, found.audit is None),
        Text(
            "The baseline is the same model with the same start, data and number of steps, trained on hard labels "
            "alone. Log loss and KL are in nats; latency is for one row, throughput for a full batch. Below a mean "
            "stands the range of its seeds.",
            "faint",
        ),
    ]


def _ceiling(found: Artifacts) -> Blocks:
    return [] if found.audit is None else ceiling.blocks(found.audit)


def _tuning(found: Artifacts) -> Blocks:
    return [] if found.trials is None else tuned.blocks(found.trials, found.surface, found.importance)


def _bias(found: Artifacts) -> Blocks:
    if found.audit is None or not found.audit["bias"]["columns"]:
        return []
    return [Text("Where gaps between groups come from", "heading"), *bias.blocks(found.audit["bias"])]


def _stored_mistakes(found: Artifacts) -> Blocks:
    train = found.negative or (found.audit or {}).get("negative", {}).get("train")
    return [] if train is None else negative.stored(train)


def _mistakes(found: Artifacts) -> Blocks:
    return [] if found.audit is None else negative.taken_over(found.audit["negative"])


def _gates(found: Artifacts) -> Blocks:
    return [] if found.audit is None else gates.blocks(found.audit)


def _slices(found: Artifacts) -> Blocks:
    evaluation = found.evaluation
    if evaluation is None or not evaluation.get("slices"):
        return []
    drawn = charts.slices(evaluation["metric"], evaluation["slices"])
    return [Row([Chart(drawn, "Every slice, side by side", legend=charts.ROLES), sections.slices(evaluation)])]


def _curves(found: Artifacts) -> Blocks:
    drawn = [Chart(svg, caption) for caption, svg in charts.curves(found.histories)]
    if not drawn:
        return []
    told = Text("Lines are the training batches, marks the validation split.", "faint")
    return [Legend(charts.ROLES), Row(drawn, "three"), told]


def _training(found: Artifacts) -> Blocks:
    bad = training.bad_steps(found.histories)
    if bad is None:
        return [training.paces(found.histories)]
    told = "Nothing was updated in them. A step's samples are those whose own loss was too large or not finite."
    return [training.paces(found.histories), Text("Steps that went wrong", "heading"), bad, Text(told, "faint")]


def _is_live(found: Artifacts) -> bool:
    """Whether the teacher answers live, so that there is never a store."""
    distill = found.spec.get("distill")
    return isinstance(distill, dict) and distill.get("soft_labels") == "live"


def _store(found: Artifacts, statistics: dict[str, Any]) -> Blocks:
    if found.store is None:
        return []
    samples = sections.samples(statistics) if statistics.get("samples") else None
    return [Facts(sections.store(found, statistics)), samples]


def _fidelity(found: Artifacts) -> Blocks:
    page = found.fidelity
    if page is None or found.store is None:
        return []
    added = ", its errors added up over them: the noise of draws averages out there, a bias stays"
    captions = ["Every coding at the same positions.", f"Every coding at the same positions{added}."]
    drawn = [Chart(svg, caption=caption) for svg, caption in zip(fidelity.curves(page), captions, strict=False)]
    return [
        Text("What it keeps of the teacher", "heading"),
        Facts(fidelity.kept(page)),
        Row(drawn) if drawn else None,
        fidelity.own(page),
        fidelity.slices(page),
        Text(
            "Measured on held-back rows against the teacher itself: KL over the head's classes and all others as one, "
            "the loss's gradient at the logits of a random student and of a trained one where there was one.",
            "faint",
        ),
    ]
