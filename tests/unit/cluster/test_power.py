"""Counters of energy: what is read from them, whose share it is, and that nothing is made up where there are none."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.mailbox import Mail
from cluster.meter import Meter, Usage
from cluster.power import Burnt, Gauge, Machine, Part, _Nvml, _Rapl, merged, parts_of, this_machine
from cluster.story import Story


def zone(folder: Path, name: str, kind: str, joules: float, most: float = 1000.0) -> Path:
    place = folder / name
    place.mkdir()
    (place / "name").write_text(kind + "\n")
    (place / "energy_uj").write_text(f"{joules * 1e6:.0f}\n")
    (place / "max_energy_range_uj").write_text(f"{most * 1e6:.0f}\n")
    return place / "energy_uj"


def test_rapl_counts_each_package_once_and_past_its_end(tmp_path: Path) -> None:
    first, second = zone(tmp_path, "intel-rapl:0", "package-0", 990), zone(tmp_path, "intel-rapl:1", "package-1", 5)
    zone(tmp_path, "intel-rapl:0:0", "core", 700)
    zone(tmp_path, "intel-rapl:2", "psys", 2000)
    found = _Rapl.open(tmp_path)
    assert found is not None and found.joules() == 0
    first.write_text(f"{20 * 1e6:.0f}")  # 30 joules on, past 1,000
    second.write_text(f"{8 * 1e6:.0f}")
    assert found.joules() == pytest.approx(33.0)
    first.unlink()
    second.write_text(f"{9 * 1e6:.0f}")
    assert found.joules() == pytest.approx(34.0)
    assert _Rapl.open(tmp_path / "none") is None


def test_nvml_counts_the_visible_devices_by_the_share_that_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    millijoules = {"0": 1000, "1": 2000, "GPU-x": 5000}
    library = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=str,
        nvmlDeviceGetHandleByUUID=str,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: millijoules[handle],
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    for visible, devices, joules in [(None, 2.0, 3.0), ("1", 1.0, 2.0), ("1", 0.25, 0.5), ("GPU-x,0", 2.0, 6.0)]:
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        found = _Nvml.open(devices)
        assert found is not None and found.joules() == pytest.approx(joules)
    millijoules.pop("0")
    assert _Nvml.open(1.0) is None  # a device whose counter can't be read is not counted in part


def test_without_counters_nothing_is_measured() -> None:
    gauge = Gauge(1.0, 0.0)
    assert gauge.machine == this_machine() and gauge.machine.host
    with Meter(cores=2, gauge=gauge) as meter:
        pass
    [part] = meter.usage.parts
    assert (part.node, part.device, part.seconds) == (gauge.machine.host, "CPU", meter.usage.core_seconds)
    assert (part.counter == "rapl") == bool(gauge.read().joules)
    assert Usage.of(meter.usage.as_dict()) == meter.usage


def test_parts_with_the_same_key_add_up() -> None:
    one, other = Part("a", "CPU", seconds=1.0, busy_seconds=0.5), Part("b", "CPU", seconds=2.0)
    assert merged((other, one, one)) == (Part("a", "CPU", seconds=2.0, busy_seconds=1.0), other)
    assert Burnt({"nvml": 5.0}) - Burnt({"nvml": 2.0}) == Burnt({"nvml": 3.0})
    machine = Machine("a", "a processor", 8, "H100", "NVIDIA H100")
    cpu, gpu = parts_of(machine, 4.0, 2.0, 3.0, {"nvml": 7.0})
    assert (cpu.counter, cpu.busy_seconds) == ("", 3.0)
    assert (gpu.device, gpu.model, gpu.counter, gpu.joules) == ("H100", "NVIDIA H100", "nvml", 7.0)


def test_a_gangs_waste_is_what_it_had_not_saved_when_it_failed() -> None:
    here, there = Machine("here"), Machine("there")
    story = Story(0.0, cpus=2, gpus=1)
    story.take(Mail(sizes=[2], machines=[here, there]), 10.0)
    story.take(Mail(kept=True), 50.0)
    # A rank dies after it, and the gang starts again at 90, on the same node twice.
    story.take(Mail(sizes=[2], machines=[here, here]), 90.0)
    usage = story.usage(100.0)
    assert usage.core_seconds == 100 * 2 * 2 and usage.device_seconds == 100 * 2
    assert usage.wasted_core_seconds == 40 * 2 * 2 and usage.wasted_device_seconds == 40 * 2
    assert {part.node: part.seconds for part in usage.parts if part.device == "CPU"} == {"here": 300, "there": 100}
    # One that saves all and leaves, to begin again larger, wastes nothing.
    story.take(Mail(kept=True, left=True), 150.0)
    story.take(Mail(sizes=[4], machines=[here] * 4), 160.0)
    assert story.usage(200.0).wasted_core_seconds == usage.wasted_core_seconds
    story.take(Mail(burnt=[(here, 12.0, {"nvml": 3.0}), (here, 1.0, {})]), 200.0)
    assert story.usage(200.0).cpu_seconds == 13.0
