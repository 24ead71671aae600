"""What a job holds at once of a cluster: told from the spec alone."""

from collections.abc import Mapping

from distill_jobs.spec import Job

Worker = Mapping[str, float]


def needs_of(job: Job) -> dict[str, list[tuple[int, Worker]]]:
    """By the setting that asks for them: so many workers, and what each of them holds by Ray's names.

    A stage runs when the one before it has ended, so that each entry has the cluster for itself.
    """
    data = job.data
    needs = {"data.actors": [(data.actors, _worker(data.cpus_per_actor))]}
    crews = [
        (kind.least, {**_worker(kind.cpus_per_actor, kind.gpus_per_actor), **kind.resources})
        for kind in job.capture.crews
    ]
    for i, crew in enumerate(crews):
        needs["capture.actors" if len(crews) == 1 else f"capture.kinds.{i}.actors"] = [crew]
    if job.distill.soft_labels == "live":
        student = job.student.train
        gang = (student.most_workers, _worker(student.cpus_per_worker, student.gpus_per_worker))
        needs["distill.soft_labels live: student.train.workers with capture.actors"] = [gang, *crews]
    for name, train in (("teacher", job.teacher.train), ("student", job.student.train)):
        if train is not None:
            rank = _worker(train.cpus_per_worker, train.gpus_per_worker)
            needs[f"{name}.train.workers"] = [(train.least_workers, rank)]
    return needs


def _worker(cpus: float, gpus: float = 0.0) -> Worker:
    return {"CPU": cpus, "GPU": gpus}
