"""Ranking quality of a base LM on the demo's dev packages: UPR over BM25's candidates."""

from __future__ import annotations

import re

import bm25s
import numpy as np
import torch
from data import prompt_rows
from likelihood import hidden_states, log_likelihoods

from qpeft_ext.demo import harvest
from qpeft_ext.prompt import Prompt

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
        collection = harvest._sample(harvest.harvest(harvest.DEV_PACKAGES, show_progress_bar=False), queries, seed)
        self.prompt, self.ids = prompt, list(collection.documents)
        documents = list(collection.documents.values())
        retriever = bm25s.BM25(k1=0.9, b=0.4)
        retriever.index([words(f"{d['title']} {d['text']}") for d in documents], show_progress=False)
        tokenised = [words(text) for text in collection.queries.values()]
        found, self.bm25 = retriever.retrieve(tokenised, k=candidates, show_progress=False)  # [Q, candidates]
        self.candidates = np.asarray(found)
        numbers = {id: number for number, id in enumerate(self.ids)}
        self.relevant = np.array([numbers[next(iter(collection.qrels[query]))] for query in collection.queries])
        self.queries = prompt.queries(list(collection.queries.values()))
        self.documents = prompt.documents(documents)
        self.random = np.random.default_rng(seed).random(self.candidates.shape)

    @torch.no_grad()
    def scores(self, model) -> np.ndarray:
        """Mean log-likelihood of each query given each of its candidates, [Q, candidates]."""
        pairs: dict[int, list[tuple[int, int]]] = {}  # document -> its (query, rank) pairs: one prefix for all
        for query, row in enumerate(self.candidates):
            for rank, document in enumerate(row):
                pairs.setdefault(int(document), []).append((query, rank))
        jobs = [(doc, wanted[at : at + 8]) for doc, wanted in pairs.items() for at in range(0, len(wanted), 8)]
        rows = [
            prompt_rows(
                np.array(self.documents[doc].document_ids, np.int64),
                [(np.array(self.queries[query]), None) for query, _ in wanted],
                self.prompt,
            )
            for doc, wanted in jobs
        ]
        scores = np.zeros(self.candidates.shape)
        order = sorted(range(len(rows)), key=lambda job: len(rows[job][0]))
        for start in range(0, len(order), 16):
            batch = order[start : start + 16]
            hidden, ids, is_query = hidden_states(model, [rows[job] for job in batch])
            log_p = log_likelihoods(model, hidden, ids, is_query).split(is_query.sum(1).tolist())
            for job, values in zip(batch, log_p, strict=True):
                wanted = jobs[job][1]
                lengths = [len(self.queries[query]) for query, _ in wanted]
                for (query, rank), tokens in zip(wanted, values.split(lengths), strict=True):
                    scores[query, rank] = tokens.mean().item()
        return scores

    def evaluate(self, model) -> dict[str, float]:
        """nDCG@10 of random order, BM25, UPR, and the sum of BM25 and UPR after standardising both per query."""
        was_training = model.training
        model.eval()
        upr = self.scores(model)
        model.train(was_training)
        fused = _standardised(self.bm25) + _standardised(upr)
        ways = {"random": self.random, "bm25": self.bm25, "upr": upr, "fused": fused}
        return {name: round(self.ndcg(scores), 4) for name, scores in ways.items()} | {"queries": len(self.queries)}

    def ndcg(self, scores: np.ndarray) -> float:
        """nDCG@10 with one relevant document per query; a query whose document BM25 missed counts 0."""
        order = np.argsort(-scores, axis=1, kind="stable")[:, :10]
        hits = np.take_along_axis(self.candidates, order, axis=1) == self.relevant[:, None]
        return float((hits / np.log2(np.arange(2, hits.shape[1] + 2))).sum(1).mean())


def _standardised(scores: np.ndarray) -> np.ndarray:
    return (scores - scores.mean(1, keepdims=True)) / (scores.std(1, keepdims=True) + 1e-9)
