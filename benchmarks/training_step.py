"""The orders of computation of a training step that bench_training.py compares.

Each leaves the gradient in ``model.clues`` and returns the loss.
"""

from __future__ import annotations

import torch
from cached_torch import CachedTorch
from collection_work import Work
from random_llama import Shape, make_batch, make_model, off_the_identity

import qpeft_ext as qpeft
from qpeft_ext.engine.rows import assemble_rows
from qpeft_ext.prompts.pairs import PairBatch
from qpeft_ext.training.losses import configured_loss

QUERIES, DOCUMENTS = 4, 8  # a positive and a hard negative for each query
OFFICIAL_MICRO_BATCH, DISTINCT_MICRO_BATCH = 4, 8


class Step:
    """Gradient of pointwise_pairwise for one batch: all pairs of `QUERIES` and `DOCUMENTS`, query by query.

    Query i has document i as its positive.
    """

    def __init__(self, model: qpeft.QPeftModel, batch: PairBatch) -> None:
        self.model, self.batch, self.device = model, batch, model.device
        self.torch_with_dict = CachedTorch(model)
        device = self.device
        self.positive = torch.zeros(QUERIES, DOCUMENTS, dtype=torch.bool, device=device)
        self.positive[range(QUERIES), range(QUERIES)] = True
        self.mask = torch.ones_like(self.positive)
        self.cache = qpeft.DocumentCache(1 << 30)

    @classmethod
    def random(cls, shape: Shape, device="cpu", clues: str = "attention", dtype=torch.float32) -> Step:
        """Make a step of a Llama with random weights."""
        return cls(make_model(shape, device, clues, dtype), make_batch(shape, QUERIES, DOCUMENTS))

    @classmethod
    def real(cls, base_model: str, work: Work, device="cpu", clues: str = "attention", dtype=torch.float32) -> Step:
        """Make a step of a pretrained LM, with the first queries that have a positive and a negative candidate."""
        lm = qpeft.load_lm(base_model, dtype=dtype, device=str(device))
        model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues=clues, margin=0.5))
        chosen: dict[str, tuple[str, dict, dict]] = {}  # by the id of the positive
        for query, some, relevances in zip(work.queries, work.documents, work.relevances, strict=True):
            positives = [document for document, relevance in zip(some, relevances, strict=True) if relevance > 0]
            negatives = [document for document in some if document not in positives]
            if positives and negatives and len(chosen) < QUERIES:
                chosen.setdefault(positives[0]["id"], (query, positives[0], negatives[0]))
        queries, positives, negatives = zip(*chosen.values(), strict=True)
        pairs = [(query, document) for query in queries for document in (*positives, *negatives)]
        return cls(off_the_identity(model), model.encode(pairs))

    @property
    def lengths(self) -> tuple[list[int], list[int]]:
        """Tokens of the prefix of each document, and of the suffix of each query, clues included."""
        model, queries = self.model, self.batch.queries
        clues = [len(q) if model.qpeft_config.clues == "attention" else model.qpeft_config.k for q in queries]
        around = [len(model.prompt.suffix.lay_out((), count)[0]) for count in clues]
        suffixes = [own + len(query) for own, query in zip(around, queries, strict=True)]
        return [len(document.ids) for document in self.batch.documents], suffixes

    def loss(self, table: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        config = self.model.qpeft_config
        return configured_loss(config, table, self.positive[rows], self.mask[rows])

    def ours(self, **options) -> torch.Tensor:
        """Run the step through `QPeftModel.forward`, with its ``options``."""
        self.model.zero_grad(set_to_none=True)
        scores = self.model(self.batch, **options).mean_query_log_likelihood
        loss = self.loss(scores.view(QUERIES, DOCUMENTS))
        loss.backward()
        return loss.detach()

    def ours_cached(self) -> torch.Tensor:
        return self.ours(cache=self.cache)

    def ours_first_epoch(self) -> torch.Tensor:
        return self.ours(cache=qpeft.DocumentCache(1 << 30))

    def ours_in_micro_batches(self) -> torch.Tensor:
        """Run the step with passes of at most 8 pairs: less memory, but the suffixes are computed twice."""
        return self.ours(max_pairs_per_batch=8)

    def cached_torch(self) -> torch.Tensor:
        """Run the step with a dict that is empty: prefixes without gradient, then one pass over all suffixes."""
        self.torch_with_dict.prefixes.clear()
        return self.cached_torch_again()

    def cached_torch_again(self) -> torch.Tensor:
        self.model.zero_grad(set_to_none=True)
        self.torch_with_dict.read([document.ids for document in self.batch.documents])
        table = self.torch_with_dict.likelihood(self.batch) / self._query_tokens(self.batch)
        loss = self.loss(table.view(QUERIES, DOCUMENTS))
        loss.backward()
        return loss.detach()

    def plain_distinct(self, pairs_at_once: int = DISTINCT_MICRO_BATCH) -> torch.Tensor:
        """Run the step on whole prompts of the distinct pairs, a few queries at a time; logits of query tokens only."""
        self.model.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        queries_at_once = pairs_at_once // DOCUMENTS
        for q in range(0, QUERIES, queries_at_once):
            queries = slice(q, q + queries_at_once)
            part = self.batch.select(range(q * DOCUMENTS, (q + queries_at_once) * DOCUMENTS))
            table = self._likelihood(part, every_position=False).view(queries_at_once, DOCUMENTS)
            loss = self.loss(table, queries) * (queries_at_once / QUERIES)
            loss.backward()
            total += loss.detach()
        return total

    def plain_distinct_one_graph(self) -> torch.Tensor:
        return self.plain_distinct(QUERIES * DOCUMENTS)

    def official(self) -> torch.Tensor:
        """Run the step on every (positive, negative) pair of rows: the positive is computed once for each negative."""
        self.model.zero_grad(set_to_none=True)
        pairs = [(q, d) for q in range(QUERIES) for d in range(DOCUMENTS) if d != q]
        total, size = torch.zeros((), device=self.device), OFFICIAL_MICRO_BATCH // 2
        for start in range(0, len(pairs), size):
            part = pairs[start : start + size]
            rows = [q * DOCUMENTS + document for q, d in part for document in (q, d)]
            likelihood = self._likelihood(self.batch.select(rows), every_position=True)
            better, worse = likelihood[0::2], likelihood[1::2]
            hinge = torch.relu(self.model.qpeft_config.margin - better + worse)
            loss = (hinge - better).sum() / len(pairs)
            loss.backward()
            total += loss.detach()
        return total

    def _likelihood(self, batch: PairBatch, every_position: bool) -> torch.Tensor:
        """Return the mean log-likelihood of whole prompts, [B], by the LM's own forward with inputs_embeds."""
        model = self.model
        clues = model.compute_clues(batch)
        rows = assemble_rows(batch, model.prompt.suffix, clues.mask.sum(1).tolist(), self.device, with_prefix=True)
        B, L = rows.ids.shape
        embeds = model.lm.get_input_embeddings()(rows.ids)
        vectors = clues.embeds[clues.mask].to(embeds.dtype)
        embeds = embeds.reshape(B * L, -1).index_copy(0, rows.clue_slots, vectors).view_as(embeds)
        arguments = {
            "inputs_embeds": embeds,
            "attention_mask": rows.mask,
            "position_ids": rows.positions,
            "use_cache": False,
        }
        if every_position:
            labels = torch.full((B * L,), -100, device=self.device).index_copy(0, rows.read.slots, rows.target_ids)
            logits = model.lm(**arguments).logits.float().flatten(0, 1)
            log_p = -torch.nn.functional.cross_entropy(logits, labels, reduction="none").view(B, L).sum(1)
            return log_p / self._query_tokens(batch)
        keep = torch.zeros(B * L, dtype=torch.bool, device=self.device)
        keep[rows.read.slots] = True
        logits = model.lm(**arguments, logits_to_keep=keep.view(B, L)).logits.float()
        log_p = logits.view(len(rows.target_ids), -1).log_softmax(-1).gather(1, rows.target_ids[:, None])
        return rows.sum_of_each_pair(log_p[:, 0]) / self._query_tokens(batch)

    def _query_tokens(self, batch: PairBatch) -> torch.Tensor:
        return torch.tensor([len(batch.queries[q]) for q, _ in batch.pairs], device=self.device)

    def gradient(self) -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in self.model.clues.parameters()])
