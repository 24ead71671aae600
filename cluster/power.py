"""Which machine a process runs on, and the energy it is accountable for, read from the machine's own counters.

Accelerators: NVML's energy counter of the devices that are visible here, of which this process counts the share that it
holds. Processors: RAPL's counter of all packages, of which it counts its cores' share of the machine's. Where a counter
can't be read there are no joules from it, and whoever reckons has to estimate.
"""

import contextlib
import functools
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

_POWERCAP = Path("/sys/class/powercap")
NVML, RAPL = "nvml", "rapl"


@dataclass(frozen=True, order=True)
class Machine:
    """A node as its bill and its data sheet know it.

    Attributes:
        host: its name.
        cpu: the maker's name of its processor; empty where unknown.
        threads: of one processor; 0 on a virtual machine, which hides how many there are.
        accelerator: Ray's name of its accelerators' type, such as ``H100``; empty without any.
        accelerator_model: what the driver calls them, such as ``NVIDIA H100 80GB HBM3``.
    """

    host: str
    cpu: str = ""
    threads: int = 0
    accelerator: str = ""
    accelerator_model: str = ""


@dataclass(frozen=True)
class Part:
    """What was held of one kind of device on one node.

    Attributes:
        node: the node's host name; empty where it isn't known.
        device: ``CPU``, or Ray's name of the accelerator's type.
        model, threads: of the processor or accelerator, as in ``Machine``.
        seconds: for which cores or accelerators were held (number of them × wall time).
        busy_seconds: processor time burnt; 0 for accelerators.
        joules: measured; 0 where nothing was.
        counter: what measured them, ``nvml`` or ``rapl``; empty where nothing did.
    """

    node: str
    device: str
    model: str = ""
    threads: int = 0
    seconds: float = 0.0
    busy_seconds: float = 0.0
    joules: float = 0.0
    counter: str = ""

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        """Parts with the same key add up."""
        return (self.node, self.device, self.model, self.threads, self.counter)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def merged(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """One part for each key, in order."""
    found: dict[tuple[str, str, str, int, str], tuple[float, float, float]] = {}
    for part in parts:
        seconds, busy, joules = found.get(part.key, (0.0, 0.0, 0.0))
        found[part.key] = (seconds + part.seconds, busy + part.busy_seconds, joules + part.joules)
    return tuple(
        Part(node, device, model, threads, *found[key], counter)
        for key in sorted(found)
        for node, device, model, threads, counter in (key,)
    )


@dataclass(frozen=True)
class Burnt:
    """What a process has burnt: joules by the counter that measured them."""

    joules: Mapping[str, float]

    def __sub__(self, before: "Burnt") -> "Burnt":
        return Burnt({name: value - before.joules.get(name, 0.0) for name, value in self.joules.items()})


class Gauge:
    """Reads the counters of this machine for a process that holds ``cores`` and ``devices`` of it."""

    def __init__(self, cores: float, devices: float) -> None:
        self.machine = this_machine(devices > 0)
        self._cores = min(1.0, cores / (os.cpu_count() or 1))
        self._rapl = _Rapl.open()
        self._nvml = _Nvml.open(devices) if devices else None

    def read(self) -> Burnt:
        """Joules up to now, from any moment on: only differences mean something."""
        found = {}
        if self._rapl is not None:
            found[RAPL] = self._rapl.joules() * self._cores
        if self._nvml is not None and (joules := self._nvml.joules()) is not None:
            found[NVML] = joules
        return Burnt(found)


def parts_of(
    machine: Machine, core_seconds: float, device_seconds: float, cpu_seconds: float, joules: Mapping[str, float]
) -> tuple[Part, ...]:
    """What was held on ``machine``, by device."""
    counters = {name: name if name in joules else "" for name in (RAPL, NVML)}
    found = [
        Part(machine.host, "CPU", machine.cpu, machine.threads, core_seconds, cpu_seconds, joules.get(RAPL, 0.0),
             counters[RAPL])
    ]  # fmt: skip
    if device_seconds:
        found.append(
            Part(machine.host, machine.accelerator, machine.accelerator_model, 0, device_seconds, 0.0,
                 joules.get(NVML, 0.0), counters[NVML])
        )  # fmt: skip
    return tuple(found)


@functools.cache
def this_machine(accelerators: bool = False) -> Machine:
    """This node; its accelerators are looked up only where some are held."""
    flags, model, processors = _cpuinfo()
    threads = 0 if "hypervisor" in flags else (os.cpu_count() or 0) // processors
    kind, name = _accelerator() if accelerators else ("", "")
    return Machine(socket.gethostname(), model, threads, kind, name)


def _cpuinfo() -> tuple[set[str], str, int]:
    """The processor's flags, its name, and how many there are."""
    found: dict[str, set[str]] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), set()).add(value.strip())
    flags, names = found.get("flags", {""}), found.get("model name", {""})
    return set(min(flags).split()), min(names), len(found.get("physical id", {""}))


def _accelerator() -> tuple[str, str]:
    """Ray's name of this node's type, and the driver's."""
    kind = name = ""
    with contextlib.suppress(Exception):
        import ray

        here = ray.get_runtime_context().get_node_id()
        resources = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
        kind = min((key.partition(":")[2] for key in resources if key.startswith("accelerator_type:")), default="")
    with contextlib.suppress(Exception):
        import pynvml

        pynvml.nvmlInit()
        handles = _visible(pynvml)
        found = pynvml.nvmlDeviceGetName(handles[0])
        name = found.decode() if isinstance(found, bytes) else str(found)
    return kind, name


class _Rapl:
    """The packages' counters in microjoules, each with the value at which it begins anew."""

    def __init__(self, packages: list[tuple[Path, float]]) -> None:
        self._packages = packages
        self._last = [_microjoules(path) for path, _ in packages]
        self._sum = 0.0

    @classmethod
    def open(cls, folder: Path = _POWERCAP) -> "Self | None":
        found = []
        with contextlib.suppress(OSError, ValueError):
            # intel-rapl:0 is a package (also of AMD's), intel-rapl:0:0 one of its parts, counted in it already.
            for zone in sorted(folder.glob("intel-rapl:*")):
                if zone.name.count(":") == 1 and (zone / "name").read_text().startswith("package"):
                    _microjoules(zone / "energy_uj")
                    found.append((zone / "energy_uj", _microjoules(zone / "max_energy_range_uj")))
            return cls(found) if found else None
        return None

    def joules(self) -> float:
        """Of all packages since this was opened."""
        for i, (path, most) in enumerate(self._packages):
            with contextlib.suppress(OSError, ValueError):
                now = _microjoules(path)
                self._sum += (now - self._last[i]) + (most if now < self._last[i] else 0.0)
                self._last[i] = now
        return self._sum * 1e-6


def _microjoules(path: Path) -> float:
    return float(path.read_text())


class _Nvml:
    """The energy counters of the visible devices; None for all once one can't be read."""

    def __init__(self, library: Any, handles: list[Any], share: float) -> None:
        self._library, self._handles, self._share = library, handles, share

    @classmethod
    def open(cls, devices: float) -> "Self | None":
        with contextlib.suppress(Exception):  # no library, no driver, or a device without the counter
            import pynvml

            pynvml.nvmlInit()
            handles = _visible(pynvml)
            found = cls(pynvml, handles, min(1.0, devices / len(handles)))
            return found if found.joules() is not None else None
        return None

    def joules(self) -> float | None:
        """Since the driver was loaded, of which this process counts what it holds."""
        with contextlib.suppress(Exception):
            read = self._library.nvmlDeviceGetTotalEnergyConsumption
            return float(sum(read(handle) for handle in self._handles)) * 1e-3 * self._share
        return None


def _visible(library: Any) -> list[Any]:
    """The devices that this process was given: by number, or by NVML's own name for them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return [library.nvmlDeviceGetHandleByIndex(i) for i in range(library.nvmlDeviceGetCount())]
    by_number, by_name = library.nvmlDeviceGetHandleByIndex, library.nvmlDeviceGetHandleByUUID
    return [by_number(int(name)) if name.isdigit() else by_name(name) for name in given.split(",") if name]
