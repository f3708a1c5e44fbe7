"""What the operator benchmarks share: realistic inputs, timing side by side, peak memory, the result file (DESIGN 8).

A benchmark file defines ``WORKS``: name -> function of a device that returns a `Case`. It runs as a script
(``python benchmarks/bench_clue_attention.py --device cpu``) and under pytest (``pytest benchmarks``, the tiny case).
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qpeft_ext.utils.files import write_text

RESULTS = Path(__file__).parent / "results"
T, S = 16, 200  # tokens of a question and of a passage
MODELS = {  # D, V
    "llama-2-7b": (4096, 32000),
    "llama-3-8b": (4096, 128256),
    "qwen2.5-0.5b": (896, 151936),
    "qwen2.5-7b": (3584, 152064),
}
POOLS = {"1x100": (1, 100, False), "4x8": (4, 8, True), "32x100": (32, 100, False)}  # queries, documents each, shared
FIRST = "llama-2-7b"
SETS = 4  # sets of inputs on a GPU: with one, the second run would find the rows of the first in the cache


class Case(NamedTuple):
    """One work: functions of one set of inputs that return tensors which `error` compares; all do equal work."""

    sets: list
    ours: Callable[[object], object]
    baselines: dict[str, Callable[[object], object]]
    error: Callable[[object, object], float]  # of ours and a baseline's result; raises AssertionError if large
    bound_bytes: float  # that any implementation must move
    bound_flops: float  # of the algorithm that ours chose
    not_run: dict[str, str] = {}  # baselines that cannot be had here, and why


def works(op: str, make: Callable, backward: bool = True) -> dict[str, Callable]:
    """``make(queries, each, shared, D, V, backward)`` for every pool and model: <op>/<pool>[/backward][@<model>]."""
    found = {}
    for model, (D, V) in MODELS.items():
        for pool, (queries, each, shared) in POOLS.items():
            for end in ("", "/backward") if backward else ("",):
                name = f"{op}/{pool}{end}" + ("" if model == FIRST else f"@{model}")
                found[name] = make(queries, each, shared, D, V, bool(end))
    return found


class Documents(NamedTuple):
    query_embeds: Tensor  # [Q, T, D]
    query_mask: Tensor  # [Q, T]
    table: Tensor  # [V, D]
    document_ids: Tensor  # [B, S]
    document_mask: Tensor  # [B, S]
    query_index: Tensor  # [B]


def default_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def normal(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=random, device=device, dtype=default_dtype(device))


def make_documents(Q: int, each: int, shared: bool, D: int, V: int, device: torch.device, S=S, T=T) -> list[Documents]:
    """``Q`` queries with ``each`` documents; on a GPU several sets of ids over one table. Ids follow Zipf's law with
    exponent 1.05: 100 documents of 200 tokens then have about 5,200 distinct ids, a quarter, and one document 130.
    Lengths vary from S / 2 to S. ``shared``: all queries have the same documents, as in-batch negatives do.
    """
    table = normal(device, V, D).mul_(0.02)
    frequencies = 1 / torch.arange(1, V + 1).double() ** 1.05
    count, sets = each if shared else Q * each, []
    for seed in range(1 if device.type == "cpu" else SETS):
        random = torch.Generator().manual_seed(seed)
        ranks = torch.multinomial(frequencies, count * S, replacement=True, generator=random)
        ids = torch.randperm(V, generator=random)[ranks].view(count, S)
        mask = torch.arange(S) < torch.randint(S // 2, S + 1, (count, 1), generator=random)
        if shared:
            ids, mask = ids.repeat(Q, 1), mask.repeat(Q, 1)
        index = torch.arange(Q).repeat_interleave(each)
        query_mask = torch.ones(Q, T, dtype=torch.bool)
        query_mask, ids, mask, index = (x.to(device) for x in (query_mask, ids, mask, index))
        sets.append(Documents(normal(device, Q, T, D, seed=seed + 1).mul_(0.02), query_mask, table, ids, mask, index))
    return sets


def distinct_bytes(x: Documents) -> float:
    """Bytes of the union of distinct rows, which any implementation must read."""
    return x.document_ids[x.document_mask].unique().numel() * x.table.shape[1] * x.table.element_size()


def pairs_of_rows(x: Documents) -> int:
    """Distinct rows of each query, summed."""
    keys = x.query_index[:, None] * x.table.shape[0] + x.document_ids
    return keys[x.document_mask].unique().numel()


def compiled(function: Callable, device: torch.device) -> Callable:
    """torch.compile at its strongest; CUDA graphs are the benchmark's, the same for all."""
    mode = None if device.type == "cpu" else "max-autotune-no-cudagraphs"
    return torch.compile(function, mode=mode, dynamic=False)


# ---- measuring -------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def median(values: Iterable[float]) -> float:
    values = sorted(values)
    return values[len(values) // 2]


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Largest sum of tensor memory above what was held before the call, results included.

    On the CPU every allocation of torch's allocator is recorded by its profiler and summed up.
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
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


class Rates(NamedTuple):
    copy: float  # bytes read and written a second
    gemm: float  # FLOP a second


def rates(device: torch.device, tiny: bool = False) -> Rates:
    """Of this machine, now."""
    n, megabytes = (256, 8) if tiny else (2048, 256) if device.type == "cpu" else (8192, 2048)
    a, b = normal(device, n, n), normal(device, n, n, seed=1)
    source = torch.ones(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = median(seconds(lambda: target.copy_(source), device) for _ in range(7))
    gemm = median(seconds(lambda: a @ b, device) for _ in range(7))
    return Rates(2 * source.numel() / copy, 2 * n**3 / gemm)


class Timing(NamedTuple):
    ms: float  # median of one run
    how: str  # "wall" on the CPU; on a GPU "graph" or "events"
    eager_ms: float  # median of a call from Python, launches and waits included


def time_in_turns(functions: dict[str, Callable], sets: list, device: torch.device, repeats: int) -> dict[str, Timing]:
    """CPU: all functions in turns, so that a busy machine is busy for all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats):
        for name, function in functions.items():
            x = sets[turn % len(sets)]
            times[name].append(seconds(lambda function=function, x=x: function(x), device) * 1e3)
    return {name: Timing(median(values), "wall", median(values)) for name, values in times.items()}


def time_on_gpu(function: Callable, sets: list, repeats: int) -> Timing:
    """Replays of a CUDA graph that runs through all sets, for at least 2 ms. Calls between events where a function
    waits for the GPU and cannot be captured, or is so slow that launches do not matter.
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
    """Whether the function waits for the GPU. A capture that fails half-way would leave the allocator unusable."""
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


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:150]}".splitlines()[0]


def measure(work: str, case: Case, device: torch.device, repeats: int, machine_rates: Rates) -> dict:
    """Checks every baseline against ours, then peak bytes, then times. On a GPU a baseline that fails is not run."""
    functions, errors, not_run = {"ours": case.ours}, {}, dict(case.not_run)
    for name, function in case.baselines.items():
        try:
            errors[name] = case.error(case.ours(case.sets[0]), function(case.sets[0]))
            functions[name] = function
        except Exception as error:  # out of memory, a compiler that gave up, a wrong result: the others are still run
            if device.type == "cpu" or name == "textbook":
                raise
            not_run[name] = reason(error)
    peaks = {name: peak_bytes(lambda f=f: f(case.sets[0]), device) for name, f in functions.items()}
    noise = None
    if device.type == "cuda":
        timings = {}
        for name, function in functions.items():
            gc.collect()
            torch.cuda.empty_cache()
            try:
                timings[name] = time_on_gpu(function, case.sets, repeats)
            except Exception as error:
                if name == "ours":
                    raise
                not_run[name] = reason(error)
                del peaks[name]
        again = time_on_gpu(case.ours, case.sets, repeats)
        noise = abs(again.ms / timings["ours"].ms - 1)
    else:
        timings = time_in_turns(functions, case.sets, device, repeats)
    ms = {name: timing.ms for name, timing in timings.items()}
    ours_ms, ours_peak = ms.pop("ours"), peaks.pop("ours")
    by_copy, by_gemm = (case.bound_bytes / machine_rates.copy * 1e3, case.bound_flops / machine_rates.gemm * 1e3)
    return {
        "work": work,
        "ours_ms": ours_ms,
        "baselines_ms": ms,
        "ratio": {name: value / ours_ms for name, value in ms.items()},
        "ours_peak_bytes": ours_peak,
        "baselines_peak_bytes": peaks,
        "bound_share": max(by_copy, by_gemm) / ours_ms or None,  # None: the case states no bound
        "max_error": max(errors.values(), default=None),
        "bound": {"bytes": case.bound_bytes, "flops": case.bound_flops, "by": "copy" if by_copy > by_gemm else "gemm"},
        "timing": {name: timing.how for name, timing in timings.items()},
        "eager_ms": {name: timing.eager_ms for name, timing in timings.items()},
        "noise": noise,  # of ours, measured first and last
        "not_run": not_run,
    }


def show(row: dict) -> None:
    error = "" if row["max_error"] is None else f", largest error {row['max_error']:.1e}"
    bound = "" if row["bound_share"] is None else f", {row['bound_share']:.0%} of the bound"
    print(f"{row['work']}: ours {row['ours_ms']:.3f} ms, {row['ours_peak_bytes'] / 1e6:.0f} MB{bound}{error}")
    for name, ms in row["baselines_ms"].items():
        ratio, peak = row["ratio"][name], row["baselines_peak_bytes"][name]
        print(f"    {name:22} {ms:10.3f} ms  {ratio:7.2f} x  {peak / 1e6:8.0f} MB{'' if ratio >= 1 else '  SLOWER'}")
    for name, why in row.get("not_run", {}).items():
        print(f"    {name:22} not run: {why}")
    sys.stdout.flush()


# ---- the script and pytest -------------------------------------------------------------------------------------------


def main(op: str, works: dict[str, Callable], cpu: tuple[str, ...], targets: tuple[str, ...] = ()) -> None:
    """Works when none is named: on the CPU ``cpu``; on a GPU the first model's and ``targets``, or all ``--others``."""
    parser = argparse.ArgumentParser(description=f"Time {op} against its baselines.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", nargs="*", choices=works, help="default: the works of DESIGN that suit the device")
    parser.add_argument("--others", action="store_true", help=f"a GPU's works of the models but {FIRST}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip", nargs="*", default=[], help="baselines to leave out")
    parser.add_argument("--out", type=Path, help="default results/<machine>_<op>.json; no file for tiny alone")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    machine_rates = rates(device, arguments.work == ["tiny"])
    print(f"copy {machine_rates.copy / 1e9:.1f} GB/s, GEMM {machine_rates.gemm / 1e9:.0f} GFLOP/s")
    others = [w for w in works if "@" in w and w not in targets]
    default = others if arguments.others else cpu if device.type == "cpu" else [w for w in works if w not in others]
    chosen, failed = arguments.work or [w for w in default if w != "tiny"], []
    path = arguments.out or RESULTS / result_name(device, op)
    for work in chosen:
        try:
            case = works[work](device)
            case = case._replace(baselines={k: f for k, f in case.baselines.items() if k not in arguments.skip})
            row = measure(work if "/" in work else f"{op}/{work}", case, device, arguments.repeats, machine_rates)
        except Exception as error:
            if device.type == "cpu":
                raise
            print(f"{work}: FAILED: {type(error).__name__}: {error}", flush=True)  # the next work may still run
            failed.append(work)
            continue
        show(row)
        del case
        gc.collect()
        if arguments.out or arguments.work != ["tiny"]:
            write(path, device, [row], machine_rates)  # after each: a run that is stopped has not been for nothing
    if arguments.out or arguments.work != ["tiny"]:
        print("wrote", path)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def result_name(device: torch.device, op: str) -> str:
    """On a GPU all operators share a file."""
    return f"{machine(device)}_{op if device.type == 'cpu' else 'ops'}.json"


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_name()}-{torch.get_num_threads()}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-").removeprefix("nvidia-")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write(path: Path, device: torch.device, rows: list[dict], machine_rates: Rates | None = None) -> Path:
    """Rows of works measured earlier stay, unless measured again."""
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    earlier = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    if device.type == "cuda":
        rows = [row | {"command": command} for row in rows]  # several scripts write this file
    new = {row["work"] for row in rows}
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=RESULTS.parent, capture_output=True, text=True)
    commit = git.stdout.strip()
    content = {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit or None,
        "command": command if device.type == "cpu" else "bash benchmarks/gpu_check.sh",
        "date": datetime.date.today().isoformat(),
        "rates": machine_rates._asdict() if machine_rates else earlier.get("rates"),
        "rows": [row for row in earlier["rows"] if row["work"] not in new] + rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1) + "\n")
    return path


def run_tiny(benchmark, works: dict[str, Callable], function: str) -> None:
    """The tiny case under pytest-benchmark: checked, then timed."""
    case = works["tiny"](torch.device("cpu"))
    functions = {"ours": case.ours, **case.baselines}
    result = benchmark.pedantic(functions[function], args=(case.sets[0],), rounds=5, warmup_rounds=1)
    case.error(case.ours(case.sets[0]), result)
