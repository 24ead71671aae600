"""The ledger: what each stage used and what that costs, in ``ledger.json``. A stage that is redone replaces its entry.

It is written whatever becomes of the tracking server. Its totals are sums of its entries, and an entry's money and
energy are sums of its ``parts``, one for each node and kind of device. Schema 2:

    {"schema_version": 2, "currency": "USD", "grid": {"kg_per_kwh", "pue", "source"}, "entries": [entry …],
     "totals": entry}

An entry has the attributes of ``Entry``; ``usage`` those of ``cluster.meter.Usage``, each of ``parts`` those of
``PartCost``. Version 1 had none of the parts, energy and prices; it is still read, as of unknown energy.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from cluster.errors import FileError
from cluster.files import Folder
from cluster.meter import COUNTED, Usage
from cluster.power import merged
from distill_jobs.errors import DataError

LEDGER = "ledger.json"
_HEADLINES = ("usd", "gpu_hours", "kwh")
SCHEMA = 2

Kind = Literal["measured", "unfinished", "declared", "storage"]


@dataclass(frozen=True)
class PartCost:
    """What was held of one kind of device on one node, and what that costs.

    Attributes:
        node: its host name; empty where it isn't known.
        device: ``CPU``, or Ray's name of the accelerator's type.
        model: the maker's name of it.
        hours: held, number of cores or accelerators × wall time.
        usd: as counted.
        kwh, kg_co2e: with the building's share (PUE).
        how: ``measured: nvml``, or what was estimated from what.
    """

    node: str
    device: str
    model: str
    hours: float
    usd: float
    kwh: float
    kg_co2e: float
    how: str

    @classmethod
    def of(cls, values: dict[str, Any]) -> "PartCost":
        return cls(**values)


@dataclass(frozen=True)
class Entry:
    """What one stage used. All numbers but ``mfu``, ``started`` and ``ended`` add up.

    Attributes:
        stage: its name, as in MLflow (``capture``, ``student/0``); ``total`` for the sum of all.
        usage: what was held, burnt, moved and wasted.
        usd: what that costs by the price book: of machines, or of storage for the entry ``storage``.
        accelerator: Ray's name of the accelerator's type; None without accelerators.
        started, ended: seconds since the epoch.
        bytes: what the stage left on disk.
        kind: ``measured``; ``unfinished`` for attempts at a stage that has not ended yet; ``declared`` for what the
            owner of a teacher says; ``storage`` for keeping what the stages left.
        usd_on_demand, usd_spot: what the same would cost at either kind of price.
        usd_month: for keeping ``bytes`` for a month.
        kwh: energy, of which ``kwh_measured`` by counters; the rest is estimated.
        kg_co2e: of ``kwh``.
        flops_possible: what the accelerators held could have computed by their data sheets; 0 where that isn't known.
        mfu: ``usage.flops`` / ``flops_possible``; None with the reason in ``mfu_why``.
        parts: by node and kind of device.
    """

    stage: str
    usage: Usage
    usd: float
    accelerator: str | None
    started: float
    ended: float
    bytes: int = 0
    kind: Kind = "measured"
    usd_on_demand: float = 0.0
    usd_spot: float = 0.0
    usd_month: float = 0.0
    kwh: float = 0.0
    kwh_measured: float = 0.0
    kg_co2e: float = 0.0
    flops_possible: float = 0.0
    mfu: float | None = None
    mfu_why: str | None = None
    parts: tuple[PartCost, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "usage": self.usage.as_dict()}

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Entry":
        parts = tuple(PartCost.of(part) for part in values.get("parts", ()))
        return cls(**{**values, "usage": Usage.of(values["usage"]), "parts": parts})


SUMMED = ("usd", "usd_on_demand", "usd_spot", "usd_month", "kwh", "kwh_measured", "kg_co2e", "flops_possible", "bytes")
"""The fields of ``Entry`` that are plain sums in a total."""


class Ledger:
    """The entries of one workdir.

    Args:
        grid: gives what is told of the electricity beside the entries.

    Raises:
        DataError: there is a ``ledger.json`` that can't be read; told at once, before anything is spent.
    """

    def __init__(self, workdir: Folder, grid: Callable[[], dict[str, Any] | None] = lambda: None) -> None:
        self.workdir, self._grid = workdir, grid
        self.entries()

    def entries(self) -> list[Entry]:
        """All entries, in the order in which their stages first ended."""
        if not self.workdir.exists(LEDGER):
            return []
        try:
            tree = self.workdir.read_json(LEDGER)
            if tree.get("schema_version", SCHEMA) > SCHEMA:
                raise DataError(f"{self.workdir}/{LEDGER} is of a later version of distill-jobs: use that one")
            return [Entry.of(values) for values in tree["entries"]]
        except (FileError, TypeError, KeyError, AttributeError):
            raise DataError(f"{self.workdir}/{LEDGER} is damaged: move it away, and redo the stages to count") from None

    def has(self, stage: str, since: float | None = None) -> bool:
        """Whether the stage has an entry, and one that ended no earlier than ``since``."""
        return any(e.stage == stage and (since is None or e.ended >= since) for e in self.entries())

    def find(self, stage: str) -> Entry | None:
        """The entry of a stage."""
        return next((entry for entry in self.entries() if entry.stage == stage), None)

    def enter(self, entry: Entry) -> Entry:
        """Enter a stage, in place of an earlier entry of the same stage."""
        self._write({e.stage: e for e in self.entries()} | {entry.stage: entry})
        return entry

    def drop(self, stage: str) -> None:
        """Take the entry of a stage away, where there is one."""
        known = {e.stage: e for e in self.entries()}
        if known.pop(stage, None) is not None:
            self._write(known)

    def totals(self) -> Entry:
        """The sum of all entries."""
        return total(self.entries())

    def spent(self) -> float:
        """US dollars for machines, which a budget is about: without what is declared, and without storage."""
        return math.fsum(e.usd for e in self.entries() if e.kind in ("measured", "unfinished"))

    def _write(self, by_stage: dict[str, Entry]) -> None:
        self.workdir.write_json(
            LEDGER,
            {
                "schema_version": SCHEMA,
                "currency": "USD",
                "grid": self._grid(),
                "entries": [e.as_dict() for e in by_stage.values()],
                "totals": total(list(by_stage.values())).as_dict(),
            },
        )


def unfinished(stage: str) -> str:
    """The name of the entry of a stage's attempts that have not come to its end."""
    return f"{stage}/unfinished"


def total(entries: list[Entry]) -> Entry:
    """The sum of ``entries``, the same in whatever order they come. Wall seconds add up, too: stages run in turn."""
    usage = {name: _sum([getattr(e.usage, name) for e in entries]) for name in COUNTED}
    kinds = {kind for e in entries if e.accelerator for kind in e.accelerator.split(", ")}
    named = {name for e in entries for name in e.usage.by_accelerator}
    seconds = {name: _sum([e.usage.by_accelerator.get(name, 0.0) for e in entries]) for name in sorted(named)}
    parts = merged(tuple(sorted((part for e in entries for part in e.usage.parts), key=_in_order)))
    entry = Entry(
        stage="total",
        usage=Usage(**usage, by_accelerator=seconds, parts=parts),
        accelerator=", ".join(sorted(kinds)) or None,
        started=min((e.started for e in entries), default=0.0),
        ended=max((e.ended for e in entries), default=0.0),
        parts=_merged([part for e in entries for part in e.parts]),
        **{name: _sum([getattr(e, name) for e in entries]) for name in SUMMED},
    )
    # Of the stages alone that a peak is known for: else the others' operations would count, and not their time.
    known = [e for e in entries if e.flops_possible]
    return replace(entry, **mfu(math.fsum(e.usage.flops for e in known), entry.flops_possible, bool(kinds)))


def mfu(flops: float, possible: float, accelerators: bool) -> dict[str, Any]:
    """Model FLOPs utilisation: operations of the models by closed formulas / what the devices held could have done.

    The devices count for as long as they are held, start-up and waiting included. See Chowdhery et al. 2022, "PaLM".
    """
    if not accelerators:
        return {"mfu": None, "mfu_why": "no accelerators, and a processor's peak is on no data sheet"}
    if not possible:
        return {"mfu": None, "mfu_why": "the accelerator's peak isn't known here"}
    if not flops:
        return {"mfu": None, "mfu_why": "no formula for the models' operations, or nothing was computed"}
    return {"mfu": flops / possible, "mfu_why": None}


def headlines(entry: Entry) -> dict[str, float]:
    """Those of ``metrics`` that stand on the pipeline's own run.

    MLflow's page for comparing shows six rows in the order of the alphabet, and quality is to be among them.
    """
    return {name: value for name, value in metrics(entry).items() if name.removeprefix("cost/") in _HEADLINES}


def metrics(entry: Entry) -> dict[str, float]:
    """An entry under the names that every stage has in MLflow."""
    usage = entry.usage
    found: dict[str, float] = {
        "cost/usd": entry.usd,
        "cost/cpu_hours": usage.core_seconds / 3600,
        "cost/cpu_busy_hours": usage.cpu_seconds / 3600,
        "cost/gpu_hours": usage.device_seconds / 3600,
        "cost/wasted_cpu_hours": usage.wasted_core_seconds / 3600,
        "cost/wasted_gpu_hours": usage.wasted_device_seconds / 3600,
        "cost/wall_seconds": usage.wall_seconds,
        "cost/kwh": entry.kwh,
        "cost/kwh_measured": entry.kwh_measured,
        "cost/kg_co2e": entry.kg_co2e,
        "cost/flops": usage.flops,
        "cost/rows": usage.rows,
        "cost/tokens": usage.tokens,
        "cost/bytes_read": usage.bytes_read,
        "cost/bytes_written": usage.bytes_written,
        "cost/bytes_kept": entry.bytes,
    }
    if entry.mfu is not None:
        found["cost/mfu"] = entry.mfu
    if usage.tokens:
        found["cost/usd_per_million_tokens"] = entry.usd / usage.tokens * 1e6
    return found


def _merged(parts: list[PartCost]) -> tuple[PartCost, ...]:
    """One part for each node, device, model and way in which its energy is known."""
    found: dict[tuple[str, str, str, str], list[PartCost]] = {}
    for part in parts:
        found.setdefault((part.node, part.device, part.model, part.how), []).append(part)
    names = ("hours", "usd", "kwh", "kg_co2e")
    return tuple(
        PartCost.of({**asdict(some[0]), **{name: math.fsum(getattr(part, name) for part in some) for name in names}})
        for _, some in sorted(found.items())
    )


def _in_order(part: Any) -> Any:
    return (part.key, part.seconds, part.busy_seconds, part.joules)


def _sum(values: list[Any]) -> Any:
    # Exact for floats, so that the order of the entries doesn't show in the last digit; counts stay whole numbers.
    return sum(values) if all(isinstance(v, int) for v in values) else math.fsum(values)
