"""Is distillation the right tool for this goal? The rules, from evidence to a verdict; nothing is measured here.

No rule answers *distil* unless a 95 % interval of the student's gain over a no-teacher baseline of equal budget,
over at least ``LEAST_SEEDS`` seeds, lies above the goal's margin (for ``iterate`` that of the money that the teacher
saves a run above its share of what the teacher cost); noise alone gets there in one case of forty. In turn:

- A limit that only the teacher keeps, or a goal that lets it stay and a quality that only it has, neither its student
  nor the baseline: *keep the teacher*.
- The gain is shown: *distil*.
- There is nothing to pass on (the teacher is not shown to be better than the baseline), the gain is shown to be within
  the margin, or a tuned student shows no gain: *train the student alone*.
- Else *not yet known*, with the cheapest measurement that could settle it.
"""

from distill_jobs import words
from distill_jobs.costs.case import Case
from distill_jobs.costs.verdict import Estimate, Evidence, Reason, Verdict
from distill_jobs.spec.goal import Aim, Deploy, Goal, Iterate

LEAST_SEEDS = 3
PREDICTED_FACTOR = 2.0
"""By how much a prediction may be off without an answer that rests on it being wrong."""


def decide(goal: Goal, evidence: Evidence) -> Verdict:
    """The verdict for a goal by the evidence there is, before a run or after it."""
    aim: Aim = goal.chosen
    case = Case(goal.kind, aim, evidence)
    if isinstance(aim, Iterate):
        return _iterate(case, aim)
    if isinstance(aim, Deploy):
        found = _limits(case, aim)
        if found is not None:
            return found
    elif evidence.gain is not None:
        found = _keep(case)
        if found is not None:
            return found
    return _worth(case) if evidence.gain is not None else _unmeasured(case)


def _limits(case: Case, aim: Deploy) -> Verdict | None:
    """What the limits alone decide; None where the student keeps them and quality has to decide."""
    evidence = case.evidence
    if not evidence.serving:
        return None
    if aim.hardware and aim.hardware.lower() not in (evidence.hardware or "").lower():
        told = (
            f"The limits hold on {aim.hardware}, and the models were timed on {evidence.hardware or 'other hardware'}."
        )
        case.reasons.append(Reason(told, evidence.serving["student"].latency_ms, None, None, "evaluation.json"))
        then = f"run `distill evaluate` on {aim.hardware}"
        return case.conclude("not yet known", f"Nothing is known of speed on {aim.hardware}.", [_point(case)], then)
    kept = {role: _keeps(case, aim, role) for role in ("teacher", "student")}
    if None in kept.values():
        then = "run `distill report`, which prices a request where the teacher's answers are in a store"
        return case.conclude("not yet known", "What serving costs is not known.", [_point(case)], then)
    if not kept["student"]:
        if kept["teacher"]:
            return case.conclude("keep the teacher", "Only the teacher keeps the limits.", [_price(case)])
        then = "choose a smaller student (student.model), or wider limits (goal.deploy)"
        return case.conclude("not yet known", "Neither teacher nor student keeps the limits.", [_point(case)], then)
    return _keep(case) if kept["teacher"] and evidence.gain is not None else None


def _keeps(case: Case, aim: Deploy, role: str) -> bool | None:
    """Whether a model keeps every limit, None where its price alone is not known; notes where it stands by each."""
    serving = case.evidence.serving[role]
    stands = [
        ("latency", serving.latency_ms, aim.latency_ms, "ms"),
        ("memory", serving.memory_bytes / 1e6, aim.memory_mb, "MB"),
        ("a million rows", serving.usd_per_million, aim.usd_per_million, "US dollars"),
    ]
    fits, known = True, True
    for what, value, limit, unit in stands:
        if limit is None:
            continue
        if value is None:
            told = f"What {what} cost with the {role} is not known."
            case.reasons.append(Reason(told, None, None, None, "alternatives.json"))
            known = False
            continue
        verb = "keeps" if value <= limit else "breaks"
        told = (
            f"The {role} {verb} the limit: {what} {value:.3g} {unit} of {limit:g} allowed, on {case.evidence.hardware}."
        )
        case.reasons.append(Reason(told, value, None, None, "evaluation.json"))
        fits &= value <= limit
    return None if fits and not known else fits


def _keep(case: Case) -> Verdict | None:
    """Keep the teacher where nothing forbids it and it is shown to be better than both that are smaller, or where it
    can't be told."""
    behind, headroom, aim = case.evidence.behind, case.evidence.headroom, case.aim
    if behind is None or behind.at_most(aim.margin):
        return None
    if headroom is not None and not headroom.above(aim.margin):
        # What is trained alone does as well, whatever the teacher's soft labels have done to the student.
        return None
    if behind.above(aim.margin):
        case.note(f"The teacher is better than its student by {case.by(behind)}.", behind)
        if headroom is not None:
            case.note(f"It is better than the baseline by {case.by(headroom)}.", headroom)
        sentence = "The student does not reach its teacher, which the goal allows to be kept."
        return case.conclude("keep the teacher", sentence, [_price(case), _point(case)])
    if case.kind != "accuracy" or not behind.bounded or behind.value <= aim.margin:
        return None
    case.note(f"The teacher's lead over its student is {case.by(behind)}, which may be nothing.", behind)
    rows = _rows_to_settle(behind, case.evidence.rows, aim.margin)
    then = f"evaluate on about {words.count(rows)} held-out rows, or train more seeds"
    return case.conclude(
        "not yet known", "Teacher and student can't be told apart.", [_price(case), _point(case)], then
    )


def _worth(case: Case) -> Verdict:
    """Distil, or train the student alone: by the gain over the baseline."""
    evidence, margin = case.evidence, case.aim.margin
    gain, few = case.note_gain(), evidence.seeds < LEAST_SEEDS
    if gain.above(margin) and not few:
        if evidence.behind is not None:
            case.note(f"The teacher's lead over the student is {case.by(evidence.behind)}.", evidence.behind)
        case.note_money()
        case.note_payback()
        return case.conclude(
            "distil", "The student learns from its teacher what it does not learn alone.", _doubts(case)
        )
    case.note_money()
    if not gain.bounded:
        then = "evaluate on more held-out rows or documents (data.test)"
        return case.conclude("not yet known", "Too little is held out to bound the gain.", [_point(case)], then)
    headroom = evidence.headroom
    if headroom is not None and not headroom.above(margin) and not gain.above(margin):
        case.note(f"The teacher's own lead over the baseline is {case.by(headroom)}.", headroom)
        sentence = "There is nothing to be seen that the teacher could pass on."
        if headroom.below(0.0):
            sentence = "The teacher itself is worse than what is trained without it."
        return case.conclude("train the student alone", sentence, [_untuned(case), _point(case)])
    if few:
        then = f"train at least {LEAST_SEEDS} seeds: how much chance there is in one run is not known"
        return case.conclude("not yet known", "Too few seeds were trained.", [_point(case)], then)
    if not evidence.tuned and not (gain.at_most(margin) and margin > 0):
        then = "run `distill tune`" + (f", about {words.money(evidence.tune_usd)}" if evidence.tune_usd else "")
        sentence = "At these settings the teacher's soft labels show no gain, and T and alpha are not tuned."
        return case.conclude("not yet known", sentence, [_point(case)], then)
    sentence = "The teacher's soft labels show no gain that matters" + (
        ", tuned as they are." if evidence.tuned else "."
    )
    return case.conclude("train the student alone", sentence, [_point(case)])


def _iterate(case: Case, aim: Iterate) -> Verdict:
    """Does what the teacher saves in each of the coming runs pay for it?"""
    found = case.evidence.iteration
    if found is None:
        return _unmeasured(case)
    source = "plan.json" if case.evidence.predicted else "ledger.json"
    most = found.alone * aim.runs
    told = (
        f"Teacher and capture {'are predicted to take' if case.evidence.predicted else 'took'} "
        f"{words.money(found.upfront)}, and {aim.runs} runs without a teacher {words.money(most)}."
    )
    case.reasons.append(Reason(told, found.upfront, None, None, source))
    slack = PREDICTED_FACTOR if case.evidence.predicted else 1.0
    if found.upfront > most * slack:
        sentence = f"The teacher costs more than all {aim.runs} runs without it: it can't pay in time."
        return case.conclude("train the student alone", sentence, [_point(case)])
    if case.evidence.predicted:
        return _unmeasured(case)
    saved = found.saved
    interval = f" (95{words.NB}% interval {_usd(saved.low)} to {_usd(saved.high)})" if saved.bounded else ""
    told = (
        f"A student from the store gets to the baseline's final quality in {found.reached} of {found.seeds} seeds, "
        f"which saves {_usd(saved.value)} a run{interval}."
    )
    case.note(told, saved)
    each = found.upfront / aim.runs
    if saved.above(each) and found.seeds >= LEAST_SEEDS:
        return case.conclude("distil", f"Over {aim.runs} runs the teacher saves more than it cost.", _doubts(case))
    if saved.at_most(each):
        sentence = f"Over {aim.runs} runs the teacher does not save what it cost."
        return case.conclude("train the student alone", sentence, [_point(case)])
    then = f"train more than {found.seeds} seeds, and look at the validation split more often (train.evaluate_every)"
    return case.conclude("not yet known", "How much the teacher saves a run is too uncertain.", [_point(case)], then)


def _unmeasured(case: Case) -> Verdict:
    case.note_money()
    mistakes = case.evidence.mistakes
    if mistakes is not None:
        told = f"At {words.percent(mistakes.value, 2)} of the training positions the teacher is confidently wrong."
        case.note(told, mistakes)
    then = f"run the job with at least {LEAST_SEEDS} seeds (`distill run`)"
    sentence = "No student and no baseline have been trained and evaluated yet."
    return case.conclude("not yet known", sentence, [_price(case)], then)


def _doubts(case: Case) -> list[Reason | None]:
    """What speaks against distilling, the gravest first."""
    evidence, harm = case.evidence, case.evidence.harm
    found: list[Reason | None] = []
    if evidence.biases:
        told = f"Gaps between slices were introduced or amplified by distillation: {'; '.join(evidence.biases[:3])}."
        found.append(Reason(told, len(evidence.biases), None, None, "audit.json"))
    if harm is not None and harm.above(1.0):
        interval = f"(95{words.NB}% interval {harm.low:.2f} to {harm.high:.2f})"
        told = f"The student makes the teacher's confident mistakes {harm.value:.2f} times as often as the baseline"
        found.append(Reason.of(f"{told} {interval}.", harm))
    if not evidence.baseline_tuned:
        told = "The baseline's learning rate was not tuned for it; one that is could close some of the gain."
        found.append(Reason(told, None, None, None, "spec.yaml"))
    if evidence.extra_usd is not None:
        told = f"It costs {words.money(evidence.extra_usd)} more than training alone."
        found.append(Reason(told, evidence.extra_usd, None, None, "ledger.json"))
    return found


def _untuned(case: Case) -> Reason | None:
    if case.evidence.tuned:
        return None
    told = "T and alpha are as set, not tuned; a student can surpass its teacher (run `distill tune` to see)."
    return Reason(told, None, None, None, "spec.yaml")


def _point(case: Case) -> Reason | None:
    """The bare number, where it points away from what the interval allows to be said."""
    gain = case.evidence.gain
    if gain is None:
        return None
    if gain.value > 0:
        text = f"The best guess is still that the student is better than the baseline, by {case.by(gain)}."
    else:
        text = f"The best guess is that soft labels do harm here: {case.by(gain)}; training alone is the safe choice."
    return Reason.of(text, gain)


def _price(case: Case) -> Reason | None:
    """How much less the student takes to serve; nothing where it takes no less."""
    serving = case.evidence.serving
    if "teacher" not in serving or "student" not in serving:
        return None
    teacher, student = serving["teacher"], serving["student"]
    faster, smaller = teacher.latency_ms / student.latency_ms, teacher.memory_bytes / student.memory_bytes
    if max(faster, smaller) <= 1:
        return None
    if faster > 1:
        return Reason(f"The student answers {faster:.3g} times as fast.", faster, None, None, "evaluation.json")
    told = f"The student takes 1/{smaller:.3g} of the teacher's memory."
    return Reason(told, smaller, None, None, "evaluation.json")


def _rows_to_settle(estimate: Estimate, rows: int, margin: float) -> float:
    """Held-out rows at which an interval that narrows with 1/√rows would end at the margin."""
    assert estimate.low is not None
    half = estimate.value - estimate.low
    return max(2 * rows, rows * (half / max(estimate.value - margin, half / 10)) ** 2)


def _usd(value: float | None) -> str:
    if value is None:
        return "unknown"
    return words.money(value) if value >= 0 else f"−{words.money(-value)}"
