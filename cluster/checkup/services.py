"""What is asked of others: the object store, the tracking server, Ray, and their clocks."""

import base64
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import psutil

from cluster.checkup.findings import Finding, ok, problem, warning
from cluster.checkup.probe import ask
from cluster.errors import ClusterError
from cluster.files import Folder
from cluster.logged import without_login
from cluster.room import Need, lacking

PORTS = {6379: "Ray's head (GCS)", 8265: "Ray's dashboard and jobs", 10001: "Ray's client server (ray://)"}
_SECONDS, _SKEW_SECONDS, _TOO_MUCH_SKEW = 10.0, 5.0, 300.0
_RAY = ("raylet", "gcs_server")
_AWS_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def storage(workdir: Folder) -> Iterator[Finding]:
    """Really write, read, list and delete a small file where the job is to write."""
    name, probe, content = f"storage: {workdir}", f".{uuid.uuid4().hex}.tmp", uuid.uuid4().bytes
    if workdir.is_local and not workdir.path().exists():
        yield ok(name, "the folder is not there yet; the first command makes it")
        return
    began = time.perf_counter()
    try:
        workdir.write(probe, content)
        same = workdir.read(probe) == content and probe in set(workdir.scan())
        workdir.remove(probe)
        gone = not workdir.exists(probe)
    except ClusterError as error:
        text, _, remedy = str(error).removeprefix(f"{workdir}/{probe}: ").partition("; ")
        given = "" if workdir.is_local else f" ({_credentials()})"
        yield problem(name, f"{text}{given}", remedy or "check the address, the endpoint and the network")
        return
    took = f"in {time.perf_counter() - began:.2f} s"
    if same and gone:
        yield ok(name, f"written, read, listed and deleted {took}")
    else:
        yield problem(name, "what was written is not read, listed or deleted as it was", "use a consistent store")


def _credentials() -> str:
    """Which of the environment's credentials are set; never what they are."""
    there = [key for key in _AWS_KEYS if os.environ.get(key)]
    return f"{' and '.join(there)} set" if there else f"{' and '.join(_AWS_KEYS)} not set"


def tracking(uri: str | None) -> Iterator[Finding]:
    """Really ask the tracking server for an experiment, with the credentials that MLflow would send."""
    name = "tracking"
    if uri is None:
        yield ok(name, "no server is named: a database beside the workdir")
        return
    if not uri.startswith(("http://", "https://")):
        yield ok(name, f"{without_login(uri)} is no server to be asked")
        return
    asked = Request(
        f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search",
        data=json.dumps({"max_results": 1}).encode(),
        headers={"Content-Type": "application/json", **_mlflow_login()},
    )
    try:
        with urlopen(asked, timeout=_SECONDS) as answer:
            json.load(answer)
            yield ok(name, f"{without_login(uri)} answers, and takes the login")
            yield from _skew("tracking server", answer.headers["Date"])
    except HTTPError as error:
        if error.code in (401, 403):
            remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            yield problem(name, f"{without_login(uri)} refuses the login ({error.code})", remedy)
        else:
            yield problem(name, f"{without_login(uri)} answers with {error.code}", "check tracking.uri and the server")
    except ValueError:
        yield problem(name, f"{without_login(uri)} is no MLflow server", "check tracking.uri")
    except (URLError, OSError) as error:
        remedy = "start it, or check tracking.uri and the network"
        yield problem(name, f"{without_login(uri)} does not answer: {getattr(error, 'reason', error)}", remedy)


def _mlflow_login() -> dict[str, str]:
    token, user = os.environ.get("MLFLOW_TRACKING_TOKEN"), os.environ.get("MLFLOW_TRACKING_USERNAME")
    if user:
        login = f"{user}:{os.environ.get('MLFLOW_TRACKING_PASSWORD', '')}"
        return {"Authorization": "Basic " + base64.b64encode(login.encode()).decode()}
    return {"Authorization": f"Bearer {token}"} if token else {}


def clock(workdir: Folder) -> Iterator[Finding]:
    """This machine's clock against the object store's: signatures of requests hold for minutes only."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    if not workdir.uri.startswith("s3://"):
        return
    try:
        with urlopen(Request(endpoint or "https://s3.amazonaws.com", method="HEAD"), timeout=_SECONDS) as answer:
            date = answer.headers["Date"]
    except HTTPError as error:  # who may not list is told the time all the same
        date = error.headers["Date"]
    except (URLError, OSError, ValueError):
        return  # that it does not answer is found elsewhere
    yield from _skew("object store", date)


def _skew(whose: str, date: str | None) -> Iterator[Finding]:
    if not date:
        return
    skew = time.time() - parsedate_to_datetime(date).timestamp()
    if abs(skew) < _SKEW_SECONDS:
        yield ok("clock", f"agrees with the {whose}'s")
        return
    told = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the {whose}'s"
    far = abs(skew) > _TOO_MUCH_SKEW
    remedy = "set the clock (chrony, ntpd): signed requests and leases go by it"
    yield problem("clock", told, remedy) if far else warning("clock", told, remedy)


def ports() -> Iterator[Finding]:
    """Whether Ray's usual ports are free here, and which processes of Ray are there already."""
    taken = [port for port in PORTS if _answers(port)]
    for port in taken:
        yield warning(
            f"port {port}",
            f"taken, by a Ray head or something else: {PORTS[port]}",
            "a second head on this machine needs others (`ray start --port … --dashboard-port …`)",
        )
    if not taken:
        yield ok("ports", f"{', '.join(map(str, PORTS))} are free")
    mine = [each for each in psutil.process_iter(["name", "username", "pid"]) if each.info["name"] in _RAY]
    heads = [each for each in mine if each.info["name"] == "gcs_server"]
    if mine and not heads:
        numbers = ", ".join(str(each.info["pid"]) for each in mine[:5])
        remedy = "`ray stop` ends them; leave them alone if their head is elsewhere"
        yield warning("Ray processes", f"raylets without a head on this machine: {numbers}", remedy)
    elif heads:
        yield ok("Ray processes", f"{len(heads)} Ray cluster{'s run' if len(heads) > 1 else ' runs'} on this machine")


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def dashboard(address: str, needs: Mapping[str, Sequence[Need]]) -> Iterator[Finding]:
    """Whether the dashboard of a cluster's head answers and takes the token, and what its nodes have."""
    from cluster.jobs import Jobs

    jobs = Jobs(address)
    running = sum(not job.over for job in jobs.all())
    nodes = jobs.nodes()
    have = {unit: sum(node.get(unit, 0.0) for node in nodes) for unit in ("CPU", "GPU", "memory")}
    about = {"nodes": len(nodes), "resources": have, "grows": False}
    yield ok("dashboard", f"{address} answers: {_has(about)}; {running} jobs run or wait there")
    lacks = [f"{what} {told}" for what, workers in needs.items() if (told := lacking(nodes, workers))]
    for each in lacks:
        text, _, remedy = each.rpartition(": ")
        yield warning("resources", text, f"{remedy}; where nodes are added on demand, it waits for them")
    if needs and not lacks:
        yield ok("resources", "there is room for all that the spec holds at once")


def ray_cluster(
    address: str | None,
    cpus: int | None,
    gpus: int | None,
    needs: Mapping[str, Sequence[Need]],
    packages: Sequence[str],
    python: str,
) -> Iterator[Finding]:
    """Start Ray here, or join the cluster: nodes, resources, versions on every node, and room for what a job needs."""
    request = {"address": address, "cpus": cpus, "gpus": gpus, "needs": needs, "packages": packages, "python": python}
    found, error = ask("ray", request)
    where = f"the cluster at {address}" if address else "an embedded cluster here"
    if error:
        yield problem("Ray", f"{where} can't be used: {error}", "check the address, or install Ray anew from the lock")
        return
    yield ok("Ray", f"Ray {found['version']}, {where}: {_has(found)}")
    for sentence in found["problems"]:
        text, _, remedy = sentence.rpartition(": ")
        yield problem("Ray nodes", text or sentence, remedy)
    for what, told in found["lacks"].items():
        text, _, remedy = f"{what} {told}".rpartition(": ")
        if found["grows"]:
            yield warning("resources", text, "it waits until the cluster has grown so far")
        else:
            yield problem("resources", text, remedy)
    if needs and not found["lacks"]:
        yield ok("resources", "there is room for all that the spec holds at once")


def _has(found: Mapping[str, Any]) -> str:
    nodes, have = found["nodes"], found["resources"]
    kinds = [f"{have[unit]:g} {unit}" for unit in ("CPU", "GPU") if have.get(unit)]
    kinds += [f"{have['memory'] / 1e9:.0f} GB"] if have.get("memory") else []
    return f"{nodes} node{'' if nodes == 1 else 's'}, {', '.join(kinds)}{', and it grows' if found['grows'] else ''}"
