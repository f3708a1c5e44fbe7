"""`Reranker`: rank documents for queries, in the shapes of sentence-transformers' CrossEncoder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from itertools import zip_longest
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..adapters.attention_clues import AttentionClues
from ..adapters.projected_rows import ProjectedRows
from ..engine.filling import CacheFilling
from ..engine.memory import plan_memory
from ..engine.schedule import default_tokens, document_jobs, query_blocks, suffix_jobs
from ..lm.arguments import expect_model
from ..model import QPeftModel
from ..prefixes.cache import DocumentCache
from ..prompts.pairs import PairBatch
from ..prompts.prompt import Document, as_documents, as_pairs, document_text, expect_query
from ..utils.inputs import as_list, kind_of, short, whole_number
from ..utils.memory import retry_with_less
from ..utils.progress import progress_bar
from .clue_similarity import ClueSimilarity
from .explain import Explanation, explain_pair

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_PAIRS_PER_BLOCK = 8192  # tokenised together and sorted together: about 60 MB of ids when no document is shared
_PAIRS_PER_LIST_BLOCK = 1024  # with source="candidates", and for `similarity`: all of a block is held at once
_PAIRS_PER_READ = 64  # whose prefixes are read from files while as many are scored
_PAIRS_PER_JOB = 256  # of a block, between two steps of the progress bar; scored again after an out-of-memory error


class Reranker:
    """Scores documents by the log-likelihood of the query: Σ log p(query token), nats, larger is better.

    With ``compat="official"`` the score is the mean instead, as in the official code.

    Passes are formed over all pairs of a call, sorted by length. A score depends on the batch by rounding only: 1e-5
    nats per query token in float32. In bfloat16 up to 2.7e-2 were measured with the demo's LM, where scores spread by 1
    (median 1e-3; 5e-3 for queries of 16 tokens or more with attention clues), up to 4.4e-2 with tiny random LMs, on a
    CPU without bfloat16 instructions: ``benchmarks/bench_batch_drift.py``.

    Several threads may use one reranker, or rerankers of one LM: they take turns, block by block (8,192 pairs). A
    thread that calls the LM itself meanwhile (``lm.generate``) gets what it always gets; one that changes the LM does
    it inside `exclusive`. More throughput comes from larger calls or from processes (`qpeft rerank --devices`): start
    them by spawn, as a process forked after the first use gets one thread (docs/threads_and_state.md).

    Args:
        model: a `QPeftModel`.
        max_tokens_per_batch: token budget of a pass, by default what suits the device; halved and retried when the
            device runs out of memory.
        cache: a `DocumentCache`, to keep document prefixes between calls; it may be shared by rerankers of one LM.
        projected_bytes: budget for projected table rows that Q-PEFT-A reuses between calls (`AttentionClues`), 256 MiB
            if None; 0: none.
        deterministic: bit-equal scores whatever else is scored; slower (see `QPeftModel.forward`).
        path: "document_first" or "plain".
        max_memory: bytes besides the weights, or "free" on a CUDA device (`memory.plan_memory` has the formula): gives
            max_tokens_per_batch, projected_bytes and a cache, where they are not given.
        truncate_queries: cut a query that is longer than ``max_query_tokens`` at its end, instead of an error.
        compile: `torch.compile` the suffix passes; the first passes then take minutes. For large models on a GPU.

    Attributes:
        truncated, truncated_queries: documents and queries cut so far (``max_document_tokens``, ``max_query_tokens``);
            one that is in two calls counts twice.
        projected: the table rows that Q-PEFT-A reuses between calls of this reranker.
        adapter: the folder or Hub id that it was loaded from; None for a model in memory.
    """

    def __init__(
        self,
        model: QPeftModel,
        max_tokens_per_batch: int | None = None,
        cache: DocumentCache | None = None,
        projected_bytes: int | None = None,
        deterministic: bool = False,
        path: str = "document_first",
        max_memory: int | str | None = None,
        compile: bool = False,
        truncate_queries: bool = False,
    ) -> None:
        expect_model(model)
        if max_tokens_per_batch is not None and max_tokens_per_batch < 1:
            raise ValueError(f"Reranker: max_tokens_per_batch must be at least 1, got {max_tokens_per_batch}")
        if cache is not None and cache.index is not None and model.engine.why_plain:
            raise ValueError(f"Reranker: an index is of no use to this model: {model.engine.why_plain}")
        attention = isinstance(model.clues, AttentionClues)
        if max_memory is not None:
            plan = plan_memory(model.engine, max_memory, attention)
            max_tokens_per_batch = max_tokens_per_batch or plan.max_tokens_per_batch
            projected_bytes = plan.projected_bytes if projected_bytes is None else projected_bytes
            cache = DocumentCache(plan.cache_bytes) if cache is None else cache
        if compile:
            model.engine.compile()
        self.model = model.eval()
        self.max_tokens_per_batch = max_tokens_per_batch or default_tokens(model.device)
        self.cache = cache
        self.deterministic = deterministic
        self.projected = ProjectedRows(256 << 20 if projected_bytes is None else projected_bytes)
        self.path = path
        self.truncate_queries = truncate_queries
        self.truncated = self.truncated_queries = 0
        self.adapter: str | None = None

    @classmethod
    def from_pretrained(
        cls,
        path,
        base_model=None,
        device=None,
        dtype=None,
        tokenizer=None,
        lm_kwargs=None,
        max_document_tokens: int | None = None,
        max_query_tokens: int | None = None,
        **options,
    ):
        """Load an adapter folder (or Hub id) and its base LM.

        Args:
            path: the adapter.
            base_model: overrides the LM that the adapter names: a name, a folder or a loaded model, which other
                threads may use meanwhile (`get_qpeft_model`).
            device, dtype, lm_kwargs: for loading the LM (`load_lm`).
            max_document_tokens, max_query_tokens: limits instead of the adapter's; None keeps those.
            options: of `Reranker`.
        """
        lm_kwargs = dict(lm_kwargs or {}, device=device, dtype=dtype)
        limits = {"max_document_tokens": max_document_tokens, "max_query_tokens": max_query_tokens}
        reranker = cls(QPeftModel.from_pretrained(path, base_model, tokenizer, **limits, **lm_kwargs), **options)
        reranker.adapter = str(path)
        return reranker

    def __repr__(self) -> str:
        model, config = self.model, self.model.qpeft_config
        name = config.base_model_name_or_path or getattr(model.lm, "name_or_path", "") or "no name"
        kind = {
            "top_k": f"top_k clues (k={config.k})",
            "attention": f"attention clues ({config.num_heads} heads)",
            "none": "no clues",
        }[config.clues]
        dtype = str(model.engine.table.dtype).removeprefix("torch.")
        parts = [
            f"{type(model.lm).__name__} {name!r}, {dtype} on {model.device}",
            kind
            + (f", generated LoRA of rank {config.generated_lora_rank}" if config.generated_lora_rank else "")
            + (f", soft prompt of {config.num_virtual_tokens} tokens" if config.num_virtual_tokens else ""),
            f"adapter: {self.adapter or 'in memory'}",
            f"{'deterministic, ' if self.deterministic else ''}{self.path}, {self.max_tokens_per_batch} tokens a pass",
            "no cache" if self.cache is None else repr(self.cache),
        ]
        if self.cache is not None and self.cache.index is not None:
            parts.append(f"index: {self.cache.index.folder}")
        return f"Reranker({'; '.join(parts)})"

    def predict(
        self,
        pairs: Iterable[tuple[str, Document]],
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        *,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        activation_fn: object = None,
        apply_softmax: bool | None = False,
        num_workers: int | None = 0,
    ) -> np.ndarray | Tensor | list[Tensor] | float:
        """Scores of (query, document) pairs, in the order given.

        Args:
            pairs: a list, array, generator, ``zip``, … of (query, document); a document is a string, or a dict with
                "text" and perhaps "title". What has two items of which the first is a string, ``["query", "document"]``
                or ``("query", {"text": …})``, is one pair.
            batch_size: at most so many pairs in a pass; None: as many as fit ``max_tokens_per_batch``, which is usually
                faster. Passes over documents are bounded by ``max_tokens_per_batch`` alone.
            show_progress_bar: None: only on a terminal.
            convert_to_tensor: give a tensor on the model's device instead of an array.  convert_to_numpy: if neither is
                wanted, a list of scalar tensors is given, as by sentence-transformers.
            activation_fn, apply_softmax, num_workers: taken for code that is written for `CrossEncoder`. A score is a
                log-likelihood without an activation, so nothing but None, False and 0 does anything sensible here.
        Returns: float32 [B], nats; of one pair a float (a scalar tensor with ``convert_to_tensor``).
        Raises: TypeError or ValueError naming the pair that is not one, or the argument that cannot be served;
            ValueError with ``source="candidates"``, where a score depends on the whole list: see `rank`.
        """
        if self.model.qpeft_config.source == "candidates":
            raise ValueError(
                "predict: with source='candidates' a score depends on all candidates of its query; "
                "use rank or rank_many"
            )
        _expect_no_activation("predict", activation_fn, apply_softmax, num_workers)
        batch_size = whole_number(batch_size, "predict: batch_size")
        pairs = as_list(pairs, "predict: pairs", "give (query, document) pairs: [(query, document), …]")
        single = len(pairs) == 2 and isinstance(pairs[0], str)
        pairs = as_pairs([pairs] if single else pairs, "predict")
        scores = np.empty(len(pairs), dtype=np.float32)
        with progress_bar(total=len(pairs), unit="pair", desc="rerank", show=show_progress_bar) as bar:
            for start in range(0, len(pairs), _PAIRS_PER_BLOCK):
                block = pairs[start : start + _PAIRS_PER_BLOCK]
                scores[start : start + len(block)] = self._score(block, bar, batch_size=batch_size)
        if convert_to_tensor:
            tensor = torch.from_numpy(scores).to(self.model.device)
            return tensor[0] if single else tensor
        if single:
            return float(scores[0])
        return scores if convert_to_numpy else list(torch.from_numpy(scores))

    def rank(
        self,
        query: str,
        documents: Iterable[Document],
        top_k: int | None = None,
        return_documents: bool = False,
        batch_size: int | None = None,
        show_progress_bar: bool | None = False,
        *,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        activation_fn: object = None,
        apply_softmax: bool | None = False,
        num_workers: int | None = 0,
    ) -> list[dict]:
        """Documents of one query, best first; equal scores keep the given order.

        Args:
            query: a string.
            documents: a list, array, Series, generator, … of strings, or of dicts with "text" and perhaps "title".
            top_k: how many to give; None: all.
            return_documents: whether each row also has "text", title and text of the document as the LM read them.
            batch_size, show_progress_bar, activation_fn, apply_softmax, num_workers: as in `predict`.
            convert_to_numpy, convert_to_tensor: taken for code that is written for `CrossEncoder`; a score is a float.
        Returns: ``[{"corpus_id": place in documents, "score": nats, ("text")}, …]``.
        Raises: TypeError or ValueError that names the argument, or the document and what is wrong with it.
        """
        if not isinstance(query, str):
            raise TypeError(f"rank: query must be a string, got {kind_of(query)}; rank_many ranks for many queries")
        _expect_no_activation("rank", activation_fn, apply_softmax, num_workers)
        query, documents = expect_query(query, "rank: query"), as_documents(documents, "rank: documents")
        ranked = self._ranked([query], [documents], top_k, show_progress_bar, batch_size)[0]
        if return_documents:
            for row in ranked:
                row["text"] = document_text(documents[row["corpus_id"]])
        return ranked

    def rank_many(
        self,
        queries: Iterable[str],
        candidates: Iterable[Iterable[Document]],
        top_k: int | None = None,
        show_progress_bar: bool | None = None,
        *,
        batch_size: int | None = None,
    ) -> list[list[dict]]:
        """`rank` for many queries; passes are filled across queries and each distinct document is read once a block.

        Args:
            queries: strings.  candidates: the documents of each query, in the same order.
            top_k, batch_size: as in `rank`.  show_progress_bar: None: only on a terminal.
        Returns: what `rank` gives, for each query.
        Raises: as `rank`; ValueError if there are not as many lists of candidates as queries.
        """
        return self._ranked(*_as_lists("rank_many", queries, candidates), top_k, show_progress_bar, batch_size)

    def _ranked(
        self,
        queries: list[str],
        candidates: list[list[Document]],
        top_k: int | None,
        show_progress_bar: bool | None,
        batch_size: int | None,
    ) -> list[list[dict]]:
        """`rank_many` of lists that are checked."""
        top_k, batch_size = whole_number(top_k, "top_k"), whole_number(batch_size, "batch_size")
        results, source = [], self.model.qpeft_config.source
        with progress_bar(total=sum(map(len, candidates)), unit="pair", desc="rerank", show=show_progress_bar) as bar:
            for block in _blocks(candidates, _PAIRS_PER_LIST_BLOCK if source == "candidates" else _PAIRS_PER_BLOCK):
                pairs = [(queries[i], document) for i in block for document in candidates[i]]
                scores, start = self._score(pairs, bar, self._lists(block, candidates), batch_size), 0
                for i in block:
                    own = scores[start : start + len(candidates[i])]
                    start += len(own)
                    order = np.argsort(-own, kind="stable")[:top_k]
                    results.append([{"corpus_id": int(j), "score": float(own[j])} for j in order])
        return results

    def explain(self, query: str, document: Document, candidates: Iterable[Document] | None = None) -> Explanation:
        """The clues of a pair: which document tokens, where they are in the text, with which weight.

        candidates: the query's other documents and this one, which matter with ``source="candidates"`` only.
        Raises: TypeError or ValueError that names what is wrong with the query or a document.
        """
        with self.model.passes(evaluating=True):
            return explain_pair(self.model, query, document, candidates, self.truncate_queries)

    def similarity(self, queries: Iterable[str], candidates: Iterable[Iterable[Document]]) -> list[list[float]]:
        """Baseline without an LM: the sum of the scores of each pair's clues; 0 for a pair without clues.

        Of "top_k" these are the clues that the model chooses, with its source, filters and trained projection (their
        weights in `explain`); other models are given the k document tokens most similar to a query token, by the
        filters and the similarity of their config. With a source "vocabulary…" a query's documents are all equal.
        Arguments and errors are those of `rank_many`.
        """
        queries, candidates = _as_lists("similarity", queries, candidates)
        results = []
        for block in _blocks(candidates, _PAIRS_PER_LIST_BLOCK):
            pairs = [(queries[i], document) for i in block for document in candidates[i]]
            with self.model.passes(evaluating=True):
                batch = self.model.encode(pairs, self._lists(block, candidates), self.truncate_queries)
                sums = iter(self._clue_similarity(batch).tolist() if pairs else ())
            results += [[next(sums) for _ in candidates[i]] for i in block]
        return results

    def exclusive(self) -> AbstractContextManager[None]:
        """While this is entered no other thread scores with this LM: see `QPeftModel.exclusive`."""
        return self.model.exclusive()

    @cached_property
    def _clue_similarity(self) -> ClueSimilarity:
        return ClueSimilarity(self.model)

    def _lists(self, block: range, candidates: Sequence[Sequence]) -> list[int] | None:
        """The list of each pair of the block: with this source the same query in two lists has two lists of clues."""
        if self.model.qpeft_config.source != "candidates":
            return None
        return [i for i in block for _ in candidates[i]]

    def _score(self, pairs: list, bar, lists: list[int] | None = None, batch_size: int | None = None) -> np.ndarray:
        if not pairs:
            return np.zeros(0, dtype=np.float32)
        with self.model.passes(evaluating=True):
            scores = self._score_alone(pairs, bar, lists, batch_size)
        if not np.isfinite(scores).all():
            query, document = pairs[int(np.flatnonzero(~np.isfinite(scores))[0])]
            raise ValueError(
                f"the score of query {short(query)} is not finite; the LM or the adapter has broken weights, "
                "or its dtype overflows (try bfloat16 or float32)"
            )
        return scores

    def _score_alone(self, pairs: list, bar, lists: list[int] | None, batch_size: int | None) -> np.ndarray:
        """The scores of a block, while no other thread uses the LM."""
        if self.cache is not None and self.cache.index is not None:
            self.cache.index.expect_prompt(self.model.prompt)  # otherwise another template would only be slow
        batch = self.model.encode(pairs, lists, self.truncate_queries)
        self.truncated += sum(document.cut > 0 for document in batch.documents)
        self.truncated_queries += batch.cut_queries
        jobs, prefilled = self._jobs(batch)
        rows, parts = [], []
        for job in jobs:
            parts.append(self._within_memory(lambda tokens, job=job: self.model(
                batch.select(job), path=self.path, cache=self.cache, deterministic=self.deterministic,
                max_tokens_per_batch=tokens, prefilled=prefilled, max_pairs_per_batch=batch_size,
                projected=self.projected)))  # fmt: skip
            rows += job
            bar.update(len(job))
        scores = np.empty(len(pairs), dtype=np.float32)
        mean = self.model.ranks_by_mean
        parts = [part.mean_query_log_likelihood if mean else part.query_log_likelihood for part in parts]
        scores[rows] = torch.cat(parts).float().cpu().numpy()
        return scores

    def _jobs(self, batch: PairBatch) -> tuple[Iterator[list[int]], bool]:
        """Lists of pairs to score one after the other, and whether all prefixes are in the cache's memory by then."""
        size = _PAIRS_PER_JOB if self.model.qpeft_config.source == "document" else len(batch)
        if self.path != "document_first" or self.cache is None:
            return document_jobs(batch, size), False
        jobs = list(document_jobs(batch, min(size, _PAIRS_PER_READ)))
        filling = CacheFilling(self.model.engine, self.cache, self.deterministic)
        at_once = self.model.device.type == "cpu" and filling.has_room(batch)
        in_files = filling.announce(batch if at_once else batch.select(jobs[0]))
        if in_files and not at_once:  # copies to a GPU and its passes go on side by side
            return _read_ahead(filling, batch, jobs), False
        filled = self._within_memory(lambda tokens: filling.fill(batch, tokens))
        return (suffix_jobs if filled else document_jobs)(batch, size), filled

    @torch.no_grad()
    def _within_memory(self, work: Callable[[int], Result]) -> Result:
        """The result of ``work(max_tokens_per_batch)``, which is halved for good when the device runs out of memory."""
        return retry_with_less(lambda: work(self.max_tokens_per_batch), self._halve_budget)

    def _halve_budget(self) -> bool:
        if self.max_tokens_per_batch == 1:  # every pass is one document or one pair already
            return False
        self.max_tokens_per_batch //= 2
        logger.warning("out of memory: retrying with max_tokens_per_batch=%d", self.max_tokens_per_batch)
        return True


def _as_lists(
    what: str, queries: Iterable[str], candidates: Iterable[Iterable[Document]]
) -> tuple[list[str], list[list[Document]]]:
    """Queries and the documents of each, read once and checked."""
    queries = as_list(queries, f"{what}: queries", "one query goes into a list: [query]")
    candidates = as_list(candidates, f"{what}: candidates", "give a list of documents for each query")
    if len(queries) != len(candidates):
        raise ValueError(f"{what}: {len(queries)} queries but {len(candidates)} lists of candidates")
    for i, query in enumerate(queries):
        expect_query(query, f"query {i}")
    return queries, [
        as_documents(documents, f"{what}: the candidates of query {i}", f" of query {i}")
        for i, documents in enumerate(candidates)
    ]


def _expect_no_activation(what: str, activation_fn: object, apply_softmax: object, num_workers: object) -> None:
    if activation_fn is not None and not isinstance(activation_fn, torch.nn.Identity):
        raise ValueError(
            f"{what}: a score is a log-likelihood without an activation; leave activation_fn out and "
            "apply yours to the scores"
        )
    if apply_softmax:
        raise ValueError(f"{what}: there is one score a pair and no classes; leave apply_softmax out")
    if num_workers:
        raise ValueError(f"{what}: texts are tokenised in this process; leave num_workers out")


def _read_ahead(filling: CacheFilling, batch: PairBatch, jobs: list[list[int]]) -> Iterator[list[int]]:
    """The jobs; while one is scored, the system reads the files of the next one."""
    for job, following in zip_longest(jobs, jobs[1:], fillvalue=()):
        filling.announce(batch.select(following))
        yield job


def _blocks(candidates: Sequence[Sequence], max_pairs: int) -> Iterator[range]:
    """Places of consecutive queries with about ``max_pairs`` pairs together."""
    for block in query_blocks([len(documents) for documents in candidates], max_pairs):
        yield range(block.start, block.stop)
