"""A look at a cluster before a job is started there: a short job of its own, ``python -m cluster.preflight``.

It reads what to look for from ``check.json`` beside it, and prints one line of JSON: all that would keep the job from
running, each in a sentence with its remedy. Nodes that are there are asked; what an
autoscaler would add can't be.
"""

import json
import os
import re
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from cluster.checkup.services import storage
from cluster.errors import ClusterError, ResourceError
from cluster.files import Folder
from cluster.lease import Lease, holder

REQUEST, MARK = "check.json", "preflight:"
_NODE_SECONDS = 60.0
# What is found to be wrong is told now; a storage that may come back is the job's own to wait for.
_PATIENCE_SECONDS = "10"

_SHARE = "give an object store (s3://…), or a folder on a file system that all nodes share"

Sentence = str


@dataclass(frozen=True)
class Request:
    """What to look for.

    Attributes:
        workdir: where the job is to write.
        probe: a file that the machine which asks has left in the workdir, if that is a folder of that machine.
        read: files, folders and globs that it reads, by the name of the setting.
        needs: workers to find room for, by what asks for them (``Session.require``).
        packages: requirements that every node has to meet, as ``ray>=2.60,<2.61``.
        python: the version of Python, as ``3.11``.
        tracking: the tracking server, where the spec names one, and the experiment there.
    """

    workdir: str
    probe: str | None
    read: Mapping[str, Sequence[str]]
    needs: Mapping[str, Sequence[tuple[int, Mapping[str, float]]]]
    packages: Sequence[str]
    python: str
    tracking: str | None
    experiment: str


@dataclass(frozen=True)
class Answer:
    """What was found: ``problems`` keep the job from running, ``notes`` don't; who is at work there already."""

    problems: tuple[Sentence, ...]
    notes: tuple[Sentence, ...]
    lease: Lease | None
    nodes: int
    resources: Mapping[str, float]


def write(request: Request, folder: Folder) -> None:
    """Leave a request for the job that will run in ``folder``."""
    folder.write_json(REQUEST, asdict(request))


def answer_in(printed: str) -> Answer | None:
    """The answer in what the job has printed."""
    for line in printed.splitlines():
        if line.startswith(MARK):
            found = json.loads(line.removeprefix(MARK))
            lease = Lease(**found["lease"]) if found["lease"] else None
            return Answer(
                tuple(found["problems"]), tuple(found["notes"]), lease, int(found["nodes"]), found["resources"]
            )
    return None


def look(request: Request) -> Answer:
    """Look at the cluster that this process can join."""
    import ray

    from cluster.session import Session

    session = Session.of_this_process()
    ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    try:
        problems, probe = _head(request)
        problems += nodes_lacking(request, probe)
        notes: list[str] = []
        for what, workers in request.needs.items():
            problem = session.lacks([(count, held) for count, held in workers])
            if problem is not None:
                (notes if session.grows else problems).append(f"{what} {problem}")
        nodes = sum(bool(node["Alive"]) for node in ray.nodes())
        lease = None if problems else holder(Folder(request.workdir))
        return Answer(tuple(problems), tuple(notes), lease, nodes, session.resources())
    finally:
        ray.shutdown()


def _head(request: Request) -> tuple[list[Sentence], str]:
    """What the command itself will need where it runs, and the name of a file that all nodes have to see."""
    from cluster.tracking import Tracker
    from cluster.tracking_server import server

    workdir, probe = Folder(request.workdir), f".{uuid.uuid4().hex}.tmp"
    if workdir.is_local and not request.probe and not workdir.path().parent.is_dir():
        problems = [f"workdir {workdir}: {workdir.path().parent} is not there: {_SHARE}"]
    else:
        found = [each for each in storage(workdir) if each.level == "problem"]
        problems = [f"workdir {workdir}, where the job would run: {each.text}; {each.remedy}" for each in found]
    try:
        if not problems:
            workdir.write(probe, b"")
    except ClusterError as error:
        problems.append(f"workdir {workdir} can't be written where the job would run: {error}")
    probe = "" if problems else probe
    uri = server(request.tracking)
    if uri or not workdir.is_local:
        try:
            Tracker(uri, request.experiment, workdir, workdir)
        except ClusterError as error:
            problems.append(str(error))
    return problems, probe


def nodes_lacking(request: Request, probe: str) -> list[Sentence]:
    """What is wrong with any node; one sentence for all nodes that share it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked: dict[Any, str] = {}
    remote = ray.remote(num_cpus=0, max_retries=0)(_on_node)
    for node in ray.nodes():
        if node["Alive"]:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[remote.options(scheduling_strategy=here).remote(asdict(request), probe)] = node["NodeManagerAddress"]
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=_NODE_SECONDS)
    found: dict[str, list[str]] = {}
    for answer in ready:
        try:
            said = ray.get(answer)
        except Exception as error:  # Ray raises plain ones, too
            said = [f"can't run a task: {' '.join(str(error).split())[:300]}"]
        for sentence in said:
            found.setdefault(sentence, []).append(asked[answer])
    for answer in late:
        found.setdefault(f"has not answered within {_NODE_SECONDS:g} s", []).append(asked[answer])
    if probe:
        with suppress(ClusterError):  # unfinished files are nobody's
            Folder(request.workdir).remove(probe)
    return [f"node {', '.join(where[:3])}{_more(where)}: {sentence}" for sentence, where in found.items()]


def _more(where: Sequence[str]) -> str:
    return f" and {len(where) - 3} more" if len(where) > 3 else ""


def _on_node(asked: Mapping[str, Any], probe: str) -> list[Sentence]:
    """What is wrong here, on one node."""
    os.environ["DISTILL_STORAGE_PATIENCE"] = _PATIENCE_SECONDS
    request = Request(**asked)
    problems = unmet(request.packages, request.python)
    workdir = Folder(request.workdir)
    try:
        if request.probe and not workdir.exists(request.probe):
            problems.append(f"workdir {workdir} is a folder of the submitting machine, not seen here: {_SHARE}")
        elif probe and not workdir.exists(probe):
            problems.append(f"workdir {workdir} is not the folder that the job would write to: {_SHARE}")
        for setting, places in request.read.items():
            problems += [f"{setting}: {place} is not there: {_SHARE}" for place in places if not there(place)]
    except ClusterError as error:
        problems.append(str(error))
    return problems


def unmet(packages: Sequence[str], python: str) -> list[Sentence]:
    """Which packages are not what the job was written for."""
    from packaging.requirements import Requirement

    found = []
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if here != python:
        found.append(f"Python is {here}, but the job needs {python}: use an image or environment with that")
    for text in packages:
        wanted = Requirement(text)
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            found.append(f"{wanted.name} is not installed, and the job needs {text}: install it from the lock")
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            found.append(f"{wanted.name} is {version}, but the job needs {wanted.specifier}: install it from the lock")
    return found


def there(place: str) -> bool:
    """Whether a file or folder is there; of a glob, the folder that it begins in."""
    fixed = re.split(r"[*?\[]", place, maxsplit=1)[0]
    place = place if fixed == place else fixed.rpartition("/")[0]
    parent, _, name = place.rstrip("/").rpartition("/")
    return Folder(parent or "/").exists(name)


def main() -> None:
    """Print the answer to the request that lies here."""
    os.environ["DISTILL_STORAGE_PATIENCE"] = _PATIENCE_SECONDS
    request = Request(**Folder(os.getcwd()).read_json(REQUEST))
    began = time.monotonic()
    try:
        answer = look(request)
    except ResourceError as error:
        answer = Answer((str(error),), (), None, 0, {})
    print(f"{MARK}{json.dumps(asdict(answer))}", flush=True)
    print(f"looked at {answer.nodes} nodes in {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
