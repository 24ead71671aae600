"""A real Slurm on this machine, for tests: a controller and nodes, in namespaces that end with the block."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

SCRIPT = Path(__file__).with_suffix(".sh")
SBATCH = Path(__file__).parents[2] / "infra/slurm/distill.sbatch"
NEEDS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")


def missing() -> str | None:
    """Why this machine can't run one."""
    if lacking := [name for name in NEEDS if shutil.which(name) is None]:
        return f"this machine has no {', '.join(lacking)} (Debian: slurm-wlm, munge, iproute2)"
    if os.geteuid() != 0:
        return "only root can make the namespaces in which the nodes live"
    made = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False)
    return None if made.returncode == 0 else "this machine lets nobody make network namespaces"


class Slurm:
    """A context manager: a cluster of ``nodes`` machines n1, n2, … with one GPU each that exists by name alone."""

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 4) -> None:
        self.folder, self.nodes, self.cpus = folder, nodes, cpus

    def __enter__(self) -> Self:
        own = ["--net", "--uts", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child"]
        with (self.folder / "cluster.log").open("w") as log:
            command = ["unshare", *own, "bash", SCRIPT, self.folder, str(self.nodes), str(self.cpus)]
            self._process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
        try:
            self.wait(lambda: psutil.Process(self._process.pid).children(), "first process of the cluster")
            self._first = psutil.Process(self._process.pid).children()[0].pid
            self.wait(lambda: len(re.findall("idle", self._sinfo())) == self.nodes, "idle nodes", 60)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    def call(self, *command: str | Path, cwd: Path | None = None, **environment: str) -> str:
        """What a command prints that runs on the controller, with this test's Python and code on its paths."""
        inside = ["nsenter", f"--target={self._first}", "--net", "--uts", "--mount", "--pid", "--"]
        environment = {
            **os.environ,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(SBATCH.parents[2]),
            "TMPDIR": "/var/tmp",
            "HF_HUB_OFFLINE": "1",
            **environment,
        }
        done = subprocess.run(
            [*inside, "env", f"--chdir={cwd or self.folder}", *map(str, command)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, folder: Path, *options: str, spec: str = "job.yaml", **environment: str) -> str:
        """The id of a job that runs ``distill.sbatch`` on a spec in ``folder``; its log will be ``<id>.log`` there."""
        given = ["--parsable", "--output=%j.log", *options, str(SBATCH), spec]
        return self.call("sbatch", *given, cwd=folder, **environment).strip()

    def facts(self, job: str) -> dict[str, str]:
        """What Slurm says of a job: ``JobState``, ``ExitCode``, ``Restarts``, …"""
        told = self.call("scontrol", "--oneliner", "show", "job", job)
        return dict(pair.split("=", 1) for pair in told.split() if "=" in pair)

    def end(self, job: str, seconds: float = 400) -> dict[str, str]:
        """The same once a job has ended for good."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        self.wait(lambda: self.facts(job)["JobState"] in ended, f"the end of job {job}", seconds)
        return self.facts(job)

    def processes(self) -> list[str]:
        """The command lines of all that runs on any node."""
        return self.call("ps", "-e", "-w", "-w", "-o", "args=").splitlines()

    def leftovers(self) -> list[str]:
        """What jobs have left on the nodes: processes of Ray, folders in the scratch."""
        left = [line for line in self.processes() if re.search(r"ray::|/ray/|bin/ray|bin/distill|gcs_server", line)]
        return left + [str(path) for path in self.folder.glob("n*/scratch/distill-*")]

    @staticmethod
    def wait(ready: Callable[[], Any], what: str, seconds: float = 30, log: Path | None = None) -> None:
        end = time.monotonic() + seconds
        while not ready():
            told = log.read_text() if log and log.exists() else ""
            assert time.monotonic() < end, f"no {what} within {seconds} s\n{told}"
            time.sleep(0.25)

    def _sinfo(self) -> str:
        try:
            return self.call("sinfo", "--noheader", "--Node", "--partition=main")
        except AssertionError:  # the controller isn't there yet
            return ""
