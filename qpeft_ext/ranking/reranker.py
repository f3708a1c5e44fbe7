"""`Reranker`: rank documents for queries, in the shapes of sentence-transformers' CrossEncoder."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapters.attention_clues import AttentionClues
from ..adapters.projected_rows import ProjectedRows
from ..engine.memory import plan_memory
from ..engine.schedule import default_tokens
from ..engine.scoring import expect_path
from ..lm.arguments import expect_model, expect_not_loaded, is_name, loading_keywords
from ..lm.loading import load_lm
from ..model import QPeftModel, get_qpeft_model
from ..prefixes.cache import DocumentCache
from ..prompts.prompt import Document, as_documents, as_pairs, document_text, expect_query
from ..utils.inputs import as_list, kind_of, true_or_false, whole_number
from .explain import describe_model
from .inputs import as_instructions, as_lists, as_threshold, expect_neutral, expect_options
from .passages import PassageScoring
from .relevance import RelevanceRanker
from .without_adapter import config_without_adapter


class Reranker(RelevanceRanker):
    """Scores documents by the log-likelihood of the query: Σ log p(query token), nats, larger is better.

    With another ``score`` of `QPeftConfig` it is that one: log-odds, an expected grade, or a sum of both kinds. With
    ``compat="official"`` it is the mean log-likelihood, as in the official code.

    Passes are formed over all pairs of a call, sorted by length. A score depends on the batch by rounding only: 1e-5
    nats per query token in float32; in bfloat16 up to 4.4e-2 were measured (``benchmarks/bench_batch_drift.py``).

    Several threads may use one reranker, or rerankers of one LM: they take turns, block by block (8,192 pairs). A
    thread that calls the LM itself meanwhile (``lm.generate``) gets what it always gets; one that changes the LM does
    it inside `exclusive`. More throughput comes from larger calls or from processes (`qpeft rerank --devices`): start
    them by spawn, since a process forked after the first use gets one thread (docs/threads_and_state.md).

    Args:
        model: a `QPeftModel`; it is put into eval mode.
        max_tokens_per_batch: token budget of a pass; None takes what suits the device. It is halved, and the pass tried
            again, when the device runs out of memory.
        cache: a `DocumentCache`, to keep document prefixes between calls; it may be shared by rerankers of one LM.
        projected_bytes: budget in bytes for projected table rows that Q-PEFT-A reuses between calls; None takes
            256 MiB, 0 keeps none.
        deterministic: make scores bit-equal whatever else is scored; slower (see `QPeftModel.forward`).
        path: "document_first", or "plain" to read the whole prompt of every pair.
        max_memory: bytes besides the weights, or "free" on a CUDA device (`engine.memory.plan_memory` has the formula);
            it decides max_tokens_per_batch, projected_bytes and cache where they are not given.
        compile: `torch.compile` the suffix passes; the first passes then take minutes. For large models on a GPU.
        truncate_queries: cut a query that is longer than ``max_query_tokens`` at its end, instead of an error.
        passages: "max", "mean" or "first": documents that are longer than ``passage_tokens`` are split between
            sentences into passages, with the title before each, and have the best passage's score, the mean, or the
            first one's; None: documents that are longer than ``max_document_tokens`` are cut.
        passage_tokens: longest passage in tokens, title and text together; None: ``max_document_tokens``.
        passage_stride: tokens from the beginning of a passage to that of the next; None: ``passage_tokens``, so that
            they do not overlap.
        kv_dtype: as for `DocumentCache`, of the cache that max_memory makes.
    Attributes:
        truncated, truncated_queries: documents and queries cut so far (``max_document_tokens``, ``max_query_tokens``);
            one that is in two calls counts twice.
        projected: the table rows that Q-PEFT-A reuses between calls of this reranker.
        passages: the `PassageScoring`, or None.
        adapter: the folder or Hub id that it was loaded from; None for a model in memory.
    Raises: ValueError for a budget below 1, another path, or an index that the model cannot use; TypeError for another
        kind of model, budget or cache.
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
        passages: str | None = None,
        passage_tokens: int | None = None,
        passage_stride: int | None = None,
        kv_dtype: str | None = None,
    ) -> None:
        expect_model(model)
        by_passages = PassageScoring.of(model.prompt, passages, passage_tokens, passage_stride)
        expect_path(path)
        max_tokens_per_batch = whole_number(max_tokens_per_batch, "Reranker: max_tokens_per_batch")
        projected_bytes = whole_number(projected_bytes, "Reranker: projected_bytes", least=0)
        deterministic = true_or_false(deterministic, "Reranker: deterministic")
        truncate_queries = true_or_false(truncate_queries, "Reranker: truncate_queries")
        if cache is not None and not isinstance(cache, DocumentCache):
            raise TypeError(f"Reranker: cache must be a DocumentCache, got {kind_of(cache)}; give DocumentCache(bytes)")
        if cache is not None and cache.index is not None and (reason := model.why_no_index):
            raise ValueError(f"Reranker: an index is of no use to this model: {reason}")
        if max_memory is not None:
            plan = plan_memory(model.engine, max_memory, isinstance(model.clues, AttentionClues))
            max_tokens_per_batch = max_tokens_per_batch or plan.max_tokens_per_batch
            projected_bytes = plan.projected_bytes if projected_bytes is None else projected_bytes
            cache = DocumentCache(plan.cache_bytes, kv_dtype=kv_dtype) if cache is None else cache
        elif kv_dtype is not None:
            raise ValueError("Reranker: kv_dtype is for max_memory's cache; give DocumentCache(kv_dtype=…) your own")
        if true_or_false(compile, "Reranker: compile"):
            model.engine.compile()
        projected = ProjectedRows(256 << 20 if projected_bytes is None else projected_bytes)
        max_tokens = max_tokens_per_batch or default_tokens(model.device)
        super().__init__(model, max_tokens, cache, deterministic, path, truncate_queries, projected, by_passages)
        self.adapter: str | None = None

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | Path,
        base_model: Any = None,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        tokenizer: Any = None,
        lm_kwargs: Mapping[str, Any] | None = None,
        max_document_tokens: int | None = None,
        max_query_tokens: int | None = None,
        **options: Any,
    ) -> Reranker:
        """Load an adapter and its base LM.

        Args:
            adapter: a folder or a Hub id.
            base_model: used instead of the LM that the adapter names: a name as for `load_lm`, or a loaded model, which
                other threads may use meanwhile (`get_qpeft_model`).
            device: where the LM goes, e.g. "cuda"; None leaves it to transformers.
            dtype: of the LM, e.g. "bfloat16", or "auto" as for `load_lm`; None keeps the checkpoint's own.
            tokenizer: the LM's; None loads it with the LM.
            lm_kwargs: further arguments of `load_lm`, such as ``revision``. A loaded model takes none of ``device``,
                ``dtype`` and these but what finds its tokenizer.
            max_document_tokens, max_query_tokens: limits used instead of the adapter's; None keeps those.
            options: arguments of `Reranker` besides the model.
        Returns: the reranker.
        Raises: OSError or ValueError with one line that names the adapter or the LM and what is wrong with it.
        """
        expect_options("from_pretrained", options, inspect.signature(cls).parameters)
        model = QPeftModel.from_pretrained(
            adapter,
            base_model,
            tokenizer,
            max_document_tokens=max_document_tokens,
            max_query_tokens=max_query_tokens,
            **loading_keywords("from_pretrained", lm_kwargs, device=device, dtype=dtype),
        )
        reranker = cls(model, **options)
        reranker.adapter = str(adapter)
        return reranker

    @classmethod
    def from_lm(
        cls,
        lm: Any,
        template: str | None = None,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        tokenizer: Any = None,
        lm_kwargs: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Reranker:
        """Make a reranker of an LM that is one itself, without an adapter of ours.

        Args:
            lm: a name as for `load_lm`, such as "Qwen/Qwen3-Reranker-0.6B", or a loaded model.
            template: as in `QPeftConfig`; None takes that of the reranker which the name means.
            device, dtype, tokenizer, lm_kwargs: as in `from_pretrained`.
            config: further options of `QPeftConfig`, such as ``instruction`` or ``max_document_tokens``.
            options: arguments of `Reranker` besides the model.
        Returns: the reranker.
        Raises: OSError or ValueError with one line; ValueError for an LM that is no known reranker, without a template.
        """
        expect_options("from_lm", options, inspect.signature(cls).parameters)
        keywords = loading_keywords("from_lm", lm_kwargs, device=device, dtype=dtype)
        expect_not_loaded("from_lm", lm, keywords)
        lm = load_lm(lm, **keywords) if is_name(lm) else lm
        chosen = config_without_adapter(str(getattr(lm, "name_or_path", "")), lm.config, template, **(config or {}))
        return cls(get_qpeft_model(lm, chosen, tokenizer), **options)

    def __repr__(self) -> str:
        cache, index = self.cache, self.cache and self.cache.index
        parts = [
            *describe_model(self.model),
            f"adapter: {self.adapter or 'in memory'}",
            f"{'deterministic, ' if self.deterministic else ''}{self.path}, {self.max_tokens_per_batch} tokens a pass",
            *([repr(self.passages)] if self.passages else []),
            "no cache" if cache is None else repr(cache),
            *([f"index: {index.folder}"] if index else []),
        ]
        return f"Reranker({'; '.join(parts)})"

    def predict(
        self,
        pairs: Iterable[Any],
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        *,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        activation_fn: object = None,
        apply_softmax: bool | None = False,
        num_workers: int | None = 0,
        prompt_name: str | None = None,
        instruction: str | Sequence[str | None] | None = None,
    ) -> np.ndarray | Tensor | list[Tensor] | float:
        """Score (query, document) pairs, in the order given.

        Args:
            pairs: a list, array, generator, ``zip``, … of (query, document); a document is a string, or a dict with
                "text" and perhaps "title". What has two items of which the first is a string, ``["query", "document"]``
                or ``("query", {"text": …})``, is one pair.
            batch_size: pairs in a pass at most; None takes as many as fit ``max_tokens_per_batch``, which is usually
                faster. Passes over documents are bounded by ``max_tokens_per_batch`` only.
            show_progress_bar: None shows it on a terminal only.
            convert_to_numpy: False gives a list of scalar tensors, as in sentence-transformers.
            convert_to_tensor: True gives a tensor on the model's device instead.
            activation_fn, apply_softmax, num_workers, prompt_name: accepted for code that is written for
                `CrossEncoder`. A score has no activation, and the prompt is the adapter's, so
                only None, False, 0 and None are taken.
            instruction: text that the LM reads between document and query, such as "Find a passage that refutes the
                claim."; or a list with one for each pair, or None. It is not scored, and cached documents stay valid.
        Returns: float32 [B], nats; for one pair a float (a scalar tensor where pairs give tensors).
        Raises: TypeError or ValueError naming the pair or the argument that is wrong; ValueError with
            ``source="candidates"``, where a score depends on the whole list: see `rank`.
        """
        if self.model.qpeft_config.source == "candidates":
            raise ValueError(
                "predict: with source='candidates' a score depends on all candidates of its query; "
                "use rank or rank_many"
            )
        expect_neutral("predict", activation_fn, apply_softmax, num_workers, prompt_name)
        convert_to_numpy = true_or_false(convert_to_numpy, "predict: convert_to_numpy")
        convert_to_tensor = true_or_false(convert_to_tensor, "predict: convert_to_tensor")
        batch_size = whole_number(batch_size, "predict: batch_size")
        given = as_list(pairs, "predict: pairs", "give (query, document) pairs: [(query, document), …]")
        single = len(given) == 2 and isinstance(given[0], str)
        checked = as_pairs([given] if single else given, "predict")
        instructions = as_instructions("predict", instruction, len(checked))
        scores = self._predicted(checked, show_progress_bar, batch_size, instructions)
        if convert_to_tensor:
            tensor = torch.from_numpy(scores).to(self.model.device)
            return tensor[0] if single else tensor
        if convert_to_numpy:
            return float(scores[0]) if single else scores
        tensors = list(torch.from_numpy(scores))
        return tensors[0] if single else tensors

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
        prompt_name: str | None = None,
        instruction: str | None = None,
        threshold: float | None = None,
    ) -> list[dict[str, Any]]:
        """Rank the documents of one query, best first; equal scores keep the given order.

        Args:
            query: a string.
            documents: a list, array, Series, generator, … of strings, or of dicts with "text" and perhaps "title".
            top_k: how many to return; None returns all.
            return_documents: whether each row also has "text", title and text of the document as the LM read them.
            batch_size, show_progress_bar, activation_fn, apply_softmax, num_workers, prompt_name: as in `predict`.
            convert_to_numpy, convert_to_tensor: accepted as well, without effect: a score is a float.
            instruction: as in `predict`, for this query.
            threshold: leave out documents whose relevance (`relevance`) is smaller, and give the "relevance" of the
                others; 0 keeps all. None computes no relevance.
        Returns: a dict for each document: "corpus_id", its place in ``documents``, and "score", nats. With ``passages``
            also "passage": (start, end) of the best one's characters in the document (the string, or its "text").
        Raises: TypeError or ValueError that names the argument, or the document and what is wrong with it.

        Example:
            >>> from pathlib import Path
            >>> import qpeft_ext as qpeft
            >>> demo = Path(qpeft.__file__).parent / "demo"  # a small LM and an adapter for documentation of code
            >>> reranker = qpeft.Reranker.from_pretrained(demo / "adapter", base_model=demo / "base_lm")
            >>> documents = [
            ...     "Delete a file or an empty folder.",
            ...     "Return a new list with the items of the iterable in ascending order.",
            ...     "Open a file and return a file object.",
            ... ]
            >>> for row in reranker.rank("sort the items of a list", documents, return_documents=True):
            ...     print(f"{row['corpus_id']} {row['score']:.1f} {row['text']}")
            1 -17.9 Return a new list with the items of the iterable in ascending order.
            0 -29.9 Delete a file or an empty folder.
            2 -31.4 Open a file and return a file object.
        """
        if not isinstance(query, str):
            raise TypeError(f"rank: query must be a string, got {kind_of(query)}; rank_many ranks for many queries")
        expect_neutral("rank", activation_fn, apply_softmax, num_workers, prompt_name)
        query, candidates = expect_query(query, "rank: query"), as_documents(documents, "rank: documents")
        instructions = as_instructions("rank", instruction, 1)
        threshold = as_threshold("rank", threshold)
        return_documents = true_or_false(return_documents, "rank: return_documents")
        all_ranked = self._ranked([query], [candidates], top_k, show_progress_bar, batch_size, instructions)
        ranked = self._above(threshold, [query], all_ranked, instructions)[0]
        for row in ranked if return_documents else ():
            row["text"] = document_text(candidates[row["corpus_id"]])
        return ranked

    def rank_many(
        self,
        queries: Iterable[str],
        candidates: Iterable[Iterable[Document]],
        top_k: int | None = None,
        show_progress_bar: bool | None = None,
        *,
        batch_size: int | None = None,
        instruction: str | Sequence[str | None] | None = None,
        threshold: float | None = None,
    ) -> list[list[dict[str, Any]]]:
        """Rank the documents of many queries.

        Faster than `rank` in a loop: passes are filled across queries, each distinct document of a block is read once.

        Args:
            queries: strings.
            candidates: the documents of each query, in the same order.
            top_k, batch_size: as in `rank`.
            show_progress_bar: None shows it on a terminal only.
            instruction: one for all queries, or a list with one for each, or None; as in `predict`.
            threshold: as in `rank`.
        Returns: for each query what `rank` returns.
        Raises: as `rank`, and if there are not as many lists of candidates as queries.
        """
        texts, lists = as_lists("rank_many", queries, candidates)
        instructions = as_instructions("rank_many", instruction, len(texts))
        threshold = as_threshold("rank_many", threshold)
        ranked = self._ranked(texts, lists, top_k, show_progress_bar, batch_size, instructions)
        return self._above(threshold, texts, ranked, instructions)
