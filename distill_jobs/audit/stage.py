"""The audit stage: ``audit.json``, by statistics alone, from the evaluation's rows, the store and the data.

Every *estimate* is ``{"value", "low", "high", "level"}``; where a bound can't be had it is null and ``why`` says so.
Arms are ``teacher``, ``student``, ``baseline`` and ``gate-<name>``, each the mean over its seeds. The file:

- ``schema_version``, ``task``, ``metric`` (``accuracy`` or ``perplexity``), ``level``;
- ``ceiling``: ``rows``, ``positions``, ``unit`` (what is resampled: ``row``, ``document``), ``units``, ``draws``,
  ``seeds``, ``enough_seeds`` (at least 3), ``in`` (what gains are counted in: accuracy, or nats a token; positive is
  better), ``gain`` (student over baseline), ``student_over_teacher``, ``teacher_over_baseline``: estimates with ``p``
  and ``distinguishable``; ``gap_closed`` (an estimate; null with ``why`` where there is no gap); ``learning_rate``
  (``tuned``, ``sentence``); ``arms``: by arm ``seeds`` (names), and the estimates ``quality`` (in ``metric``),
  ``nll``, ``kl_to_teacher``, ``accuracy``, ``agreement``, ``fidelity_right`` and ``fidelity_wrong`` (agreement where
  the teacher is right, and wrong); ``slices``: by column and value ``rows``, ``units`` and ``arms`` with ``quality``
  (and ``nll``); ``sentences``: what it comes to, as plain text;
- ``calibration``: by arm ``ece`` (an estimate, with ``debiased``), ``seeds`` (the ECE of each), ``bins``
  (``lower``, ``upper``, ``count``, ``confidence``, ``accuracy``);
- ``bias``: ``positive`` (class, or null), ``metrics``, ``min_slice_rows``, ``correction`` (``method``, ``tests``,
  ``false_alarms``), ``labels`` (how many gaps bear each), ``limit`` (null, or ``max_gap`` by difference and ``over``:
  a list of ``column``, ``metric``, ``gap``, ``limit``), and ``columns``: by slice column or intersection (``sex ×
  race``) ``groups`` (by value ``rows``, ``units``, ``small``, ``arms``: by arm an estimate for each metric), ``gaps``
  (a list: ``group`` against the rest, ``metric``, ``judged``, ``flag`` (why not, or null), ``p`` (corrected, by
  test), ``label``, and the estimates ``teacher``, ``baseline``, ``student``, ``change`` (student less baseline) and
  each gate arm) and ``differences`` (by name an estimate for each arm, with ``debiased``; ``groups`` that were
  judged; ``label`` and ``widest``, of the widest of the student's gaps that the difference is made of);
- ``negative``: ``thresholds``; ``train`` (what ``store/negative.json`` holds, see ``stored_mistakes``; or null values
  with ``why``); ``heldout`` and, by column and value, ``slices``: ``positions``, ``mistakes``, ``rate``, ``small``,
  ``arms``: by arm ``repeats``, ``agreement_elsewhere``, ``ratio_to_agreement`` and, but for the baseline, ``excess``,
  ``ratio_to_baseline``, ``negative_transfer_ratio`` (see ``negative``);
- ``gates``: a list of rows for the student, the baseline and each gate: ``arm``, ``seeds``, ``quality``, ``gain``
  (over the baseline), ``gap_closed``, ``negative_transfer`` (the excess), ``negative_transfer_ratio``, ``ece``,
  ``bias`` (by column, by difference); and for gates ``transfer_kept`` (its excess over the student's) and
  ``over_student`` (its gain over the student, with ``distinguishable``).
"""

from typing import Any

from cluster.files import Folder
from cluster.meter import Meter, Usage
from distill_jobs.audit.bias import Bias
from distill_jobs.audit.calibration import calibration
from distill_jobs.audit.ceiling import Ceiling
from distill_jobs.audit.evaluate import EVALUATED
from distill_jobs.audit.findings import AUDIT, learning_rate, made_of
from distill_jobs.audit.intervals import LEVEL, nothing, ratio
from distill_jobs.audit.measures import Measures
from distill_jobs.audit.negative import Negative
from distill_jobs.audit.resample import Resampler
from distill_jobs.audit.scores import Scores
from distill_jobs.audit.stored_mistakes import stored_mistakes, thresholds_of
from distill_jobs.data.facts import DataFacts
from distill_jobs.errors import DataError
from distill_jobs.spec import Job

SCHEMA_VERSION = 1
_NO_EXCESS = "the student is not shown to take over these mistakes: there is nothing to cut"


def audit(job: Job, workdir: Folder) -> tuple[dict[str, Any], Usage]:
    """Reckon, and write ``audit.json``.

    Returns:
        its numbers under MLflow's names, and what the audit has used.

    Raises:
        DataError: ``audit.positive`` is no class, or missing where ``audit.max_gap`` needs it.
        NotReadyError: the evaluation was made by an earlier release.
    """
    with Meter() as meter:
        train = count_mistakes(job, workdir)[0] if job.distill.soft_labels == "store" else None
        facts, scores = DataFacts.load(workdir / "data"), Scores.read(workdir / EVALUATED)
        found = reckon(job, facts, scores, learning_rate(job, workdir), train)
        workdir.write_json(AUDIT, found)
    return made_of(found), meter.usage


def count_mistakes(job: Job, workdir: Folder) -> tuple[dict[str, Any], Usage]:
    """``store/negative.json``, counted unless it is there already; and what counting has used."""
    with Meter() as meter:
        found = stored_mistakes(workdir / "store", workdir / "data", job.audit)
    return found, meter.usage


def reckon(
    job: Job, facts: DataFacts, scores: Scores, rate: dict[str, Any], train: dict[str, Any] | None
) -> dict[str, Any]:
    """What ``audit.json`` holds."""
    spec = job.audit
    positive = judged_class(job, facts)
    measures = Measures(
        scores,
        Resampler(len(scores.positions), scores.units, spec.draws),
        facts.slices,
        spec.intersections,
        spec.confident,
        positive,
    )
    ceiling, negative = Ceiling(measures), Negative(measures, spec.min_slice_rows)
    found = {
        "schema_version": SCHEMA_VERSION,
        "task": job.task,
        "metric": ceiling.metric,
        "level": LEVEL,
        "ceiling": ceiling.as_dict(rate),
        "calibration": calibration(scores, measures.resampler),
        "bias": Bias(measures, spec).as_dict(None if positive is None else facts.classes[positive]),
        "negative": negative.as_dict(thresholds_of(spec, scores.language), train),
    }
    return {**found, "gates": [_gate(role, ceiling, negative, found) for role in scores.students]}


def judged_class(job: Job, facts: DataFacts) -> int | None:
    """The number of the class that rates are about; None where there are no rates.

    Raises:
        DataError: ``audit.positive`` is no class of the data, or missing where ``audit.max_gap`` needs it.
    """
    positive, limits = positive_class(job.audit.positive, facts.classes), job.audit.max_gap
    rates = sorted(set(limits) - {"accuracy_difference"}) if isinstance(limits, dict) else []
    if positive is None and facts.classes and rates:
        # A limit on what is not measured would never be exceeded.
        raise DataError(
            f"audit.max_gap limits {rates[0]}, which is about one class, and there are {len(facts.classes)}: say which "
            f"by audit.positive"
        )
    return positive


def positive_class(wanted: str | int | None, classes: tuple[str, ...]) -> int | None:
    """The number of the class that rates are about: the one asked for, else the last of two, else none."""
    if wanted is None:
        return 1 if len(classes) == 2 else None
    if str(wanted) not in classes:
        raise DataError(f"audit.positive is {wanted!r}, which is no class; there are {', '.join(classes) or 'none'}")
    return classes.index(str(wanted))


def _gate(role: str, ceiling: Ceiling, negative: Negative, found: dict[str, Any]) -> dict[str, Any]:
    own, base = found["ceiling"]["arms"][role], role == "baseline"
    none = nothing("the baseline is what it is measured against")
    row: dict[str, Any] = {
        "arm": role,
        "seeds": len(own["seeds"]),
        "quality": own["quality"],
        "gain": none if base else ceiling.contrast(role, "baseline"),
        "gap_closed": none if base else ceiling.gap_closed(role),
        "ece": found["calibration"][role]["ece"],
        "bias": {
            column: {name: told[role] for name, told in each["differences"].items()}
            for column, each in found["bias"]["columns"].items()
        },
    }
    transfer = {} if base else found["negative"]["heldout"]["arms"][role]
    row["negative_transfer"] = transfer.get("excess", none)
    row["negative_transfer_ratio"] = transfer.get("negative_transfer_ratio", none)
    if role.startswith("gate-"):
        row["transfer_kept"] = ratio(negative.excess(role), negative.excess("student"), _NO_EXCESS)
        row["over_student"] = ceiling.contrast(role, "student")
    return row
