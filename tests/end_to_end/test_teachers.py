"""One job with a store, the same with the teacher live beside the student, and one that learns from two teachers."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Distill, digits_spec, write_spec

pytestmark = pytest.mark.slow


def small(data: Path, workdir: Path, **changes: Any) -> dict[str, Any]:
    workers = {"student__train__workers": 1, "capture__actors": 1, "seeds": [0], "cluster": {"cpus": 2}}
    return digits_spec(data, workdir, **{**workers, **changes})


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def stored(digits: Path, distill: Distill, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job's workdir."""
    folder = tmp_path_factory.mktemp("stored")
    done = distill("run", write_spec(folder / "job.yaml", small(digits, folder / "work")), timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "work"


def test_store_and_live_side_by_side(stored: Path, digits: Path, distill: Distill, tmp_path: Path) -> None:
    """The same teacher and the same student but for rounding; live pays for its teacher in the student's entry."""
    spec = write_spec(tmp_path / "job.yaml", small(digits, tmp_path / "work", distill__soft_labels="live"))
    done = distill("run", spec, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "capture: left out, because distill.soft_labels is live" in done.stdout
    work = tmp_path / "work"
    assert not (work / "store").exists() and (work / "report.html").exists()
    entries = [{e["stage"]: e["usage"] for e in read(w / "ledger.json")["entries"]} for w in (stored, work)]
    assert "capture" in entries[0] and "capture" not in entries[1]
    held = [usage["student/0"]["core_seconds"] / usage["student/0"]["wall_seconds"] for usage in entries]
    assert held == pytest.approx([1.0, 2.0], rel=0.01)
    assert entries[1]["baseline/0"]["core_seconds"] == pytest.approx(entries[1]["baseline/0"]["wall_seconds"], rel=0.01)
    curves = [[e["soft"] for e in read(w / "student" / "0" / "history.json") if "soft" in e] for w in (stored, work)]
    assert curves[1] == pytest.approx(curves[0], rel=0.02, abs=1e-3)
    quality = [read(w / "evaluation.json")["models"]["student/0"]["accuracy"] for w in (stored, work)]
    assert quality[1] == pytest.approx(quality[0], abs=0.02)
    again = distill("run", spec, timeout=600)
    assert again.returncode == 0 and read(work / "student" / "0" / "stage.json")["made"]["live_teacher"], again.stdout


def test_two_teachers(stored: Path, digits: Path, distill: Distill, tmp_path: Path) -> None:
    """And behind another gate beside the student, which is left out of the student's own summary."""
    teachers = [{"weight": 1.0}, {"store": str(stored / "store"), "slices": {"ink": {"bold": 3.0}}}]
    compared = {"audit": {"gates": ["swap"]}}
    changes = {"teacher__seed": 5, "distill__teachers": teachers, "distill__by_label": "right", **compared}
    spec = write_spec(tmp_path / "job.yaml", small(digits, tmp_path / "work", **changes))
    done = distill("run", spec, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    work = tmp_path / "work"
    student, baseline = (read(work / arm / "0" / "stage.json")["inputs"] for arm in ("student", "baseline"))
    assert student["distill.by_label"] == "right" and len(student["taught"]) == 1 == len(baseline["taught"])
    assert "distill.teachers" not in baseline
    evaluation, entries = read(work / "evaluation.json"), read(work / "ledger.json")["entries"]
    assert all(evaluation["models"][arm]["accuracy"] > 0.5 for arm in ("student/0", "gate-swap/0"))
    assert len(evaluation["summary"]["student"]["seeds"]) == 1
    assert "gate-swap/0" in {entry["stage"] for entry in entries}
    gated = [step["gated"] for step in read(work / "gate-swap" / "0" / "history.json") if "gated" in step]
    assert gated and all(0 <= share <= 1 for share in gated)
    assert not any("gated" in step for step in read(work / "student" / "0" / "history.json"))
    other = small(digits, tmp_path / "other", **{**changes, "distill__teachers": [{}, {"store": str(tmp_path)}]})
    refused = distill("train", write_spec(tmp_path / "other.yaml", other), timeout=600)
    said = refused.stdout + refused.stderr
    assert refused.returncode != 0 and "manifest.json is missing" in said and "Traceback" not in said
