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
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
D, V, T, S = 4096, 32000, 16, 200  # Llama-2-7B; a question; a passage


class Case(NamedTuple):
    """One work: functions that return tensors which `error` compares with those of ``ours``; all do equal work."""

    ours: Callable[[], object]
    baselines: dict[str, Callable[[], object]]
    error: Callable[[object, object], float]  # of ours and a baseline's result; raises if large
    bound_bytes: float  # that any implementation must move
    bound_flops: float  # of the algorithm that ours chose


class Documents(NamedTuple):
    query_embeds: Tensor  # [Q, T, D]
    query_mask: Tensor  # [Q, T]
    table: Tensor  # [V, D]
    document_ids: Tensor  # [B, S]
    document_mask: Tensor  # [B, S]
    query_index: Tensor  # [B]


def make_documents(Q: int, each: int, device, *, shared=False, T=T, S=S, D=D, V=V, dtype=None) -> Documents:
    """``Q`` queries with ``each`` documents. Ids follow Zipf's law with exponent 1.05: 100 documents of 200 tokens
    then have about 5,200 distinct ids, a quarter, and one document about 130. Lengths vary from S / 2 to S.
    ``shared``: all queries have the same documents, as in-batch negatives do.
    """
    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
    random = torch.Generator().manual_seed(0)
    frequencies = 1 / torch.arange(1, V + 1).double() ** 1.05
    count = each if shared else Q * each
    ranks = torch.multinomial(frequencies, count * S, replacement=True, generator=random)
    ids = torch.randperm(V, generator=random)[ranks].view(count, S)
    mask = torch.arange(S) < torch.randint(S // 2, S + 1, (count, 1), generator=random)
    if shared:
        ids, mask = ids.repeat(Q, 1), mask.repeat(Q, 1)
    table = torch.randn(V, D, generator=random) * 0.02
    query_embeds = torch.randn(Q, T, D, generator=random) * 0.02
    query_index = torch.arange(Q).repeat_interleave(each)
    query_mask = torch.ones(Q, T, dtype=torch.bool)
    inputs = Documents(query_embeds.to(dtype), query_mask, table.to(dtype), ids, mask, query_index)
    return Documents(*(x.to(device) for x in inputs))


def distinct_bytes(x: Documents) -> float:
    """Bytes of the union of distinct rows, which any implementation must read."""
    return x.document_ids[x.document_mask].unique().numel() * x.table.shape[1] * x.table.element_size()


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


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


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


def rates(device: torch.device) -> tuple[float, float]:
    """Measured copy rate (bytes moved a second) and GEMM rate (FLOP a second) of this machine, now."""
    cpu = device.type == "cpu"
    dtype, n = (torch.float32, 2048) if cpu else (torch.bfloat16, 8192)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.ones((256 if cpu else 2048) << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = median([seconds(lambda: target.copy_(source), device) for _ in range(7)])
    gemm = median([seconds(lambda: a @ b, device) for _ in range(7)])
    return 2 * source.numel() / copy, 2 * n**3 / gemm


def measure(work: str, case: Case, device: torch.device, repeats: int, machine_rates: tuple[float, float]) -> dict:
    """Checks every baseline against ours, then times all in turns, so that a busy machine is busy for all of them."""
    functions = {"ours": case.ours, **case.baselines}
    result = case.ours()
    errors = [case.error(result, function()) for function in case.baselines.values()]
    del result
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds(function, device) * 1e3)
    ms = {name: median(values) for name, values in times.items()}
    peaks = {name: peak_bytes(function, device) for name, function in functions.items()}
    ours_ms, ours_peak = ms.pop("ours"), peaks.pop("ours")
    copy_rate, gemm_rate = machine_rates
    bound_ms = max(case.bound_bytes / copy_rate, case.bound_flops / gemm_rate) * 1e3
    return {
        "work": work,
        "ours_ms": ours_ms,
        "baselines_ms": ms,
        "ratio": {name: value / ours_ms for name, value in ms.items()},
        "ours_peak_bytes": ours_peak,
        "baselines_peak_bytes": peaks,
        "bound_share": bound_ms / ours_ms,
        "max_error": max(errors, default=None),
    }


def show(row: dict) -> None:
    print(f"{row['work']}: ours {row['ours_ms']:.2f} ms, {row['ours_peak_bytes'] / 1e6:.0f} MB, ", end="")
    print(f"{row['bound_share']:.0%} of the bound, largest error {row['max_error']:.1e}")
    for name, ms in row["baselines_ms"].items():
        ratio, peak = row["ratio"][name], row["baselines_peak_bytes"][name]
        print(f"    {name:22} {ms:10.2f} ms  {ratio:7.2f} x  {peak / 1e6:8.0f} MB{'' if ratio >= 1 else '  SLOWER'}")
    sys.stdout.flush()


# ---- the script and pytest -------------------------------------------------------------------------------------------


def main(op: str, works: dict[str, Callable], default: dict[str, tuple[str, ...]]) -> None:
    """``default``: device type -> works measured when none is named."""
    parser = argparse.ArgumentParser(description=f"Time {op} against its baselines.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", nargs="*", choices=works, help="default: the works of DESIGN that suit the device")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip", nargs="*", default=[], help="baselines to leave out")
    parser.add_argument("--out", type=Path, help="default results/<machine>_<op>.json; no file for tiny alone")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    machine_rates = rates(device)
    print(f"copy {machine_rates[0] / 1e9:.1f} GB/s, GEMM {machine_rates[1] / 1e9:.0f} GFLOP/s")
    rows = []
    for work in arguments.work or default[device.type]:
        case = works[work](device)
        case = case._replace(baselines={k: f for k, f in case.baselines.items() if k not in arguments.skip})
        rows.append(measure(work, case, device, arguments.repeats, machine_rates))
        show(rows[-1])
        del case
        gc.collect()
    if arguments.out or arguments.work != ["tiny"]:
        print("wrote", write(arguments.out or RESULTS / f"{machine(device)}_{op}.json", device, rows))


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_name()}-{torch.get_num_threads()}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write(path: Path, device: torch.device, rows: list[dict]) -> Path:
    """Rows of works measured earlier by the same file stay, unless measured again."""
    if path.is_file():
        new = {row["work"] for row in rows}
        rows = [row for row in json.loads(path.read_text())["rows"] if row["work"] not in new] + rows
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=RESULTS.parent, capture_output=True, text=True)
    commit = git.stdout.strip()
    content = {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit or None,
        "command": command,
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
    return path


def run_tiny(benchmark, works: dict[str, Callable], function: str) -> None:
    """The tiny case under pytest-benchmark: checked, then timed."""
    case = works["tiny"](torch.device("cpu"))
    functions = {"ours": case.ours, **case.baselines}
    result = benchmark.pedantic(functions[function], rounds=5, warmup_rounds=1)
    case.error(case.ours(), result)
