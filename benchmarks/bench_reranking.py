"""Reranking 50 queries with 100 candidates each: ours cold, warm and from disk, against three baselines (DESIGN 8).

    python benchmarks/bench_reranking.py                      # 25 M Llama, 2 threads: half an hour
    python benchmarks/bench_reranking.py --setting small      # a few minutes

The work: queries of 12 to 20 tokens; documents of log-normal length, 200 tokens on average with a spread of 0.4 of it
(SQuAD 0.51, TREC DL 0.41, SciFact 0.41), cut at 320. Candidates are shared: each distinct document is a candidate of
two of the 50 queries on average, as with BM25's best 100 for 50 queries drawn from SQuAD (1.9), SciFact (1.7) or CoSQA
(2.1); Cranfield has 4.0, MS MARCO 1.02, and whole test sets more (``--sharing``; 1 is the worst case).

Baselines, same weights and, but for the last, same clues and scores:
    plain             our plain path: whole prompts, sorted by length over all queries, the head on query tokens only
    padded_unsorted   a UPR loop: query by query, 16 candidates at a time in the given order, padded to the longest
    cross_encoder     sentence-transformers' CrossEncoder of the same LM, its own batching (32, sorted): the prompt
                      without clues, the logit of one word at its last position

The work is done in parts, in which all systems take turns, so that a busy machine is busy for all of them: a part is
a fifth of the documents with all their queries (a fifth of the queries for padded_unsorted, which goes query by query).
Reported are sums over the parts, so that every system has done the whole work once; ``part_ratios`` show the spread.
Times include tokenisation. Process CPU time stands beside wall time.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from common import show
from random_llama import Shape, make_model
from result_file import new_parser, parse, save
from shared_candidates import LONGEST_DOCUMENT, SETTINGS, Pairs, Setting, make_pairs
from timing import peak_bytes, synchronize

import qpeft_ext as qpeft

TOLERANCE = 1e-4  # of mean log-likelihoods, nats per query token
UPR_BATCH = 16


# -- the systems: each takes the pairs of a part and returns their scores, [B] float32 ---------------------------------


class Systems:
    def __init__(self, setting: Setting, device, dtype: torch.dtype, cache_bytes: int, folder: Path) -> None:
        self.setting, self.device, self.folder = setting, torch.device(device), folder
        options = {"max_document_tokens": LONGEST_DOCUMENT}
        self.model = make_model(setting.shape, device, "attention", dtype, **options).eval()
        self.cache_bytes = cache_bytes
        self.cache = self.disk_cache = None
        self.cross_encoder_model = self._load_cross_encoder()

    def baselines(self) -> dict[str, Callable[[Pairs], np.ndarray]]:
        systems = {"plain": self.plain, "padded_unsorted": self.padded_unsorted}
        if self.cross_encoder_model:
            systems["cross_encoder"] = self.cross_encoder
        return systems

    def ours_cold(self, part: Pairs) -> np.ndarray:
        """Score with an empty cache, which is filled on the way."""
        self.cache = qpeft.DocumentCache(self.cache_bytes)
        return self.ours_warm(part)

    def ours_warm(self, part: Pairs) -> np.ndarray:
        return qpeft.Reranker(self.model, cache=self.cache).predict(part.texts(), show_progress_bar=False)

    def ours_disk(self, part: Pairs) -> np.ndarray:
        """Score with prefixes in files of an earlier process, which are read once and then kept in memory."""
        return qpeft.Reranker(self.model, cache=self.disk_cache).predict(part.texts(), show_progress_bar=False)

    @torch.no_grad()
    def write_files(self, part: Pairs) -> None:
        """Write what `ours_disk` reads, and let the system drop it from its page cache."""
        folder = self.folder / "prefixes"
        if self.disk_cache is not None:
            self.disk_cache.tiers["disk"]._lock.close()  # as the end of a process would
            shutil.rmtree(folder)
        writer = qpeft.DocumentCache(0, disk=folder, disk_bytes=self.cache_bytes)
        for prefix in self.model.encode(part.texts()).documents:
            self.model.engine.cached_prefill([prefix.ids], writer)
        writer.tiers["disk"]._lock.close()
        for file in folder.glob("*.safetensors"):
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self.disk_cache = qpeft.DocumentCache(self.cache_bytes, disk=folder, disk_bytes=self.cache_bytes)

    def plain(self, part: Pairs) -> np.ndarray:
        return qpeft.Reranker(self.model, path="plain").predict(part.texts(), show_progress_bar=False)

    def padded_unsorted(self, part: Pairs) -> np.ndarray:
        scores, texts = [], part.texts()
        for start, stop in _groups_of_one_query(part.pairs, UPR_BATCH):
            batch = self.model.score(texts[start:stop], path="plain", max_tokens_per_batch=1 << 30)
            scores.append(batch.query_log_likelihood.float().cpu().numpy())
        return np.concatenate(scores)

    def cross_encoder(self, part: Pairs) -> np.ndarray:
        return self.cross_encoder_model.predict(self._cross_encoder_texts(part), show_progress_bar=False)

    def _cross_encoder_texts(self, part: Pairs) -> list[tuple[str, str]]:
        head = f"<s> {self.model.qpeft_config.instruction} Passage:"
        return [(f"{head} {document}", f"w6 w7 w8 w9 {query}") for query, document in part.texts()]

    def _load_cross_encoder(self):
        try:
            from sentence_transformers import CrossEncoder
            from sentence_transformers.base.modules import Transformer
            from sentence_transformers.cross_encoder.modules import LogitScore
        except ImportError as error:
            print(f"cross_encoder is left out: sentence-transformers cannot be imported ({error})")
            return None
        self.model.lm.save_pretrained(self.folder / "lm")
        self.model.tokenizer.pad_token = "</s>"
        self.model.tokenizer.save_pretrained(self.folder / "lm")
        dtype = {"dtype": self.model.engine.table.dtype}
        lm = Transformer(str(self.folder / "lm"), transformer_task="text-generation", model_kwargs=dtype)
        modules = [lm, LogitScore(true_token_id=10)]
        return CrossEncoder(modules=modules, device=str(self.device), activation_fn=torch.nn.Identity())

    @torch.no_grad()
    def cross_encoder_oracle(self, part: Pairs) -> np.ndarray:
        """Compute the logits of the cross-encoder by the LM itself, one pair at a time."""
        scores = []
        for document, query in self._cross_encoder_texts(part):
            ids = self.model.tokenizer([f"{document} {query}"], add_special_tokens=False, return_tensors="pt").input_ids
            scores.append(float(self.model.lm(ids.to(self.device), logits_to_keep=1).logits[0, -1, 10]))
        return np.array(scores, dtype=np.float32)


def _groups_of_one_query(pairs: list[tuple[int, int]], size: int):
    start = 0
    for i in range(1, len(pairs) + 1):
        if i == len(pairs) or pairs[i][0] != pairs[start][0] or i - start == size:
            yield start, i
            start = i


# -- what each must compute --------------------------------------------------------------------------------------------


@dataclass
class Tokens:
    """Counts, without padding: tokens through the LM, tokens that these attend to, and rows through the head."""

    tokens: int = 0
    attended: int = 0
    head_rows: int = 0

    def add(self, before: int, new: int, head_rows: int) -> None:
        self.tokens += new
        self.attended += new * before + new * (new + 1) // 2
        self.head_rows += head_rows

    def flops(self, shape: Shape) -> float:
        """Return the FLOPs, two for a multiply-add; those of clue modules, a few per cent, are not counted."""
        layer = 4 * shape.width**2 + 3 * shape.width * shape.inner
        linear = 2 * shape.layers * layer * self.tokens
        head = 2 * shape.width * shape.vocabulary * self.head_rows
        return linear + 4 * shape.layers * shape.width * self.attended + head


def count_tokens(systems: Systems, data: Pairs) -> dict[str, Tokens]:
    model, counts = systems.model, {name: Tokens() for name in ("cold", "warm", "plain", "cross_encoder")}
    batch = model.encode(data.texts())
    pieces = model.prompt.suffix
    for document in batch.documents:
        counts["cold"].add(0, len(document.ids), 0)
    for q, d in batch.pairs:
        prefix, query = len(batch.documents[d].ids), len(batch.queries[q])
        suffix = len(pieces.hints) + query + len(pieces.question) + query - 1  # the last one is only a target
        counts["cold"].add(prefix, suffix, query)
        counts["warm"].add(prefix, suffix, query)
        counts["plain"].add(0, prefix + suffix, query)
        counts["cross_encoder"].add(0, prefix + len(pieces.bare_question) + query, 1)
    counts["padded_unsorted"] = counts["plain"]
    counts["disk"] = counts["warm"]
    return counts


# -- measuring ---------------------------------------------------------------------------------------------------------


def check(systems: Systems, part: Pairs) -> float:
    """Return the largest difference of mean log-likelihoods from the plain path; ValueError above `TOLERANCE`."""
    query_tokens = np.array([len(systems.model.prompt.queries([part.queries[q]])[0]) for q, _ in part.pairs])
    expected = systems.plain(part) / query_tokens
    largest = 0.0
    systems.write_files(part)
    for function in (systems.ours_cold, systems.ours_warm, systems.ours_disk, systems.padded_unsorted):
        error = float(np.abs(function(part) / query_tokens - expected).max())
        largest = max(largest, error)
        if not error <= TOLERANCE:
            raise ValueError(f"{function.__name__}: scores differ from the plain path's by {error:.1e} per token")
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

    def row(self, name: str, baselines: list[str]) -> dict:
        """Return the sums over all parts of one of ours, beside those of the baselines."""
        wall, cpu, rates = self.wall, self.cpu, self.pairs_per_second
        return {
            "ours_ms": sum(wall[name]),
            "baselines_ms": {b: sum(wall[b]) for b in baselines},
            "ratio": {b: sum(wall[b]) / sum(wall[name]) for b in baselines},
            "part_ratios": {b: [y / x for x, y in zip(rates[b], rates[name], strict=True)] for b in baselines},
            "ours_cpu_ms": sum(cpu[name]),
            "baselines_cpu_ms": {b: sum(cpu[b]) for b in baselines},
            "cpu_ratio": {b: sum(cpu[b]) / sum(cpu[name]) for b in baselines},
            "pairs_per_second": {n: len(wall[n]) / sum(1 / x for x in rates[n]) for n in (name, *baselines)},
            "parts": len(wall[name]),
        }


def measure(systems: Systems, data: Pairs, baselines: list[str], only: int | None = None) -> list[dict]:
    """Return one row for each of the works. ``only``: stop after this number of parts."""
    setting, device = systems.setting, systems.device
    largest_error = check(systems, data.few(100))
    ours = {"cold": systems.ours_cold, "warm": systems.ours_warm, "disk": systems.ours_disk}
    against = {name: function for name, function in systems.baselines().items() if name in baselines}
    times = Times([*ours, *against])
    for r in range(only or setting.parts):
        systems.write_files(data.part(r, setting.parts))
        for name, function in {**ours, **against}.items():  # warm follows cold: it reads what cold left
            part = data.part(r, setting.parts, by_query=name == "padded_unsorted")
            times.add(name, len(part.pairs), lambda function=function, part=part: function(part), device)
        rates = ", ".join(f"{name} {rates[r]:.1f}" for name, rates in times.pairs_per_second.items())
        print(f"part {r + 1} of {setting.parts}, pairs/s: {rates}", flush=True)
    sample = data.part(0, setting.parts).few(200)
    systems.write_files(sample)
    peaks = {name: peak_bytes(lambda f=function: f(sample), device) for name, function in {**ours, **against}.items()}
    counts = count_tokens(systems, data)
    rows = []
    for name in ours:
        row = {"work": f"rerank_{name}{setting.suffix}", **times.row(name, list(against))}
        bound = {b: counts[b].tokens / counts[name].tokens for b in against}
        flops = {n: counts[n].flops(setting.shape) for n in (name, *against)}
        row |= {
            "ours_peak_bytes": peaks[name],
            "baselines_peak_bytes": {b: peaks[b] for b in against},
            "bound_share": row["ratio"]["plain"] / bound["plain"] if "plain" in bound else None,
            "max_error": largest_error,
            "token_bound": bound,
            "queries_per_petaflop": {n: 1e15 * setting.queries / flops[n] for n in flops},
            "shape": describe(systems, data) | {"tokens": {n: counts[n].tokens for n in flops}},
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


def main() -> None:
    parser = new_parser("Time reranking against its baselines.", "reranking", threads=2)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--setting", default="25m", choices=SETTINGS)
    parser.add_argument("--queries", type=int)
    parser.add_argument("--parts", type=int, help="the work is done in so many parts, at least 5 for a median")
    parser.add_argument("--only", type=int, help="stop after so many parts: a quick look")
    parser.add_argument("--sharing", type=float, default=2.0, help="pairs per distinct document")
    parser.add_argument("--baselines", nargs="*", default=["plain", "padded_unsorted", "cross_encoder"])
    parser.add_argument("--cache-gb", type=float, default=6.0, help="memory for the prefixes of one part of the work")
    arguments = parse(parser)
    setting = SETTINGS[arguments.setting]
    setting = replace(setting, queries=arguments.queries or setting.queries, parts=arguments.parts or setting.parts)
    data = make_pairs(setting, arguments.sharing)
    dtype, cache_bytes = getattr(torch, arguments.dtype), int(arguments.cache_gb * 1e9)
    with tempfile.TemporaryDirectory() as folder:
        systems = Systems(setting, arguments.device, dtype, cache_bytes, Path(folder))
        rows = measure(systems, data, arguments.baselines, arguments.only)
    if arguments.out or arguments.setting != "tiny":
        print("wrote", save(arguments, "reranking", rows))
    for row in rows:
        show(row)
        for name, bound in row["token_bound"].items():
            print(
                f"    {name:22} {row['ratio'][name]:5.2f} x wall, {row['cpu_ratio'][name]:5.2f} x CPU, bound by "
                f"tokens {bound:.2f} x; {row['pairs_per_second'][name]:.1f} pairs/s, "
                f"{row['queries_per_petaflop'][name]:.0f} queries per PetaFLOP"
            )


if __name__ == "__main__":
    main()
