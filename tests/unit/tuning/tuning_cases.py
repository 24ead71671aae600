"""A small classification job, and trials that nobody ran."""

import json
from pathlib import Path
from typing import Any

from cluster.sweep import Trial
from distill_jobs.spec import Job, parse_job


def job(folder: Path, **changes: Any) -> Job:
    """A job on 40 rows of two columns; ``changes`` go into the tree's first level."""
    rows = folder / "rows.jsonl"
    if not rows.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows.write_text("".join(json.dumps({"a": i, "b": i % 2}) + "\n" for i in range(40)))
    train = {"epochs": 2, "batch_size": 8, "learning_rate": 0.003}
    tree: dict[str, Any] = {
        "name": "small",
        "task": "classification",
        "workdir": str(folder / "run"),
        "data": {"train": str(rows), "label": "b", "features": {"tabular": {"numeric": ["a"]}}},
        "teacher": {"model": {"mlp": {"hidden": [8]}}, "train": train},
        "student": {"model": {"mlp": {"hidden": [4]}}, "train": train},
        "distill": {"temperature": 2.0, "alpha": 0.9},
        "capture": {"codec": {"dense": {}}},
    }
    return parse_job({**tree, **changes})


def trial(number: int, score: float | None, state: str = "finished", **parameters: Any) -> Trial:
    return Trial(f"student-{number:03d}", parameters, state=state, score=score)  # type: ignore[arg-type]
