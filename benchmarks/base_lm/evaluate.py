"""Ranking quality and validation loss of base LMs on the demo's dev packages: UPR over BM25's candidates.

python benchmarks/base_lm/evaluate.py qpeft_ext/demo/base_lm build/base_lm_again
"""

from __future__ import annotations

import argparse
import json
import re

import numpy as np
import torch
from data import prompt_rows
from likelihood import hidden_states, log_likelihoods

from qpeft_ext import QPeftConfig
from qpeft_ext.demo import harvest
from qpeft_ext.lm.loading import load_lm, load_tokenizer
from qpeft_ext.prompts.prompt import Prompt
from qpeft_ext.utils.optional import import_bm25s

bm25s = import_bm25s()
HUMPS = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def words(text: str) -> list[str]:
    """Words for BM25: snake_case and CamelCase are split, as the LM's tokenizer does, so the comparison is fair."""
    return re.findall(r"[a-z]+|[0-9]+", HUMPS.sub(" ", text).lower())


class DevSet:
    """Dev queries with BM25's best candidates.

    Args:
        prompt: of the LM to be evaluated.
        seed: samples the queries.
    """

    def __init__(self, prompt: Prompt, seed: int, queries: int = 60, candidates: int = 50) -> None:
        collection = harvest.sample_queries(
            harvest.harvest(harvest.DEV_PACKAGES, show_progress_bar=False), queries, seed
        )
        self.prompt, self.ids = prompt, list(collection.documents)
        documents = list(collection.documents.values())
        retriever = bm25s.BM25(k1=0.9, b=0.4)
        retriever.index([words(f"{d['title']} {d['text']}") for d in documents], show_progress=False)
        tokenised = [words(text) for text in collection.queries.values()]
        found, self.bm25 = retriever.retrieve(tokenised, k=candidates, show_progress=False)  # [Q, candidates]
        self.candidates = np.asarray(found)
        numbers = {id: number for number, id in enumerate(self.ids)}
        self.relevant = np.array([numbers[next(iter(collection.qrels[query]))] for query in collection.queries])
        self.query_texts = list(collection.queries.values())
        self.queries = prompt.queries(self.query_texts)
        self.documents = prompt.documents(documents)
        self.random = np.random.default_rng(seed).random(self.candidates.shape)

    @torch.no_grad()
    def log_likelihoods(self, model, pairs: list[tuple[int, int]]) -> list[torch.Tensor]:
        """log p of each token of a query given a document, for pairs of a query and a document (their numbers)."""
        of_document: dict[int, list[int]] = {}  # document -> its pairs, which share a prefix
        for number, (_, document) in enumerate(pairs):
            of_document.setdefault(document, []).append(number)
        jobs = [(doc, wanted[at : at + 8]) for doc, wanted in of_document.items() for at in range(0, len(wanted), 8)]
        rows = [
            prompt_rows(
                np.array(self.documents[doc].document_ids, np.int64),
                [(np.array(self.queries[pairs[number][0]]), None) for number in wanted],
                self.prompt,
            )
            for doc, wanted in jobs
        ]
        found: list[torch.Tensor] = [torch.empty(0)] * len(pairs)
        order = sorted(range(len(rows)), key=lambda job: len(rows[job][0]))
        for start in range(0, len(order), 16):
            batch = order[start : start + 16]
            hidden, ids, is_query = hidden_states(model, [rows[job] for job in batch])
            log_p = log_likelihoods(model, hidden, ids, is_query).split(is_query.sum(1).tolist())
            for job, values in zip(batch, log_p, strict=True):
                wanted = jobs[job][1]
                lengths = [len(self.queries[pairs[number][0]]) for number in wanted]
                for number, tokens in zip(wanted, values.split(lengths), strict=True):
                    found[number] = tokens
        return found

    def scores(self, model) -> np.ndarray:
        """Mean log-likelihood of each query given each of its candidates, [Q, candidates]."""
        pairs = [(query, int(document)) for query, row in enumerate(self.candidates) for document in row]
        means = [tokens.mean().item() for tokens in self.log_likelihoods(model, pairs)]
        return np.array(means).reshape(self.candidates.shape)

    def loss(self, model) -> dict[str, float]:
        """Validation loss: nats per token of the queries, each given its document; and per character that is no white
        space, which LMs with other tokenizers have the same number of."""
        found = torch.cat(self.log_likelihoods(model, list(enumerate(self.relevant.tolist()))))
        characters = sum(len("".join(text.split())) for text in self.query_texts)
        loss, total = -found.mean().item(), -found.sum().item()
        return {"loss": round(loss, 4), "loss_per_character": round(total / characters, 4)}

    def evaluate(self, model) -> dict[str, float]:
        """nDCG@10 of random order, BM25, UPR, and the sum of BM25 and UPR, both standardised per query; and `loss`."""
        was_training = model.training
        model.eval()
        upr, loss = self.scores(model), self.loss(model)
        model.train(was_training)
        fused = _standardised(self.bm25) + _standardised(upr)
        ways = {"random": self.random, "bm25": self.bm25, "upr": upr, "fused": fused}
        measured = {name: round(self.ndcg(scores), 4) for name, scores in ways.items()}
        return measured | loss | {"queries": len(self.queries)}

    def ndcg(self, scores: np.ndarray) -> float:
        """nDCG@10 with one relevant document per query; a query whose document BM25 missed counts 0."""
        order = np.argsort(-scores, axis=1, kind="stable")[:, :10]
        hits = np.take_along_axis(self.candidates, order, axis=1) == self.relevant[:, None]
        return float((hits / np.log2(np.arange(2, hits.shape[1] + 2))).sum(1).mean())


def _standardised(scores: np.ndarray) -> np.ndarray:
    return (scores - scores.mean(1, keepdims=True)) / (scores.std(1, keepdims=True) + 1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lm", nargs="+", help="folders of LMs")
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--max-document-tokens", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = QPeftConfig(clues="none", max_document_tokens=options.max_document_tokens, max_query_tokens=48)
    for folder in options.lm:
        dev = DevSet(Prompt(load_tokenizer(folder), config), options.seed, options.queries)
        print(json.dumps({"lm": folder} | dev.evaluate(load_lm(folder, dtype="float32"))), flush=True)


if __name__ == "__main__":
    main()
