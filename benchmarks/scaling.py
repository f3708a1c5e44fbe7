"""The cost of reranking and training in tokens, FLOPs and bytes: the tables of docs/scaling.md.

    python benchmarks/scaling.py          print the tables
    python benchmarks/scaling.py --write  put them into docs/scaling.md, between their markers
    python benchmarks/scaling.py --check  fail if docs/scaling.md is not what this prints

Pure arithmetic, and one simulation of the cache. python_tests/benchmarks/test_scaling.py compares the token counts with
those of the engine, counted in a tiny model while it runs.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import markers

RESULTS = Path(__file__).parent / "results"

PREFIX, SUFFIX, QUERY = 212, 40, 16  # tokens: document prefix; query suffix, clues and query included; query alone


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder with 16-bit weights; kv_heads: heads whose keys and values are stored."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    inner: int
    vocabulary: int

    @property
    def weights_per_layer(self) -> int:
        """Return the weights in one layer's matrix products: queries and output, keys and values, the gated MLP."""
        attention = 2 * self.width * self.heads * self.head_width + 2 * self.width * self.kv_heads * self.head_width
        return attention + 3 * self.width * self.inner

    @property
    def kv_bytes(self) -> int:
        """Return the bytes of one token: a key and a value of 16 bits per layer and stored head."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_width

    def flops(self, tokens: int, before: int = 0, head_tokens: int = 0) -> float:
        """Return the FLOPs of a forward pass over ``tokens`` after ``before`` others, with the LM head on some."""
        context = before + tokens / 2  # causal: a token attends to what is before it, to half of its own on average
        per_token = 2 * self.weights_per_layer + 4 * self.heads * self.head_width * context
        return self.layers * tokens * per_token + 2 * head_tokens * self.width * self.vocabulary


SHAPES = (
    Shape("Qwen2.5-0.5B", 24, 896, 14, 2, 64, 4864, 151936),
    Shape("Llama-2-7B", 32, 4096, 32, 32, 128, 11008, 32000),
    Shape("Llama-3-70B", 80, 8192, 64, 8, 128, 28672, 128256),
)


# -- tokens ------------------------------------------------------------------------------------------------------------


def rerank_tokens(pairs: int, documents: int, prefix: int = PREFIX, suffix: int = SUFFIX) -> dict[str, int]:
    """Count the tokens that the LM reads to rank ``pairs`` pairs of ``documents`` distinct documents.

    plain: whole prompts.  cold: each distinct prefix once.  warm: prefixes from memory.  disk: from the disk.
    """
    return {
        "plain": pairs * (prefix + suffix),
        "cold": documents * prefix + pairs * suffix,
        "warm": pairs * suffix,
        "disk": pairs * suffix,
    }


def train_tokens(queries: int = 4, negatives: int = 1, prefix: int = PREFIX, suffix: int = SUFFIX) -> dict[str, int]:
    """Count the token passes of a training step with in-batch negatives, forward and backward as one each.

    The LM is frozen, so that the backward pass has one product per weight, as the forward pass has.
    official: a query's positive is repeated for each of its negatives.  distinct: every pair once.
    step: prefixes forward only.  cached: no prefixes.
    """
    documents = queries * (1 + negatives)
    pairs = queries * documents
    rows = 2 * queries * (documents - 1)  # of a query: its positive and a negative, for each other document
    return {
        "official": 2 * rows * (prefix + suffix),
        "distinct": 2 * pairs * (prefix + suffix),
        "step": documents * prefix + 2 * pairs * suffix,
        "cached": 2 * pairs * suffix,
    }


# -- the cache ---------------------------------------------------------------------------------------------------------


def popularity(documents: int, exponent: float = 0.8) -> list[float]:
    """Return the share of each document among all candidates, by Zipf's law."""
    weights = [1 / rank**exponent for rank in range(1, documents + 1)]
    total = sum(weights)
    return [weight / total for weight in weights]


def hit_rate(shares: list[float], capacity: int) -> float:
    """Return the share of hits of a least-recently-used cache in the long run, by Che's approximation.

    A document is in it if it was asked for within the time in which ``capacity`` distinct ones are."""
    low, high = 0.0, 1.0
    while sum(-math.expm1(-share * high) for share in shares) < capacity:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        if sum(-math.expm1(-share * middle) for share in shares) < capacity:
            low = middle
        else:
            high = middle
    return sum(share * -math.expm1(-share * high) for share in shares)


def simulated_hit_rate(shares: list[float], capacity: int, asked: int = 60_000) -> float:
    """Return the same by simulation: the second half of ``asked`` independent draws."""
    draw, cache, hits = random.Random(0), OrderedDict(), 0
    for i, document in enumerate(draw.choices(range(len(shares)), shares, k=asked)):
        if document in cache:
            cache.move_to_end(document)
            hits += i >= asked // 2
        else:
            cache[document] = None
            if len(cache) > capacity:
                cache.popitem(last=False)
    return hits / (asked - asked // 2)


# -- break-even --------------------------------------------------------------------------------------------------------

MACHINES = {"H200, 400 TFLOP/s": 400e12, "2 CPU cores, 60 GFLOP/s": 60e9}  # sustained on large products; assumed
MEDIA = {"NVMe, 6 GB/s": 6e9, "PCIe 5 x16, 50 GB/s": 50e9, "HBM3e, 4.8 TB/s": 4.8e12}  # assumed; caps are per device


def break_even_bandwidth(shape: Shape, flops_per_second: float) -> float:
    """Return the bytes per second above which reading a prefix is quicker than computing it again."""
    return PREFIX * shape.kv_bytes * flops_per_second / shape.flops(PREFIX)


def break_even_queries(shape: Shape, flops_per_second: float, bytes_per_second: float) -> float:
    """Return the queries per document above which it pays to write all prefixes first, at equal write speed.

    n prefix passes against one pass, one write and n reads. Infinite where reading is not quicker than computing.
    """
    compute = shape.flops(PREFIX) / flops_per_second
    move = PREFIX * shape.kv_bytes / bytes_per_second
    return (compute + move) / (compute - move) if compute > move else math.inf


# -- tables ------------------------------------------------------------------------------------------------------------


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [" | ".join(header), "|".join(["---"] * len(header)), *(" | ".join(row) for row in rows)]
    return "".join(f"| {line} |\n" if "---" not in line else f"|{line}|\n" for line in lines)


def amount(value: float, unit: str) -> str:
    """Format a number with three digits and a decimal prefix."""
    if math.isinf(value):
        return "never"
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    power = min(len(prefixes) - 1, max(0, int(math.log10(max(value, 1)) // 3)))
    scaled = value / 1000**power
    return f"{scaled:.{max(0, 2 - int(math.log10(max(scaled, 1))))}f} {prefixes[power]}{unit}".strip()


def tokens_table() -> str:
    rows = []
    for reuse in (1, 2, 10, 100):
        cost = {name: count / 1000 for name, count in rerank_tokens(1000, 1000 // reuse).items()}
        rows.append(
            [
                str(reuse),
                *(f"{cost[name]:.1f}" for name in ("plain", "cold", "warm", "disk")),
                f"{cost['plain'] / cost['cold']:.2f}× / {cost['plain'] / cost['warm']:.2f}×",
            ]
        )
    return table(["queries per document", "plain", "cold", "warm", "disk", "bound: cold / warm against plain"], rows)


def training_table() -> str:
    counts = train_tokens()
    return table(
        ["order of computation", "token passes", "against `train_step`", "against the cached epoch"],
        [
            [name, f"{counts[key]:,}", f"{counts[key] / counts['step']:.2f}×", f"{counts[key] / counts['cached']:.2f}×"]
            for name, key in (
                ("official", "official"),
                ("each distinct pair once, in full", "distinct"),
                ("document first: `train_step`", "step"),
                ("document first, prefixes cached: `train_epoch_cached`", "cached"),
            )
        ],
    )


def work_table() -> str:
    rows = []
    for shape in SHAPES:
        plain = shape.flops(PREFIX + SUFFIX, head_tokens=QUERY)
        prefix, suffix = shape.flops(PREFIX), shape.flops(SUFFIX, before=PREFIX, head_tokens=QUERY)
        rows.append(
            [
                shape.name,
                amount(shape.flops(1), "FLOP"),
                amount(plain, "FLOP"),
                amount(prefix, "FLOP"),
                amount(suffix, "FLOP"),
                f"{plain / suffix:.2f}×",
                amount(shape.kv_bytes, "B"),
                amount(PREFIX * shape.kv_bytes, "B"),
            ]
        )
    return table(
        [
            "model",
            "one token",
            "plain pair",
            "prefix",
            "suffix (= warm pair)",
            "plain / warm",
            "KV per token",
            "KV of a prefix (read per warm pair)",
        ],
        rows,
    )


def cache_table() -> str:
    return table(
        ["model", "one document", "10⁶ documents", "10⁹ documents", "documents in 100 GB of GPU memory"],
        [
            [
                shape.name,
                *(amount(count * PREFIX * shape.kv_bytes, "B") for count in (1, 10**6, 10**9)),
                f"{int(100e9 / (PREFIX * shape.kv_bytes)):,}",
            ]
            for shape in SHAPES
        ],
    )


def break_even_table() -> str:
    return table(
        ["model", "machine", "reading pays above", *(f"queries per document: {name}" for name in MEDIA)],
        [
            [
                shape.name,
                machine,
                amount(break_even_bandwidth(shape, speed), "B/s"),
                *(_queries(break_even_queries(shape, speed, bandwidth)) for bandwidth in MEDIA.values()),
            ]
            for shape in SHAPES
            for machine, speed in MACHINES.items()
        ],
    )


def _queries(count: float) -> str:
    return "never" if math.isinf(count) else f"{count:.2f}"


def hits_table() -> str:
    shares = popularity(10_000)
    return table(
        ["cache holds", "hit rate, formula", "hit rate, simulated", "tokens per pair", "against plain"],
        [
            [
                f"{part:.0%} of the documents",
                f"{(rate := hit_rate(shares, int(part * 10_000))):.3f}",
                f"{simulated_hit_rate(shares, int(part * 10_000)):.3f}",
                f"{(cost := SUFFIX + (1 - rate) * PREFIX):.0f}",
                f"{(PREFIX + SUFFIX) / cost:.2f}×",
            ]
            for part in (0.01, 0.05, 0.1, 0.25, 0.5)
        ],
    )


def measured_table() -> str:
    """Return the table of what benchmarks/bench_reranking.py has measured, if there is a result."""
    rows = []
    for path in sorted(RESULTS.glob("*_reranking.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        for row in result["rows"]:
            if ratio := (row.get("ratio") or {}).get("plain"):
                rows.append([result["machine"], f"`{row['work']}`", f"{row['ours_ms']:,.0f} ms", f"{ratio:.2f}×"])
    return table(["machine", "work", "ours", "plain ÷ ours"], rows) if rows else "(none yet)\n"


TABLES = {
    "tokens": tokens_table,
    "training": training_table,
    "work": work_table,
    "caches": cache_table,
    "break-even": break_even_table,
    "hits": hits_table,
    "measured": measured_table,
}


def main() -> int:
    if "--check" not in sys.argv and "--write" not in sys.argv:
        print("\n".join(f"{name}\n\n{make()}" for name, make in TABLES.items()))
        return 0
    check = "--check" in sys.argv
    if sorted(shown := markers.names("scaling")) != sorted(TABLES):
        raise SystemExit(
            f"each of these tables has one place in the pages: {', '.join(TABLES)}; got {', '.join(shown)}"
        )
    outdated = markers.write_tables("scaling", lambda name, page: TABLES[name](), check)
    return markers.report(outdated, check, "benchmarks/scaling.py --write")


if __name__ == "__main__":
    raise SystemExit(main())
