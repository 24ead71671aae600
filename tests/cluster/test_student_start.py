"""A student pruned from its teacher, with adapters, trained on a real gang: alone and spread over two ranks."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from cluster.files import Folder
from cluster.gang import Gang, run_gang
from cluster.session import Session
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.prepare import prepare
from distill_jobs.errors import DistillError
from distill_jobs.models.build import build_model
from distill_jobs.models.files import save_model
from distill_jobs.spec import Job, parse_job
from distill_jobs.training.arm import train_arms
from distill_jobs.training.task import Arm, TrainTask

CONFIG = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "attention_heads": 2, "layers": 1, "calibration_rows": 12}


def prepared(session: Session, folder: Path) -> Job:
    texts = [("word " * (1 + (i * 7) % 23)).strip() for i in range(120)]
    pq.write_table(pa.table({"text": texts}), folder / "text.parquet")
    train = {"steps": 3, "batch_size": 8, "micro_batch": 2, "learning_rate": 0.02, "precision": "fp32"}
    job = parse_job(
        {
            "name": "start",
            "task": "causal_lm",
            "workdir": str(folder / "run"),
            "data": {
                "train": str(folder / "text.parquet"),
                "features": {"documents": {"sequence_length": 64, "tokenizer": "bytes"}},
                "rows_per_part": 20,
            },
            "teacher": {"model": {"config": CONFIG}, "train": train},
            "student": {"model": {"prune_teacher": SIZES}, "lora": {"rank": 2}, "train": train},
        }
    )
    workdir = Folder(job.workdir)
    prepare(job, session, workdir, lambda *_: None)
    facts = DataFacts.load(workdir / "data")
    save_model(build_model(job.teacher.model, facts, seed=0), workdir / "teacher", facts, workdir / "data")
    return job


def train(session: Session, job: Job, folder: Path, workers: int, zero_stage: int) -> dict[str, torch.Tensor]:
    spec = job.student.train.model_copy(update={"workers": workers, "zero_stage": zero_stage})
    lora = job.student.lora
    arm = Arm("baseline", 3, Folder(str(folder)), job.student.model, spec, 0.0, 1.0, "digest", {}, lora=lora)
    workdir = Folder(job.workdir)
    task = TrainTask((arm,), workdir / "data", None, workdir / "teacher", workers, 0)
    run_gang(session, train_arms, task, Gang(workers), lambda _: None, fatal=(DistillError,))
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.slow
def test_adapters_on_a_pruned_teacher_train_alike_on_one_rank_and_on_two(session: Session, tmp_path: Path) -> None:
    job = prepared(session, tmp_path)
    alone = train(session, job, tmp_path / "one", 1, 0)
    spread = train(session, job, tmp_path / "two", 2, 3)
    workdir = Folder(job.workdir)
    facts = DataFacts.load(workdir / "data")
    start = build_model(job.student.model, facts, seed=9, teacher=workdir / "teacher", data=workdir / "data").core
    # What is saved is the model alone, its adapters merged in; the rest stands as it was pruned.
    assert {*alone, "lm_head.weight"} == set(start.state_dict())
    for name, weights in alone.items():
        torch.testing.assert_close(spread[name], weights, rtol=1e-4, atol=2e-5, msg=name)
        assert torch.equal(weights, start.state_dict()[name]) == ("proj" not in name), name
