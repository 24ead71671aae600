"""The same student three ways: from the store, from a live teacher, and by TRL's GKD trainer, its teacher beside it.

SmolLM2's shape teaches the same cut to 6 layers, both of random weights, in fp32 on two cores: forward KL alone at
T = 1 on the data's own text. The store's student has both cores, as GKD has; live, student and teacher have one each.
Counted are whole steps, after the first few; memory is the most that all processes of an arm held together. What the
capture took, which the store's student no longer pays, stands beside. By turns, as whole runs.

TRL is not installed with this project. ``GKD_PYTHON`` names the Python of an environment that has it:

    python3.11 -m venv build/trl && build/trl/bin/pip install torch==2.13.0 && build/trl/bin/pip install trl
    GKD_PYTHON=build/trl/bin/python pytest -m benchmark tests/benchmarks/test_bench_live.py -s
"""

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytest
from test_bench_reader import make_store
from test_bench_step import LLAMA, SHAPES

from cluster.files import Folder
from cluster.gang import Gang, run_gang
from cluster.session import Session
from distill_jobs.capture.stage import capture
from distill_jobs.data.facts import DataFacts
from distill_jobs.errors import DistillError
from distill_jobs.models.build import build_model
from distill_jobs.models.files import save_model
from distill_jobs.spec import Job, parse_job
from distill_jobs.training.arm import train_arms
from distill_jobs.training.task import Arm, TrainTask

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(0)]
LENGTH, ROWS, STEPS, FIRST, CORES = 256, 4, 10, 4, 2
TURNS = int(os.environ.get("BENCH_LIVE_TURNS", "2"))
STUDENT: dict[str, Any] = LLAMA | SHAPES["SmolLM2 cut to 6 layers"]
TEACHER: dict[str, Any] = STUDENT | {"num_hidden_layers": 30}
STORE, LIVE, GKD = "from the store", "live teacher", "TRL's GKD"


@dataclass
class Run:
    """Seconds of each step on the clock, of the processor on average, and the most bytes held."""

    seconds: list[float]
    processor: float
    peak: int


class Watch:
    """What Ray's workers at work below this process hold and burn."""

    def __init__(self) -> None:
        self.peak, self.marks = 0, list[tuple[int, float]]()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def mark(self, report: dict[str, Any]) -> None:
        """Look at what has been burnt when a step is reported."""
        if "loss" in report:
            self.marks.append((report["step"], sum(sum(times[:2]) for _, times in _workers())))

    def end(self) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.1):
            self.peak = max(self.peak, sum(held for held, _ in _workers()))


def _workers() -> list[tuple[int, Any]]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[0].startswith("ray::") and "IDLE" not in process.cmdline()[0]:
                found.append((process.memory_info().rss, process.cpu_times()))
        except (psutil.Error, IndexError):
            continue
    return found


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session(cpus=CORES) as running:
        yield running


@pytest.fixture(scope="module")
def job(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Rows of random tokens, a teacher of random weights, and its store, captured by the product."""
    root = Folder(str(tmp_path_factory.mktemp("live")))
    make_store(root, 1, ROWS * STEPS, LENGTH)
    (root / "store").clear()
    train = {"steps": STEPS, "batch_size": ROWS, "precision": "fp32", "cpus_per_worker": CORES}
    job = parse_job(
        {
            "name": "live",
            "task": "causal_lm",
            "workdir": root.uri,
            "data": {"train": "none", "features": {"documents": {"sequence_length": LENGTH}}},
            "teacher": {"model": {"config": TEACHER}, "train": train},
            "student": {"model": {"config": STUDENT}, "train": train},
            "distill": {"alpha": 1.0, "temperature": 1.0},
            "capture": {"precision": "fp32", "cpus_per_actor": CORES, "fidelity_positions": 0},
        }
    )
    facts = DataFacts.load(root / "data")
    save_model(build_model(job.teacher.model, facts, seed=0), root / "teacher" / "model", facts, root / "data")
    _, used = capture(job, session, root, lambda *_: None)
    tokens = ROWS * STEPS * LENGTH
    print(f"\ncapture, {CORES} cores: {tokens / used.wall_seconds:,.0f} tokens/s, its start included")
    return job


def trained(session: Session, job: Job, folder: Path, live: bool) -> Run:
    root, cores = Folder(job.workdir), CORES // 2 if live else CORES
    arm = Arm("student", 0, Folder(str(folder)), job.student.model, job.student.train, 1.0, 1.0, folder.name, {})
    beside = job.capture.model_copy(update={"cpus_per_actor": cores})
    store, teacher = (None if live else root / "store"), root / "teacher" / "model"
    task = TrainTask((arm,), root / "data", store, teacher, cores, 0, live=beside if live else None)
    watch = Watch()
    run_gang(session, train_arms, task, Gang(1, cpus=cores), watch.mark, fatal=(DistillError,))
    watch.end()
    history = [entry for entry in json.loads((folder / "history.json").read_text()) if "loss" in entry]
    seconds = [ROWS * LENGTH / entry["tokens_per_second"] for entry in history if entry["step"] > FIRST]
    (first, before), (last, after) = next(mark for mark in watch.marks if mark[0] >= FIRST), watch.marks[-1]
    return Run(seconds, (after - before) / (last - first), watch.peak)


def by_gkd(python: str) -> Run:
    given = {"student": STUDENT, "teacher": TEACHER, "rows": ROWS, "length": LENGTH, "steps": STEPS, "threads": CORES}
    command = [python, str(Path(__file__).with_name("gkd_steps.py")), json.dumps(given)]
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800, env=clean)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["threads"] == CORES
    kept = STEPS - FIRST
    return Run(told["seconds"][-kept:], sum(told["processor"][-kept:]) / kept, told["peak"])


@pytest.mark.parametrize("other", [LIVE, GKD])
def test_the_store_against(other: str, session: Session, job: Job, tmp_path: Path) -> None:
    python = os.environ.get("GKD_PYTHON")
    if other == GKD and not python:
        pytest.skip("TRL is not installed here: GKD_PYTHON names the Python of an environment that has it")
    runs: dict[str, list[Run]] = {STORE: [], other: []}
    for turn in range(TURNS):
        runs[STORE].append(trained(session, job, tmp_path / f"store-{turn}", live=False))
        if other == GKD:
            runs[GKD].append(by_gkd(str(python)))
        else:
            runs[LIVE].append(trained(session, job, tmp_path / f"live-{turn}", live=True))
    print(f"\nsteps of {ROWS} × {LENGTH} tokens, {CORES} cores, load {os.getloadavg()[0]:.1f} on {os.cpu_count()}:")
    for name, found in runs.items():
        seconds, burnt = median(s for run in found for s in run.seconds), median(run.processor for run in found)
        print(
            f"  {name}: {ROWS * LENGTH / seconds:,.0f} tokens/s ({seconds:.2f} s a step), processor {burnt:.2f} s a "
            f"step, peak {max(run.peak for run in found) / 2**20:,.0f} MiB"
        )
    assert all(run.seconds for found in runs.values() for run in found)
