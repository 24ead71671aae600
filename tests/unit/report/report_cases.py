"""A workdir as a finished pipeline leaves it, small and made up, for the report's tests."""

import math
import random
from pathlib import Path
from typing import Any

import yaml

from cluster.files import Folder
from cluster.meter import Usage
from distill_jobs.costs.ledger import Ledger
from distill_jobs.costs.reckon import Reckoner
from distill_jobs.report.plot import Axis, Mark, Plot, Series, Surface
from distill_jobs.report.svg import INK, MARKER, OTHER, ROLE, STUDENT, TEACHER
from distill_jobs.spec.costs import Costs

SEEDS = (0, 1, 2)
HOSTILE = '<script>alert(1)</script>"\'&$x^2$ %{x} <a href="http://evil.test/">x</a>'
STATISTICS = {
    "head_mass": 0.9731,
    "teacher_wrong": 0.142,
    "entropy": 0.311,
    "samples": [
        {
            "source": "adult.parquet:1234",
            "context": None,
            "gold": ">50K",
            "gold_probability": 0.62,
            "likely": [(">50K", 0.62), ("<=50K", 0.38)],
        }
    ],
}


def finished(path: Path, **changes: Any) -> Folder:
    """Write the artifacts; ``changes``: name, metric, low (of the gain), slices, seeds."""
    workdir = Folder(str(path))
    seeds = changes.get("seeds", SEEDS)
    spec = {
        "name": changes.get("name", "adult"),
        "task": "classification",
        "workdir": "demo/adult",
        "data": {"train": "demo/adult.parquet", "label": "income", "slices": ["sex", "race"]},
        "teacher": {"model": {"mlp": {"hidden": [512, 512]}}, "train": {"epochs": 20.0}},
        "student": {"model": {"mlp": {"hidden": [16]}}, "train": {"epochs": 10.0}},
        "costs": {"override": {"cpu_hour": 0.04}},
        "tracking": {"uri": "http://me:hunter2@tracker"},
        "seeds": list(seeds),
    }
    workdir.write("spec.yaml", yaml.safe_dump(spec, allow_unicode=True).encode())
    workdir.write_json("data/manifest.json", data_facts())
    plan = {
        "schema_version": 1,
        "teacher": "9f" * 32,
        "vocabulary": {"real": 2, "padded": 2},
        "data_fingerprint": "ab12",
    }
    workdir.write_json("store/plan.json", {**plan, "codec": {"name": "dense"}})
    manifest = {"codec": {"name": "dense"}, "rows": 26049, "tokens": 26049, "parts": 7, "bytes": 11_300_000}
    workdir.write_json("store/manifest.json", {**manifest, "bytes_per_position": 14.0, "plan": "77aa55cc11ee22dd"})
    workdir.write_json("evaluation.json", evaluation(**changes))
    _stages(workdir, seeds)
    return workdir


def data_facts() -> dict[str, Any]:
    splits = {"train": 26049, "validation": 3256, "test": 16281}
    return {
        "task": "classification",
        "features": "tabular",
        "fingerprint": "ab12cd34ef56ab78",
        "classes": ["<=50K", ">50K"],
        "vocabulary": None,
        "slices": ["sex", "race"],
        "splits": {name: {"rows": rows, "tokens": rows, "parts": 4} for name, rows in splits.items()},
        "dropped": {},
    }


def evaluation(**changes: Any) -> dict[str, Any]:
    """``evaluation.json``: accuracies as of the census, or perplexities as of a small language model."""
    language = changes.get("metric") == "perplexity"
    seeds = changes.get("seeds", SEEDS)
    base = {"teacher": 31.2, "student": 86.3, "baseline": 89.9} if language else {}
    base = base or {"teacher": 0.8612, "student": 0.8541, "baseline": 0.8489}
    sign, scale = (-1, 1.0) if language else (1, 0.0011)
    wobbles = {"teacher": (0.0,), "student": (-1.1, 0.2, 0.9), "baseline": (0.3, -0.7, 0.4)}
    values = {role: [base[role] + scale * wobble for wobble in wobbles[role]][: len(seeds)] for role in base}
    mean = {role: sum(v) / len(v) for role, v in values.items()}
    gain = mean["student"] - mean["baseline"]
    reach = changes.get("reach", 0.6) * abs(gain)
    model = {"nll": 0.312, "accuracy": 0.86, "agreement": 1.0, "kl_to_teacher": 0.0, "ece": 0.011}
    big = {
        "parameters": 318_466,
        "bytes": 1_273_864,
        "latency_ms": 0.41,
        "throughput": 61_000.0,
        "memory_bytes": 9_400_000,
    }
    small = {"parameters": 1_746, "bytes": 6_984, "latency_ms": 0.09, "throughput": 910_000.0, "memory_bytes": 800_000}
    models: dict[str, Any] = {"teacher": {**model, **big}}
    for seed in seeds:
        models[f"student/{seed}"] = {**model, **small, "nll": 0.329, "agreement": 0.953, "kl_to_teacher": 0.0121}
        models[f"baseline/{seed}"] = {**model, **small, "nll": 0.341, "agreement": 0.931, "kl_to_teacher": 0.0307}
    found = {"sex": {"Female": (5421, 0.06), "Male": (10860, -0.03)}}
    found["race"] = {
        "White": (13946, 0.0),
        "Black": (1561, 0.05),
        "Asian-Pac-Islander": (480, -0.01),
        "Other": (135, 0.04),
    }
    slices = {
        column: {v: {"rows": n, **{r: mean[r] * (1 - sign * s) for r in mean}} for v, (n, s) in rows.items()}
        for column, rows in changes.get("slices", found).items()
    }
    return {
        "task": "causal_lm" if language else "classification",
        "metric": "perplexity" if language else "accuracy",
        "better": "lower" if language else "higher",
        "rows": 16281,
        "tokens": 16281,
        "models": models,
        "summary": {
            "teacher": {"value": mean["teacher"]},
            **{role: {"mean": mean[role], "seeds": values[role]} for role in ("student", "baseline")},
            "gain": {
                "mean": gain,
                "low": gain - reach,
                "high": gain + reach,
                "level": 0.95,
                "distinguishable": reach < abs(gain),
            },
        },
        "slices": slices,
    }


def history(steps: int, start: float, end: float, soft: float, seed: int) -> list[dict[str, Any]]:
    """A falling, noisy loss curve with some looks at the validation split."""
    noise = random.Random(seed)
    entries: list[dict[str, Any]] = []
    for number in range(1, 101):
        step = number * steps // 100
        hard = end + (start - end) * math.exp(-number / 14) + noise.gauss(0, 0.012)
        tail = soft * math.exp(-number / 20) + 0.05 * soft
        entries.append(
            {"step": step, "loss": 0.1 * hard + 0.9 * tail, "hard": hard, "soft": tail, "learning_rate": 1e-3}
        )
        if number % 10 == 0:
            entries.append({"step": step, "validation": end + (start - end) * math.exp(-number / 14) + 0.006})
    return entries


def _stages(workdir: Folder, seeds: tuple[int, ...]) -> None:
    ledger, clock = Ledger(workdir), 1_790_000_000.0
    reckoner = Reckoner(Costs(override={"cpu_hour": 0.04}))
    folders = {"prepare": "data", "teacher": "teacher", "capture": "store", "evaluate": "evaluation"}
    arms = [f"{role}/{seed}" for seed in seeds for role in ("student", "baseline")]
    seconds = {"prepare": 11.0, "teacher": 38.0, "capture": 14.0, **dict.fromkeys(arms, 6.5), "train/start-up": 13.0}
    for stage, wall in {**seconds, "evaluate": 12.0}.items():
        rows = 0 if stage == "train/start-up" else 26049
        usage = Usage(core_seconds=wall, cpu_seconds=wall * 0.9, wall_seconds=wall, rows=rows, tokens=rows)
        ledger.enter(reckoner.entry(stage, usage, None, clock, clock + wall))
        clock += wall
        if stage == "train/start-up":
            continue
        record: dict[str, Any] = {
            "stage": stage,
            "digest": f"{abs(hash(stage)):016x}"[:16],
            "inputs": {"code": "0.1.0"},
        }
        record |= {
            "made": {"rows": 26049, "parts": 7},
            "usage": usage.as_dict(),
            "started": clock - wall,
            "ended": clock,
        }
        workdir.write_json(f"{folders.get(stage, stage)}/stage.json", record)
        if stage == "teacher":
            workdir.write_json("teacher/history.json", history(8000, 0.62, 0.30, 0.0, 9))
        elif stage in arms:
            soft = 0.5 if stage.startswith("student") else 0.0
            workdir.write_json(f"{stage}/history.json", history(4000, 0.66, 0.33, soft, int(stage[-1]) + len(stage)))


def plots() -> list[Plot]:
    """One plot of each kind, with names that would like to be more than names."""
    students = [1.0, 10.0, 100.0, 1000.0]
    curves = [
        Series("store once", STUDENT, students, [3.0 + 0.1 * n for n in students], "line"),
        Series(HOSTILE, TEACHER, students, [0.5 * n for n in students], "line", dash="dash"),
    ]
    gaps = [
        Series(role, ROLE[role], [0.1 + i / 50, 0.2, 0.05], [0, 1, 2], low=[0.05, 0.1, None], high=[0.2, 0.3, None],
               marker=MARKER[role], told=[HOSTILE] * 3, faint=role == "baseline")
        for i, role in enumerate(ROLE)
    ]  # fmt: skip
    grid = [[0.8 + t / 100 - a / 50 for t in range(1, 9)] for a in range(5)]
    trials = Series("trials", INK, [2.0, 5.0], [0.2, 0.9], told=[HOSTILE, "trial 2"])
    spent = [Series(n, c, [30.0, 4.0], [0, 1], "bars") for n, c in (("predicted", OTHER), ("actual", STUDENT))]
    runs = Series("runs", STUDENT, [0.01, 0.1], [0.8, 0.9], low=[0.7, 0.85], high=[0.85, 0.92], labels=["a", HOSTILE])
    bins = Series("teacher", TEACHER, [0.5, 0.9], [0.55, 0.93], low=[0.5, 0.9], high=[0.6, 0.95])
    share, money = Axis("share", "percent"), Axis("money", "money", log=True)
    return [
        Plot("curves", "Curves", Axis("students", log=True), money, curves, "said", marks=[Mark("x", 10.0, HOSTILE)]),
        Plot("gaps", HOSTILE, share, Axis(names=["a", HOSTILE, "c"]), gaps, HOSTILE, marks=[Mark("x", 0.0)]),
        Plot("surface", "Surface", Axis("T"), Axis("alpha"), [trials], "said",
             surface=Surface(list(range(1, 9)), [a / 4 for a in range(5)], grid, "accuracy", True, "percent")),
        Plot("spent", "Spent", Axis("seconds"), Axis(names=["teach", "capture"]), spent, "said"),
        Plot("front", "Front", money, share, [runs], "said", marks=[Mark("y", 0.8, "best")]),
        Plot("bins", "Bins", share, share, [bins], "said", diagonal=True),
    ]  # fmt: skip
