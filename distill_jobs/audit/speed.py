"""How large and how fast a model is, on the device where it runs."""

import time
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from cluster.power import this_machine
from distill_jobs.data.batch import Batch
from distill_jobs.models.scorer import Scorer


@torch.inference_mode()
def measure_speed(model: Scorer, batch: Batch, repeats: int) -> dict[str, Any]:
    """Measure ``model`` on a real batch.

    Returns:
        parameters and bytes (weights as held), latency_ms (median of ``repeats`` passes of one row), throughput
        (scored positions a second at the whole batch), memory_bytes (weights and the peak of live tensors in a pass
        of the whole batch), hardware (the device's name, and how many threads of a processor).
    """
    first = {name: value[:1] for name, value in batch.inputs.items()}
    weights = sum(t.numel() * t.element_size() for t in {id(p): p for p in model.state_dict().values()}.values())
    positions = max(1, batch.positions)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": weights,
        "latency_ms": 1000 * _seconds(model, first, repeats),
        "throughput": positions / _seconds(model, batch.inputs, max(3, repeats // 5)),
        "memory_bytes": weights + _peak_activations(model, batch.inputs),
        "hardware": _hardware(model),
    }


def _hardware(model: Scorer) -> str:
    if _on_cuda(model):
        return str(torch.cuda.get_device_name())
    threads = torch.get_num_threads()
    return f"{this_machine().cpu or 'CPU'}, {threads} thread{'s' if threads > 1 else ''}"


def _on_cuda(model: Scorer) -> bool:
    """A model that a factory makes may have neither weights nor buffers; what it computes then is on the processor."""
    return any(tensor.is_cuda for tensor in model.state_dict().values())


def _seconds(model: Scorer, inputs: dict[str, torch.Tensor], repeats: int) -> float:
    cuda = _on_cuda(model)
    times = []
    for attempt in range(repeats + 1):
        started = time.perf_counter()
        model(**inputs)
        if cuda:
            torch.cuda.synchronize()
        if attempt:  # The first pass warms caches and allocators.
            times.append(time.perf_counter() - started)
    return median(times)


def _peak_activations(model: Scorer, inputs: dict[str, torch.Tensor]) -> int:
    """Bytes of live tensors at their peak during one pass, weights not counted."""
    if _on_cuda(model):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(**inputs)
        return int(torch.cuda.max_memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(**inputs)
    kineto: Any = profiler.profiler
    changes = sorted((e.start_ns(), e.nbytes()) for e in kineto.kineto_results.events() if e.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak
