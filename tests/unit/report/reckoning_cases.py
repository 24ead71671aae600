"""What audit, tuning, costs and advice leave in a workdir, small and made up, for the report's tests."""

from typing import Any

from report_cases import HOSTILE

from cluster.files import Folder

ARMS = ("teacher", "student", "baseline", "gate-drop")
METRICS = ("accuracy", "true_positive_rate", "false_positive_rate", "selection_rate")


def estimate(value: float | None, reach: float = 0.01, **more: Any) -> dict[str, Any]:
    if value is None:
        return {"value": None, "low": None, "high": None, "level": 0.95, "why": "there is too little", **more}
    return {"value": value, "low": value - reach, "high": value + reach, "level": 0.95, **more}


def reckoned(workdir: Folder, group: str = "Female", **changes: Any) -> Folder:
    """Write all of it; ``group`` is the name of a slice's value."""
    workdir.write_json("audit.json", audit(group, **changes))
    workdir.write_json("verdict.json", verdict(**changes))
    for name, made in tuning(group).items():
        workdir.write_json(f"tune/{name}.json", made)
    workdir.write_json("store/negative.json", stored(group))
    workdir.write_json("alternatives.json", alternatives())
    workdir.write_json("plan.json", plan())
    return workdir


def verdict(answer: str = "train the student alone", **_: Any) -> dict[str, Any]:
    text = f"The student is no better than a baseline by {HOSTILE}."
    reason = {"text": text, "value": 0.1, "low": -0.1, "high": 0.3, "source": "audit.json"}
    then = "run `distill tune SPEC` <b>now</b>"
    told = {"goal": "accuracy", "sentence": "There is nothing to pass on.", "reasons": [reason]}
    return {
        "schema_version": 1,
        "answer": answer,
        **told,
        "against": {**reason, "text": "It may be luck."},
        "next": then,
    }


def audit(group: str = "Female", gates: bool = True, kept: float = 0.3, **_: Any) -> dict[str, Any]:
    arms = ARMS if gates else ARMS[:3]
    named = {"seeds": ["0", "1", "2"]}
    measures = ("quality", "nll", "kl_to_teacher", "accuracy", "agreement", "fidelity_right", "fidelity_wrong")
    contrast = {**estimate(0.004, 0.001), "p": 0.01, "distinguishable": True}
    ceiling = {
        "metric": "accuracy",
        "better": "higher",
        "in": "accuracy",
        "rows": 16281,
        "positions": 16281,
        "unit": "row",
        "units": 16281,
        "draws": 1000,
        "seeds": 3,
        "enough_seeds": True,
        "learning_rate": {"tuned": False, "sentence": "The learning rate is the spec's."},
        "arms": {arm: {**named, **{what: estimate(0.85) for what in measures}} for arm in sorted(arms)},
        "gain": contrast,
        "student_over_teacher": contrast,
        "teacher_over_baseline": contrast,
        "gap_closed": estimate(None),
        "slices": {},
        "sentences": ["The student is better than the no-teacher baseline."],
    }
    bins = [
        {"lower": b / 15, "upper": (b + 1) / 15, "count": 100 * (b > 7), "confidence": b / 15, "accuracy": b / 16}
        for b in range(15)
    ]
    calibration = {arm: {"ece": estimate(0.02, debiased=0.015), "seeds": [0.02], "bins": bins} for arm in arms}
    found = {"schema_version": 1, "task": "classification", "metric": "accuracy", "level": 0.95, "ceiling": ceiling}
    negative = _negative(group, arms)
    return {
        **found,
        "calibration": calibration,
        "bias": _bias(group, arms),
        "negative": negative,
        "gates": [_gate(arm, kept) for arm in arms if arm != "teacher"],
    }


def stored(group: str) -> dict[str, Any]:
    counts = {"rows": 800, "positions": 800, "wrong": 90, "mistakes": 40, "rate": 0.05}
    slices = {"sex": {group: {**counts, "small": False}, "Male": {**counts, "rate": None, "small": True}}}
    return {"schema_version": 1, "thresholds": {"confident": 0.9}, **counts, "slices": slices}


def tuning(name: str) -> dict[str, dict[str, Any]]:
    shown = [
        {"name": name, "temperature": 1.0 + i, "alpha": i / 8, "score": 0.85 + i / 1000, "state": state}
        for i, state in enumerate(("finished", "finished", "pruned", "failed"))
    ]
    grid = {"temperature": [1.0, 2.0, 4.0], "alpha": [0.1, 0.9], "mean": [[0.84, 0.86, 0.85], [0.83, 0.85, 0.84]]}
    told = {"noise": 0.001, "explains": 0.4, "at": {}, "level": 0.95, "why": None, "metric": "accuracy"}
    settings = {"distill.temperature": 2.0, "distill.loss": name}
    judged = {
        "finalists": [
            {"name": "default", "settings": settings, "scores": [0.85, None], "mean": estimate(0.85)},
            {"name": "student-1", "settings": settings, "scores": [0.86, 0.86]},
        ],
        "best": "student-1",
        "default": "default",
        "gain": estimate(0.01, 0.02),
        "distinguishable": False,
        "noise": 0.001,
        "settings": settings,
    }
    saved = {"against_capture_each": estimate(1.0), "against_live": estimate(-0.5), "trainings": 8, "capture_usd": 0.2}
    trials = {
        "schema_version": 1,
        "task": "classification",
        "metric": "accuracy",
        "better": "higher",
        "split": {"name": "validation", "rows": 3256},
        "trials": [{**each, "role": "student", "round": "search"} for each in shown],
        "student": judged,
        "baseline": None,
        "saved": saved,
        "usd": 2.0,
        "seconds": 200.0,
    }
    matters = {"method": "fANOVA", "trials": 8, "needed": 8, "parameters": {name: estimate(0.6), "b": estimate(None)}}
    surface = {**grid, **told, "trials": shown, "better": "higher", "chosen": [2.0, 0.1]}
    return {"trials": trials, "surface": surface, "importance": {"student": matters, "baseline": None}}


def alternatives() -> dict[str, Any]:
    at = [0.0, 5.0, 10.0]
    lines = {"store once": [1.0, 2.0, 3.0], "live teacher in every run": [0.0, 2.0, 4.0]}
    curves = [
        {"name": name, "x": name, "y": "US dollars", "at": at, "lines": lines, "break_even": even}
        for name, even in (("requests", 5.0), ("students", None), ("months", 0.0))
    ]
    why = {"low": None, "high": None, "why": "measured once"}
    return {
        "schema_version": 1,
        "currency": "USD",
        "measured": {"capture_usd": 1.0},
        "store_or_live": {"students": 3, "saved_usd": -1.0, "break_even_students": {"value": 5.0, **why}},
        "distil_or_alone": {"extra_usd": 1.0, "teacher_usd": 2.0, "usd_per_point": estimate(0.5, 0.1)},
        "distil_or_serve": {
            "teacher_request_usd": 2e-9,
            "student_request_usd": 1e-9,
            "break_even_requests": {"value": None, **why},
        },
        "curves": curves,
        "formulas": {"store_usd": "Store once: capture + months."},
        "rests_on": ["the ledger"],
    }


def against() -> dict[str, Any]:
    """What ``predicted_against_actual`` gives."""
    names = ("seconds", "usd", "kwh", "kg_co2e", "core_hours", "device_hours", "tokens", "flops", "bytes")
    stage = {
        "predicted": dict.fromkeys(names, 2.0),
        "actual": dict.fromkeys(names, 3.0),
        "ratio": dict.fromkeys(names, 1.5),
    }
    undone = {"predicted": dict.fromkeys(names, 2.0), "actual": None, "ratio": None}
    stages = {"capture": stage, "train": stage, "evaluate": undone}
    return {"stages": stages, "total": stage, "not_predicted": {"probe": 0.5}, "within": 2.0, "made": 0.0}


def plan() -> dict[str, Any]:
    names = ("seconds", "usd", "kwh", "kg_co2e", "core_hours", "device_hours", "tokens", "flops", "bytes")
    stages = [{"stage": name, **dict.fromkeys(names, 2.0)} for name in ("capture", "train", "evaluate")]
    total = {"stage": "total", **dict.fromkeys(names, 6.0)}
    sizes = [{"times": 2, "stages": stages, "total": total}]
    return {"schema_version": 1, "within": 2.0, "made": 0.0, "stages": stages, "total": total, "sizes": sizes}


def _bias(group: str, arms: tuple[str, ...]) -> dict[str, Any]:
    labels = ("inherited", "no gap shown", "amplified", "repaired")
    gaps = [
        {
            "group": group,
            "metric": metric,
            "judged": metric != "selection_rate",
            "flag": None if metric != "selection_rate" else "it has 3 rows",
            "p": {},
            "label": label,
            **{arm: estimate(0.05) for arm in (*arms, "change")},
        }
        for metric, label in zip(METRICS, labels, strict=True)
    ]
    groups = {
        group: {
            "rows": 5421,
            "units": 5421,
            "small": True,
            "arms": {arm: dict.fromkeys(METRICS, estimate(0.8)) for arm in arms},
        }
    }
    differences = {
        "equalized_odds_difference": {
            **{arm: estimate(0.1, debiased=0.09) for arm in arms},
            "groups": [group, "Male"],
            "label": "inherited",
            "widest": group,
        }
    }
    over = [{"column": "sex", "metric": "equalized_odds_difference", "gap": estimate(0.1), "limit": 0.05}]
    return {
        "positive": ">50K",
        "metrics": list(METRICS),
        "min_slice_rows": 50,
        "correction": {"method": "Holm", "tests": 12, "false_alarms": 0.05},
        "labels": {"inherited": 1, "no gap shown": 1, "amplified": 1, "repaired": 0},
        "limit": {"max_gap": {}, "over": over},
        "columns": {"sex": {"groups": groups, "gaps": gaps, "differences": differences}},
    }


def _negative(group: str, arms: tuple[str, ...]) -> dict[str, Any]:
    of = ("repeats", "agreement_elsewhere", "ratio_to_agreement", "excess", "ratio_to_baseline")
    told = {arm: {what: estimate(0.3) for what in of} for arm in arms if arm != "teacher"}
    for arm in told.values():
        arm["negative_transfer_ratio"] = estimate(1.3, 0.1)
    whole = {"positions": 16281, "mistakes": 400, "rate": estimate(0.02), "small": False, "arms": told}
    slices = {"sex": {group: whole, "Male": {**whole, "small": True}}}
    return {"thresholds": {"confident": 0.9}, "train": stored(group), "heldout": whole, "slices": slices}


def _gate(arm: str, kept: float) -> dict[str, Any]:
    row = {
        "arm": arm,
        "seeds": 3,
        "quality": estimate(0.85),
        "gain": estimate(0.01) if arm != "baseline" else estimate(None),
        "gap_closed": estimate(0.5),
        "ece": estimate(0.02),
        "bias": {"sex": {"equalized_odds_difference": estimate(0.1)}},
        "negative_transfer": estimate(0.1) if arm != "baseline" else estimate(None),
        "negative_transfer_ratio": estimate(1.2),
    }
    if arm.startswith("gate-"):
        row |= {"transfer_kept": estimate(kept, 0.1), "over_student": estimate(0.001)}
    return row
