"""Passes over wide rows, in blocks of rows that stay in a core's cache.

On a CPU the blocks are shared out to threads that each work alone, in place of letting all threads share each small
operation: that would make them wait for one another dozens of times a block, which costs most where other processes
want the same cores.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


def rows_in_cache(tensor: Tensor) -> int:
    """Rows of ``tensor`` [N, V] for one pass: few enough for a core's cache, plenty for an accelerator."""
    budget = 1 << 19 if tensor.device.type == "cpu" else 1 << 24
    return max(1, min(budget // max(1, tensor.shape[1]), len(tensor)))


def by_blocks(work: Callable[[slice], Made], over: Tensor, rows: int | None = None) -> list[Made]:
    """``work`` on every block of the rows of ``over`` [N, V], in order and without gradients.

    Args:
        rows: of a block; default as many as stay in a core's cache. More for work of many small steps a block.
    """
    size = rows or rows_in_cache(over)
    blocks = [slice(start, start + size) for start in range(0, max(1, len(over)), size)]
    inference, threads = torch.is_inference_mode_enabled(), torch.get_num_threads()

    def alone(block: slice) -> Made:
        # Both modes belong to a thread.
        with torch.inference_mode(inference), torch.no_grad():
            return work(block)

    workers = min(threads, len(blocks))
    if workers == 1 or over.device.type != "cpu":
        return [alone(block) for block in blocks]
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(alone, blocks))
    finally:
        # A thread sets its own number, but also the default of threads to come: that goes back to what it was.
        torch.set_num_threads(threads)


@contextmanager
def alone() -> Iterator[None]:
    """For many small steps on a CPU: by this thread alone. Also a decorator.

    A few thousand numbers are done sooner than a second thread is met at the end of each step, and where other
    processes want the cores that meeting takes milliseconds.
    """
    threads = torch.get_num_threads()
    if threads > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if threads > 1:
            torch.set_num_threads(threads)
