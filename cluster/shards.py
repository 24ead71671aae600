"""Map shards over crews of Ray actors: each worker is made once, dead actors are replaced, failed shards retried."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from cluster.actors import Fatal, RayActors
from cluster.errors import ResourceError
from cluster.pool import PoolReport, Progress
from cluster.session import Session
from cluster.standing import STANDING
from cluster.supervise import Supervisor
from cluster.team import Crew, Worker

__all__ = ["Crew", "PoolReport", "Progress", "Worker", "map_shards"]


def map_shards(
    session: Session,
    crews: Crew | Sequence[Crew],
    shards: Sequence[Any],
    on_result: Callable[[Any, Any], None],
    *,
    retries: int = 3,
    fatal: Fatal = (),
    what: str = "work",
    on_progress: Callable[[Progress], None] | None = None,
) -> PoolReport:
    """Run every shard once to success; ``on_result(shard, value)`` is called here, in order of completion.

    All actors are asked for at the start, so that an autoscaler sees what is wanted; work begins with the first that
    is there, and each takes shards at its own speed. Lost actors are replaced as soon as there is room. When nothing
    else is left, an idle actor runs a slow shard a second time; the first result counts.

    An actor that is told to go (SIGTERM, its node drained) finishes its shard or gives it back (``cluster.notice``),
    which costs no retry. An exception of a ``fatal`` type, or a ``ClusterError``, ends the work at once: trying again
    would not help. Any other, a ``TransientFileError``, and the death of an actor have the shard tried again after a
    pause that grows with its failures.

    Args:
        shards: any sequence with a cheap ``[]``, such as a range or a NumPy array; never copied.
        retries: how often one shard may fail and be tried again.
        what: what the work is called in messages.
        on_progress: called about once a second, and at the end.

    Raises:
        ResourceError: the cluster has no room for the least that the crews ask for, and won't grow.
        ShardError: a shard failed more than ``retries`` times; names the shard and the last cause.
        ClusterError, or one of ``fatal``: as a worker raised it.
    """
    if not len(shards):
        return PoolReport()
    several = (crews,) if isinstance(crews, Crew) else tuple(crews)
    with RayActors(session, several, len(shards), fatal) as actors:
        _check_room(session, actors, what)
        spent = session.spending()
        work = Supervisor(
            actors, several, shards, on_result, retries=retries, what=what, on_progress=on_progress, on_usage=spent
        )
        return work.run()


def _check_room(session: Session, actors: RayActors, what: str) -> None:
    problem = actors.shortage()
    if problem is None:
        return
    if not session.grows:
        raise ResourceError(f"{what} {problem}")
    STANDING.waiting = f"{what} {problem}"
    print(f"{what} {problem}: waiting for it to grow", file=sys.stderr, flush=True)
