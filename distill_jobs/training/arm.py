"""Train one arm and commit it: the function that runs on every rank of a gang."""

import time
from typing import Any

import torch

from cluster.engine import Engine, resolve_precision
from cluster.engine_config import EngineConfig
from cluster.files import Folder
from cluster.gang import Rank
from cluster.meter import Meter, Usage
from cluster.oncall import OnCall
from distill_jobs.data.facts import DataFacts
from distill_jobs.losses.fused_head import fused_head
from distill_jobs.models.build import build_model
from distill_jobs.models.files import save_model
from distill_jobs.models.flops import forward_flops, training_flops
from distill_jobs.models.packing import check_packing
from distill_jobs.models.scorer import Scorer
from distill_jobs.stage import RECORD, StageRecord
from distill_jobs.store.features import FeatureCoding
from distill_jobs.store.plan import StorePlan, check_student
from distill_jobs.training.checkpoint import Keeper
from distill_jobs.training.features import FeatureStudent, students_own
from distill_jobs.training.live import live_plan, live_source, live_teacher
from distill_jobs.training.loop import Loop, Progress, steps_of
from distill_jobs.training.pace import memory_of
from distill_jobs.training.source import Source, split_source, store_source
from distill_jobs.training.task import Arm, TrainTask


def train_arms(rank: Rank, task: TrainTask) -> list[dict[str, Any]]:
    """Train the task's arms one after another; returns their stage records. Each is committed as soon as it ends.

    An arm that is done is left alone, and one that was begun goes on from its last checkpoint.
    """
    facts = DataFacts.load(task.data)
    validation = split_source(task.data, "validation", task.reading)
    return [(_done(rank, arm) or _train_arm(rank, task, arm, facts, validation)).as_dict() for arm in task.arms]


def _done(rank: Rank, arm: Arm) -> StageRecord | None:
    record = StageRecord.read(arm.folder)
    done = record is not None and record.digest == arm.digest
    return record if rank.agreed(int(done)) else None


def _train_arm(rank: Rank, task: TrainTask, arm: Arm, facts: DataFacts, validation: Source) -> StageRecord:
    started = time.time()
    if rank.rank == 0:
        arm.folder.remove(RECORD)
    ranks = arm.train.gang_sizes[-1]
    before: dict[str, dict[str, Any]] = {}
    # The teacher loads while the student is built.
    with (
        live_teacher(rank, task, arm) as asked,
        Meter(task.cores / ranks, task.devices / ranks, rank.gauge) as meter,
    ):

        def used() -> dict[str, dict[str, Any]]:
            now = meter.read()
            # The ranks share a live teacher's actors: the first one counts them.
            now = rank.together(now + _live_held(None if rank.rank else asked, now.wall_seconds))
            return {**before, task.session: (Usage.of(before.get(task.session, {})) + now).as_dict()}

        keeper = Keeper(arm.folder / "checkpoints", arm.digest, arm.train.checkpoint, rank, used)
        scorer = _student_model(arm, task, facts, rank)
        progress, row_bytes = _train(arm, task, scorer, validation, rank, keeper, before, asked)
        if rank.rank == 0:
            meter.rows, meter.tokens, meter.flops = progress.rows, progress.positions, progress.flops
            meter.bytes_read = round(progress.rows * row_bytes)
        spent = used()
        live = asked.usage() if asked is not None else None
    made = {
        "steps": progress.history[-1]["step"],
        "best_step": progress.best_step or progress.history[-1]["step"],
        # Adapters are merged when the model is saved.
        "parameters": sum(p.numel() for name, p in scorer.named_parameters() if ".lora_" not in name),
        "peak_memory_bytes": memory_of(rank.device),
        "forward_flops": forward_flops(scorer, facts),
    }
    if live is not None:
        made["live_teacher"] = {name: getattr(live, name) for name in ("core_seconds", "device_seconds", "cpu_seconds")}
        spent[task.session]["cpu_seconds"] += live.cpu_seconds
    earlier = sum((Usage.of(each) for name, each in spent.items() if name != task.session), Usage())
    usage = {**(earlier + Usage.of(spent[task.session])).as_dict(), "earlier": earlier.as_dict()}
    record = StageRecord(arm.name, arm.digest, arm.inputs, made, usage, started, time.time())
    if rank.rank == 0:
        arm.folder.write_json("history.json", progress.history)
        record.commit(arm.folder)
        rank.kept()
        keeper.shelf.folder.clear()
    return record


def _live_held(asked: OnCall | None, seconds: float) -> Usage:
    """What the actors of a teacher who answers live are held for, beside the gang."""
    if asked is None:
        return Usage()
    return Usage(device_seconds=asked.devices * seconds, core_seconds=asked.cores * seconds)


def _student_model(arm: Arm, task: TrainTask, facts: DataFacts, rank: Rank) -> Scorer:
    scorer = build_model(
        arm.model, facts, seed=arm.seed, teacher=task.teacher, data=task.data, device=rank.device, lora=arm.lora
    )
    if task.store is not None:
        check_student(StorePlan.load(task.store), scorer.outputs, facts.tokenizer_sha)
    elif task.live is not None:
        check_student(live_plan(task.live, facts, facts.targets), scorer.outputs, facts.tokenizer_sha)
    if facts.features == "documents":
        check_packing(scorer, facts)
    return scorer


def _train(
    arm: Arm,
    task: TrainTask,
    scorer: Scorer,
    validation: Source,
    rank: Rank,
    keeper: Keeper,
    before: dict[str, dict[str, Any]],
    asked: OnCall | None,
) -> tuple[Progress, float]:
    """Train and save; returns how it went, and the bytes of a row as it is read."""
    if asked is not None and task.live is not None:
        train = live_source(asked, task.data, task.live, arm.train, rank, task.reading)
    elif task.store is None:
        train = split_source(task.data, "train", task.reading)
    else:
        train = store_source(
            task.store, task.data, arm.reads_soft, task.reading, task.mix, task.teachers, arm.teacher_layers
        )
    steps = steps_of(train.rows, arm.train.epochs, arm.train.steps, arm.train.batch_size)
    # The same for student and baseline: dropout and the like must not make the arms differ.
    torch.manual_seed(arm.seed)
    fused = arm.train.fused_loss
    head = fused_head(scorer, train.facts, fused == "compiled") if fused else None
    flops = training_flops(scorer, train.facts)
    student = _by_features(arm, task, scorer, train.facts)
    engine = Engine(student or scorer, _engine_config(arm, steps, rank), rank.device)
    try:
        loop = Loop(arm, engine, train, validation, rank, steps, head, keeper, flops, student)
        found = keeper.restore(engine)
        if found is not None:
            loop.restore(found["loop"])
            before.update(found["usage"])
            rank.report({"arm": arm.name, "of": steps, "step": loop.step, "resumed": True})
        progress = loop.run()
        if progress.best_step not in (0, loop.step):
            keeper.load_best(engine, progress.best_step)
        keeper.finish()
        state = engine.full_state(ema=True)
        if rank.rank == 0:
            _save(arm, scorer, train.facts, task.data, students_own(state) if student and state else state)
        engine.barrier()
    finally:
        engine.close()
    return progress, train.row_bytes


def _by_features(arm: Arm, task: TrainTask, scorer: Scorer, facts: DataFacts) -> FeatureStudent | None:
    if arm.features is None:
        return None
    plan = StorePlan.load(task.store) if task.store is not None else None
    coding = plan.make_features() if plan is not None else FeatureCoding.of(task.live.features if task.live else None)
    assert coding is not None, "the source has been asked for features"
    return FeatureStudent(scorer, arm.features, coding.width, facts, arm.seed)


def _engine_config(arm: Arm, steps: int, rank: Rank) -> EngineConfig:
    precision = resolve_precision(arm.train.precision, torch.device(rank.device).type)
    return arm.train.engine(steps, rank.world_size, precision)


def _save(arm: Arm, scorer: Scorer, facts: DataFacts, data: Folder, state: dict[str, torch.Tensor] | None) -> None:
    folder = arm.folder / "model"
    folder.clear()
    save_model(scorer, folder, facts, data, state)
