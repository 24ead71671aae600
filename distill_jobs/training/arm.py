"""Train one arm and commit it: the function that runs on every rank of a gang."""

import time
from typing import Any

import torch

from cluster.engine import Engine, resolve_precision
from cluster.engine_config import EngineConfig
from cluster.files import Folder
from cluster.gang import Rank
from cluster.meter import Meter, peak_memory_bytes
from distill_jobs.data.facts import DataFacts
from distill_jobs.losses.fused_head import fused_head
from distill_jobs.models.build import build_model
from distill_jobs.models.files import save_model
from distill_jobs.models.packing import check_packing
from distill_jobs.models.scorer import Scorer
from distill_jobs.stage import RECORD, StageRecord
from distill_jobs.store.plan import StorePlan, check_student
from distill_jobs.training.loop import Loop, Progress, steps_of
from distill_jobs.training.source import Source, split_source, store_source
from distill_jobs.training.task import Arm, TrainTask


def train_arms(rank: Rank, task: TrainTask) -> list[dict[str, Any]]:
    """Train the task's arms one after another; returns their stage records. Each is committed as soon as it ends."""
    facts = DataFacts.load(task.data)
    validation = split_source(task.data, "validation", task.reading)
    records = []
    for arm in task.arms:
        started = time.time()
        if rank.rank == 0:
            arm.folder.remove(RECORD)
        with Meter(cores=task.cores, devices=task.devices) as meter:
            scorer = _student_model(arm, task, facts)
            progress = _train(arm, task, scorer, validation, rank)
            meter.rows, meter.tokens = progress.rows, progress.positions
        record = StageRecord(
            stage=arm.name,
            digest=arm.digest,
            inputs=arm.inputs,
            made={
                "steps": progress.history[-1]["step"],
                "best_step": progress.best_step or progress.history[-1]["step"],
                "parameters": sum(p.numel() for p in scorer.parameters()),
                "peak_memory_bytes": _peak(rank.device),
            },
            usage=meter.usage.as_dict(),
            started=started,
            ended=time.time(),
        )
        if rank.rank == 0:
            arm.folder.write_json("history.json", progress.history)
            record.commit(arm.folder)
        records.append(record.as_dict())
    return records


def _student_model(arm: Arm, task: TrainTask, facts: DataFacts) -> Scorer:
    scorer = build_model(arm.model, facts, seed=arm.seed, teacher=task.teacher)
    if task.store is not None:
        check_student(StorePlan.load(task.store), scorer.outputs, facts.tokenizer_sha)
    if facts.features == "documents":
        check_packing(scorer, facts)
    return scorer


def _train(arm: Arm, task: TrainTask, scorer: Scorer, validation: Source, rank: Rank) -> Progress:
    if task.store is None:
        train = split_source(task.data, "train", task.reading)
    else:
        train = store_source(task.store, task.data, arm.reads_soft, task.reading, task.mix)
    steps = steps_of(train.rows, arm.train.epochs, arm.train.steps, arm.train.batch_size)
    # The same for student and baseline: dropout and the like must not make the arms differ.
    torch.manual_seed(arm.seed)
    head = fused_head(scorer, train.facts) if arm.train.fused_loss else None
    engine = Engine(scorer, _engine_config(arm, steps, rank), rank.device)
    try:
        progress = Loop(arm, engine, train, validation, rank, steps, head).run()
        state = progress.best_state or engine.full_state()
        if rank.rank == 0:
            _save(arm, scorer, train.facts, task.data, state)
        engine.barrier()
    finally:
        engine.close()
    return progress


def _engine_config(arm: Arm, steps: int, rank: Rank) -> EngineConfig:
    precision = resolve_precision(arm.train.precision, torch.device(rank.device).type)
    return arm.train.engine(steps, rank.world_size, precision)


def _save(arm: Arm, scorer: Scorer, facts: DataFacts, data: Folder, state: dict[str, torch.Tensor] | None) -> None:
    folder = arm.folder / "model"
    folder.clear()
    save_model(scorer, folder, facts, data, state)


def _peak(device: str) -> int:
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    return peak_memory_bytes()
