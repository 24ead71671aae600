"""The ledger: what each stage used and what that costs, in ``ledger.json``. A stage that is redone replaces its entry.

It is written whatever becomes of the tracking server. Its totals are sums of its entries, and nothing else.
"""

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

from cluster.errors import FileError
from cluster.files import Folder
from cluster.meter import COUNTED, Usage
from distill_jobs.costs.prices import PriceBook
from distill_jobs.errors import DataError

LEDGER = "ledger.json"


@dataclass(frozen=True)
class Entry:
    """What one stage used.

    Attributes:
        stage: its name, as in MLflow (``capture``, ``student/0``); ``total`` for the sum of all.
        usage: what was held, burnt and moved.
        usd: what that costs by the price book.
        accelerator: Ray's name of the accelerator's type; None without accelerators.
        started, ended: seconds since the epoch.
        bytes: what the stage left on disk.
    """

    stage: str
    usage: Usage
    usd: float
    accelerator: str | None
    started: float
    ended: float
    bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "usage": self.usage.as_dict()}

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Entry":
        return cls(**{**values, "usage": Usage.of(values["usage"])})


class Ledger:
    """The entries of one workdir.

    Raises:
        DataError: there is a ``ledger.json`` that can't be read; told at once, before anything is spent.
    """

    def __init__(self, workdir: Folder) -> None:
        self.workdir = workdir
        self.entries()

    def entries(self) -> list[Entry]:
        """All entries, in the order in which their stages first ended."""
        if not self.workdir.exists(LEDGER):
            return []
        try:
            return [Entry.of(values) for values in self.workdir.read_json(LEDGER)["entries"]]
        except (FileError, TypeError, KeyError, AttributeError):
            raise DataError(f"{self.workdir}/{LEDGER} is damaged: move it away, and redo the stages to count") from None

    def has(self, stage: str, since: float | None = None) -> bool:
        """Whether the stage has an entry, and one that ended no earlier than ``since``."""
        return any(e.stage == stage and (since is None or e.ended >= since) for e in self.entries())

    def record(
        self,
        stage: str,
        usage: Usage,
        usd: float,
        accelerator: str | None,
        started: float,
        ended: float,
        bytes: int = 0,
    ) -> Entry:
        """Enter a stage that has ended, in place of an earlier entry of the same stage."""
        named = ", ".join(sorted(usage.by_accelerator)) or accelerator
        entry = Entry(stage, usage, usd, named if usage.device_seconds else None, started, ended, bytes)
        by_stage = {e.stage: e for e in self.entries()} | {stage: entry}
        self.workdir.write_json(
            LEDGER,
            {
                "schema_version": 1,
                "currency": "USD",
                "entries": [e.as_dict() for e in by_stage.values()],
                "totals": total(list(by_stage.values())).as_dict(),
            },
        )
        return entry

    def record_overhead(
        self, stage: str, held: Usage, spent: Usage, prices: PriceBook, accelerator: str | None
    ) -> Entry:
        """Enter what a gang or pool held beyond what the entries of its own work account for: start-up and waiting."""
        usage = Usage(**{name: max(0, getattr(held, name) - getattr(spent, name)) for name in COUNTED})
        now = time.time()
        usd = prices.money(usage, accelerator)
        return self.record(stage, usage, usd, accelerator, now - usage.wall_seconds, now)

    def totals(self) -> Entry:
        """The sum of all entries."""
        return total(self.entries())


def total(entries: list[Entry]) -> Entry:
    """The sum of ``entries``, the same in whatever order they come. Wall seconds add up, too: stages run in turn."""
    usage = {name: _sum([getattr(e.usage, name) for e in entries]) for name in COUNTED}
    kinds = {kind for e in entries if e.accelerator for kind in e.accelerator.split(", ")}
    named = {name for e in entries for name in e.usage.by_accelerator}
    seconds = {name: _sum([e.usage.by_accelerator.get(name, 0.0) for e in entries]) for name in sorted(named)}
    return Entry(
        stage="total",
        usage=Usage(**usage, by_accelerator=seconds),
        usd=math.fsum(e.usd for e in entries),
        accelerator=", ".join(sorted(kinds)) or None,
        started=min((e.started for e in entries), default=0.0),
        ended=max((e.ended for e in entries), default=0.0),
        bytes=sum(e.bytes for e in entries),
    )


def metrics(entry: Entry) -> dict[str, float]:
    """An entry under the names that every stage has in MLflow."""
    usage = entry.usage
    found: dict[str, float] = {
        "cost/usd": entry.usd,
        "cost/cpu_hours": usage.core_seconds / 3600,
        "cost/cpu_busy_hours": usage.cpu_seconds / 3600,
        "cost/gpu_hours": usage.device_seconds / 3600,
        "cost/wall_seconds": usage.wall_seconds,
        "cost/rows": usage.rows,
        "cost/tokens": usage.tokens,
        "cost/bytes_read": usage.bytes_read,
        "cost/bytes_written": usage.bytes_written,
        "cost/bytes_kept": entry.bytes,
    }
    if usage.tokens:
        found["cost/usd_per_million_tokens"] = entry.usd / usage.tokens * 1e6
    return found


def _sum(values: list[Any]) -> Any:
    # Exact for floats, so that the order of the entries doesn't show in the last digit; counts stay whole numbers.
    return sum(values) if all(isinstance(v, int) for v in values) else math.fsum(values)
