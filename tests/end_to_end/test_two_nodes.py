"""Capture and training over two nodes that share nothing but a network and an object store, and lose one in each stage.

The nodes are network namespaces with addresses, working folders and temporary files of their own; one is cut off the
network in the middle of the capture, and another, which took its place, is killed in the middle of the training.
"""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import namespaces
import pytest
import torch
from conftest import digits_spec, write_spec
from namespaces import Network
from object_server import KEYS, moto
from pyarrow import fs
from safetensors.torch import load

from cluster.files import Folder, fetch, store_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

DISTILL = Path(sys.executable).with_name("distill")
TEACHER = """
import time, torch
class Slow(torch.nn.Linear):
    def forward(self, pixels):
        time.sleep(0.25)
        return super().forward(pixels.flatten(1))
def make(feature_width, classes):
    torch.manual_seed(0)
    return Slow(feature_width, classes)
"""


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    if why := namespaces.missing():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("net")
    (folder / "code").mkdir()
    (folder / "code" / "slow_teacher.py").write_text(TEACHER)
    code = f"{folder / 'code'}:{Path(__file__).parents[2]}"
    with namespaces.network(folder, PYTHONPATH=code, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", **KEYS) as net:
        yield net


@pytest.fixture(scope="module")
def store(net: Network) -> Iterator[str]:
    """The endpoint of an object store that the nodes reach over the bridge, and this process too."""
    with moto(net.address) as endpoint, pytest.MonkeyPatch.context() as patch:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": endpoint}.items():
            patch.setenv(name, value)
        net.env["AWS_ENDPOINT_URL"] = endpoint
        system = fs.S3FileSystem(endpoint_override=endpoint[7:], scheme="http", allow_bucket_creation=True)
        system.create_dir("jobs")
        yield endpoint


def spec_of(digits: Path, folder: Path) -> Path:
    """Many parts, a teacher that takes its time, and students that are trained on two nodes or on one."""
    Folder("s3://jobs/in").put(digits, "digits.parquet")
    train = {
        "epochs": 14,
        "batch_size": 64,
        "learning_rate": 0.003,
        "workers": [1, 2],
        "checkpoint": {"every_steps": 25},
    }
    teacher = {"model": {"factory": {"target": "slow_teacher:make"}}}
    spec = digits_spec(Path("x"), Path("x"), seeds=[0], teacher=teacher, student__train=train)
    spec["student"]["model"] = {"mlp": {"hidden": [16]}}
    spec["data"] = {**spec["data"], "train": "s3://jobs/in/digits.parquet", "rows_per_part": 60}
    spec["capture"] = {"actors": [1, 2], "batch_tokens": 32}
    spec |= {"reading": {"window_parts": 100}, "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"}}
    return write_spec(folder / "job.yaml", spec)


def until(what: Callable[[], Any], running: Any, log: Path, seconds: float = 300) -> None:
    """Wait for something while a command runs."""
    end = time.monotonic() + seconds
    while not what():
        assert running.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.1)


def ended(running: Any, log: Path, seconds: float = 500) -> str:
    code = running.wait(seconds)
    assert code == 0, log.read_text()
    return log.read_text()


@pytest.mark.usefixtures("store")
def test_a_node_is_lost_in_each_stage(net: Network, digits: Path, tmp_path: Path) -> None:
    head, second = net.node(1), net.node(1)
    spec = spec_of(digits, tmp_path)

    def start(verb: str, workdir: str) -> tuple[Any, Path]:
        log = head.folder / f"{verb}-{workdir.rpartition('/')[2]}.log"
        more = ("--set", f"workdir={workdir}", "--set", f"cluster.address={net.ray}")
        return head.popen(DISTILL, verb, spec, *more, log=log.name), log

    calm, rough = Folder("s3://jobs/calm"), Folder("s3://jobs/rough")
    for verb in ("prepare", "teach"):
        ended(*start(verb, calm.uri))
    fetch(calm, tmp_path / "copy")
    store_folder(tmp_path / "copy", rough)
    for verb in ("capture", "train"):
        ended(*start(verb, calm.uri))
    writers = {record["writer"] for record in records(calm)}
    assert len(writers) == 2, writers

    running, log = start("capture", rough.uri)
    # Only when both nodes have committed parts, and many are still to come.
    until(lambda: len({record["writer"] for record in records(rough)}) == 2, running, log)
    before = len(records(rough))
    second.cut()
    printed = ended(running, log)
    assert before < 20 and net.becomes(second, alive=False)
    mine, theirs = ((each / "store/parts").read_json("manifest.json") for each in (rough, calm))
    assert mine["part_sha256"] == theirs["part_sha256"], printed
    second.kill()

    third = net.node(1)
    running, log = start("train", rough.uri)
    checkpoints = rough / "student/0/checkpoints"
    until(lambda: checkpoints.names(".json"), running, log)
    assert checkpoints.read_json(checkpoints.names(".json")[0])["world"] == 2
    third.kill()
    until(lambda: "goes on with 1 of 2 ranks" in log.read_text(), running, log)
    net.node(1)
    printed = ended(running, log)
    assert "student/0 goes on from step" in printed and "with 2 of 2 ranks" in printed, printed
    for arm in ("student/0", "baseline/0"):
        found, expected = (load((each / arm / "model").read("model.safetensors")) for each in (rough, calm))
        for name, value in expected.items():
            # The sums over one rank and over two are rounded differently.
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=5e-4, msg=f"{arm} {name}")
    assert not checkpoints.names()


def records(workdir: Folder) -> list[dict[str, Any]]:
    parts = workdir / "store/parts"
    return [parts.read_json(name) for name in parts.names(".json") if name.startswith("part-")]
