"""Torch and the devices it sees, against those that the driver knows."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.checkup.findings import Finding, ok, problem, warning
from cluster.checkup.probe import ask

_SECONDS = 20.0


@dataclass(frozen=True)
class Driver:
    """What ``nvidia-smi`` says.

    Attributes:
        names: of the GPUs.
        version: of the driver.
        cuda: the latest runtime that it serves; empty where it doesn't say.
    """

    names: tuple[str, ...]
    version: str
    cuda: str


def torch_and_devices() -> Iterator[Finding]:
    """Torch, imported in a process of its own, and what it makes of this machine's devices."""
    found, error = ask("torch", {})
    if error:
        yield problem("torch", f"can't be imported: {error}", "install it anew from the lock")
        return
    try:
        known = driver()
    except (OSError, subprocess.SubprocessError) as trouble:
        known = None
        yield warning("GPU driver", f"nvidia-smi is there but fails: {trouble}", "look at the driver: `nvidia-smi`")
    yield from judge(found, known)


def driver() -> Driver | None:
    """The NVIDIA driver and its GPUs; None where there are none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    asked = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    lines = subprocess.run(asked, capture_output=True, text=True, timeout=_SECONDS, check=True).stdout.splitlines()
    rows = [line.rpartition(",") for line in lines if "," in line]
    if not rows:
        return None
    page = subprocess.run([program], capture_output=True, text=True, timeout=_SECONDS, check=False).stdout
    cuda = re.search(r"CUDA Version:\s*([\d.]+)", page)
    return Driver(tuple(name.strip() for name, _, _ in rows), rows[0][2].strip(), cuda[1] if cuda else "")


def judge(torch: Mapping[str, Any], known: Driver | None) -> Iterator[Finding]:
    """What is wrong between torch (``probe.torch_``) and the driver; of a machine without a GPU nothing is claimed."""
    version, built = torch["version"], torch["cuda"]
    build = f"CUDA {built}" if built else "no CUDA"
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch["devices"]:
        yield from _devices(torch, build, known, shown)
        return
    if known is None:
        device_files = sorted(Path("/dev").glob("nvidia[0-9]*"))
        if device_files and shutil.which("nvidia-smi") is None:
            yield warning(
                "torch",
                f"torch {version} (built with {build}) sees no GPU, though there is {device_files[0]}",
                "start the container with the NVIDIA runtime (docker run --gpus all)",
            )
            return
        yield ok("torch", f"torch {version} (built with {build}); no GPU is visible here")
        return
    gpus = f"{len(known.names)} × {known.names[0]} (driver {known.version})"
    if not built:
        remedy = "install torch built with CUDA, or use the CUDA image (infra/docker)"
        yield problem("torch", f"torch {version} is built without CUDA, but there are {gpus}", remedy)
    elif known.cuda and int(known.cuda.split(".")[0]) < int(built.split(".")[0]):
        yield problem(
            "torch",
            f"torch {version} is built with CUDA {built}, and the driver of {gpus} serves up to {known.cuda}",
            "update the driver, or install torch built with an older CUDA",
        )
    else:
        why = torch["error"] or "it doesn't say why"
        hidden = f"CUDA_VISIBLE_DEVICES is {shown!r}: unset it" if shown is not None else "see whether another holds it"
        yield problem("torch", f"torch {version} can't use {gpus}: {why}", hidden)


def _devices(torch: Mapping[str, Any], build: str, known: Driver | None, shown: str | None) -> Iterator[Finding]:
    devices = torch["devices"]
    names = ", ".join(f"{each['name']} ({each['bytes'] / 2**30:.0f} GiB)" for each in devices)
    told = f"torch {torch['version']} (built with {build}) sees {names}"
    if known is not None and len(known.names) > len(devices):
        remedy = f"CUDA_VISIBLE_DEVICES is {shown!r}" if shown is not None else "look at the container's devices"
        yield warning("torch", f"{told}: {len(devices)} of the driver's {len(known.names)}", remedy)
    else:
        yield ok("torch", told)
    old = [each["name"] for each in devices if not each["bf16"]]
    if old:
        yield warning("bf16", f"{old[0]} has no bf16", "set precision to fp16 or fp32 in the spec")
