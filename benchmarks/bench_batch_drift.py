"""Differences of scores between batches, caches and numbers of threads.

    python benchmarks/bench_batch_drift.py                     # 300 batches a combination
    python benchmarks/bench_batch_drift.py --batches 20 --lm llama --threads-only

Random batches (pairs with repetitions, any token budget) of every LM x dtype x clue kind, with each cache in turn; each
score is compared with that of the pair unpadded, on the plain path. In float32 a difference of more than 1e-5 nats a
query token is an error; in bfloat16 the differences are the result. Then the same with a sixth of the batches and each
cache by 8 threads at once, which share a reranker.

LMs: three random ones with attention that matters, and that of the demo. Nothing is timed.
"""

from __future__ import annotations

import inspect
import statistics
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from result_file import new_parser, parse, save
from transformers import AutoConfig, AutoModelForCausalLM

import qpeft_ext as qpeft
from qpeft_ext.lm.loading import BASE_LM, load_tokenizer

LIMIT = 1e-5  # nats a query token, float32
THREADS = 8
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
LMS: dict[str, tuple[str, dict] | None] = {
    "llama": ("llama", _SIZES),
    "gemma3": (
        "gemma3_text",
        {
            **_SIZES,
            "query_pre_attn_scalar": 16,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}),
    "demo": None,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CLUES = {
    "none": {"clues": "none"},
    "top_k": {"clues": "top_k", "k": 5, "rank": 16},
    "attention": {"clues": "attention", "num_heads": 4, "rank": 16},
    "top_k+generated": {"clues": "top_k", "k": 5, "rank": 16, "generated_lora_rank": 4},
}
CACHES = ("none", "memory", "disk")


def make_texts() -> tuple[list[str], list[str]]:
    """Take queries of one to 16 words and documents of none to 120 from the source of a standard module."""
    rng, words = np.random.default_rng(0), inspect.getsource(statistics).split()

    def some(most: int) -> str:
        start, count = int(rng.integers(len(words) - most)), int(rng.integers(1, most + 1))
        return " ".join(words[start : start + count])

    return ["a", *(some(16) for _ in range(7))], ["", "a", *(some(120) for _ in range(10))]


def make_model(lm: str, dtype: str, clues: str) -> qpeft.QPeftModel:
    """Make the model, with trained modules that are a little away from their start."""
    tokenizer = load_tokenizer(BASE_LM)
    if LMS[lm] is None:
        base = qpeft.load_lm(str(BASE_LM), dtype=dtype)
    else:
        model_type, sizes = LMS[lm]
        ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
        config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **ends, **sizes)
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        with torch.no_grad():
            for parameter in base.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.18)
        base = base.to(DTYPES[dtype])
    model = qpeft.get_qpeft_model(base, qpeft.QPeftConfig(**CLUES[clues]), tokenizer)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.trained_modules.values():
            for parameter in module.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


class Drift:
    """Scores of random batches against those of their pairs, unpadded and one per pass.

    Attributes:
        expected: the score of each (query, document), in nats per query token.
        tokens: query tokens of each (query, document).
    """

    def __init__(self, model: qpeft.QPeftModel, folder: Path) -> None:
        self.model = model
        self.queries, self.documents = make_texts()
        scores = [
            [model.score([(query, document)], path="plain") for document in self.documents] for query in self.queries
        ]
        self.tokens = np.array([[float(score.num_tokens) for score in row] for row in scores])
        self.expected = np.array([[float(score.query_log_likelihood) for score in row] for row in scores]) / self.tokens
        prefix = model.engine.packing.nbytes(80)
        small = {
            "memory": qpeft.DocumentCache(6 * prefix),  # of 12 documents: some have to leave
            "disk": qpeft.DocumentCache(2 * prefix, disk=folder / "prefixes", disk_bytes=6 * prefix),
        }
        self.rerankers = {name: qpeft.Reranker(model, cache=small.get(name)) for name in CACHES}

    def of_batch(self, reranker: qpeft.Reranker, rng: np.random.Generator) -> np.ndarray:
        """Return the differences of the scores of one batch, in nats per query token."""
        count = int(rng.integers(1, 17))
        q, d = rng.integers(len(self.queries), size=count), rng.integers(len(self.documents), size=count)
        reranker.max_tokens_per_batch = int(rng.choice([128, 512, 2048]))
        scores = reranker.predict([(self.queries[i], self.documents[j]) for i, j in zip(q, d, strict=True)])
        return np.abs(scores / self.tokens[q, d] - self.expected[q, d])

    def of_batches(self, batches: int) -> dict[str, np.ndarray]:
        """Return the differences of all pairs of ``batches`` batches, for each cache."""
        rng, found = np.random.default_rng(1), {name: [] for name in CACHES}
        for number in range(batches):
            name = CACHES[number % len(CACHES)]
            found[name].append(self.of_batch(self.rerankers[name], rng))
        return {name: np.concatenate(parts) for name, parts in found.items() if parts}

    def of_threads(self, batches: int) -> dict[str, np.ndarray]:
        """Return the same when `THREADS` threads at once share a reranker and its cache."""

        def work(reranker: qpeft.Reranker, seed: int) -> np.ndarray:
            rng = np.random.default_rng(seed)
            return np.concatenate([self.of_batch(reranker, rng) for _ in range(-(-batches // THREADS))])

        with ThreadPoolExecutor(THREADS) as threads:
            found = {
                name: [threads.submit(work, reranker, seed) for seed in range(THREADS)]
                for name, reranker in self.rerankers.items()
            }
            return {name: np.concatenate([part.result() for part in parts]) for name, parts in found.items()}


def measure(
    lms: list[str], dtypes: list[str], clues: list[str], batches: int, with_batches: bool = True
) -> Iterator[dict]:
    """Yield rows of results. Raises: ValueError if a float32 score differs by more than `LIMIT`."""
    for lm in lms:
        for dtype in dtypes:
            for kind in clues:
                with tempfile.TemporaryDirectory() as folder:
                    drift = Drift(make_model(lm, dtype, kind), Path(folder))
                    parts = {"batches": drift.of_batches} if with_batches else {}
                    for name, part in (parts | {"threads": drift.of_threads}).items():
                        count = batches if name == "batches" else batches // 6
                        found = part(count)
                        differences = np.concatenate(list(found.values()))
                        row = {
                            "work": f"batch_drift/{lm}/{dtype}/{kind}/{name}",
                            "batches": count,
                            "pairs": len(differences),
                            "max_error": float(differences.max()),
                            "median_error": float(np.median(differences)),
                            "max_error_by_cache": {cache: float(part.max()) for cache, part in found.items()},
                            "spread": float(drift.expected.std()),  # of the scores themselves, nats a query token
                        }
                        yield row
                        if dtype == "float32" and not differences.max() <= LIMIT:
                            raise ValueError(
                                f"{row['work']}: a score differs by {row['max_error']:.1e} nats a query "
                                f"token from that of the unpadded pair, expected at most {LIMIT}"
                            )


def main() -> None:
    parser = new_parser(__doc__, "batch_drift")
    parser.add_argument("--batches", type=int, default=300, help="of every LM, dtype and clue kind")
    parser.add_argument("--lm", nargs="*", default=list(LMS), choices=LMS)
    parser.add_argument("--dtype", nargs="*", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--clues", nargs="*", default=list(CLUES), choices=CLUES)
    parser.add_argument("--threads-only", action="store_true")
    arguments = parse(parser)
    for row in measure(arguments.lm, arguments.dtype, arguments.clues, arguments.batches, not arguments.threads_only):
        print(
            f"{row['work']}: {row['pairs']} pairs, at most {row['max_error']:.1e}, median {row['median_error']:.1e} "
            f"nats a query token; the scores spread by {row['spread']:.2f}",
            flush=True,
        )
        path = save(arguments, "batch_drift", [row])
    print("wrote", path)


if __name__ == "__main__":
    main()
