"""What a piece of work used, measured in the process that did it, and summed wherever that is needed."""

import os
import resource
import socket
import time
from dataclasses import asdict, dataclass, field, fields
from types import TracebackType
from typing import Any, Self


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
        by_accelerator: of ``device_seconds`` those whose accelerator is known, by Ray's name of its type.
    """

    device_seconds: float = 0.0
    core_seconds: float = 0.0
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    rows: int = 0
    tokens: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    by_accelerator: dict[str, float] = field(default_factory=dict)

    def __add__(self, other: "Usage") -> "Usage":
        counted = {name: getattr(self, name) + getattr(other, name) for name in COUNTED}
        names = {**self.by_accelerator, **other.by_accelerator}
        kinds = {n: self.by_accelerator.get(n, 0.0) + other.by_accelerator.get(n, 0.0) for n in names}
        return Usage(**counted, by_accelerator=kinds)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Usage":
        known = {name: values.get(name, 0) for name in COUNTED}
        return cls(**known, by_accelerator=dict(values.get("by_accelerator") or {}))


COUNTED = tuple(f.name for f in fields(Usage) if f.name != "by_accelerator")
"""The fields of ``Usage`` that are plain numbers."""


class Meter:
    """Measures the block it encloses, in this process: ``with Meter(cores=2) as meter: ...; meter.usage``."""

    def __init__(self, cores: float = 1.0, devices: float = 0.0) -> None:
        self.cores, self.devices = cores, devices
        self.rows = self.tokens = self.bytes_read = self.bytes_written = 0
        self.usage = Usage()

    def __enter__(self) -> Self:
        self._wall, self._cpu = time.perf_counter(), cpu_seconds()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.usage = self.read()

    def read(self) -> Usage:
        """What has been used since the block began."""
        wall = time.perf_counter() - self._wall
        return Usage(
            device_seconds=wall * self.devices,
            core_seconds=wall * self.cores,
            cpu_seconds=cpu_seconds() - self._cpu,
            wall_seconds=wall,
            rows=self.rows,
            tokens=self.tokens,
            bytes_read=self.bytes_read,
            bytes_written=self.bytes_written,
        )


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
