"""What reranking needs in memory, and what a batch does to a score.

    python benchmarks/bench_reranking_limits.py --work rerank_memory   # a million documents, 1 GB on disk
    python benchmarks/bench_reranking_limits.py --work batch_drift     # bf16 and float32, the demo's LM
    python benchmarks/bench_reranking_limits.py --work deterministic   # what bit-equal scores cost

rerank_memory: resident set while 100 queries x 100 candidates are reranked, over that with the model loaded; it must
grow by less than 300 MB. batch_drift: largest and median change of a pair's mean log-likelihood (nats per query token)
between alone and in a batch, and between the cached and the plain path. Nothing is written; the output is the result.
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
from bench_reranking import SETTINGS, make_pairs
from bench_training import make_model

import qpeft_ext as qpeft
from qpeft_ext import formats
from qpeft_ext.demo.run import BASE_LM
from qpeft_ext.rerank_run import by_likelihood, rerank_run


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak(threading.Thread):
    """The largest resident set while the block runs."""

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
    """``count`` documents: the given texts again and again, each behind a word of its own."""
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
            run = {q: [(f"d{d}", -float(r)) for r, d in enumerate(rng.choice(len(corpus), 100, replace=False))]
                   for q in queries}
            reranker = qpeft.Reranker(model, cache=qpeft.DocumentCache(arguments.cache_bytes))
            result = rerank_run(by_likelihood(reranker), queries, corpus, run, show_progress_bar=False)
    growth = peak.bytes - before
    print(f"rerank_memory: {len(queries)} x 100 of {arguments.documents} documents, {arguments.setting}, cache "
          f"{arguments.cache_bytes / 1e6:.0f} MB: {result}; resident set {before / 1e6:.0f} MB with the model, at most "
          f"{growth / 1e6:.0f} MB more ({index / 1e6:.0f} MB of it for the corpus index)")
    if growth >= 300e6:
        raise SystemExit("the resident set grew by more than 300 MB")


def demo_pairs() -> list[tuple[str, str]]:
    """Functions and docstrings of the standard library, as in the demo."""
    import inspect
    import statistics
    import textwrap

    functions = [f for module in (inspect, os.path, statistics, tempfile, textwrap)
                 for _, f in inspect.getmembers(module, inspect.isfunction) if inspect.getdoc(f)]
    queries = [inspect.getdoc(f).splitlines()[0][:80] for f in functions[:: len(functions) // 10]][:10]
    return [(query, inspect.getsource(f)) for query in queries for f in functions[:40]]


def batch_drift(arguments) -> None:
    pairs = demo_pairs()
    for dtype in ("float32", "bfloat16"):
        config = qpeft.QPeftConfig(clues="attention")
        model = qpeft.get_qpeft_model(qpeft.load_lm(str(BASE_LM), dtype=dtype), config)
        few = range(0, len(pairs), max(1, len(pairs) // arguments.pairs))
        alone = torch.cat([model.score([pairs[i]]).mean_query_log_likelihood for i in few])
        together = model.score(pairs).mean_query_log_likelihood[list(few)]
        plain = model.score(pairs, path="plain").mean_query_log_likelihood[list(few)]
        for name, other in (("in a batch", together), ("on the plain path", plain)):
            drift = (alone - other).abs()
            print(f"batch_drift, {dtype}, {len(few)} pairs alone against {name}: at most {float(drift.max()):.1e}, "
                  f"median {float(drift.median()):.1e} nats per query token; "
                  f"the scores spread by {float(alone.std()):.2f}")


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
    print(f"deterministic, {arguments.setting}, {len(texts)} pairs: {rates[True][0] / rates[False][0]:.2f} x the wall "
          f"time, {rates[True][1] / rates[False][1]:.2f} x the CPU time")


WORKS = {function.__name__: function for function in (rerank_memory, batch_drift, deterministic)}

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
