"""The systems of one reranking job: what they are made of, their fingerprint, and loading them in any process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..adapters.files import LM_ADAPTER, adapter_config, adapter_digest, local_folder, trained_lm
from ..adapters.own_lm import finding_own_lm, revision_of
from ..config import QPeftConfig
from ..formats import open_collection
from ..formats.trec import Run
from ..lm.classifier import names_classifier
from ..lm.loading import (
    default_device,
    is_encoder_decoder,
    lm_digest,
    load_config,
    load_lm,
    load_tokenizer,
    quiet_transformers,
)
from ..model import build_prompt
from ..prefixes.manifest import read_manifest
from ..prompts.prompt import Prompt
from ..utils.inputs import short
from .run import Block, RankedBlock, Ranker, by_likelihood, by_similarity, read_documents
from .without_adapter import config_without_adapter

_ALONE = "leave --upr out, or rank with it alone: --base-model LM --upr"
UPR, SIMILARITY, RERANKER = "UPR", "similarity only", "reranker"


@runtime_checkable
class _Versioned(Protocol):
    def version(self) -> str: ...


@dataclass(frozen=True)
class SystemsSpec:
    """All that a process must know to rank: plain values, so that they can be sent to another process or machine.

    Args:
        data: the collection with the corpus, for `formats.open_collection`; a path is absolute. "" where documents are
            not read by their ids.
        model: the adapter, a folder or a Hub id; None for none.
        base_model: used instead of the LM that the adapter names.
        upr: whether to rank without clues too.
        similarity_only: whether to rank by the similarities of the clues too, without the LM: those of the adapter's
            clues, or of the default ones without an adapter.
        dtype, attention: as for `load_lm`.
        revision: as for `load_lm`; None takes the adapter's, for the LM that it names.
        deterministic, max_tokens_per_batch, truncate_queries, passages, passage_tokens, passage_stride: as for
            `Reranker`.
        max_query_tokens, max_document_tokens: limits used instead of the adapter's.
        cache_bytes: budget of a `DocumentCache` in every process; 0 for none.
        max_memory: as for `Reranker`, instead of cache_bytes.
        index: a folder of prefixes on disk, made by ``qpeft index``.
        kv_dtype: as for `DocumentCache`, of the cache that cache_bytes, max_memory or index ask for.
        template, special_tokens: as in `QPeftConfig`, where there is no adapter that says it.
        options: further options of `QPeftConfig` for an LM that is a reranker itself.
        threshold: documents with a smaller relevance are left out of the main system's ranking; None leaves none out.
    """

    data: str
    model: str | None = None
    base_model: str | None = None
    upr: bool = False
    similarity_only: bool = False
    dtype: str | None = None
    attention: str | None = None
    revision: str | None = None
    deterministic: bool = False
    max_tokens_per_batch: int | None = None
    max_query_tokens: int | None = None
    max_document_tokens: int | None = None
    cache_bytes: int = 0
    max_memory: int | str | None = None
    index: Path | None = None
    kv_dtype: str | None = None
    template: str | None = None
    special_tokens: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    truncate_queries: bool = False
    threshold: float | None = None
    passages: str | None = None
    passage_tokens: int | None = None
    passage_stride: int | None = None

    @cached_property
    def config(self) -> QPeftConfig:
        """The adapter's config; without an adapter the default one, or that of the reranker which the LM is.

        Raises: ValueError if ``template`` or ``special_tokens`` is not the adapter's, or the LM is no known reranker.
        """
        asked = {"template": self.template, "special_tokens": self.special_tokens}
        if self.model:
            return adapter_config(self.model, asked)
        if self.is_reranker:
            lm_config = load_config(str(self.base_model), revision=self.revision)
            return config_without_adapter(str(self.base_model), lm_config, **{**asked, **self.options})
        given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        config = QPeftConfig(**given)
        if self.upr and config.score != "likelihood":
            raise ValueError(
                f"UPR scores by the likelihood of the query, and template={short(self.template)} asks for an answer; "
                "leave --upr or --template out"
            )
        return config

    @property
    def is_reranker(self) -> bool:
        """Tell whether the LM reranks as it is, without an adapter of ours."""
        return not (self.model or self.upr or self.similarity_only)

    @property
    def lm_name(self) -> str:
        """The LM's name, as for `load_lm`. Raises: ValueError if nobody names it."""
        name = self.config.base_model_name_or_path if self._own_lm is None else self._own_lm
        if not name:
            raise ValueError(f"{self.model}: the adapter does not name its base LM; give --base-model")
        return name

    @property
    def _own_lm(self) -> str | None:
        """The LM that was given, or that the adapter holds, which need not be the one that it names."""
        if self.base_model is not None or not self.model:
            return self.base_model
        held = trained_lm(local_folder(self.model), self.config)
        return None if held is None else str(held)

    @cached_property
    def untrained_lm(self) -> str | None:
        """Name of the LM before training, which UPR scores with, where the adapter has trained it; None elsewhere.

        Raises: ValueError if nobody names it.
        """
        if not (self.model and self.upr):
            return None
        if not (self.config.train_lm or (local_folder(self.model) / LM_ADAPTER).is_dir()):
            return None
        if name := self.base_model or self.config.base_model_name_or_path:
            return name
        raise ValueError(
            f"{self.model}: --upr takes the LM before training, and the adapter does not name it; {_ALONE}"
        )

    @property
    def lm_revision(self) -> str | None:
        """The revision of the LM on the Hub, as for `load_lm`."""
        return self.revision or revision_of(self.config, self.base_model)

    @property
    def names(self) -> list[str]:
        """Names of the systems, the main one first."""
        if self.is_reranker:
            return [RERANKER]
        without = "UPR adapter" if self.config.num_virtual_tokens is None else "prompt tuning"
        method = {"top_k": "Q-PEFT-R", "attention": "Q-PEFT-A"}.get(self.config.clues, without)
        return [method] * bool(self.model) + [UPR] * self.upr + [SIMILARITY] * self.similarity_only

    @property
    def limits(self) -> dict[str, int]:
        """max_query_tokens and max_document_tokens."""
        return {
            name: getattr(self, name) or getattr(self.config, name)
            for name in ("max_query_tokens", "max_document_tokens")
        }

    @property
    def config_with_limits(self) -> QPeftConfig:
        """The config with these limits."""
        limits: dict[str, Any] = {**self.limits}
        return replace(self.config, **limits)

    @property
    def passage_options(self) -> dict[str, Any]:
        """The options of `Reranker` for passages; empty without them."""
        names = ("passages", "passage_tokens", "passage_stride")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def prompt(self) -> Prompt:
        """Make the `Prompt` without loading the LM."""
        with finding_own_lm(self.model or "", self.config, self._own_lm):
            return prompt_without_lm(self.lm_name, self.lm_revision, self.config_with_limits)

    def settings(self, queries: Mapping[str, str], candidates: Run) -> dict[str, object]:
        """Return all that the scores of the job depend on, except for rounding; see `PartialRun`."""
        corpus = open_collection(self.data).corpus
        assert isinstance(corpus, _Versioned)  # as all are that can be opened
        content = hashlib.sha256()
        for query_id, ranking in candidates.items():
            content.update(repr((query_id, queries[query_id], [doc_id for doc_id, _ in ranking])).encode())
        return self.model_settings() | {"queries and candidates": content.hexdigest()[:16], "corpus": corpus.version()}

    def model_settings(self) -> dict[str, object]:
        """Return all that the score of a pair depends on, except for rounding."""
        special_tokens = self.prompt().special_tokens
        kv_dtype = read_manifest(self.index).get("kv_dtype") if self.index else self.kv_dtype
        return {
            "adapter": adapter_digest(local_folder(self.model)) if self.model else None,
            "base model": lm_digest(self.lm_name, revision=self.lm_revision),
            "dtype": self.dtype,
            **({} if kv_dtype is None else {"kv_dtype": kv_dtype}),  # earlier versions have no such setting
            "attention": self.attention,
            **{name: getattr(self.config, name) for name in ("template", "allow_special_tokens")},
            **({} if special_tokens == "bos" else {"special_tokens": special_tokens}),  # before it was an option: bos
            **({"options": repr(sorted(self.options.items()))} if self.options else {}),
            "deterministic": self.deterministic,
            **self.limits,
            **self.passage_options,
            **self._lm_of_upr(),
        }

    def _lm_of_upr(self) -> dict[str, str]:
        """Return the setting that the scores of UPR depend on where its LM is not that of the other systems."""
        if (name := self.untrained_lm) is None:
            return {}
        with _naming_upr():
            return {"LM of UPR": lm_digest(name, revision=self.lm_revision)}

    def about(self) -> dict[str, object]:
        """Return names and versions, which the settings do not have, for people."""
        from ..utils.environment import versions

        return {
            "adapter": self.model,
            "base model": self.lm_name,
            "systems": self.names,
            "versions": versions(("torch", "transformers")),
        }


def prompt_without_lm(name: str, revision: str | None, config: QPeftConfig) -> Prompt:
    """Make the `Prompt` of an LM that is not loaded.

    Args:
        name, revision: of the LM, as for `load_lm`.
        config: every option.
    Raises: ValueError for options that the LM or its tokenizer does not have.
    """
    lm_config = load_config(name, revision=revision)
    tokenizer = load_tokenizer(name, revision=revision)
    return build_prompt(tokenizer, config, is_encoder_decoder(lm_config), not names_classifier(lm_config))


@contextmanager
def _naming_upr() -> Iterator[None]:
    """A context whose errors are about the LM from which an adapter was trained."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise type(error)(f"--upr takes the LM before training: {error}; {_ALONE}") from error


class Systems:
    """The systems of a job, loaded on one device: ``systems(block)`` ranks a block.

    Args:
        spec: the systems.
        device: where the LM goes; None takes a GPU if there is one.
    Raises: ValueError for a device that cannot be used, or a model that cannot be loaded.
    """

    def __init__(self, spec: SystemsSpec, device: str | None) -> None:
        from ..model import get_qpeft_model
        from ..prefixes.cache import DocumentCache
        from .reranker import Reranker

        device = default_device(device)
        quiet_transformers()

        self.corpus = open_collection(spec.data).corpus if spec.data else {}
        cached = spec.cache_bytes or spec.index is not None
        cache = DocumentCache(spec.cache_bytes, index=spec.index, kv_dtype=spec.kv_dtype) if cached else None
        options: dict[str, Any] = {
            "deterministic": spec.deterministic,
            "cache": cache,
            "max_memory": spec.max_memory,
            "kv_dtype": None if cached else spec.kv_dtype,
            "truncate_queries": spec.truncate_queries,
            **spec.passage_options,
        }
        if spec.max_tokens_per_batch is not None:
            options["max_tokens_per_batch"] = spec.max_tokens_per_batch
        self.main, self.threshold = spec.names[0], spec.threshold
        self.rerankers: dict[str, Reranker] = {}
        lm: Any = None
        tokenizer: Any = None
        if spec.model:
            folder = local_folder(spec.model)
            adapter = Reranker.from_pretrained(
                folder,
                spec.base_model,
                device=device,
                dtype=spec.dtype,
                lm_kwargs={"attention": spec.attention, "revision": spec.lm_revision},
                **spec.limits,
                **options,
            )
            self.rerankers = {name: adapter for name in spec.names if name != UPR}  # its clues' similarities, too
            lm, tokenizer = adapter.model.lm, adapter.model.tokenizer
            options["cache"] = adapter.cache
        plain = [name for name in spec.names if name not in self.rerankers]
        if plain:  # the adapter's prompt and limits, so that only the clues differ
            how: dict[str, Any] = {
                "dtype": spec.dtype, "device": device, "attention": spec.attention, "revision": spec.lm_revision
            }  # fmt: skip
            if spec.untrained_lm is not None:  # the adapter's LM is not what it is compared with
                with _naming_upr():
                    lm = load_lm(spec.untrained_lm, **how)
                options["cache"] = DocumentCache(spec.cache_bytes, kv_dtype=spec.kv_dtype) if spec.cache_bytes else None
            lm = lm or load_lm(spec.lm_name, **how)
            shared = ("compat", "template", "special_tokens", "instruction", "allow_special_tokens")
            same: dict[str, Any] = {name: getattr(spec.config, name) for name in shared} | spec.limits
            config = QPeftConfig(clues="none", **same) if not spec.is_reranker else spec.config_with_limits
            if spec.index is not None and spec.config.num_virtual_tokens is not None:
                options["cache"] = None  # the index was made with the adapter's soft prompt, not with the instruction
            reranker = Reranker(get_qpeft_model(lm, config, tokenizer), **options)
            self.rerankers |= dict.fromkeys(plain, reranker)

    def ranker(self, name: str) -> Ranker:
        """Return the function by which the system of this name ranks."""
        if name == SIMILARITY:
            return by_similarity(self.rerankers[name])
        return by_likelihood(self.rerankers[name], self.threshold if name == self.main else None)

    def __call__(self, block: Block) -> RankedBlock:
        before = self._counts(block.system)
        rankings = self.ranker(block.system)(block.queries, read_documents(self.corpus, block))
        after = self._counts(block.system)
        return RankedBlock(rankings, *(now - then for now, then in zip(after, before, strict=True)))

    def _counts(self, name: str) -> tuple[int, int, int, int]:
        reranker = self.rerankers[name]
        hits, misses = (0, 0) if reranker.cache is None else (reranker.cache.hits, reranker.cache.misses)
        return reranker.truncated, hits, misses, reranker.passages.long_sentences if reranker.passages else 0
