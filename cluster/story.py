"""What became of a gang, as far as its driver knows: why it failed, how large it was, and what it held and wasted."""

import itertools
from collections import Counter
from dataclasses import dataclass, field

from ray.exceptions import RayError

from cluster.errors import ClusterError, GangError, one_line
from cluster.mailbox import Mail
from cluster.meter import Usage
from cluster.power import Machine, Part, merged, parts_of
from cluster.standing import STANDING

Fatal = tuple[type[Exception], ...]


@dataclass
class Story:
    """What became of a gang.

    Attributes:
        started: when it was asked for, on the driver's clock.
        cpus, gpus: of each rank.
        failures: those since its last start.
        sizes: when it was of which size.
        machines: on how many starts of a rank each machine has held one.
        burnt: processor seconds and joules of the ranks that came to their end.
        kept: when all that had been done was last saved.
        left: whether the gang has saved all and left to start again, which is no failure.
        wasted: ranks times seconds from ``kept`` to the next start, each time a failure had ended the gang.
    """

    started: float
    cpus: float
    gpus: float
    failures: list[tuple[int, Exception]] = field(default_factory=list)
    sizes: list[tuple[float, int]] = field(default_factory=list)
    machines: Counter[Machine] = field(default_factory=Counter)
    burnt: list[tuple[Machine, float, dict[str, float]]] = field(default_factory=list)
    kept: float = 0.0
    left: bool = False
    wasted: float = 0.0

    def take(self, mail: Mail, now: float) -> None:
        """Learn what the mail says."""
        self.machines.update(mail.machines)
        self.burnt.extend(mail.burnt)
        self.left = self.left or mail.left
        if mail.kept or mail.left:
            self.kept = now
        if mail.sizes:
            if self.sizes:
                since, size = self.sizes[-1]
                if not self.left:
                    self.wasted += (now - max(self.kept, since)) * size
                    STANDING.survived("gang_restarts", len(mail.sizes))
                STANDING.survived("gang_resizes", int(mail.sizes[-1] != size))
            self.left = False
            self.failures.clear()
            self.sizes.extend((now, size) for size in mail.sizes)
        self.failures.extend(mail.failures)

    def usage(self, now: float) -> Usage:
        """What has been held by now; a gang that has started on several nodes is shared between them by its ranks."""
        ranks = self.rank_seconds(self.started, now)
        whole = sum(self.machines.values())
        parts: list[Part] = []
        for machine, count in self.machines.items():
            held = ranks * count / whole
            mine = [(cpu, joules) for where, cpu, joules in self.burnt if where == machine]
            summed: Counter[str] = Counter()
            for _, joules in mine:
                summed.update(joules)
            parts += parts_of(machine, held * self.cpus, held * self.gpus, sum(cpu for cpu, _ in mine), summed)
        return Usage(
            device_seconds=ranks * self.gpus,
            core_seconds=ranks * self.cpus,
            cpu_seconds=sum(cpu for _, cpu, _ in self.burnt),
            wall_seconds=now - self.started,
            wasted_core_seconds=self.wasted * self.cpus,
            wasted_device_seconds=self.wasted * self.gpus,
            parts=merged(tuple(parts)),
        )

    def rank_seconds(self, started: float, ended: float) -> float:
        """Ranks times seconds. The first start-up counts as the size it leads to, a later one as the size before it."""
        times = [started, *(when for when, _ in self.sizes), ended]
        sizes = [size for _, size in self.sizes]
        spans = [end - start for start, end in itertools.pairwise(times)]
        return sum(span * size for span, size in zip(spans, [*sizes[:1], *sizes], strict=True)) if sizes else 0.0


def cause(error: Exception, failures: list[tuple[int, Exception]], fatal: Fatal, what: str) -> Exception:
    """The one error that tells why the gang failed, out of all that its ranks and Ray said."""
    by_rank: dict[int, Exception] = dict(getattr(error, "worker_failures", {}))
    said = [*failures, *sorted(by_rank.items())]
    for _, failure in said:
        if isinstance(failure, (ClusterError, *fatal)) and type(failure) is not GangError:
            return failure
    for rank, failure in by_rank.items():
        if isinstance(failure, RayError) or "health check" in str(failure).lower():
            return GangError(f"{what} failed: the process of rank {rank} died; it was killed or ran out of memory")
    for rank, failure in said:
        return GangError(f"{what} failed on rank {rank}: {_said(failure)}")
    return GangError(f"{what} failed: {_said(error)}")


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, GangError) else one_line(error)
