"""What a piece of work used, measured in the process that did it, and summed wherever that is needed."""

import os
import resource
import socket
import time
from dataclasses import asdict, dataclass, field, fields, replace
from types import TracebackType
from typing import Any, Self

from cluster.power import Gauge, Part, merged, parts_of


@dataclass(frozen=True)
class Usage:
    """What was used. All fields add up, so that a stage's usage is the sum of its pieces'.

    Attributes:
        device_seconds: seconds for which accelerators were held (number of them × wall time).
        core_seconds: seconds for which CPU cores were held (number of them × wall time); what a bill counts.
        cpu_seconds: processor time really burnt (user and system), at most ``core_seconds`` where cores are fenced.
        wall_seconds: elapsed time of the piece.
        rows, tokens: input that was worked through.
        bytes_read, bytes_written: payload moved from and to the workdir.
        flops: floating-point operations of the models, by closed formulas.
        wasted_core_seconds, wasted_device_seconds: of those held, what went into attempts that came to nothing: lost,
            failed and tried again, or run twice.
        by_accelerator: of ``device_seconds`` those whose accelerator is known, by Ray's name of its type.
        parts: what was held by node and kind of device, where that is known.
    """

    device_seconds: float = 0.0
    core_seconds: float = 0.0
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    rows: int = 0
    tokens: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    flops: float = 0.0
    wasted_core_seconds: float = 0.0
    wasted_device_seconds: float = 0.0
    by_accelerator: dict[str, float] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()

    def __add__(self, other: "Usage") -> "Usage":
        counted = {name: getattr(self, name) + getattr(other, name) for name in COUNTED}
        names = {**self.by_accelerator, **other.by_accelerator}
        kinds = {n: self.by_accelerator.get(n, 0.0) + other.by_accelerator.get(n, 0.0) for n in names}
        return Usage(**counted, by_accelerator=kinds, parts=merged(self.parts + other.parts))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, the same before JSON and after it."""
        return {**asdict(self), "parts": [asdict(part) for part in self.parts]}

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Usage":
        known = {name: values.get(name, 0) for name in COUNTED}
        parts = tuple(Part(**part) for part in values.get("parts") or ())
        return cls(**known, by_accelerator=dict(values.get("by_accelerator") or {}), parts=parts)

    def beyond(self, other: "Usage") -> "Usage":
        """What this holds beyond ``other``, nothing where that is more; parts are told apart by their keys."""
        counted = {name: max(0, getattr(self, name) - getattr(other, name)) for name in COUNTED}
        kinds = {n: max(0.0, v - other.by_accelerator.get(n, 0.0)) for n, v in self.by_accelerator.items()}
        known = {part.key: part for part in other.parts}
        parts = tuple(_less(part, known[part.key]) if part.key in known else part for part in self.parts)
        return Usage(**counted, by_accelerator=kinds, parts=parts)


def _less(part: Part, other: Part) -> Part:
    names = ("seconds", "busy_seconds", "joules")
    return replace(part, **{name: max(0.0, getattr(part, name) - getattr(other, name)) for name in names})


COUNTED = tuple(f.name for f in fields(Usage) if f.name not in ("by_accelerator", "parts"))
"""The fields of ``Usage`` that are plain numbers."""


class Meter:
    """Measures the block it encloses, in this process: ``with Meter(cores=2) as meter: ...; meter.usage``.

    With a ``gauge`` the usage says on which node it was, and what its counters have measured.
    """

    def __init__(self, cores: float = 1.0, devices: float = 0.0, gauge: Gauge | None = None) -> None:
        self.cores, self.devices, self._gauge = cores, devices, gauge
        self.rows = self.tokens = self.bytes_read = self.bytes_written = 0
        self.flops = 0.0
        self.usage = Usage()

    def __enter__(self) -> Self:
        self._wall, self._cpu = time.perf_counter(), cpu_seconds()
        self._burnt = self._gauge.read() if self._gauge is not None else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.usage = self.read()

    def read(self) -> Usage:
        """What has been used since the block began."""
        wall, cpu = time.perf_counter() - self._wall, cpu_seconds() - self._cpu
        return Usage(
            device_seconds=wall * self.devices,
            core_seconds=wall * self.cores,
            cpu_seconds=cpu,
            wall_seconds=wall,
            rows=self.rows,
            tokens=self.tokens,
            bytes_read=self.bytes_read,
            bytes_written=self.bytes_written,
            flops=self.flops,
            parts=self._parts(wall, cpu),
        )

    def _parts(self, wall: float, cpu: float) -> tuple[Part, ...]:
        if self._gauge is None or self._burnt is None:
            return ()
        joules = (self._gauge.read() - self._burnt).joules
        return parts_of(self._gauge.machine, wall * self.cores, wall * self.devices, cpu, joules)


def cpu_seconds() -> float:
    """Processor time of this process and its finished children, in seconds."""
    mine, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return mine.ru_utime + mine.ru_stime + children.ru_utime + children.ru_stime


def peak_memory_bytes() -> int:
    """The most resident memory this process has held, in bytes (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def writer_name() -> str:
    """Who did a piece of work: host and process, for commit records."""
    return f"{socket.gethostname()}:{os.getpid()}"
