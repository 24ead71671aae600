"""A whole job in an object store, by the command that a user types: well, killed, and through a store that fails.

The server is moto's, in a process of its own, and what fails is a proxy before it: answers of 500 and 503, slow ones,
ones cut in their middle, requests that are carried out but not answered, and connections that are closed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from conftest import digits_spec, write_spec
from fault_proxy import FaultProxy, Storm
from object_server import KEYS, environment, gcs, moto
from pyarrow import fs

from cluster.files import Folder, filesystem

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STAGES = ("prepare", "teach", "capture", "train", "evaluate", "audit", "report")

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with moto() as endpoint, pytest.MonkeyPatch.context() as patch:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": endpoint}.items():
            patch.setenv(name, value)
        host = endpoint.removeprefix("http://")
        fs.S3FileSystem(endpoint_override=host, scheme="http", allow_bucket_creation=True).create_dir("jobs")
        yield endpoint


@pytest.fixture(scope="module")
def distill(endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs the command as on another machine: what it needs to know of the store stands in its environment."""
    home = tmp_path_factory.mktemp("elsewhere")

    def call(*arguments: Any, through: str = endpoint, timeout: float = 400) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            _command(*arguments),
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=home,
            env=_environment(through, home),
            check=False,
        )

    return call


def _command(*arguments: Any) -> list[str]:
    return [str(Path(sys.executable).with_name("distill")), *map(str, arguments)]


def _environment(endpoint: str, home: Path) -> dict[str, str]:
    caches = {"DISTILL_NODE_CACHE": str(home / "node"), "DISTILL_PART_CACHE": str(home / "parts")}
    return environment(endpoint, HF_HUB_OFFLINE="1", COLUMNS="200", **caches)


def spec_of(folder: Path, name: str, data: str, workdir: str, **changes: Any) -> Path:
    """The job: small, of many parts, and with checkpoints."""
    train = {"epochs": 4, "batch_size": 64, "learning_rate": 0.003, "workers": 2, "checkpoint": {"every_steps": 30}}
    spec = digits_spec(Path("unused"), Path("unused"), seeds=[0], student__train=train, **changes)
    spec["data"] = {**spec["data"], "train": data, "rows_per_part": 200}
    spec["teacher"]["train"] = {**spec["teacher"]["train"], "epochs": 4}
    more = {"workdir": workdir, "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"}, "name": name}
    return write_spec(folder / f"{name}.yaml", {**spec, **more, "reading": {"window_parts": 20}})


@pytest.fixture(scope="module")
def on_disk(digits: Path, distill: Run, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The workdir of the job on a disk."""
    folder = tmp_path_factory.mktemp("disk")
    done = distill("run", spec_of(folder, "disk", str(digits), str(folder / "run")))
    assert done.returncode == 0, done.stdout + done.stderr
    return Folder(str(folder / "run"))


@pytest.fixture(scope="module")
def remote(digits: Path, distill: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Folder]:
    """The spec and the workdir of the same job in the object store, and what it reads there too."""
    Folder("s3://jobs/in").put(digits, "digits.parquet")
    folder = tmp_path_factory.mktemp("remote")
    spec = spec_of(folder, "remote", "s3://jobs/in/*.parquet", "s3://jobs/run")
    done = distill("run", spec)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "distill report SPEC --to" in done.stdout
    return spec, Folder("s3://jobs/run")


def assert_same(found: Folder, expected: Folder) -> None:
    """The same data, teacher, store and students, to the bit."""
    for table in ("data/train", "data/validation", "data/test", "store/parts"):
        mine, theirs = ((each / table).read_json("manifest.json") for each in (found, expected))
        assert mine["part_sha256"] == theirs["part_sha256"] and mine["part_rows"] == theirs["part_rows"], table
    for model in ("teacher", "student/0", "baseline/0"):
        assert (found / model / "model").read("model.safetensors") == (expected / model / "model").read(
            "model.safetensors"
        ), model
    mine, theirs = (each.read_json("evaluation.json")["models"] for each in (found, expected))
    assert {name: each["nll"] for name, each in mine.items()} == {name: each["nll"] for name, each in theirs.items()}


def test_the_same_comes_out_as_on_a_disk(remote: tuple[Path, Folder], on_disk: Folder) -> None:
    assert_same(remote[1], on_disk)
    assert not [name for name in remote[1].scan() if name.endswith(".tmp")]


def test_what_is_done_is_skipped(remote: tuple[Path, Folder], distill: Run) -> None:
    again = distill("run", remote[0])
    assert again.returncode == 0, again.stderr
    assert " done in " not in again.stdout and again.stdout.count("skipped") >= len(STAGES), again.stdout


def test_the_models_are_in_mlflow(remote: tuple[Path, Folder], digits: Path) -> None:
    uri = f"sqlite:///{remote[0].parent / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    for kind in ("teacher", "student"):
        model = mlflow.pyfunc.load_model(f"models:/remote-{kind}/1")
        rows = pd.read_parquet(digits, columns=["image"]).head(5)
        assert len(model.predict(rows)) == 5


def test_the_other_verbs(remote: tuple[Path, Folder], on_disk: Folder, distill: Run, tmp_path: Path) -> None:
    spec, workdir = remote
    told = {
        "plan": ("plan", spec),
        "advise": ("advise", spec),
        "verify": ("store", "verify", f"{workdir}/store"),
        "inspect": ("store", "inspect", f"{workdir}/store"),
        "fidelity": ("store", "fidelity", f"{workdir}/store"),
        "repair": ("store", "repair", f"{workdir}/store"),
        "export": ("store", "export", f"{workdir}/store", "--to", "s3://jobs/exported"),
        "compare": ("compare", workdir, on_disk, "--out", tmp_path / "compare.html"),
        "report": ("report", spec, "--to", tmp_path / "report.html"),
    }
    for name, arguments in told.items():
        done = distill(*arguments)
        assert done.returncode == 0, (name, done.stdout, done.stderr)
    assert (tmp_path / "report.html").read_bytes() == workdir.read("report.html")
    assert "<html" in (tmp_path / "compare.html").read_text()
    assert Folder("s3://jobs/exported").infos()


def test_the_same_by_googles_protocol(
    remote: tuple[Path, Folder], digits: Path, distill: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gcs() as endpoint:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
        monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "tests")
        filesystem("gs://jobs/run")[0].create_dir("jobs")
        Folder("gs://jobs/in").put(digits, "digits.parquet")
        done = distill("run", spec_of(tmp_path, "google", "gs://jobs/in/*.parquet", "gs://jobs/run"))
        assert done.returncode == 0, done.stdout + done.stderr
        assert_same(Folder("gs://jobs/run"), remote[1])


def test_tuning(remote: tuple[Path, Folder], distill: Run) -> None:
    search = "tune.search={distill.temperature: {choice: [1.0, 4.0]}}"
    more = ("--set", "tune.baseline=false", "--set", "tune.finalists=1", "--set", "student.train.workers=1")
    done = distill("tune", remote[0], "--trials", 2, "--set", search, *more)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "temperature" in remote[1].read("tune/best.yaml").decode()


def test_a_workdir_without_a_tracking_server_is_refused(remote: tuple[Path, Folder], distill: Run) -> None:
    refused = distill("run", remote[0], "--set", "tracking.uri=null", "--set", "workdir=s3://jobs/other")
    assert refused.returncode != 0 and "give tracking.uri" in refused.stderr and "Traceback" not in refused.stderr


@contextmanager
def started(log: Path, *arguments: Any, endpoint: str) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a session of its own, killed with all its processes when the block ends."""
    with log.open("wb") as out:
        running = subprocess.Popen(
            _command(*arguments),
            stdout=out,
            stderr=out,
            cwd=log.parent,
            env=_environment(endpoint, log.parent),
            start_new_session=True,
        )
        try:
            yield running
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
            running.wait()


def test_training_killed_in_the_middle_goes_on(
    remote: tuple[Path, Folder], endpoint: str, distill: Run, tmp_path: Path
) -> None:
    """Killed when a checkpoint stands in the store: the weights are those of a run that nothing befell."""
    longer = ("--set", "student.train.epochs=40", "--set", "distill.alpha=0.6")
    folders = {}
    for name in ("killed", "whole"):
        # Of its own only from training on: what comes before is the same, and the command finds it done.
        folders[name] = Folder(f"s3://jobs/{name}")
        _copy(remote[1], folders[name])
        workdir = ("--set", f"workdir={folders[name]}", *longer)
        if name == "killed":
            checkpoints = folders[name] / "student/0/checkpoints"
            with started(tmp_path / "log", "train", remote[0], *workdir, endpoint=endpoint) as running:
                end = time.monotonic() + 200
                while not checkpoints.names(".json"):
                    assert running.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
                    time.sleep(0.05)
        done = distill("train", remote[0], *workdir)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("goes on from step" in done.stdout) is (name == "killed"), done.stdout
    mine, theirs = ((folders[name] / "student/0/model").read("model.safetensors") for name in ("killed", "whole"))
    assert mine == theirs


def _copy(source: Folder, target: Folder) -> None:
    system, path = (
        fs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"].removeprefix("http://"), scheme="http"),
        source.uri.removeprefix("s3://"),
    )
    fs.copy_files(path, target.uri.removeprefix("s3://"), source_filesystem=system, destination_filesystem=system)
    for arm in ("student/0", "baseline/0"):
        (target / arm).clear()


def test_a_failing_store_changes_nothing(
    remote: tuple[Path, Folder], endpoint: str, distill: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every tenth request meets a fault, of each kind in turn, and every stage meets each kind."""
    host, port = endpoint.removeprefix("http://").split(":")
    proxy, storm = FaultProxy(host, int(port)), Storm(every=10)
    proxy.storm = storm
    workdir = ("--set", "workdir=s3://jobs/stormy")
    try:
        for storm.season in STAGES:
            done = distill(storm.season, remote[0], *workdir, through=proxy.endpoint)
            assert done.returncode == 0, (storm.season, done.stdout, done.stderr)
        storm.season = "verify"
        assert distill("store", "verify", "s3://jobs/stormy/store", through=proxy.endpoint).returncode == 0
    finally:
        proxy.stop()
    with capsys.disabled():
        print(f"\n{len(proxy.seen):,} requests; faults survived:")
        for season in (*STAGES, "verify"):
            print(f"  {season:9}", json.dumps({kind: storm.hits[season, kind] for kind in Storm.KINDS}))
    assert all(storm.hits[season, kind] for season in STAGES for kind in Storm.KINDS)
    assert_same(Folder("s3://jobs/stormy"), remote[1])
