"""The teacher online in actors: the same soft labels as from a store, and the same student."""

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from cluster.errors import ClusterError
from cluster.files import Folder
from cluster.gang import Gang, run_gang
from cluster.oncall import OnCall
from cluster.session import Session
from cluster.team import Crew
from distill_jobs.capture.stage import capture
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.prepare import prepare
from distill_jobs.errors import CaptureError, DistillError
from distill_jobs.models.build import build_model
from distill_jobs.models.files import save_model
from distill_jobs.spec import Job, parse_job
from distill_jobs.spec.features import MatchedFeatures
from distill_jobs.stage import StageRecord
from distill_jobs.store.reader import LogitStore
from distill_jobs.store.writer import PREFIX
from distill_jobs.training.arm import train_arms
from distill_jobs.training.live import LiveTask, LiveWorker
from distill_jobs.training.task import Arm, TrainTask

CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}

LAYER = "model.layers.0"


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session(cpus=3) as running:
        yield running


class Slow:
    """Says who it is; dies where it is told to, once."""

    def __init__(self, scar: Path) -> None:
        self.scar = scar

    def run(self, question: Any) -> Any:
        if question == "die" and not self.scar.exists():
            self.scar.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if question == "fail":
            raise CaptureError("row 7 is no row")
        if question == "break":
            raise RuntimeError("something\nelse")
        time.sleep(0.05)
        return os.getpid(), question


@pytest.mark.slow
def test_questions_outlive_actors_and_are_shared_out(session: Session, tmp_path: Path) -> None:  # noqa: ARG001
    scar = tmp_path / "scar"
    crew = Crew(lambda: Slow(scar), least=2, cpus=1)
    here, there = (OnCall("pool", [crew], fatal=(DistillError,), what="the pool") for _ in range(2))
    try:
        answers = [here.ask(n) for n in range(8)] + [there.ask("die"), there.ask(9)]
        said = [answer.wait() for answer in answers]
        assert [what for _, what in said] == [*range(8), "die", 9]
        assert len({who for who, _ in said[:8]}) == 2 and scar.exists()
        with pytest.raises(CaptureError, match="row 7"):
            here.ask("fail").wait()
        with pytest.raises(ClusterError, match="the pool failed: ") as caught:
            here.ask("break").wait()
        assert "\n" not in str(caught.value)
        held = here.usage()
        assert held.core_seconds == pytest.approx(2 * held.wall_seconds) and held.cpu_seconds > 0
    finally:
        here.close()
    with pytest.raises(ClusterError, match="died"):
        there.ask(1).wait()


@pytest.fixture(scope="module")
def job(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Prepared documents, an untrained teacher in fp32, and its store with draws."""
    folder = tmp_path_factory.mktemp("live")
    texts = [("word " * (1 + (i * 7) % 23)).strip() for i in range(60)]
    pq.write_table(pa.table({"text": texts}), folder / "text.parquet")
    train = {"steps": 4, "batch_size": 8, "micro_batch": 2, "learning_rate": 0.01, "precision": "fp32"}
    job = parse_job(
        {
            "name": "live",
            "task": "causal_lm",
            "workdir": str(folder / "run"),
            "data": {
                "train": str(folder / "text.parquet"),
                "features": {"documents": {"sequence_length": 64, "tokenizer": "bytes"}},
                "rows_per_part": 20,
            },
            "teacher": {"model": {"config": CONFIG}, "train": train},
            "student": {"model": {"config": CONFIG}, "train": train},
            "distill": {"alpha": 0.7, "temperature": 2.0},
            "capture": {
                "codec": {"hybrid": {"head": 12, "draws": 4}},
                "precision": "fp32",
                "batch_tokens": 256,
                "fidelity_positions": 0,
                "features": {"layers": [LAYER], "width": 8},
            },
        }
    )
    workdir = Folder(job.workdir)
    prepare(job, session, workdir, lambda *_: None)
    facts = DataFacts.load(workdir / "data")
    teacher = build_model(job.teacher.model, facts, seed=9)
    with torch.no_grad():
        next(p for name, p in teacher.named_parameters() if name.endswith("lm_head.weight")).mul_(
            20.0
        )  # so that it has something to say
    save_model(teacher, workdir / "teacher" / "model", facts, workdir / "data")
    capture(job, session, workdir, lambda *_: None)
    return job


@pytest.mark.slow
def test_an_actor_says_what_the_store_holds(job: Job) -> None:
    workdir = Folder(job.workdir)
    worker = LiveWorker(LiveTask(workdir / "teacher" / "model", workdir / "data", job.capture, job.capture.crews[0]))
    store = LogitStore.open(workdir / "store")
    numbers = np.array([11, 0, 5, 5])
    kept, said = store.take(numbers, columns=[], layers=(LAYER,)), worker.run(numbers)
    assert f"{PREFIX}feature_0" in kept
    assert set(said) == set(kept)
    for name, values in kept.items():
        assert said[name].shape == values.shape and said[name].dtype == values.dtype
        # Batches of other rows round otherwise, and then a code or a draw is another one now and then.
        assert (said[name] == values).mean() > 0.98, name
    with torch.no_grad():
        next(worker.teacher.parameters()).fill_(torch.nan)
    with pytest.raises(CaptureError, match=r"can't score sample \d+: .*distill.soft_labels to store"):
        worker.run(np.arange(6))


def train(session: Session, job: Job, folder: Path, workers: int, live: bool) -> tuple[dict[str, torch.Tensor], Any]:
    workdir, spec = Folder(job.workdir), job.student.train.model_copy(update={"workers": workers})
    features = MatchedFeatures.model_validate({"pairs": {LAYER: LAYER}})
    arm = Arm("student", 3, Folder(str(folder)), job.student.model, spec, 0.7, 2.0, "digest", {}, features=features)
    task = TrainTask(
        (arm, replace(arm, role="baseline", alpha=0.0, features=None, folder=Folder(str(folder / "baseline")))),
        workdir / "data",
        None if live else workdir / "store",
        workdir / "teacher" / "model",
        workers,
        0,
        live=job.capture if live else None,
    )
    run_gang(session, train_arms, task, Gang(workers), lambda _: None, fatal=(DistillError,))
    return load_file(folder / "model" / "model.safetensors"), StageRecord.read(arm.folder)


@pytest.fixture(scope="module")
def stored(session: Session, job: Job, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("stored")
    return folder, train(session, job, folder, 1, live=False)[0]


@pytest.mark.slow
def test_the_student_is_the_one_from_the_store(
    session: Session, job: Job, stored: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """On two ranks that share one teacher; its cost is the student's alone."""
    weights, record = train(session, job, tmp_path, 2, live=True)
    for name, expected in stored[1].items():
        torch.testing.assert_close(weights[name], expected, rtol=2e-2, atol=2e-4, msg=name)
    live, usage = record.made["live_teacher"], record.usage
    assert live["core_seconds"] > 0 and live["cpu_seconds"] > 0
    # Two ranks and the teacher each hold a core.
    assert usage["core_seconds"] == pytest.approx(3 * usage["wall_seconds"], rel=0.01)
    baseline = StageRecord.read(Folder(str(tmp_path / "baseline")))
    assert baseline is not None and "live_teacher" not in baseline.made
    assert baseline.usage["core_seconds"] == pytest.approx(2 * baseline.usage["wall_seconds"], rel=0.01)
    [first, *_] = json.loads((tmp_path / "history.json").read_text())
    [same, *_] = json.loads((stored[0] / "history.json").read_text())
    assert first["soft"] > 0.05 and first["features"] == pytest.approx(same["features"], rel=1e-3)
    alone = load_file(tmp_path / "baseline" / "model" / "model.safetensors")
    assert max(float((alone[name] - stored[1][name]).abs().max()) for name in alone) > 5e-3
