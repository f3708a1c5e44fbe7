"""One training step, forward and backward to the clue module: ours against whole prompts (DESIGN 8).

    python benchmarks/bench_training.py                 # train_step and train_epoch_cached, 25 M Llama, 2 threads
    python benchmarks/bench_training.py --tiny          # a second or two, for CI; writes nothing

The work: 4 queries, 1 hard negative each, in-batch negatives: 32 distinct pairs over 8 documents; 56 rows in the
official order (28 pairs, each a positive and a negative row). Prefix 212 tokens, suffix 40 (clues included).

Baselines, same weights and same loss:
    official        rows in micro-batches of 4, logits of every position, whole prompts forward and backward
    plain_distinct  32 distinct rows in micro-batches of 8 (the 8 documents of a query), logits of query positions only
    first_epoch     (train_epoch_cached only) ours with an empty cache
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch
from common import show
from random_llama import TINY, Shape, make_batch, make_model
from result_file import new_parser, parse, save
from timing import median, peak_bytes, synchronize

import qpeft_ext as qpeft
from qpeft_ext.engine.rows import assemble_rows
from qpeft_ext.prompts.pairs import PairBatch
from qpeft_ext.training.losses import configured_loss

QUERIES, DOCUMENTS = 4, 8  # a positive and a hard negative for each query
OFFICIAL_ROWS, OFFICIAL_MICRO_BATCH, DISTINCT_MICRO_BATCH = 56, 4, 8
TOLERANCE = 1e-4  # of losses and gradients, relative


# -- the three orders of computation; each leaves the gradient in model.clues and returns the loss ---------------------


class Step:
    """Gradient of pointwise_pairwise for one batch."""

    def __init__(self, shape: Shape, device="cpu", clues: str = "attention", dtype=torch.float32) -> None:
        self.shape, self.device = shape, torch.device(device)
        self.model, self.batch = make_model(shape, device, clues, dtype), make_batch(shape, QUERIES, DOCUMENTS)
        self.positive = torch.zeros(QUERIES, DOCUMENTS, dtype=torch.bool, device=device)
        self.positive[range(QUERIES), range(QUERIES)] = True
        self.mask = torch.ones_like(self.positive)
        self.cache = qpeft.DocumentCache(1 << 30)

    def loss(self, table: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        config = self.model.qpeft_config
        return configured_loss(config, table, self.positive[rows], self.mask[rows])

    def ours(self, **options) -> torch.Tensor:
        """Run the step through `QPeftModel.forward`, with its ``options``."""
        self.model.zero_grad(set_to_none=True)
        scores = self.model(self.batch, **options).mean_query_log_likelihood
        loss = self.loss(scores.view(QUERIES, DOCUMENTS))
        loss.backward()
        return loss.detach()

    def ours_cached(self) -> torch.Tensor:
        return self.ours(cache=self.cache)

    def ours_first_epoch(self) -> torch.Tensor:
        return self.ours(cache=qpeft.DocumentCache(1 << 30))

    def ours_in_micro_batches(self) -> torch.Tensor:
        """Run the step with passes of at most 8 pairs: less memory, but the suffixes are computed twice."""
        return self.ours(max_pairs_per_batch=8)

    def plain_distinct(self, pairs_at_once: int = DISTINCT_MICRO_BATCH) -> torch.Tensor:
        """Run the step on whole prompts of the distinct pairs, a few queries at a time; logits of query tokens only."""
        self.model.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        queries_at_once = pairs_at_once // DOCUMENTS
        for q in range(0, QUERIES, queries_at_once):
            queries = slice(q, q + queries_at_once)
            part = self.batch.select(range(q * DOCUMENTS, (q + queries_at_once) * DOCUMENTS))
            table = self._likelihood(part, every_position=False).view(queries_at_once, DOCUMENTS)
            loss = self.loss(table, queries) * (queries_at_once / QUERIES)
            loss.backward()
            total += loss.detach()
        return total

    def plain_distinct_one_graph(self) -> torch.Tensor:
        return self.plain_distinct(QUERIES * DOCUMENTS)

    def official(self) -> torch.Tensor:
        """Run the step on every (positive, negative) pair of rows: the positive is computed once for each negative."""
        self.model.zero_grad(set_to_none=True)
        pairs = [(q, d) for q in range(QUERIES) for d in range(DOCUMENTS) if d != q]
        total, size = torch.zeros((), device=self.device), OFFICIAL_MICRO_BATCH // 2
        for start in range(0, len(pairs), size):
            part = pairs[start : start + size]
            rows = [q * DOCUMENTS + document for q, d in part for document in (q, d)]
            likelihood = self._likelihood(self.batch.select(rows), every_position=True)
            better, worse = likelihood[0::2], likelihood[1::2]
            hinge = torch.relu(self.model.qpeft_config.margin - better + worse)
            loss = (hinge - better).sum() / len(pairs)
            loss.backward()
            total += loss.detach()
        return total

    def _likelihood(self, batch: PairBatch, every_position: bool) -> torch.Tensor:
        """Return the mean log-likelihood of whole prompts, [B], by the LM's own forward with inputs_embeds."""
        model = self.model
        clues = model.compute_clues(batch)
        rows = assemble_rows(batch, model.prompt.suffix, clues.mask.sum(1).tolist(), self.device, with_prefix=True)
        B, L = rows.ids.shape
        embeds = model.lm.get_input_embeddings()(rows.ids)
        vectors = clues.embeds[clues.mask].to(embeds.dtype)
        embeds = embeds.reshape(B * L, -1).index_copy(0, rows.clue_slots, vectors).view_as(embeds)
        arguments = {
            "inputs_embeds": embeds,
            "attention_mask": rows.mask,
            "position_ids": rows.positions,
            "use_cache": False,
        }
        if every_position:
            labels = torch.full((B * L,), -100, device=self.device).index_copy(0, rows.read.slots, rows.target_ids)
            logits = model.lm(**arguments).logits.float().flatten(0, 1)
            log_p = -torch.nn.functional.cross_entropy(logits, labels, reduction="none").view(B, L).sum(1)
        else:
            keep = torch.zeros(B * L, dtype=torch.bool, device=self.device)
            keep[rows.read.slots] = True
            logits = model.lm(**arguments, logits_to_keep=keep.view(B, L)).logits.float()
            log_p = logits.view(len(rows.target_ids), -1).log_softmax(-1).gather(1, rows.target_ids[:, None])
            log_p = log_p.view(B, -1).sum(1)
        return log_p / self.shape.query

    def gradient(self) -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in self.model.clues.parameters()])


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


def token_passes(shape: Shape) -> dict[str, int]:
    """Count the tokens that go through the LM, forward and backward (28,224, 16,128, 4,256 and 2,560 by default)."""
    whole, pairs = shape.prefix + shape.suffix, QUERIES * DOCUMENTS
    cached = 2 * pairs * shape.suffix
    return {
        "official": 2 * OFFICIAL_ROWS * whole,
        "plain_distinct": 2 * pairs * whole,
        "first_epoch": DOCUMENTS * shape.prefix + cached,
        "cached": cached,
    }


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
    passes = token_passes(step.shape)
    own = passes["cached" if work == "train_epoch_cached" else "first_epoch"]
    bound = {name: passes[name] / own for name in baselines}
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
        "ours_cpu_ms": cpu_ms.pop("ours"),
        "baselines_cpu_ms": cpu_ms,
        "shape": vars(step.shape)
        | {
            "prefix": step.shape.prefix,
            "suffix": step.shape.suffix,
            "parameters": sum(p.numel() for p in step.model.lm.parameters()),
            "clues": step.model.qpeft_config.clues,
            "dtype": str(step.model.engine.table.dtype).removeprefix("torch."),
        },
    }


def measure_saved(step: Step) -> dict:
    """Compare saved memory: one graph with one graph, and micro-batches with the official micro-batch."""
    # A step in micro-batches keeps the checkpoints of all at once, and the graph of one that is computed again.
    one = Step(step.shape, step.device, step.model.qpeft_config.clues, step.model.engine.table.dtype)
    one.batch = step.batch.select(range(DOCUMENTS))

    def graph_of_one_micro_batch() -> None:
        one.model(one.batch).mean_query_log_likelihood.sum().backward()

    checkpoints = saved_bytes(step, step.ours_in_micro_batches)
    ours = {
        "one_graph": saved_bytes(step, step.ours),
        "micro_batches_of_8": checkpoints + saved_bytes(one, graph_of_one_micro_batch),
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
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, one repetition, no file")
    arguments = parse(parser)
    step = Step(TINY if arguments.tiny else Shape(), arguments.device, arguments.clues, getattr(torch, arguments.dtype))
    repeats = 1 if arguments.tiny else arguments.repeats
    step.ours_cached()  # fills the cache
    plain = {"official": step.official, "plain_distinct": step.plain_distinct}
    rows = [
        measure(step, "train_step", step.ours, plain, repeats),
        measure(
            step,
            "train_epoch_cached",
            step.ours_cached,
            {"first_epoch": step.ours_first_epoch, "official": step.official},
            repeats,
        ),
    ]
    rows[0]["saved_bytes"] = measure_saved(step)
    shape = rows[0]["shape"]
    print(
        f"{shape['parameters'] / 1e6:.1f} M parameters, {shape['clues']} clues, {shape['dtype']}, "
        f"{shape['prefix']} + {shape['suffix']} tokens, {arguments.threads} threads"
    )
    for row in rows:
        show(row)
        for name, bound in row["token_pass_bound"].items():
            cpu = row["baselines_cpu_ms"][name] / row["ours_cpu_ms"]
            print(
                f"    {name:22} {row['ratio'][name]:5.2f} x in wall time, {cpu:5.2f} x in CPU time; bound by token "
                f"passes {bound:.2f} x"
            )
    for name, ratio in rows[0]["saved_bytes"]["ratio"].items():
        print(f"saved for backward: {name} = {ratio:.2f}")
    if arguments.out or not arguments.tiny:
        print("wrote", save(arguments, "training", rows))


if __name__ == "__main__":
    main()
