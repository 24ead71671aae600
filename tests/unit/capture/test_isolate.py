"""Whose fault it is: rows are found by halving, memory makes batches smaller, and the machine's faults go through."""

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capture_cases import LENGTH, columns_of, fail_with, lm_facts, make_task, raises, table_facts

from cluster import notice
from cluster.errors import FileError, TransientFileError
from distill_jobs.capture.isolate import DeviceLostError, NoRoomError
from distill_jobs.capture.sizes import SIZES, Sizes
from distill_jobs.capture.worker import CaptureWorker
from distill_jobs.errors import CaptureError, DistillError, ModelError
from distill_jobs.models.faults import Fault, fault_of

NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.fixture(autouse=True)
def fresh_notice() -> Iterator[None]:
    yield
    notice.forget()


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (ValueError("odd row"), Fault.ROW),
        (IndexError("index out of range in self"), Fault.ROW),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), Fault.ROW),
        (CaptureError("the teacher's logits are not finite"), Fault.ROW),
        (NO_MEMORY, Fault.MEMORY),
        (MemoryError(), Fault.MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), Fault.MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), Fault.MEMORY),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), Fault.DEVICE),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), Fault.DEVICE),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), Fault.DEVICE),
        (OSError(5, "Input/output error"), Fault.OTHER),
        (FileError("a file is missing"), Fault.OTHER),
        (TransientFileError("503 SlowDown"), Fault.OTHER),
        (ModelError("the model gives its output head nothing"), Fault.OTHER),
        (KeyboardInterrupt(), Fault.OTHER),
    ],
)
def test_faults_are_told_apart(error: BaseException, fault: Fault) -> None:
    assert fault_of(error) is fault


def test_the_allocators_own_words_are_known() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 50)
    assert fault_of(raised.value) is Fault.MEMORY
    with pytest.raises(MemoryError) as refused:
        np.empty(1 << 55)
    assert fault_of(refused.value) is Fault.MEMORY


def test_a_bad_row_is_found_in_few_steps(tmp_path: Path) -> None:
    facts = table_facts(64)
    columns = columns_of(facts, 64)
    columns["features"][37, 0] = 99.0
    worker = CaptureWorker(make_task(tmp_path, facts, columns, batch_tokens=64))
    core = fail_with(worker, raises(ValueError("odd row")))
    told = worker.run(0)
    assert told["quarantine_samples"] == [("part0.jsonl:37", "ValueError: odd row")] and told["rows"] == 63
    assert sorted(core.calls, reverse=True) == [64, 32, 32, 16, 16, 8, 8, 4, 4, 2, 2, 1, 1]


@pytest.mark.parametrize(
    "error",
    [OSError(5, "Input/output error"), FileError("gone"), ModelError("no such layer"), TransientFileError("503")],
)
def test_faults_of_the_machine_end_the_attempt_as_they_are(tmp_path: Path, error: Exception) -> None:
    facts = table_facts(20)
    columns = columns_of(facts, 20)
    columns["features"][7, 0] = 99.0
    worker = CaptureWorker(make_task(tmp_path, facts, columns))
    core = fail_with(worker, raises(error))
    with pytest.raises(type(error), match=str(error).replace("[", r"\[")):
        worker.run(0)
    assert core.calls == [20], "no row is suspected"


def test_a_lost_device_ends_the_actor(tmp_path: Path) -> None:
    facts = table_facts(20)
    columns = columns_of(facts, 20)
    columns["features"][7, 0] = 99.0
    worker = CaptureWorker(make_task(tmp_path, facts, columns))
    core = fail_with(
        worker, raises(torch.AcceleratorError("CUDA error: device-side assert triggered\nCUDA kernel ..."))
    )
    with pytest.raises(DeviceLostError, match=r"lost to this process: .*device-side assert") as raised:
        worker.run(0)
    assert core.calls == [20] and notice.leaving()
    assert not isinstance(raised.value, DistillError), "such a fault is tried again"


def room_for(worker: CaptureWorker, tokens: int, chunk: int = 10**9) -> list[tuple[int, int]]:
    """Let the worker's memory hold so many tokens of a batch, and logits of so many positions; the batches tried."""
    real, tried = worker.tools.scoring, []

    def score(group: Any) -> Any:
        tried.append((len(group.rows), group.size))
        if group.size > tokens or min(worker.sizes.chunk, len(group.scored)) > chunk:
            raise NO_MEMORY
        return real(group)

    worker.tools.scoring = score  # type: ignore[assignment]
    return tried


def test_out_of_memory_halves_the_batch_and_is_remembered(tmp_path: Path) -> None:
    facts = lm_facts(40, parts=2)
    task = make_task(tmp_path, facts, columns_of(facts, 40), batch_tokens=400)
    worker = CaptureWorker(task)
    tried = room_for(worker, tokens=100)
    assert worker.run(0)["rows"] == 20 and worker.run(1)["rows"] == 20
    failed = [size for _, size in tried if size > 100]
    assert len(failed) <= 3, "what failed once is not tried again"
    assert 48 <= worker.sizes.tokens <= 100
    (name,) = (path.name for path in (tmp_path / "store" / SIZES).iterdir())
    # Another actor on such a device begins with what was found; on another device, or asked for less, it does not.
    after = CaptureWorker(task)
    assert after.sizes.tokens == worker.sizes.tokens
    tried = room_for(after, tokens=100)
    (tmp_path / "store" / "parts" / "part-00000.json").unlink()
    after.run(0)
    assert all(size <= 100 for _, size in tried)
    other = Sizes(task.store, {"device": "another"}, 400, 7)
    assert (other.tokens, other.chunk) == (400, 7)
    task.store.write(f"{SIZES}/{name}", b'{"tokens": -1, "chunk": "x"}')
    assert CaptureWorker(task).sizes.tokens == 400, "damage counts as nothing"


def test_a_single_row_goes_through_the_head_in_smaller_chunks(tmp_path: Path) -> None:
    facts = lm_facts(10)
    columns = columns_of(facts, 10)
    columns["input_ids"][4], columns["segments"][4], columns["tokens"][4] = 5, 1, LENGTH
    worker = CaptureWorker(make_task(tmp_path, facts, columns, batch_tokens=24, chunk_positions=64))
    room_for(worker, tokens=10**9, chunk=LENGTH - 3)
    assert worker.run(0)["rows"] == 10
    assert worker.sizes.chunk == 16


def test_a_row_that_never_fits_is_a_fault_to_try_again(tmp_path: Path) -> None:
    facts = lm_facts(10)
    worker = CaptureWorker(make_task(tmp_path, facts, columns_of(facts, 10)))
    room_for(worker, tokens=3)
    said = r"a single row of \d+ tokens.*lower capture.batch_tokens or capture.chunk_positions"
    with pytest.raises(NoRoomError, match=said) as raised:
        worker.run(0)
    assert not isinstance(raised.value, DistillError)


def test_real_memory_runs_out_and_the_capture_goes_on(tmp_path: Path) -> None:
    facts = table_facts(2048)
    task = make_task(tmp_path, facts, columns_of(facts, 2048), batch_tokens=2048)
    limited = textwrap.dedent(
        """
        import resource, sys
        import torch
        from torch import nn
        from cluster.files import Folder
        from distill_jobs.capture.worker import CaptureTask, CaptureWorker

        class Wide(nn.Module):
            # Every row takes a MiB on its way.
            def __init__(self, core):
                super().__init__()
                self.core = core

            def forward(self, values):
                return self.core(values) + torch.ones(len(values), 1 << 18).mean()  * 0

        torch.set_num_threads(1)
        root = Folder(sys.argv[1])
        task = CaptureTask(root / "teacher", root / "data", root / "store", 2048, "fp32", 1, 0)
        worker = CaptureWorker(task)
        worker.teacher.core = Wide(worker.teacher.core)
        pages = int(open("/proc/self/statm").read().split()[0])
        most = pages * resource.getpagesize() + (700 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        print(worker.run(0)["rows"], worker.sizes.tokens)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, str(tmp_path)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    rows, tokens = map(int, done.stdout.split())
    assert rows == 2048 and 64 <= tokens <= 512
    assert CaptureWorker(task).sizes.tokens == tokens
