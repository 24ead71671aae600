"""``distill status``: how a pipeline stands, from what it has committed and what the running command says of itself."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from rich.console import Group
from rich.live import Live as Screen
from rich.table import Table
from rich.text import Text

from cluster.files import Folder
from cluster.lease import holder
from cluster.standing import in_words
from distill_jobs.console import Console
from distill_jobs.costs.ledger import Ledger, unfinished
from distill_jobs.errors import DataError, DistillError, NotReadyError
from distill_jobs.live import read
from distill_jobs.spec import Job
from distill_jobs.spec.load import load_job, parse_job
from distill_jobs.stage import FOLDERS, StageRecord
from distill_jobs.words import count, duration, money, percent, when

_LOOK_SECONDS = 2.0
_ON = ("running", "waiting")

Found = dict[str, Any]


def status(target: str, address: str | None, console: Console, *, as_json: bool = False, watch: bool = False) -> None:
    """The whole of ``distill status``.

    Args:
        target: a workdir, a spec, or the id of a Ray job.
        address: of the Ray cluster, for a job's id.
        watch: show it until the command there has ended.

    Raises:
        NotReadyError: there is nothing of that name, or nothing has run there.
    """
    looks = _looks(Folder(workdir_of(target, address)), watch)
    if as_json:
        for found in looks:
            console.say(json.dumps(found, indent=None if watch else 1, sort_keys=True))
    elif watch:
        with Screen(Text("looking …"), console=console.rich, refresh_per_second=1) as screen:
            for found in looks:
                screen.update(_drawn(found), refresh=True)
    else:
        console.rich.print(_drawn(next(looks)))


def _looks(workdir: Folder, watch: bool) -> Iterator[Found]:
    """One look, or one after the other until the command has ended."""
    while True:
        yield (found := look(workdir))
        if not watch or found["state"] not in _ON:
            return
        time.sleep(_LOOK_SECONDS)


def workdir_of(target: str, address: str | None) -> str:
    """The workdir that a workdir, a spec or a job's id stands for."""
    path = Path(target)
    if path.suffix in (".yaml", ".yml") and "://" not in target:
        return load_job(target).workdir
    if "://" in target or path.is_dir():
        return target
    if address is not None:
        return workdir_of_job(target, address)
    raise NotReadyError(
        f"there is no workdir and no spec {target}; give a folder, an address such as s3://…, or a spec's YAML file; "
        f"for the id of a Ray job give --address too"
    )


def workdir_of_job(job: str, address: str) -> str:
    """The workdir of a Ray job."""
    from cluster.jobs import Jobs
    from distill_jobs.submitting import WORKDIR

    found = Jobs(address).get(job)
    workdir = found.metadata.get(WORKDIR)
    if workdir is None:
        raise NotReadyError(f"{job} is no pipeline: it was not started by `distill submit`")
    if found.waiting:
        raise NotReadyError(f"{job} has not begun yet, and waits for the cluster: {found.message}")
    return workdir


def look(workdir: Folder) -> Found:
    """How the pipeline in a workdir stands, in plain values; times are seconds since the epoch.

    ``state`` is one of ``running``, ``waiting`` (for a cluster to grow), ``finished``, ``failed`` (``why`` says the
    sentence), ``stopped``, ``killed`` (without a last word), and ``quiet`` where no command has said anything.

    Raises:
        NotReadyError: nothing has run there.
    """
    live, job = read(workdir), _job(workdir)
    stages = _stages(workdir, job, live)
    if live is None and not any(stage["state"] == "done" for stage in stages):
        raise NotReadyError(f"nothing has run in {workdir}: start it with `distill run SPEC`")
    name = live["name"] if live else job.name if job else workdir.uri.rstrip("/").rpartition("/")[2]
    found: Found = {"workdir": workdir.uri, "name": name, "stages": stages, **_spent(workdir, stages)}
    if live is None:
        return {**found, "state": "quiet", "faults": {}}
    usd = live["usd"] if live["state"] in _ON else found["usd"]
    found |= {**live, "usd": usd, "stages": stages}
    if live["state"] in _ON and holder(workdir) is None:
        found["state"] = "killed"
    return found


def _job(workdir: Folder) -> Job | None:
    """The spec that the last command left; None where there is none that can be read."""
    try:
        data = workdir.find("spec.yaml")
        return parse_job(yaml.safe_load(data)) if data is not None else None
    except (DistillError, yaml.YAMLError):
        return None


def _stages(workdir: Folder, job: Job | None, live: Found | None) -> list[Found]:
    """Every stage and arm in order, as far as it is known which there are."""
    before, after = ["prepare", "teacher", "capture"], ["evaluate", "audit", "report"]
    if job is not None and job.distill.soft_labels == "live":
        before.remove("capture")
    arms = [f"{role}/{seed}" for role, seed in job.arms] if job is not None else []
    running = live["stage"] if live else None
    found = []
    for name in [*before, *arms, *after]:
        record = StageRecord.read(workdir / FOLDERS.get(name, name))
        if record is not None:
            took = {"took": record.usage.get("wall_seconds"), "ended": record.ended}
            found.append({"stage": name, "state": "done", **took})
        else:
            under_way = running == name or (running == "train" and name in arms)
            found.append({"stage": name, "state": "begun" if under_way else "open"})
    return found


def _spent(workdir: Folder, stages: list[Found]) -> Found:
    """What the ledger says, in all and put down to each stage."""
    try:
        entries = {entry.stage: entry for entry in Ledger(workdir).entries()}
    except DataError as error:
        return {"usd": None, "ledger": str(error)}
    for stage in stages:
        named = [entries[name] for name in (stage["stage"], unfinished(stage["stage"])) if name in entries]
        if named:
            stage["usd"] = math.fsum(entry.usd for entry in named)
    return {"usd": math.fsum(e.usd for e in entries.values() if e.kind in ("measured", "unfinished"))}


def _drawn(found: Found) -> Group:
    now, state = time.time(), found["state"]
    lines = [f"{found['name']}  {found['workdir']}", _headline(found, now)]
    if state in _ON and found.get("stage"):
        lines += [f"  {line}" for line in _pace(found, now)]
    if "owner" in found:
        lines.append(_owner(found, now))
    budget = f" of {money(found['budget_usd'])}" if found.get("budget_usd") else ""
    lines.append(f"spent: {money(found['usd'])}{budget}" if found["usd"] is not None else found["ledger"])
    lines.append(f"survived: {in_words(found['faults']) or 'no faults'}")
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "", "took", "money"):
        table.add_column(column, justify="right" if column in ("took", "money") else "left")
    for stage in found["stages"]:
        took = duration(stage["took"]) if stage.get("took") is not None else ""
        table.add_row(stage["stage"], stage["state"], took, money(stage["usd"]) if "usd" in stage else "")
    return Group(*(Text(line) for line in lines), table)


def _headline(found: Found, now: float) -> str:
    state, stage = found["state"], found.get("stage")
    at = f" at {stage}, {_progress(found)}" if stage else ""
    again = "run the same command to go on"
    left = [each["stage"] for each in found["stages"] if each["state"] != "done"]
    if state == "running":
        return f"running: {stage}, {_progress(found)}" if stage else "running: between two stages"
    if state == "waiting":
        return f"waiting for the cluster to grow: {found['why']}"
    if state == "failed":
        return f"failed {when(found['renewed'])}{at}: {found['why']}"
    if state == "stopped":
        return f"stopped {when(found['renewed'])}{at}; {again}"
    if state == "killed":
        ago = duration(now - found["renewed"])
        return f"stopped or killed after {when(found['renewed'])} ({ago} ago){at}; {again}"
    told = "the last command has finished" if state == "finished" else "no command is known to run"
    return f"{told}; {'every stage is done' if not left else 'still to do: ' + _some(left)}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _progress(found: Found) -> str:
    if not found.get("total"):
        return "starting"
    of = f"{found['done']:,.0f} of {found['total']:,.0f} {found['unit']}".rstrip()
    return f"{of} ({percent(found['done'] / found['total'], 0)})"


def _pace(found: Found, now: float) -> list[str]:
    lines, unit = [], found["unit"] or "steps"
    if found["rate"]:
        lines.append(f"{count(found['rate'])} {unit}/s")
    if found["stage_ends"] is not None and found["stage_ends"] > now:
        lines.append(f"the stage ends in about {duration(found['stage_ends'] - now)}")
    if found["ends"] is not None:
        whole = max(0.0, found["ends"] - now)
        lines.append(f"all stages in about {duration(whole)}, at {when(found['ends'])}")
    return [", ".join(lines), *([found["note"]] if found["note"] else [])] if lines else [found["note"] or "starting"]


def _owner(found: Found, now: float) -> str:
    owner = found["owner"]
    who = f"process {owner['pid']} on {owner['host']}"
    who = f"Ray job {owner['job']} ({who})" if owner["job"] else who
    renewed = f", told {duration(max(0.0, now - found['renewed']))} ago" if found["state"] in _ON else ""
    return f"{who}, since {when(found['began'])}{renewed}"
