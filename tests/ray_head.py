"""A Ray cluster of its own processes, with a dashboard, as somebody would start it with ``ray start``."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

RAY = Path(sys.executable).with_name("ray")


@dataclass(frozen=True)
class Head:
    """A running head: where its dashboard and its control store answer, and the environment it was started in."""

    dashboard: str
    address: str
    env: Mapping[str, str]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextmanager
def ray_head(cpus: int = 2, **env: str) -> Iterator[Head]:
    """Start a head with ``env`` in its environment; its jobs find this Python first."""
    port, dashboard = free_port(), free_port()
    own = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST", "AWS_"))}
    own |= {"PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}
    own |= {"RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1", **env}
    # Ray's sockets lie there, whose names may not be long.
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        command = [RAY, "start", "--head", "--block", f"--port={port}", f"--num-cpus={cpus}", "--num-gpus=0"]
        command += [f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--include-dashboard=true"]
        command += [
            f"--ray-client-server-port={free_port()}",
            "--node-ip-address=127.0.0.1",
            f"--temp-dir={folder}",
            "--disable-usage-stats",
        ]
        with Path(folder, "start.log").open("w") as log:
            running = subprocess.Popen(
                [*map(str, command), f"--dashboard-agent-listen-port={free_port()}"],
                env=own,
                stdout=log,
                stderr=log,
                cwd=folder,
                start_new_session=True,
            )
        try:
            _answers(f"http://127.0.0.1:{dashboard}", own, running, Path(folder, "start.log"))
            yield Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", own)
        finally:
            running.send_signal(signal.SIGTERM)
            try:
                running.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGKILL)
                running.wait()


def _answers(url: str, env: Mapping[str, str], running: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 90
    token = {"Authorization": f"Bearer {env['RAY_AUTH_TOKEN']}"} if env.get("RAY_AUTH_TOKEN") else {}
    while True:
        assert running.poll() is None and time.monotonic() < end, log.read_text()
        try:
            with urlopen(Request(f"{url}/api/jobs/", headers=token), timeout=5) as answer:
                if answer.status == 200:
                    return
        except (URLError, OSError):
            time.sleep(0.3)
