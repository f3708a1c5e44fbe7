"""Keys and values stored in float32, bfloat16 and int8: bytes, change of the scores, reading, reranking from a disk.

    python benchmarks/bench_kv_dtype.py                                   # the LM of the demo on docstrings
    python benchmarks/bench_kv_dtype.py --base-model LM --data FOLDER --split dev

The work: documents with a judged query each; every query is scored with its own document and with those after it, so
that each document is in ``--queries`` pairs. Scores are compared with those of exact keys and values, by Kendall's tau
over all pairs. Each prefix is computed once and stored in every dtype, a file a prefix, which the system drops from its
page cache before it is read. The dtypes take turns; reported are medians.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from result_file import new_parser, parse, save
from scipy.stats import kendalltau

import qpeft_ext as qpeft
from qpeft_ext.lm.loading import BASE_LM

DTYPES = ("bfloat16", "float32", "int8")  # the first is what the others are compared with
BUDGET = 64 << 30


def make_pairs(data: str | None, split: str | None, documents: int, queries: int, seed: int = 0) -> list[tuple]:
    """Pairs of a query and a document, ``queries`` for each of so many documents."""
    from qpeft_ext import formats
    from qpeft_ext.demo.data import load_demo_data

    if data is None:
        test = load_demo_data(None, documents, 1, seed, lambda text: True).test
        texts, asked, qrels = test.documents, test.queries, test.qrels
    else:
        collection = formats.open_collection(data)
        texts, asked = collection.corpus, collection.queries(split)
        qrels = collection.qrels(split)
    own: dict[str, str] = {}  # document -> a query of it
    for query_id in np.random.default_rng(seed).permutation(sorted(qrels)):
        own.setdefault(next(iter(qrels[query_id])), query_id)
        if len(own) == documents:
            break
    ids = list(own)
    return [(asked[own[ids[i]]], texts[ids[(i + step) % len(ids)]]) for i in range(len(ids)) for step in range(queries)]


@torch.no_grad()
def write(model: qpeft.QPeftModel, pairs: list[tuple], folder: Path) -> dict[str, int]:
    """Write a folder of files for each dtype. Returns: bytes of the prefixes in each."""
    caches = {name: qpeft.DocumentCache(0, disk=folder / name, disk_bytes=BUDGET, kv_dtype=name) for name in DTYPES}
    engine = model.engine
    nbytes = dict.fromkeys(DTYPES, 0)
    with model.passes(evaluating=True):
        for document in model.encode(pairs).documents:
            computed = engine.prefill([document.ids])
            for name, cache in caches.items():
                (key,), (prefix,) = (
                    engine.cache_keys([document.ids], cache),
                    computed.split(engine.packing.stored_as(name).dtype),
                )
                cache.put(key, prefix)
                nbytes[name] += prefix.nbytes
    for cache in caches.values():
        cache.tiers["disk"]._lock.close()  # as the end of a process would
    return nbytes


def drop_from_page_cache(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Rounds:
    """What is measured, dtype by dtype in turns.

    Args:
        model: of the demo's LM, or another.
        pairs: from `make_pairs`.
        folder: that `write` has written.
    """

    def __init__(self, model: qpeft.QPeftModel, pairs: list[tuple], folder: Path) -> None:
        self.model, self.pairs, self.folder = model, pairs, folder
        self.ms: dict[str, dict[str, list[float]]] = {
            work: {name: [] for name in DTYPES} for work in ("read", "rerank_disk", "rerank_disk_cpu", "rerank_warm")
        }
        self.scores: dict[str, np.ndarray] = {}

    def run(self, name: str) -> None:
        """Measure one dtype once."""
        drop_from_page_cache(self.folder / name)
        self._time("read", name, self._cache(name), self._read)
        drop_from_page_cache(self.folder / name)
        cache = self._cache(name)
        self._time("rerank_disk", name, cache, self._rerank)
        self._time("rerank_warm", name, cache, self._rerank)

    def _cache(self, name: str) -> qpeft.DocumentCache:
        cache = qpeft.DocumentCache(BUDGET, disk=self.folder / name, disk_bytes=BUDGET, kv_dtype=name)
        cache.tiers["disk"]._lock.close()  # the next one is made before this one is collected
        return cache

    def _time(self, work: str, name: str, cache: qpeft.DocumentCache, run) -> None:
        start, cpu = time.perf_counter(), time.process_time()
        run(name, cache)
        self.ms[work][name].append((time.perf_counter() - start) * 1e3)
        if f"{work}_cpu" in self.ms:
            self.ms[f"{work}_cpu"][name].append((time.process_time() - cpu) * 1e3)

    def _read(self, name: str, cache: qpeft.DocumentCache) -> None:
        engine = self.model.engine
        ids = [document.ids for document in self.model.encode(self.pairs).documents]
        found = cache.fetch(engine.cache_keys(ids, cache), engine.packing.stored_as(name), engine.device)
        assert all(prefix is not None for prefix in found)

    def _rerank(self, name: str, cache: qpeft.DocumentCache) -> None:
        self.scores[name] = qpeft.Reranker(self.model, cache=cache).predict(self.pairs, show_progress_bar=False)
        assert cache.misses == 0

    def row(self, work: str, name: str) -> dict:
        ms = {each: statistics.median(self.ms[work][each]) for each in DTYPES}
        return {
            "work": f"{work}/{name}",
            "ours_ms": ms[name],
            "baselines_ms": {DTYPES[0]: ms[DTYPES[0]]},
            "ratio": {DTYPES[0]: ms[DTYPES[0]] / ms[name]},
            "pairs_per_second": 1e3 * len(self.pairs) / ms[name],
        }


def measure(base_model: str, pairs: list[tuple], rounds: int, dtype: str, device: str) -> list[dict]:
    """Measure all dtypes. Returns: a row for each kind of work and dtype."""
    lm = qpeft.load_lm(base_model, dtype=dtype, device=device)
    model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none")).eval()
    with tempfile.TemporaryDirectory(dir=".") as folder:  # /tmp may lie in memory
        nbytes = write(model, pairs, Path(folder))
        measured = Rounds(model, pairs, Path(folder))
        for i in range(rounds):
            for name in DTYPES[i % 3 :] + DTYPES[: i % 3]:
                measured.run(name)
    exact = measured.scores[dtype]
    rows = []
    for name in DTYPES:
        scores = measured.scores[name]
        facts = {
            "bytes": nbytes[name],
            "of_bfloat16": nbytes[name] / nbytes["bfloat16"],
            "tau": float(kendalltau(exact, scores).statistic),
            "max_error": float(np.abs(scores - exact).max()),
        }
        rows += [measured.row(work, name) | facts for work in measured.ms]
    return rows


def main() -> None:
    parser = new_parser("Time keys and values in other dtypes.", "kv_dtype", threads=2)
    parser.add_argument("--base-model", default=str(BASE_LM))
    parser.add_argument("--data", help="a collection; default: docstrings of the installed packages")
    parser.add_argument("--split")
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--queries", type=int, default=2, help="pairs of each document")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    arguments = parse(parser)
    pairs = make_pairs(arguments.data, arguments.split, arguments.documents, arguments.queries)
    rows = measure(arguments.base_model, pairs, arguments.rounds, arguments.dtype, str(arguments.device))
    for row in rows:
        print(
            f"{row['work']:26} {row['ours_ms']:9.1f} ms, {row['ratio']['bfloat16']:.2f} x bfloat16's speed; "
            f"{row['bytes'] / 1e6:.1f} MB, {row['of_bfloat16']:.3f} of bfloat16's; tau {row['tau']:.4f}, "
            f"largest change {row['max_error']:.3f} nats"
        )
    if arguments.out:
        print("wrote", save(arguments, "kv_dtype", rows))


def test_tiny():
    texts = ["sorted returns a new sorted list", "open gives a file object", "raised when an import fails"]
    pairs = [(query, text) for query in ("sort a list", "read a file") for text in texts]
    rows = measure(str(BASE_LM), pairs, 1, "float32", "cpu")
    assert len(rows) == 12
    for row in rows:
        assert row["tau"] > 0.9 and row["max_error"] < 1
    assert rows[-1]["work"] == "rerank_warm/int8" and rows[-1]["of_bfloat16"] < 0.9  # short texts


if __name__ == "__main__":
    main()
