"""What a training asks of the cluster, and what its ranks are sent to do."""

import uuid

from cluster.files import Folder
from cluster.gang import Gang
from distill_jobs.spec import Job, Train
from distill_jobs.training.task import Arm, TrainTask


def gang_of(train: Train) -> Gang:
    """The gang that a training runs on."""
    sizes = train.gang_sizes
    return Gang(
        workers=sizes[-1],
        cpus=train.cpus_per_worker,
        gpus=train.gpus_per_worker,
        sizes=sizes if train.least_workers < train.most_workers else (),
        max_failures=train.max_failures,
    )


def task_of(job: Job, arms: tuple[Arm, ...], train: Train, store: Folder | None) -> TrainTask:
    """Arms of a job for one gang; without ``store`` they read the prepared data, or a live teacher."""
    workdir, gang = Folder(job.workdir), gang_of(train)
    return TrainTask(
        arms=arms,
        data=workdir / "data",
        store=store,
        teacher=workdir / "teacher" / "model",
        cores=gang.workers * gang.cpus,
        devices=gang.workers * gang.gpus,
        reading=job.reading,
        mix=job.distill.mix,
        teachers=job.distill,
        live=job.capture if store is None and arms[0].role != "teacher" else None,
        session=uuid.uuid4().hex,
    )
