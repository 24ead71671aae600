"""``distill doctor``: what this machine or cluster has, what a spec would need of it, and what is wrong."""

import glob
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path

from rich.text import Text

from cluster.checkup import devices, machine, services
from cluster.checkup.findings import Check, Finding, examine, ok, problem, warning
from cluster.files import Folder
from cluster.preflight import there
from distill_jobs import shipping
from distill_jobs.console import Console
from distill_jobs.costs import plan
from distill_jobs.needs import needs_of
from distill_jobs.spec import Job

DISTRIBUTION = "distill-jobs"
_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}
_COMPILERS = ("c++", "g++", "clang++")
# A look is over soon; what comes back after that is a job's own to wait for.
_PATIENCE_SECONDS = "5"


def doctor(job: Job | None, address: str | None, console: Console, *, as_json: bool = False) -> bool:
    """The whole of ``distill doctor``; whether no problem was found.

    Args:
        job: what the machine is to do; None to look at the machine alone.
        address: of the Ray cluster: its dashboard (``http://…``), or what ``cluster.address`` takes.
    """
    os.environ.setdefault("DISTILL_STORAGE_PATIENCE", _PATIENCE_SECONDS)
    found = examine(checks(job, address))
    if as_json:
        console.say(json.dumps([asdict(each) for each in found], indent=1))
    else:
        for each in found:
            console.rich.print(_line(each))
        console.say(_sum(found))
    return not any(each.level == "problem" for each in found)


def checks(job: Job | None, address: str | None) -> dict[str, Check]:
    """All that is looked at, by name."""
    workdir = Folder(job.workdir) if job is not None else None
    compilers = (os.environ.get("CXX") or "c++", *_COMPILERS[1:])
    found: dict[str, Check] = {
        "packages": partial(machine.packages, DISTRIBUTION),
        "torch": devices.torch_and_devices,
        "processors": machine.processors,
        "memory": machine.memory,
        "disk": partial(machine.disks, workdir, _predicted(workdir)),
        "open files": machine.limits,
        "C++ compiler": partial(machine.compiler, compilers),
        "ports": services.ports,
        "tracking": partial(services.tracking, _tracking(job)),
    }
    if address is not None and address.startswith(("http://", "https://")):
        found["dashboard"] = partial(services.dashboard, address, needs_of(job) if job is not None else {})
    else:
        found["Ray"] = partial(_ray, job, address)
    if job is not None and workdir is not None:
        found["storage"] = partial(services.storage, workdir)
        found["clock"] = partial(services.clock, workdir)
        found["what the spec reads"] = partial(reads, job)
    return found


def reads(job: Job) -> Iterator[Finding]:
    """Whether the data and models that a spec names are there."""
    missing, count = False, 0
    for setting, place in shipping.places(job.model_dump(mode="json")):
        count += 1
        if _is_there(place):
            continue
        missing = True
        if "://" in place or place.startswith("/"):
            yield problem(setting, f"{place} is not there", "correct it in the spec, or put it there")
        elif setting.endswith("tokenizer") and place == "bytes":
            missing = False
        else:
            yield _of_the_hub(setting, place)
    if not missing:
        yield ok("what the spec reads", f"all of it is there ({count} {'place' if count == 1 else 'places'})")


def _of_the_hub(setting: str, name: str) -> Finding:
    """A model or tokenizer that is no folder: of Hugging Face's hub, or in its cache."""
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return ok(setting, f"{name} is in Hugging Face's cache")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        remedy = "fetch it once without HF_HUB_OFFLINE, or give a folder"
        return problem(setting, f"{name} is no folder, and not in Hugging Face's cache", remedy)
    return warning(setting, f"{name} is fetched from Hugging Face's hub", "give a folder where nodes have no way out")


def _is_there(place: str) -> bool:
    return there(place) if "://" in place else bool(glob.glob(place, recursive=True))


def _ray(job: Job | None, address: str | None) -> Iterator[Finding]:
    cluster = job.cluster if job is not None else None
    packages = [each for each in metadata.requires(DISTRIBUTION) or () if "extra ==" not in each]
    return services.ray_cluster(
        address or (cluster.address if cluster else None) or os.environ.get("RAY_ADDRESS") or None,
        cluster.cpus if cluster else None,
        cluster.gpus if cluster else None,
        needs_of(job) if job is not None else {},
        packages,
        f"{sys.version_info[0]}.{sys.version_info[1]}",
    )


def _tracking(job: Job | None) -> str | None:
    return (job.tracking.uri if job is not None else None) or os.environ.get("MLFLOW_TRACKING_URI") or None


def _predicted(workdir: Folder | None) -> float | None:
    """Bytes that a plan says the workdir will hold; None without one."""
    if workdir is None or not workdir.is_local or not Path(workdir.path(plan.PLAN)).exists():
        return None
    return float((plan.read(workdir) or {}).get("storage", {}).get("bytes", 0.0))


def _line(each: Finding) -> Text:
    line = Text.assemble((f"{each.level:<8}", _STYLES[each.level]), f" {each.check}: {each.text}")
    return line.append(f"; {each.remedy}") if each.remedy else line


def _sum(found: list[Finding]) -> str:
    counts = {level: sum(each.level == level for each in found) for level in ("problem", "warning")}
    told = [f"{count} {level}{'' if count == 1 else 's'}" for level, count in counts.items()]
    return f"{len(found)} findings: {' and '.join(told)}"
