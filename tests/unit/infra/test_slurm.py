"""``infra/slurm/distill.sbatch`` without Slurm: its options, what it refuses, and its course beside stand-ins for the
programs that it calls. ``tests/end_to_end/test_slurm_jobs.py`` runs it under a real Slurm."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tools import INFRA, ROOT, run, tool

SCRIPT = INFRA / "slurm" / "distill.sbatch"
NODES = ROOT / "tests/end_to_end/slurm_cluster.sh"

# A node where everything answers at once. The Ray of each step runs until scancel ends it, as in a job.
STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then echo n1; else echo "$@" >>"$HERE/requeued"; fi',
    "srun": 'while [ "$1" != bash ]; do shift; done; echo $$ >"$HERE/step.pid"; exec "$@"',
    "ray": 'echo "$@" >>"$HERE/started"; mkdir -p "$DIR/ray"; echo $$ >"$HERE/ray.pid"\n'
    'echo 10.0.0.1:6379 >"$DIR/ray/ray_current_cluster"; ls -l "$RAY_AUTH_TOKEN_PATH" >"$HERE/token"; exec sleep 60',
    "scancel": 'kill "$(cat "$HERE/step.pid")" "$(cat "$HERE/ray.pid")"',
    "squeue": 'cat "$HERE/state"',
    "python3": 'if [ "$1" = -c ]; then echo 20001; fi',
    "distill": 'trap "exit 130" TERM; echo "$RAY_ADDRESS $RAY_AUTH_MODE $*" >"$HERE/ran"\n'
    'while [ -e "$HERE/long" ]; do sleep 0.1; done; exit 5',
}


def complaints(text: str) -> list[str]:
    """What of a job's fate the script's options would leave to chance, and what it must not do."""
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)", text, flags=re.MULTILINE))
    wanted = {"requeue": "", "no-kill": "", "open-mode": "append", "ntasks-per-node": "1"}
    found = [f"--{name} is missing" for name, value in wanted.items() if options.get(name) != value]
    warning = re.fullmatch(r"B:(TERM|USR1)@(\d+)", options.get("signal", ""))
    if not warning or int(warning[2]) < 60:
        found.append("--signal warns the script too late, or not at all")
    # It would end every Ray of this user on the node, those of other jobs too.
    found += ["ray stop ends other jobs' Ray"] * bool(re.search(r"\bray stop\b", text))
    found += ["the token stands on a command line"] * bool(re.search(r"RAY_AUTH_TOKEN=\S|--export=\S*TOKEN", text))
    return found


def test_the_options_are_set() -> None:
    assert complaints(SCRIPT.read_text()) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("#SBATCH --requeue", "#SBATCH --no-requeue", "--requeue"),
        ("#SBATCH --no-kill\n", "", "--no-kill"),
        ("--open-mode=append", "--open-mode=truncate", "--open-mode"),
        ("B:TERM@120", "TERM@120", "--signal"),
        ("B:TERM@120", "B:TERM@5", "--signal"),
        ('rm -rf "$DIR"\n', "ray stop\n", "ray stop"),
        ("unset RAY_AUTH_TOKEN RAY_ADDRESS", 'export RAY_AUTH_TOKEN="$(cat x)"', "on a command line"),
    ],
)
def test_a_broken_script_is_told_of(old: str, new: str, said: str) -> None:
    text = SCRIPT.read_text()
    assert old in text
    assert any(said in why for why in complaints(text.replace(old, new)))


@pytest.mark.parametrize("path", [SCRIPT, NODES], ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(path: Path) -> None:
    assert run(tool("shellcheck"), str(path)).stdout == ""
    assert "SC2086" in run(tool("shellcheck"), "-", given=path.read_text() + "\nrm $1\n").stdout


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of one node, with stand-ins on its search path."""
    for name, text in STAND_INS.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "job.yaml").touch()
    (tmp_path / "scratch").mkdir()
    (tmp_path / "state").write_text("RUNNING\n")
    names = {"JOB_ID": "7", "JOB_NUM_NODES": "1", "JOB_NODELIST": "n1", "CPUS_PER_TASK": "2", "GPUS_ON_NODE": "3"}
    return {
        **{f"SLURM_{name}": value for name, value in names.items()},
        "SLURM_MEM_PER_NODE": "1000",
        "SLURMD_NODENAME": "localhost",
        "TMPDIR": "/tmp",
        "HERE": str(tmp_path),
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
        "HOME": str(tmp_path),
    }


def start(job: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.Popen(command, env=job, cwd=job["HERE"], stderr=subprocess.PIPE, text=True)


def left_behind(job: dict[str, str]) -> list[str]:
    began = (Path(job["HERE"]) / "started").read_text()
    found = re.search(r"--temp-dir=(\S+)/ray", began)
    assert found
    return [found[1]] if os.path.exists(found[1]) else []


def test_it_runs_the_job_on_its_ray_and_gives_its_exit_code(job: dict[str, str], tmp_path: Path) -> None:
    running = start(job, "job.yaml", "--set", "a=b")
    _, told = running.communicate(timeout=30)
    assert running.returncode == 5, told
    assert (tmp_path / "ran").read_text() == "10.0.0.1:6379 token run job.yaml --set a=b\n"
    options = (tmp_path / "started").read_text()
    for wanted in ("start --head --port=0", "--num-cpus=2", "--num-gpus=3", f"--object-store-memory={300 * 2**20}"):
        assert wanted in options
    assert (tmp_path / "token").read_text().startswith("-rw-------")
    assert not (tmp_path / "requeued").exists() and left_behind(job) == []

    start({**job, "DISTILL_DO": "capture"}, "job.yaml").communicate(timeout=30)
    assert (tmp_path / "ran").read_text() == "10.0.0.1:6379 token capture job.yaml\n"


def test_a_slow_start_of_ray_is_tried_again_and_a_failed_one_told_of(job: dict[str, str], tmp_path: Path) -> None:
    ray = tmp_path / "bin/ray"
    whole = ray.read_text()
    slow = 'if [ ! -e "$HERE/once" ]; then touch "$HERE/once"; echo The node timed out during startup; exit 1; fi'
    ray.write_text(whole.replace("#!/bin/bash\n", f"#!/bin/bash\n{slow}\n"))
    running = start(job, "job.yaml")
    _, told = running.communicate(timeout=30)
    assert running.returncode == 5 and "Ray ended" not in told and left_behind(job) == []

    ray.write_text("#!/bin/bash\necho no room for Ray\nexit 1\n")
    running = start(job, "job.yaml")
    _, told = running.communicate(timeout=30)
    assert running.returncode == 1 and "Ray ended on localhost: no room for Ray" in told and "didn't start" in told


@pytest.mark.parametrize(
    ("number", "state", "again"),
    [
        (signal.SIGTERM, "RUNNING", True),
        (signal.SIGUSR1, "RUNNING", True),
        (signal.SIGTERM, "CANCELLED", False),
        (signal.SIGTERM, "COMPLETING", False),
    ],
)
def test_a_warned_job_is_queued_again_and_a_cancelled_one_is_not(
    job: dict[str, str], tmp_path: Path, number: signal.Signals, state: str, again: bool
) -> None:
    (tmp_path / "long").touch()
    (tmp_path / "state").write_text(f"{state}\n")
    running = start(job, "job.yaml")
    end = time.monotonic() + 30
    while not (tmp_path / "ran").exists() and time.monotonic() < end:
        time.sleep(0.05)
    running.send_signal(number)
    _, told = running.communicate(timeout=30)
    assert running.returncode == 130, told
    requeued = (tmp_path / "requeued").read_text() if (tmp_path / "requeued").exists() else ""
    assert requeued == ("requeue 7\n" if again else "") and ("queued again" in told) is again
    assert left_behind(job) == []


def test_what_can_not_run_is_refused_in_a_sentence(job: dict[str, str], tmp_path: Path) -> None:
    for arguments in ([], ["no.yaml"]):
        running = start(job, *arguments)
        _, told = running.communicate(timeout=10)
        assert (running.returncode, told.count("\n")) == (2, 1) and "give the job's spec" in told
    (tmp_path / "bin/distill").unlink()
    running = start(job, "job.yaml")
    _, told = running.communicate(timeout=10)
    assert running.returncode == 2 and "distill isn't on PATH; activate its environment before sbatch" in told
