"""The spec's kinds of actors, as the cluster takes them."""

from collections.abc import Callable

from cluster.shards import Crew, Worker
from distill_jobs.spec.capture import ActorKind


def crew_of(kind: ActorKind, make: Callable[[], Worker], *, alone: bool = False) -> Crew:
    """The crew of a kind of actors; with ``alone`` a single one of it."""
    return Crew(
        make,
        most=1 if alone else kind.most,
        least=1 if alone else kind.least,
        cpus=kind.cpus_per_actor,
        gpus=kind.gpus_per_actor,
        accelerator=kind.accelerator,
        resources=kind.resources,
        name=kind.name,
    )
