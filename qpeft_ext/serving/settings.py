"""Limits of the server, and what it loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Limits:
    """Bounds of a request, of all that wait, and of time.

    Attributes:
        max_body_bytes: of a request.
        max_documents: documents, or pairs, of a request.
        max_queue_tokens: tokens of all requests that wait or are being scored; one more is answered with 429.
        max_requests: requests in flight; one more is answered with 429.
        pass_seconds: about how long the scoring thread may take before it looks at the queue again.
        max_pass_tokens: tokens that it computes between two looks at most.
        request_timeout: seconds from the end of the body to the answer.
        body_timeout: seconds until the body has arrived.
    """

    max_body_bytes: int = 8 << 20
    max_documents: int = 1000
    max_queue_tokens: int = 2 << 20
    max_requests: int = 512
    pass_seconds: float = 1.0
    max_pass_tokens: int = 1 << 17
    request_timeout: float = 300.0
    body_timeout: float = 30.0


@dataclass(frozen=True)
class ServeSpec:
    """Models and options of ``qpeft serve``.

    Attributes:
        models: adapters by the name that requests give; None in the place of an adapter is the LM itself: the reranker
            that it is, or else its likelihoods without clues (UPR).
        base_model: the LM, a name as for `load_lm`; None takes the one that the first adapter names.
        template: of the LM itself; None takes that of the reranker which it is, or else "qpeft".
        config_options: further options of `QPeftConfig` for the LM itself.
        models_root: folder below which adapters may be loaded while the server runs; None refuses that.
        corpus: data set whose documents requests may name by id; None: every document comes with its text.
        index: made by ``qpeft index``, or None.
        cache_bytes: memory for keys and values of documents.
        disk: folder and bytes for keys and values of documents, or None.
        kv_dtype: the dtype in which they are stored, as for `DocumentCache`.
        api_keys: a request must carry one of them; () lets everyone in.
        lm_options: for `load_lm`: device, dtype, attention, revision.
        token_limits: max_document_tokens and max_query_tokens, where they differ from the adapter's.
        reranker_options: of every `Reranker` besides model, cache and truncate_queries, which is on.
        limits: see `Limits`.
    """

    models: Mapping[str, str | None]
    base_model: str | None = None
    template: str | None = None
    config_options: Mapping[str, Any] = field(default_factory=dict)
    models_root: Path | None = None
    corpus: str | None = None
    index: Path | None = None
    cache_bytes: int = 1 << 30
    disk: tuple[Path, int] | None = None
    kv_dtype: str | None = None
    api_keys: tuple[str, ...] = ()
    lm_options: Mapping[str, Any] = field(default_factory=dict)
    token_limits: Mapping[str, int] = field(default_factory=dict)
    reranker_options: Mapping[str, Any] = field(default_factory=dict)
    limits: Limits = Limits()
