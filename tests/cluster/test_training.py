"""Arms trained on a real gang: the number of ranks doesn't matter, and a run that diverges stops in one sentence."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from cluster.errors import NonFiniteError
from cluster.files import Folder
from cluster.gang import Gang, run_gang
from cluster.session import Session
from distill_jobs.data.prepare import prepare
from distill_jobs.errors import DistillError, TrainingError
from distill_jobs.spec import Job, parse_job
from distill_jobs.training.arm import train_arms
from distill_jobs.training.task import Arm, TrainTask

CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def job(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Prepared documents of very different lengths, so that rows hold unequally many scored positions."""
    folder = tmp_path_factory.mktemp("training")
    texts = [("word " * (1 + (i * 7) % 23)).strip() for i in range(120)]
    pq.write_table(pa.table({"text": texts}), folder / "text.parquet")
    # Half precision, where the processor has it, would round what this compares.
    train = {"steps": 3, "batch_size": 8, "micro_batch": 2, "learning_rate": 0.01, "precision": "fp32"}
    job = parse_job(
        {
            "name": "ranks",
            "task": "causal_lm",
            "workdir": str(folder / "run"),
            "data": {
                "train": str(folder / "text.parquet"),
                "features": {"documents": {"sequence_length": 64, "tokenizer": "bytes"}},
                "rows_per_part": 20,
            },
            "teacher": {"model": {"config": CONFIG}, "train": train},
            "student": {"model": {"config": CONFIG}, "train": train},
        }
    )
    prepare(job, session, Folder(job.workdir), lambda *_: None)
    return job


def train(session: Session, job: Job, folder: Path, workers: int, **changes: object) -> dict[str, torch.Tensor]:
    spec = job.student.train.model_copy(update={"workers": workers, **changes})
    arm = Arm("baseline", 3, Folder(str(folder)), job.student.model, spec, 0.0, 1.0, "digest", {})
    task = TrainTask((arm,), Folder(job.workdir) / "data", None, None, workers, 0)
    run_gang(session, train_arms, task, Gang(workers), lambda _: None, fatal=(DistillError,))
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def alone(session: Session, job: Job, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return train(session, job, tmp_path_factory.mktemp("one"), 1)


def test_two_ranks_train_what_one_does(
    session: Session, job: Job, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    together = train(session, job, tmp_path, 2)
    for name, weights in alone.items():
        torch.testing.assert_close(together[name], weights, rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.slow
def test_whole_logits_train_what_the_fused_loss_does(
    session: Session, job: Job, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    whole = train(session, job, tmp_path, 1, fused_loss=False)
    assert any(not torch.equal(weights, whole[name]) for name, weights in alone.items()), "both took the same path"
    for name, weights in alone.items():
        torch.testing.assert_close(whole[name], weights, rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.slow
def test_spreading_offloading_and_recomputing_train_the_same(
    session: Session, job: Job, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    spread = train(
        session,
        job,
        tmp_path,
        2,
        zero_stage=3,
        offload="parameters",
        activation_checkpointing=True,
        deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    )
    for name, weights in alone.items():
        torch.testing.assert_close(spread[name], weights, rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.slow
def test_what_is_saved_is_the_moving_average(
    session: Session, job: Job, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    averaged = train(session, job, tmp_path / "ema", 1, ema=0.999)
    # Three steps of a short memory: what the average is made of is the run that is otherwise saved.
    for name, weights in alone.items():
        assert not torch.equal(averaged[name], weights), name
        torch.testing.assert_close(averaged[name], weights, rtol=0, atol=0.03, msg=name)


@pytest.mark.slow
def test_a_diverging_run_stops_and_saves_nothing(session: Session, job: Job, tmp_path: Path) -> None:
    with pytest.raises((TrainingError, NonFiniteError), match=r"not finite|loss is (nan|inf)") as caught:
        train(session, job, tmp_path / "bad", 1, learning_rate=1e30, clip=0.0, warmup=0.0)
    assert "\n" not in str(caught.value) and "learning" in str(caught.value)
    assert not (tmp_path / "bad" / "model").exists() and not (tmp_path / "bad" / "stage.json").exists()


def test_the_arm_is_plain_data(job: Job) -> None:
    arm = Arm("student", 1, Folder("x"), job.student.model, job.student.train, 0.5, 2.0, "d", {"a": 1})
    assert replace(arm, seed=2).name == "student/2" and replace(arm, role="teacher").name == "teacher"
