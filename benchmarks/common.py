"""Parts that the benchmarks of operators share: realistic inputs, measuring side by side, the script itself.

A benchmark file defines ``WORKS``, a function of a device for each name that returns a `Case`. It runs as a script
(``python benchmarks/bench_clue_attention.py --device cpu``) and under pytest (``pytest benchmarks``, the tiny case).
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from result_file import new_parser, parse, save
from timing import Rates, normal, peak_bytes, rates, time_in_turns, time_on_gpu
from torch import Tensor

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
    """One work: functions of one set of inputs, which do equal work and return tensors that `error` compares."""

    sets: list
    ours: Callable[[object], object]
    baselines: dict[str, Callable[[object], object]]
    error: Callable[[object, object], float]  # of ours and a baseline's result; raises AssertionError if large
    bound_bytes: float  # that any implementation must move
    bound_flops: float  # of the algorithm that ours chose
    not_run: dict[str, str] = {}  # baselines that cannot be had here, and why


def works(op: str, make: Callable, backward: bool = True) -> dict[str, Callable]:
    """Call ``make(queries, each, shared, D, V, backward)`` for every pool and model.

    Returns: a work for each name ``<op>/<pool>[/backward][@<model>]``.
    """
    found = {}
    for model, (D, V) in MODELS.items():
        for pool, (queries, each, shared) in POOLS.items():
            for end in ("", "/backward") if backward else ("",):
                name = f"{op}/{pool}{end}" + ("" if model == FIRST else f"@{model}")
                found[name] = make(queries, each, shared, D, V, bool(end))
    return found


class Documents(NamedTuple):
    """Inputs that the operators on documents have in common."""

    query_embeds: Tensor  # [Q, T, D]
    query_mask: Tensor  # [Q, T]
    table: Tensor  # [V, D]
    document_ids: Tensor  # [B, S]
    document_mask: Tensor  # [B, S]
    query_index: Tensor  # [B]


def make_documents(Q: int, each: int, shared: bool, D: int, V: int, device: torch.device, S=S, T=T) -> list[Documents]:
    """Make ``Q`` queries with ``each`` documents; on a GPU several sets of ids over one table.

    Ids follow Zipf's law with exponent 1.05: 100 documents of 200 tokens then have about 5,200 distinct ids, a quarter,
    and one document 130. Lengths vary from S / 2 to S. With ``shared`` all queries have the same documents, as with
    in-batch negatives.
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
    """Return the bytes of all distinct rows, which any implementation must read."""
    return x.document_ids[x.document_mask].unique().numel() * x.table.shape[1] * x.table.element_size()


def pairs_of_rows(x: Documents) -> int:
    """Return the number of distinct rows of each query, summed over the queries."""
    keys = x.query_index[:, None] * x.table.shape[0] + x.document_ids
    return keys[x.document_mask].unique().numel()


def compiled(function: Callable, device: torch.device) -> Callable:
    """Compile with torch's strongest setting, without CUDA graphs: the benchmark captures those for all alike."""
    mode = None if device.type == "cpu" else "max-autotune-no-cudagraphs"
    return torch.compile(function, mode=mode, dynamic=False)


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:150]}".splitlines()[0]


def measure(work: str, case: Case, device: torch.device, repeats: int, machine_rates: Rates) -> dict:
    """Check every baseline against ours, then measure peak memory and times; on a GPU skip a baseline that fails."""
    functions, errors, not_run = {"ours": case.ours}, {}, dict(case.not_run)
    for name, function in case.baselines.items():
        try:
            errors[name] = case.error(case.ours(case.sets[0]), function(case.sets[0]))
            functions[name] = function
        except Exception as error:  # out of memory, a compiler that fails, a wrong result: the others are still run
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
    """Print a row of results, with each baseline in a line of its own."""
    error = "" if row["max_error"] is None else f", largest error {row['max_error']:.1e}"
    bound = "" if row["bound_share"] is None else f", {row['bound_share']:.0%} of the bound"
    print(f"{row['work']}: ours {row['ours_ms']:.3f} ms, {row['ours_peak_bytes'] / 1e6:.0f} MB{bound}{error}")
    for name, ms in row["baselines_ms"].items():
        ratio, peak = row["ratio"][name], row["baselines_peak_bytes"][name]
        memory = "" if peak is None else f"  {peak / 1e6:8.0f} MB"
        print(f"    {name:22} {ms:10.3f} ms  {ratio:7.2f} x{memory}{'' if ratio >= 1 else '  SLOWER'}")
    for name, why in row.get("not_run", {}).items():
        print(f"    {name:22} not run: {why}")
    sys.stdout.flush()


# ---- the script and pytest -------------------------------------------------------------------------------------------


def main(op: str, works: dict[str, Callable], cpu: tuple[str, ...], targets: tuple[str, ...] = ()) -> None:
    """Run the script of an operator: measure the works that ``--work`` names, and write their rows.

    Without ``--work`` these are ``cpu`` on the CPU; on a GPU those of the first model and ``targets``, or with
    ``--others`` all the rest.
    """
    parser = new_parser(f"Time {op} against its baselines.", op)
    parser.add_argument("--work", nargs="*", choices=works, help="default: the works that suit the device")
    parser.add_argument("--others", action="store_true", help=f"a GPU's works of the models other than {FIRST}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip", nargs="*", default=[], help="baselines to leave out")
    arguments = parse(parser)
    device = arguments.device
    machine_rates = rates(device, arguments.work == ["tiny"])
    print(f"copy {machine_rates.copy / 1e9:.1f} GB/s, GEMM {machine_rates.gemm / 1e9:.0f} GFLOP/s")
    others = [w for w in works if "@" in w and w not in targets]
    default = others if arguments.others else cpu if device.type == "cpu" else [w for w in works if w not in others]
    chosen, failed = arguments.work or [w for w in default if w != "tiny"], []
    file, path = op if device.type == "cpu" else "ops", None  # on a GPU all operators share a file
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
            path = save(arguments, file, [row], machine_rates)  # after each, so that a stopped run keeps its rows
    if path:
        print("wrote", path)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def run_tiny(benchmark, works: dict[str, Callable], function: str) -> None:
    """Check the tiny case and time one of its functions under pytest-benchmark."""
    case = works["tiny"](torch.device("cpu"))
    functions = {"ours": case.ours, **case.baselines}
    result = benchmark.pedantic(functions[function], args=(case.sets[0],), rounds=5, warmup_rounds=1)
    case.error(case.ours(case.sets[0]), result)
