"""The memory that reranking needs, and the cost of bit-equal scores.

    python benchmarks/bench_reranking_limits.py --work rerank_memory   # a million documents, 1 GB on disk
    python benchmarks/bench_reranking_limits.py --work deterministic   # what bit-equal scores cost

rerank_memory: resident set while 100 queries x 100 candidates are reranked, over that with the model loaded; it must
grow by less than 300 MB. Nothing is written; the output is the result. What a batch does to a score is measured by
bench_batch_drift.py.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from random_llama import make_model
from shared_candidates import SETTINGS, make_pairs

import qpeft_ext as qpeft
from qpeft_ext import formats
from qpeft_ext.ranking.run import by_likelihood, rerank_run


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak(threading.Thread):
    """A context that records the largest resident set while it is open."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self.ended = resident_bytes(), threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.01):
            self.bytes = max(self.bytes, resident_bytes())

    def __enter__(self) -> Peak:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.join()


def write_corpus(folder: Path, documents: list[str], count: int) -> None:
    """Write ``count`` documents: the given texts again and again, each after a word of its own."""
    with open(folder / "corpus.jsonl", "w") as file:
        for i in range(count):
            file.write(f'{{"_id": "d{i}", "title": "", "text": "n{i} {documents[i % len(documents)]}"}}\n')


def rerank_memory(arguments) -> None:
    setting = SETTINGS[arguments.setting]
    data = make_pairs(setting, 2.0)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["QPEFT_CACHE"] = name
        write_corpus(folder, data.documents, arguments.documents)
        model = make_model(setting.shape, "cpu", "attention", torch.float32).eval()
        before = resident_bytes()
        with Peak() as peak:
            corpus = formats.Corpus(folder)
            index = peak.bytes - before
            queries = {f"q{i}": data.queries[i % len(data.queries)] for i in range(arguments.queries)}
            run = {
                q: [(f"d{d}", -float(r)) for r, d in enumerate(rng.choice(len(corpus), 100, replace=False))]
                for q in queries
            }
            reranker = qpeft.Reranker(model, cache=qpeft.DocumentCache(arguments.cache_bytes))
            result = rerank_run(by_likelihood(reranker), queries, corpus, run, show_progress_bar=False)
    growth = peak.bytes - before
    print(
        f"rerank_memory: {len(queries)} x 100 of {arguments.documents} documents, {arguments.setting}, cache "
        f"{arguments.cache_bytes / 1e6:.0f} MB: {result}; resident set {before / 1e6:.0f} MB with the model, at most "
        f"{growth / 1e6:.0f} MB more ({index / 1e6:.0f} MB of it for the corpus index)"
    )
    if growth >= 300e6:
        raise SystemExit("the resident set grew by more than 300 MB")


def deterministic(arguments) -> None:
    setting = SETTINGS[arguments.setting]
    data = make_pairs(setting, 2.0)
    texts = data.part(0, 20).texts()[: arguments.pairs]
    model = make_model(setting.shape, "cpu", "attention", torch.float32).eval()
    rates = {}
    for name in (False, True):
        start, cpu = time.perf_counter(), time.process_time()
        qpeft.Reranker(model, deterministic=name).predict(texts)
        rates[name] = time.perf_counter() - start, time.process_time() - cpu
    print(
        f"deterministic, {arguments.setting}, {len(texts)} pairs: {rates[True][0] / rates[False][0]:.2f} x the wall "
        f"time, {rates[True][1] / rates[False][1]:.2f} x the CPU time"
    )


WORKS = {function.__name__: function for function in (rerank_memory, deterministic)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="*", default=list(WORKS), choices=WORKS)
    parser.add_argument("--setting", default="25m", choices=SETTINGS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--cache-bytes", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for work in arguments.work:
        WORKS[work](arguments)
