"""What every stage depends on: the one place that decides whether it is skipped or redone."""

from collections.abc import Set
from typing import Any

from cluster.files import Folder, digest, sha256
from distill_jobs import __version__
from distill_jobs.audit.evaluate import columns_of
from distill_jobs.audit.findings import learning_rate
from distill_jobs.data.prepare import data_digest
from distill_jobs.data.table import MANIFEST
from distill_jobs.models.brought import brought_digest
from distill_jobs.spec import Job, Model, Train
from distill_jobs.spec.distill import Distill
from distill_jobs.spec.features import inputs_of as features_inputs
from distill_jobs.stage import FOLDERS, Status, flatten, status
from distill_jobs.store import SCHEMA_VERSION
from distill_jobs.training.task import Arm

Inputs = dict[str, dict[str, Any]]
STAGES = ("prepare", "teach", "capture", "train", "evaluate", "audit", "report")

# Where work runs does not change what comes out (beyond rounding), so moving a job to other machines redoes nothing.
_RESOURCES = {"actors", "cpus_per_actor"}
_PLACES = {"train", "validation", "test"}


def inputs_of(job: Job) -> Inputs:
    """The inputs of every stage and arm, flat; a later stage's hold the digests of the earlier ones it reads."""
    tree = job.model_dump(mode="json")
    data = _without(tree["data"], _RESOURCES | _PLACES)
    tree["teacher"]["train"] = _without(tree["teacher"]["train"], Train.RESOURCES)
    tree["teacher"]["model"] = _given(tree["teacher"]["model"])
    declared = tree["teacher"].pop("cost")  # What it has cost makes no other teacher of it.
    code = {"code": __version__}
    prepare = {**code, "task": job.task, **flatten(data, "data"), "content": data_digest(job)}
    teacher = {
        **code,
        "prepare": digest(prepare),
        **flatten(tree["teacher"], "teacher"),
        "weights": _weights(job.teacher.model),
    }
    capture = {
        **code,
        "teacher": digest(teacher),
        **flatten(tree["capture"]["codec"], "capture.codec"),
        "capture.seed": job.capture.seed,
        "capture.precision": job.capture.arithmetic,
        "store": SCHEMA_VERSION,
    }
    if job.capture.features:
        capture |= flatten(features_inputs(job.capture.features), "capture")
    inputs = {"prepare": prepare, "teacher": teacher, "capture": capture}
    both = {**code, "weights": _weights(job.student.model)}
    student = {**both, **_student(job, job.student.train)}
    # A baseline reads nothing of the teacher, unless it starts as a part of it: another T or alpha leaves it alone.
    start = {"teacher": digest(teacher)} if job.student.model.from_teacher else {}
    alone = {**both, **_student(job, job.baseline_train)}
    mix = {"distill.mix": tree["distill"]["mix"], "mixed": _mixed(job)}
    if job.distill.teachers:
        # A baseline too: it goes without the rows that any of them has in quarantine.
        mix["taught"] = [sha256(Folder(one.store), MANIFEST) for one in job.distill.teachers if one.store is not None]
    for seed in job.seeds:
        own = {**student, **mix, "seed": seed}
        for role, distill in job.taught.items():
            taught = {**flatten(distill.inputs(), "distill"), **_compared(job, distill)}
            inputs[f"{role}/{seed}"] = {**own, "capture": digest(capture), **taught}
        inputs[f"baseline/{seed}"] = {**alone, **mix, "seed": seed, "prepare": digest(prepare), **start}
    arms = {name: digest(values) for name, values in inputs.items() if "/" in name}
    evaluated = {**flatten(tree["evaluate"], "evaluate"), **columns_of(job)}
    inputs["evaluate"] = {**code, **arms, "teacher": digest(teacher), **evaluated}
    inputs["audit"] = {**code, "evaluate": digest(inputs["evaluate"]), **flatten(tree["audit"], "audit")}
    if learning_rate(job, Folder(job.workdir))["tuned"]:
        inputs["audit"]["learning_rate"] = "tuned"
    costs = flatten(job.costs.inputs(), "costs") | (flatten(declared, "teacher.cost") if declared else {})
    goal = flatten(tree["goal"], "goal") if job.goal != Job.model_fields["goal"].default else {}
    inputs["report"] = {**code, "audit": digest(inputs["audit"]), **costs, **goal, **_tuned(job)}
    return inputs


def learnt(job: Job) -> list[Any]:
    """What of the spec alone, seeds aside, tells one student from another; no file is read."""
    return [_student(job, job.student.train), job.distill.inputs(), job.distill.model_dump(include={"mix"})]


def teacher_arm(job: Job, inputs: Inputs) -> Arm:
    """The teacher's own training, on hard labels."""
    assert job.teacher.train is not None
    return Arm(
        role="teacher",
        seed=job.teacher.seed,
        folder=Folder(job.workdir) / "teacher",
        model=job.teacher.model,
        train=job.teacher.train,
        alpha=0.0,
        temperature=1.0,
        digest=digest(inputs["teacher"]),
        inputs=inputs["teacher"],
    )


def arms_of(job: Job, inputs: Inputs) -> list[Arm]:
    """All models of a job that are no teacher, as ``Job.arms`` has them."""
    workdir = Folder(job.workdir)
    return [arm_of(job, role, seed, workdir / role / str(seed), inputs[f"{role}/{seed}"]) for role, seed in job.arms]


def arm_of(job: Job, role: str, seed: int, folder: Folder, inputs: dict[str, Any]) -> Arm:
    """One model that is no teacher, to be trained in ``folder``."""
    # A baseline has no teacher to be spared of.
    taught = job.taught.get(role)
    return Arm(
        role=role,
        seed=seed,
        folder=folder,
        model=job.student.model,
        lora=job.student.lora,
        train=job.student.train if taught else job.baseline_train,
        alpha=taught.alpha if taught else 0.0,
        temperature=job.distill.temperature,
        loss=job.distill.loss,
        standardise=job.distill.standardise,
        gate=taught.gate.of(job.task) if taught else None,
        features=taught.features if taught else None,
        digest=digest(inputs),
        inputs=inputs,
    )


def statuses_of(job: Job, inputs: Inputs, stage: str) -> list[Status]:
    """Whether a stage is done; for ``train`` one for each arm, none for a stage that it lacks."""
    workdir = Folder(job.workdir)
    if stage == "capture" and job.distill.soft_labels == "live":
        return []
    if stage == "train":
        return [status(arm.name, arm.folder, arm.inputs) for arm in arms_of(job, inputs)]
    name = "teacher" if stage == "teach" else stage
    return [status(name, workdir / FOLDERS[name], inputs[name])]


def _student(job: Job, train: Train) -> dict[str, Any]:
    """The student's part of the spec, trained by ``train``, flat."""
    tree = job.student.model_dump(mode="json")
    tree["model"] = _given(tree["model"])
    return flatten({**tree, "train": _without(train.model_dump(mode="json"), Train.RESOURCES)}, "student")


def _compared(job: Job, distill: Distill) -> dict[str, int]:
    """The rows among which a loss compares one with another; nothing for one that takes each row by itself."""
    within = distill.features is not None and distill.features.loss == "cka"
    return {"distill.features.micro_batch": job.student.train.rows_per_micro_batch} if within else {}


def _tuned(job: Job) -> dict[str, str]:
    """What identifies what tuning found, which a report shows; nothing of a job that was not tuned."""
    tuned = Folder(job.workdir) / "tune"
    return {"tuned": sha256(tuned, "trials.json")} if tuned.exists("trials.json") else {}


def _mixed(job: Job) -> list[str]:
    """What identifies the content of the stores that are mixed in."""
    return [sha256(Folder(other.store), MANIFEST) for other in job.distill.mix]


def _weights(model: Model) -> str | None:
    return brought_digest(model) if model.kind in ("hf", "gguf", "factory", "saved") else None


def _given(model: dict[str, Any]) -> dict[str, Any]:
    """A model of the spec without the kind ``saved``, which came later, where it is none: no digest changes."""
    return {kind: value for kind, value in model.items() if kind != "saved" or value is not None}


def _without(part: dict[str, Any] | None, names: Set[str]) -> dict[str, Any] | None:
    return part and {key: value for key, value in part.items() if key not in names}
