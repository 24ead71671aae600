"""What a usage held, by node and kind of device, all of it: what isn't known to be anywhere is a part of its own."""

import math
from dataclasses import replace

from cluster.meter import Usage
from cluster.power import Part, merged

CPU, OTHER = "CPU", "other"


def parts_of(usage: Usage, accelerator: str | None) -> tuple[Part, ...]:
    """Parts whose seconds add up to the core-seconds and device-seconds of ``usage``.

    Args:
        accelerator: what device-seconds count as where the usage doesn't name their type.
    """
    cores = _fitted([part for part in usage.parts if part.device == CPU], usage.core_seconds)
    devices = _fitted([part for part in usage.parts if part.device != CPU], usage.device_seconds)
    devices = [replace(part, device=part.device or accelerator or OTHER) for part in devices]
    busy = max(0.0, usage.cpu_seconds - math.fsum(part.busy_seconds for part in cores))
    left = usage.core_seconds - _seconds(cores)
    rest = [Part("", CPU, seconds=left, busy_seconds=busy)] if left > _ROUNDING * usage.core_seconds else []
    for name, seconds in usage.by_accelerator.items():
        known = math.fsum(part.seconds for part in devices if part.device == name)
        left = min(seconds - known, usage.device_seconds - _seconds([*devices, *rest], but=CPU))
        rest += [Part("", name, seconds=left)] if left > _ROUNDING * seconds else []
    left = usage.device_seconds - _seconds([*devices, *rest], but=CPU)
    rest += [Part("", accelerator or OTHER, seconds=left)] if left > _ROUNDING * usage.device_seconds else []
    return merged((*cores, *devices, *rest))


_ROUNDING = 1e-9


def _seconds(parts: list[Part], but: str = "") -> float:
    return math.fsum(part.seconds for part in parts if part.device != but)


def _fitted(parts: list[Part], most: float) -> list[Part]:
    """The parts, made smaller together where they come to more than ``most`` seconds."""
    held = _seconds(parts)
    return parts if held <= most or not held else [replace(p, seconds=p.seconds * most / held) for p in parts]
