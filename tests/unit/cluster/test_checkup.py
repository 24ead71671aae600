"""What ``distill doctor`` finds, with real files, sockets and servers, and torch, Ray and drivers broken on purpose."""

import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from cluster.checkup import devices, machine, services
from cluster.checkup.devices import Driver, driver, judge, torch_and_devices
from cluster.checkup.findings import Finding, examine, ok
from cluster.errors import FileError
from cluster.files import Folder
from cluster.room import lacking, room

EIGHT = Driver(("NVIDIA H100 80GB HBM3",) * 8, "550.54", "12.4")


def levels(found: Any) -> list[tuple[str, str]]:
    return [(each.check, each.level) for each in found]


def test_no_check_harms_another() -> None:
    def broken() -> Iterator[Finding]:
        raise KeyError("odd")

    def refused() -> Iterator[Finding]:
        yield ok("disk", "first")
        raise FileError("the disk is gone; mount it")

    def hangs() -> Iterator[Finding]:
        time.sleep(5)
        yield ok("never", "")

    began = time.monotonic()
    found = examine({"a": broken, "b": refused, "c": hangs, "d": lambda: [ok("d", "well")]}, seconds=0.2)
    assert time.monotonic() - began < 2
    assert levels(found) == [("a", "warning"), ("b", "problem"), ("c", "warning"), ("d", "ok")]
    assert "KeyError: 'odd'" in found[0].text and found[1].text == "the disk is gone; mount it"
    assert found[2].text == "no answer within 0 s"


def test_packages_against_their_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert levels(machine.packages("distill-jobs")) == [("packages", "ok")]
    assert levels(machine.packages("no-such-distribution")) == [("packages", "problem")]
    wanted = ["numpy<1", "no-such-package>=2", "psutil>=5", 'pytest>=9; extra == "dev"']
    monkeypatch.setattr(metadata, "requires", lambda _: wanted)
    monkeypatch.setattr(metadata, "metadata", lambda _: {"Requires-Python": "<3"})
    found = list(machine.packages("distill-jobs"))
    assert levels(found) == [("packages", "problem")] * 3
    assert "needs <3" in found[0].text and "numpy is" in found[1].text and "no-such-package is not" in found[2].text
    assert found[1].remedy == "install it from the lock"


@pytest.mark.parametrize(
    ("torch", "known", "level", "words"),
    [
        ({"cuda": None, "devices": []}, None, "ok", "no GPU is visible"),
        ({"cuda": "13.0", "devices": []}, None, "ok", "no GPU is visible"),
        ({"cuda": None, "devices": []}, EIGHT, "problem", "built without CUDA, but there are 8 × NVIDIA H100"),
        ({"cuda": "13.0", "devices": []}, EIGHT, "problem", "CUDA 13.0, and the driver of 8"),
        ({"cuda": "12.6", "devices": [], "error": "no device"}, EIGHT, "problem", "can't use 8.*no device"),
        ({"cuda": "12.6", "devices": [("H100", True)] * 8}, EIGHT, "ok", r"sees H100 \(80 GiB\)"),
        ({"cuda": "12.6", "devices": [("H100", True)]}, EIGHT, "warning", "1 of the driver's 8"),
    ],
)
def test_torch_against_the_driver(torch: dict[str, Any], known: Driver | None, level: str, words: str) -> None:
    seen = [{"name": name, "bytes": 80 << 30, "bf16": bf16} for name, bf16 in torch["devices"]]
    [found] = judge({"version": "2.13.0", "error": "", **torch, "devices": seen}, known)
    assert found.level == level and bool(found.remedy) == (level != "ok")
    assert re.search(words, found.text), found.text


def test_an_old_device_without_bf16_is_told() -> None:
    seen = {"name": "T4", "bytes": 15 << 30, "bf16": False}
    found = list(judge({"version": "2.13.0", "cuda": "12.6", "devices": [seen], "error": ""}, None))
    assert levels(found) == [("torch", "ok"), ("bf16", "warning")]


def test_the_driver_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    program.write_text(
        '#!/bin/sh\nif [ -n "$1" ]; then echo "NVIDIA L4, 550.54"; echo "NVIDIA L4, 550.54"; else '
        'echo "| Driver Version: 550.54   CUDA Version: 12.4 |"; fi\n'
    )
    program.chmod(0o755)
    assert driver() == Driver(("NVIDIA L4", "NVIDIA L4"), "550.54", "12.4")
    program.write_text("#!/bin/sh\nexit 9\n")
    with pytest.raises(subprocess.CalledProcessError):
        driver()
    monkeypatch.setattr(devices, "ask", lambda *_: ({"version": "2", "cuda": None, "devices": [], "error": ""}, ""))
    assert levels(torch_and_devices()) == [("GPU driver", "warning"), ("torch", "ok")]


@pytest.mark.parametrize(("broken", "message"), [("raise ImportError('libtorch.so: no such file')", "libtorch.so")])
def test_a_broken_torch_or_ray_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, message: str
) -> None:
    for name in ("torch", "ray"):
        (tmp_path / f"{name}.py").write_text(broken)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[3]}")
    [found] = torch_and_devices()
    assert (found.check, found.level) == ("torch", "problem") and message in found.text
    [found] = services.ray_cluster(None, None, None, {}, [], "3.11")
    assert (found.check, found.level) == ("Ray", "problem") and message in found.text
    (tmp_path / "torch.py").write_text("import os; os.kill(os.getpid(), 11)")
    [found] = torch_and_devices()
    assert found.level == "problem" and "ended by signal 11" in found.text


def test_limits_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.cpu_quota(tmp_path) is None and machine.memory_limit(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("2000000000\n")
    assert machine.cpu_quota(tmp_path) == 1.5 and machine.memory_limit(tmp_path) == 2_000_000_000
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.cpu_quota(tmp_path) is None and machine.memory_limit(tmp_path) is None
    monkeypatch.setattr(machine, "cpu_quota", lambda: 0.5)
    [found] = machine.processors()
    assert found.level == "warning" and "cluster.cpus" in found.remedy and " to 1:" in found.remedy
    monkeypatch.setattr(machine, "memory_limit", lambda: 1_000_000_000)
    found = next(iter(machine.memory()))
    assert found.level == "warning" and "by the cgroup's limit" in found.text


def test_disks(tmp_path: Path) -> None:
    found = {each.check: each for each in machine.disks(Folder(str(tmp_path / "a/b")), needed=1e18)}
    assert found["disk: workdir"].level == "problem" and "predicts 1000000000.0 GB" in found["disk: workdir"].text
    assert found.keys() == {"disk: workdir", "disk: temporary files", "disk: node cache"}
    (tmp_path / "file").touch()
    found = {each.check: each for each in machine.disks(Folder(str(tmp_path / "file/run")))}
    assert found["disk: workdir"].level == "problem" and "not a folder" in found["disk: workdir"].text


def test_few_files_and_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (256, 65536))
    [found] = machine.limits()
    assert found.level == "warning" and "ulimit -n 65536" in found.remedy
    assert levels(machine.compiler(["no-such-compiler"])) == [("C++ compiler", "warning")]


def test_an_object_store_is_really_used(s3: Callable[[str], Folder], monkeypatch: pytest.MonkeyPatch) -> None:
    workdir = s3("doctor") / "run"
    [found] = services.storage(workdir)
    assert found.level == "ok" and list(workdir.scan()) == []
    assert levels(services.clock(workdir)) == [("clock", "ok")]
    [found] = services.storage(Folder("s3://nobody") / "run")
    assert found.level == "problem" and "no such bucket" in found.text and found.remedy.startswith("create it")
    assert "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY set" in found.text
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("DISTILL_STORAGE_PATIENCE", "1")
    [found] = services.storage(workdir)
    assert found.level == "problem" and found.remedy


def test_a_local_workdir(tmp_path: Path) -> None:
    assert levels(services.storage(Folder(str(tmp_path))))[0][1] == "ok" and not list(tmp_path.iterdir())
    [found] = services.storage(Folder(str(tmp_path / "later")))
    assert found.level == "ok" and "not there yet" in found.text


class Answer(BaseHTTPRequestHandler):
    """A server that wants a login, and whose clock can be wrong."""

    skew, body = 0.0, b'{"experiments": []}'

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        let_in = self.headers["Authorization"] == "Basic YTpi"  # a:b
        self.send_response_only(200 if let_in else 401)
        self.send_header("Date", formatdate(time.time() + self.skew, usegmt=True))
        self.end_headers()
        self.wfile.write(self.body if let_in else b"")

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def server() -> Iterator[str]:
    serving = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_port}"
    serving.shutdown()
    serving.server_close()


def test_a_tracking_server_is_really_asked(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    [found] = services.tracking(server)
    assert found.level == "problem" and "(401)" in found.text and "MLFLOW_TRACKING_USERNAME" in found.remedy
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "a")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "b")
    assert levels(services.tracking(server)) == [("tracking", "ok"), ("clock", "ok")]
    for skew, level in ((-60.0, "warning"), (900.0, "problem")):
        monkeypatch.setattr(Answer, "skew", skew)
        found = list(services.tracking(server))[1]
        assert (found.check, found.level) == ("clock", level) and abs(int(found.text.split()[0]) - abs(skew)) < 3
    monkeypatch.setattr(Answer, "body", b"<html>")
    assert [each.text for each in services.tracking(server)][-1] == f"{server} is no MLflow server"
    [found] = services.tracking("http://user:secret@127.0.0.1:9")
    assert found.level == "problem" and "does not answer" in found.text and "secret" not in json.dumps(str(found))
    assert levels(services.tracking(None)) == [("tracking", "ok")]


def test_taken_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(services, "PORTS", {port: "Ray's head"})
        assert (f"port {port}", "warning") in levels(services.ports())
    assert ("ports", "ok") in levels(services.ports())


def test_room_on_nodes() -> None:
    nodes = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0}]
    assert lacking(nodes, [(1, {"CPU": 4, "GPU": 1}), (1, {"CPU": 4})]) is None
    assert "asks for 3 workers of 3 CPU (9 in all), but the cluster has 8" in str(lacking(nodes, [(3, {"CPU": 3})]))
    assert "the cluster's nodes have room for 2" in str(lacking(nodes, [(3, {"CPU": 2.5})]))
    assert "2 workers of 1 GPU (2 in all), but the cluster has 1" in str(lacking(nodes, [(2, {"GPU": 1})]))
    assert lacking([], [(0, {"CPU": 1})]) is None and room(nodes, {"GPU": 0.5}) == 2


def test_no_dashboard() -> None:
    found = examine({"dashboard": lambda: services.dashboard("http://127.0.0.1:9", {})})
    assert levels(found) == [("dashboard", "problem")] and "no Ray dashboard answers" in found[0].text
