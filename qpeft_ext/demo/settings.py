"""Settings of the demo, and the names of the systems that it compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import QPeftConfig

QUERIES = 1000
MEASURE = "nDCG@10"  # decides on dev, and is plotted
MAX_QUERY_TOKENS = 64  # longer first sentences are left out, whatever the tokenizer
FIRST, SIMILARITY, UPR, CLUES, BEST = "BM25", "similarity only", "UPR", "Q-PEFT-R", "Q-PEFT-R + generated LoRA"
_OPTIONS: dict[str, dict[str, Any]] = {
    UPR: {"clues": "none"},
    CLUES: {"clues": "top_k", "filters": ("non_alphabetic", "stop_words")},
    BEST: {"clues": "top_k", "generated_lora_rank": 16, "target_modules": ("all-linear",)},
}


@dataclass(frozen=True)
class Settings:
    """Sizes of the demo, which takes ten minutes on two cores with the defaults and the packaged LM.

    Attributes:
        queries: test queries.
        dev_queries: dev queries; None: all of the installed packages, 100 of a BEIR folder.
        systems: what is compared, beside BM25.
        max_document_tokens: tokens of a document that are read; 160 is what the packaged LM was trained with.
        kv_dtype: dtype of cached prefixes; None is the LM's.
        read_once: whether a system finds the documents in the cache that an earlier one has read; otherwise each
            pays for its own, and the times are comparable.
        candidates: how many of BM25's best documents are reranked.
        num_negatives: negatives of a training example, from BM25's best 40; with the positive, lists of 8.
        queries_per_step: queries of a training step.
        train_queries: training queries.
        train_queries_clues: training queries of Q-PEFT-R, which are the first of them.
        learning_rate_clues: learning rate of Q-PEFT-R.
        learning_rate_best: learning rate of Q-PEFT-R with a generated LoRA, as in benchmarks/quality/choose.yaml.
        evaluations: how often an adapter is evaluated on dev while it is trained.
        dev_examples: how many dev queries it is evaluated on.
        cache_bytes: memory for the prefixes of documents.
        fusion_weights: weights of the reranker that are tried; BM25 has the rest.
    """

    queries: int = QUERIES
    dev_queries: int | None = None
    systems: tuple[str, ...] = (UPR, CLUES, BEST)
    max_document_tokens: int = 160
    kv_dtype: str | None = None
    read_once: bool = False
    candidates: int = 20
    num_negatives: int = 7
    queries_per_step: int = 8
    train_queries: int = 1200
    train_queries_clues: int = 320
    learning_rate_clues: float = 1e-4
    learning_rate_best: float = 1e-3
    evaluations: int = 3
    dev_examples: int = 100
    cache_bytes: int = 6 << 30
    fusion_weights: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

    def config(self, system: str) -> QPeftConfig:
        """Return the options of a system."""
        return QPeftConfig(
            loss="listwise",
            num_hard_negatives=self.num_negatives,
            in_batch_negatives=False,
            queries_per_group=self.queries_per_step,
            max_document_tokens=self.max_document_tokens,
            max_query_tokens=MAX_QUERY_TOKENS,
            **_OPTIONS[system],
        )

    def training_of(self, system: str) -> tuple[int, float]:
        """Return the number of training queries of a system, and its learning rate."""
        if system == CLUES:
            return min(self.train_queries, self.train_queries_clues), self.learning_rate_clues
        return self.train_queries, self.learning_rate_best
