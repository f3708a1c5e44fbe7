"""Wall time and peak memory of functions on a CPU or a GPU, and what the machine could reach at best."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor


def default_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that is measured on a device."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def normal(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    """Return normally distributed numbers in the dtype of the device."""
    random = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=random, device=device, dtype=default_dtype(device))


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of one call, until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def median(values: Iterable[float]) -> float:
    """Return the middle value; the larger one of two."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Return the largest sum of tensor memory above that before the call, results included.

    On the CPU torch's profiler records every allocation, and they are summed up.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def product_seconds(function: Callable[[], object]) -> float:
    """Return the time of the matrix products of one call on a CPU, without those inside attention."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    products = ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise")
    return sum(event.self_cpu_time_total for event in profile.key_averages() if event.key in products) / 1e6


class Rates(NamedTuple):
    """The best rates of a machine, measured by a large copy and a large product."""

    copy: float  # bytes read and written a second
    gemm: float  # FLOP a second


def rates(device: torch.device, tiny: bool = False) -> Rates:
    """Measure the rates of this machine now."""
    n, megabytes = (256, 8) if tiny else (2048, 256) if device.type == "cpu" else (8192, 2048)
    a, b = normal(device, n, n), normal(device, n, n, seed=1)
    source = torch.ones(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = median(seconds(lambda: target.copy_(source), device) for _ in range(7))
    gemm = median(seconds(lambda: a @ b, device) for _ in range(7))
    return Rates(2 * source.numel() / copy, 2 * n**3 / gemm)


class Timing(NamedTuple):
    """The time of one function."""

    ms: float  # median of one run
    how: str  # "wall" on the CPU; on a GPU "graph" or "events"
    eager_ms: float  # median of a call from Python, launches and waits included


def time_in_turns(functions: dict[str, Callable], sets: list, device: torch.device, repeats: int) -> dict[str, Timing]:
    """Time functions on a CPU, all in turns, so that a busy machine is busy for all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats):
        for name, function in functions.items():
            x = sets[turn % len(sets)]
            times[name].append(seconds(lambda function=function, x=x: function(x), device) * 1e3)
    return {name: Timing(median(values), "wall", median(values)) for name, values in times.items()}


def time_on_gpu(function: Callable, sets: list, repeats: int) -> Timing:
    """Time replays of a CUDA graph that runs through all sets, for at least 2 ms.

    A function that waits for the GPU cannot be captured, and with a slow one launches do not matter: there, single
    calls are timed between events.
    """
    stream = torch.cuda.Stream()  # where graphs are captured; warm it up with what allocates and compiles
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(sets[0])
        eager = [_between_events(lambda x=x: function(x)) for x in (sets * repeats)[: max(repeats, len(sets))]]
    torch.cuda.current_stream().wait_stream(stream)
    eager_ms = median(eager)
    if eager_ms > 100 or _waits(function, sets[0]):
        return Timing(eager_ms, "events", eager_ms)
    rounds = max(1, min(50, round(2 / max(eager_ms * len(sets), 1e-3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for x in sets * rounds:
            function(x)
    graph.replay()
    replay = _between_events(graph.replay)
    replays = max(5, min(4 * repeats, int(500 / max(replay, 1e-3))))
    ms = median(_between_events(graph.replay) for _ in range(replays)) / (rounds * len(sets))
    return Timing(ms, "graph", eager_ms)


def _between_events(call: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _waits(function: Callable, x) -> bool:
    """Return whether the function waits for the GPU; a capture that fails half-way would break the allocator."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(x)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False
