"""The loop that keeps actors at work: it gives out shards, replaces who is lost, and tells how far the work has come.

It speaks to actors through a small protocol alone (``cluster.backend``), and reads no clock but the backend's: Ray's
actors are one backend, the stand-ins of a simulation another. What it does for a result doesn't depend on how many
actors there are, and what it holds doesn't depend on how many shards.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np

from cluster.backend import Backend, Draining, Ended, Lost, Placed, Ready, Told
from cluster.errors import ResourceError, ShardError, TransientFileError
from cluster.logs import TOLD
from cluster.meter import Usage
from cluster.notice import HandBack
from cluster.pool import PoolReport, Progress, Tally, named
from cluster.schedule import Schedule
from cluster.standing import STANDING
from cluster.team import Crew, Member, Team

_log = logging.getLogger(__name__)
_PROGRESS_SECONDS = 1.0
_LOOK_SECONDS = 5.0
_PATIENCE_SECONDS = 600.0
_FAILED_PAUSE, _TRANSIENT_PAUSE, _START_PAUSE, _LONGEST_START_PAUSE = 0.1, 1.0, 0.5, 30.0


class Supervisor:
    """One map, from the first actor's start to the last shard's result; see ``cluster.shards.map_shards``."""

    def __init__(
        self,
        backend: Backend,
        crews: Sequence[Crew],
        shards: Sequence[Any],
        on_result: Callable[[Any, Any], None],
        *,
        retries: int = 3,
        what: str = "work",
        on_progress: Callable[[Progress], None] | None = None,
        on_usage: Callable[[Usage], None] = lambda _: None,
    ) -> None:
        self.backend, self.shards, self.on_result, self.on_progress = backend, shards, on_result, on_progress
        self.on_usage = on_usage
        self.retries, self.what = retries, what
        self.schedule = Schedule(len(shards), len(crews), retries)
        self.team = Team(crews)
        self.lost = 0
        self._tally = Tally()
        self.first: float | None = None
        self.began = self.now = backend.now()
        self._draining: Mapping[str, float | None] = {}
        self._told_at = self._looked_at = self._enough_at = self.began
        self._answers: dict[type, Callable[[Any], None]] = {
            Placed: self._placed,
            Ready: self._ready,
            Ended: self._ended,
            Lost: self._lost,
            Told: self._told,
            Draining: self._drain,
        }

    def run(self) -> PoolReport:
        """Work until every shard is done.

        Raises:
            ShardError, ResourceError, ClusterError, or a fatal error of the worker.
        """
        try:
            while self.schedule.open:
                self._staff()
                for event in self.backend.events(self._timeout()):
                    self.now = self.backend.now()
                    self._answers[type(event)](event)
                self.now = self.backend.now()
                self._look_around()
        except BaseException:
            self.now = self.backend.now()
            # Whoever may stop the work for what it uses has no more to stop: what was used is told all the same.
            with contextlib.suppress(Exception):
                self.on_usage(self._usage()[0])
            raise
        finally:
            self._tally.faults(self.schedule, self.lost)
            STANDING.waiting = None
        self._report_progress()
        usage, by_crew = self._usage()
        schedule, first = self.schedule, self.now if self.first is None else self.first
        return PoolReport(
            usage,
            by_crew,
            schedule.retried,
            schedule.handed_back,
            self.lost,
            schedule.duplicated,
            first - self.began,
        )

    def _staff(self) -> None:
        """Ask for actors that are wanted, let go those that are not, and give work to the idle."""
        left, untouched = self.schedule.open, self.schedule.untouched
        for kind, crew in enumerate(self.team.kinds):
            wanted = min(crew.crew.most, left)
            if crew.alive < wanted and self.now >= crew.resume_at:
                for _ in range(wanted - crew.alive):
                    self.team.add(self.backend.start(kind), kind, self.now)
            if not untouched and crew.alive > 2 * left and (crew.idle or crew.unplaced):
                self._let_go(kind, crew.alive - 2 * left)
            while crew.idle and self._give(next(iter(crew.idle))):
                pass

    def _let_go(self, kind: int, count: int) -> None:
        # One actor for each shard that is left, and one that may have to run a copy of it: nobody else is of use.
        crew = self.team.kinds[kind]
        for actor in list(islice(chain(crew.unplaced, crew.idle), count)):
            self._retire(actor)

    def _give(self, actor: int) -> bool:
        member = self.team.members[actor]
        shard = self.schedule.take(actor, member.kind, self.now)
        if shard is None:
            self.team.rest(actor)
            return False
        self.team.work(actor)
        if self.first is None:
            self.first = self.now
        self.backend.give(actor, self._shard(shard))
        return True

    def _timeout(self) -> float:
        idle = [kind for kind, crew in enumerate(self.team.kinds) if crew.idle]
        wake = self.schedule.wake_at(idle, self.now) if idle else None
        times = [self.now + _PROGRESS_SECONDS] if wake is None else [self.now + _PROGRESS_SECONDS, wake]
        times += [crew.resume_at for crew in self.team.kinds if crew.resume_at > self.now]
        return max(0.0, min(times) - self.now)

    def _placed(self, event: Placed) -> None:
        wanted = self.team.place(event.actor, event.node, event.age, self.now, event.machine)
        if wanted and event.node in self._draining:
            self._retire(event.actor)

    def _ready(self, event: Ready) -> None:
        member = self.team.members.get(event.actor)
        if member is None:
            return
        if event.error is None:
            self.team.kinds[member.kind].failed_starts = 0
            self.team.rest(event.actor)
            self._give(event.actor)
            return
        if not isinstance(event.error, (ShardError, TransientFileError)):
            raise event.error
        self._retire(event.actor, failed=True)
        self._start_failed(member.kind, str(event.error))

    def _start_failed(self, kind: int, cause: str) -> None:
        crew = self.team.kinds[kind]
        crew.failed_starts += 1
        pause = _START_PAUSE * 2.0 ** min(crew.failed_starts - 1, 10)
        crew.resume_at = self.now + min(pause, _LONGEST_START_PAUSE)
        if crew.failed_starts > self.retries and not self.team.any_placed:
            raise ShardError(
                f"{self.what}: no actor of {crew.crew.name} can start; the last one failed because {cause}"
            )

    def _ended(self, event: Ended) -> None:
        member = self.team.members.get(event.actor)
        if member is None:
            return
        self.team.burn(event.actor, event.cpu_seconds, event.joules)
        member.leaving = member.leaving or event.leaving
        if event.told:
            self.team.tell(event.actor, event.told)
        if event.error is None:
            shard = self.schedule.finish(event.actor, self.now)
            if shard is not None:
                STANDING.observe("shard_seconds", self.schedule.lasted)
                self.on_result(self._shard(shard), event.value)
        else:
            self._failed(event.actor, member, event.error)
        if member.leaving:
            self._retire(event.actor)
        else:
            self._give(event.actor)

    def _failed(self, actor: int, member: Member, error: Exception) -> None:
        if self.schedule.shard_of(actor) is None or isinstance(error, HandBack):
            member.leaving = member.leaving or isinstance(error, HandBack)
            self.schedule.hand_back(actor, self.now)
        elif isinstance(error, TransientFileError):
            self._retry(actor, str(error), _TRANSIENT_PAUSE)
        elif isinstance(error, ShardError):
            self._retry(actor, str(error), _FAILED_PAUSE)
        else:
            raise error

    def _retry(self, actor: int, cause: str, pause: float) -> None:
        if (failed := self.schedule.shard_of(actor)) is not None:
            name = named(self._shard(failed))
            _log.warning("%s: shard %s has failed: %s", self.what, name, cause, extra={**TOLD, "shard": name})
        if (hopeless := self.schedule.fail(actor, self.now, pause)) is not None:
            shard, failures = hopeless
            raise ShardError(
                f"{self.what}: shard {named(self._shard(shard))} failed {failures} times, the last time because {cause}"
            )

    def _lost(self, event: Lost) -> None:
        member = self.team.members.get(event.actor)
        if member is None:
            return
        self.lost += 1
        _log.warning("%s: an actor is lost: %s", self.what, event.cause, extra=TOLD)
        if event.node_died and member.node is not None:
            self._tally.lost_nodes.add(member.node)
        self.team.remove(event.actor, self.now, failed=not member.ready)
        if event.excused or member.leaving:
            self.schedule.hand_back(event.actor, self.now)
        elif member.ready:
            self._retry(event.actor, event.cause, _FAILED_PAUSE)
        elif not event.node_died:
            self._start_failed(member.kind, event.cause)

    def _told(self, event: Told) -> None:
        self.team.tell(event.actor, event.numbers)
        if event.leaving:
            self._send_away(event.actor, None, told=True)

    def _drain(self, event: Draining) -> None:
        self._draining = event.nodes
        for actor, member in list(self.team.members.items()):
            if member.node is not None and member.node in event.nodes:
                self._send_away(actor, event.nodes[member.node])

    def _send_away(self, actor: int, seconds: float | None, told: bool = False) -> None:
        member = self.team.members.get(actor)
        if member is None or member.leaving:
            return
        member.leaving = True
        if not member.busy:
            self._retire(actor)
        elif not told:
            self.backend.leave(actor, seconds)

    def _retire(self, actor: int, failed: bool = False) -> None:
        self.backend.stop(actor)
        self.team.remove(actor, self.now, failed)

    def _usage(self) -> tuple[Usage, dict[str, Usage]]:
        return self.team.usage(self.now, self.now - self.began, self.schedule.wasted(self.now))

    def _look_around(self) -> None:
        if self.now - self._told_at >= _PROGRESS_SECONDS:
            self._report_progress()
        if self.now - self._looked_at < _LOOK_SECONDS:
            return
        self._looked_at = self.now
        problem = None if self.team.any_placed else self.backend.shortage()
        STANDING.waiting = None if problem is None else f"{self.what} {problem}"
        if problem is None:
            self._enough_at = self.now
        elif self.now - self._enough_at > _PATIENCE_SECONDS:
            raise ResourceError(f"{self.what}: nobody can work for {_PATIENCE_SECONDS / 60:.0f} minutes: {problem}")

    def _report_progress(self) -> None:
        self._told_at = self.now
        usage, by_crew = self._usage()
        self.on_usage(usage)
        self._tally.faults(self.schedule, self.lost)
        self._tally.numbers(self.schedule, self.team)
        if self.on_progress is None:
            return
        schedule, team = self.schedule, self.team
        done = (schedule.done, schedule.total, team.ready, len(team.members) - team.ready)
        self.on_progress(Progress(*done, schedule.retried, self.lost, dict(team.told), usage, by_crew))

    def _shard(self, number: int) -> Any:
        shard = self.shards[number]
        return shard.item() if isinstance(shard, np.generic) else shard
