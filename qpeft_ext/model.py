"""`QPeftModel`: a frozen LM, a trained clue module, and the likelihood of queries given documents."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, wraps
from threading import local

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .adapters.attention_clues import AttentionClues
from .adapters.filters import allowed_ids
from .adapters.generated_lora import GeneratedLora
from .adapters.inputs import ClueInputs
from .adapters.layers import Clues
from .adapters.projected_rows import ProjectedRows
from .adapters.soft_prompt import build_soft_prompt
from .adapters.top_k_clues import TopKClues
from .config import QPeftConfig
from .engine.base import BaseEngine
from .engine.encoder_decoder import EncoderStates
from .engine.factory import make_engine
from .engine.rows import Rows
from .engine.schedule import Limits, default_tokens, schedule
from .engine.scores import CountTokens, PassClues, Scores, count_all_tokens, counts_of, in_order
from .lm.arguments import expect_lm_arguments
from .lm.passes import lm_lock
from .official.clues import build_official_clues
from .official.likelihood import count_uncertain_tokens
from .prefixes.cache import DocumentCache
from .prefixes.kv import PrefixKV
from .prompts.pairs import PairBatch, to_device
from .prompts.prompt import Document, Prompt, as_pairs
from .utils.forked import computes_now
from .utils.torch_state import own_state

logger = logging.getLogger(__name__)

CLUES_FIRST_IS_PLAIN = "layout='clues_first' puts the clues, which hang on the query, before the document"


_this_thread = local()


def _in_passes(method):
    """A method that runs the LM or the trained modules: see `QPeftModel.passes`."""

    @wraps(method)
    def run(self, *args, **kwargs):
        with self.passes():
            return method(self, *args, **kwargs)

    return run


class QPeftModel(nn.Module):
    """Composes an LM (of transformers, causal or encoder–decoder, or a `peft` model) with trained modules.

    The LM is frozen (unless ``train_lm``) and stays in eval mode. Precision is that of its weights: `torch.autocast`,
    the default dtype and inference mode change no score, and ``model.to(dtype)`` changes the LM only, as the trained
    modules have float32 weights. Build it with `get_qpeft_model` or load it with `QPeftModel.from_pretrained`.

    Passes of several threads take turns. A thread that calls the LM itself meanwhile gets what it always gets; one that
    changes it (weights, adapters, device, dtype) does so inside `exclusive`.

    Args:
        lm: the language model.  config: `QPeftConfig`.  tokenizer: the LM's tokenizer.
    Raises: ValueError for an LM that does not fit the config, or whose weights are on the meta device.
    """

    def __init__(self, lm: nn.Module, config: QPeftConfig, tokenizer) -> None:
        super().__init__()
        expect_lm_arguments("QPeftModel", lm, config, tokenizer)
        lm = _usable(lm)
        with lm_lock(lm), own_state():
            self._build(lm, config, tokenizer)

    def _build(self, lm: nn.Module, config: QPeftConfig, tokenizer) -> None:
        lm.eval()
        if config.train_lm and hasattr(lm, "peft_config"):
            raise ValueError("QPeftModel: train_lm=True trains the whole LM; give it without its peft adapter")
        if any(getattr(adapter, "is_prompt_learning", False) for adapter in getattr(lm, "peft_config", {}).values()):
            raise ValueError(
                "QPeftModel: a peft adapter of virtual tokens (prompt tuning, prefix tuning) would not be "
                "read; give the LM without it"
            )
        if not hasattr(lm, "peft_config"):
            lm.requires_grad_(config.train_lm)
        self.lm = lm
        self.tokenizer = tokenizer
        self.clues = self.generated_lora = self.soft_prompt = None
        self.qpeft_config = config
        self.engine = self._probed_engine()
        self.qpeft_config = config = config.resolve(self.engine.table.shape[1])
        self.prompt = build_prompt(tokenizer, config, self.engine.is_encoder_decoder)
        self.prompt.expect_rows(len(self.engine.table))
        with torch.random.fork_rng(devices=[]):  # the same seed, the same clue module, whatever was drawn before
            torch.default_generator.manual_seed(config.seed)
            self.clues = build_clues(config, self.engine.table, tokenizer)
            if config.generated_lora_rank:
                width = self.engine.table.shape[1]
                self.generated_lora = GeneratedLora(lm, width, config.generated_lora_rank, config.target_modules,
                                                    self.engine.decoder)  # fmt: skip
            self.soft_prompt = build_soft_prompt(
                config, self.prompt, self.engine.table, self.engine.scale, self.engine.context
            )
        self.engine = self.engine.with_soft_prompt(self.soft_prompt)
        self._count_tokens, self.ranks_by_mean = build_token_count(config, tokenizer)
        self.to_device_of_lm()
        self.eval()

    def _probed_engine(self) -> BaseEngine:
        """An engine that has found out what the passes need to know of the LM, in the dtype that it has now."""
        why_plain = CLUES_FIRST_IS_PLAIN if self.qpeft_config.layout == "clues_first" else ""
        engine = make_engine(self.lm, why_plain).with_soft_prompt(self.soft_prompt)
        self._lm_dtype = engine.table.dtype
        return engine

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """While this is entered no other thread runs a pass of this LM, in whatever model or reranker around it.

        For a thread that changes the LM while others rank. It may use the model itself, but with a gradient on a GPU
        the backward pass belongs outside: with ``suffix_micro_batch`` it runs in another thread of torch.
        """
        with lm_lock(self.lm):
            yield

    @contextmanager
    def passes(self, evaluating: bool = False) -> Iterator[None]:
        """Around everything that runs the LM or the trained modules: this thread alone, in the state of torch that is
        ours (`own_state`), and with the LM as it is now. ``evaluating``: in eval mode, whatever the mode outside is.
        """
        inside = getattr(_this_thread, "models", ())  # whose passes this thread is in
        if id(self) in inside and not (evaluating and self.training):
            yield
            return
        with lm_lock(self.lm), own_state():
            computes_now()
            if self.lm.training:
                self.train(self.training)
            if self.engine.table.dtype != self._lm_dtype:
                compiled = self.engine.is_compiled
                self.engine = self._probed_engine()
                if compiled:
                    self.engine.compile()
            training = self.training
            try:
                if evaluating and training:
                    self.eval()
                _this_thread.models = (*inside, id(self))
                yield
            finally:
                _this_thread.models = inside
                if self.training != training:
                    self.train(training)

    def to_device_of_lm(self) -> None:
        """Move the trained modules to the device of the LM's embeddings."""
        for module in self.trained_modules.values():
            module.to(self.engine.device)

    @property
    def trained_modules(self) -> dict[str, nn.Module]:
        """What an adapter consists of, by the prefix of its keys in the adapter file."""
        parts = {"": self.clues, "generated_lora.": self.generated_lora, "soft_prompt.": self.soft_prompt}
        return {prefix: module for prefix, module in parts.items() if module is not None}

    @property
    def device(self) -> torch.device:
        return self.engine.device

    def train(self, mode: bool = True) -> QPeftModel:
        """Train mode for the clue module and for dropout *inside* adapters of the LM; never for the LM itself.

        Only of adapters that are trained: the dropout of others would end up in cached prefixes.
        """
        super().train(mode)
        self.lm.eval()
        for module in self.lm.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout.train(mode and any(p.requires_grad for p in module.parameters()))
        return self

    # -- scoring -------------------------------------------------------------------------------------------------

    def encode(
        self, pairs: Sequence[tuple[str, Document]], lists: Sequence[int] | None = None, truncate_queries: bool = False
    ) -> PairBatch:
        """Tokenise pairs (query, document). ``lists``, ``truncate_queries``: see `PairBatch.from_text`.

        Raises: TypeError or ValueError that names the pair and what is wrong with it.
        """
        return PairBatch.from_text(self.prompt, as_pairs(pairs, "encode"), lists, truncate_queries)

    @_in_passes
    def forward(
        self,
        batch: PairBatch,
        path: str = "document_first",
        cache: DocumentCache | None = None,
        max_tokens_per_batch: int | None = None,
        deterministic: bool = False,
        prefilled: bool = False,
        max_pairs_per_batch: int | None = None,
        projected: ProjectedRows | None = None,
    ) -> Scores:
        """Score B pairs.

        Args:
            batch: from `encode`.
            path: "document_first" (each distinct document's prefix once, then the suffixes), or "plain" (whole
                prompts). Models whose cache cannot be shared take the plain path either way, and so does
                ``layout="clues_first"``.
            cache: prefixes are read from it and put into it, unless they need a gradient (a soft prompt or the LM
                is trained).
            max_tokens_per_batch: budget of tokens per pass; None: what suits the device (`schedule.default_tokens`).
            deterministic: every prefix, clue and suffix is computed unpadded and one per pass, so that a score is
                bit-equal whatever else is in the batch or in the cache (same machine and number of threads). Slower.
            prefilled: whether the prefixes of all documents are in the cache already (`CacheFilling`): documents of
                different lengths may share a pass.
            max_pairs_per_batch: pairs in a suffix pass at most; None: as many as the token budget allows. With a
                gradient the passes are then computed again in the backward pass, as with ``suffix_micro_batch``.
            projected: rows of the embedding table that Q-PEFT-A reuses between calls with it, without gradient. Not
                used with ``deterministic``.
        """
        if path not in ("document_first", "plain"):
            raise ValueError(f"path must be document_first or plain, got {path!r}")
        if not len(batch):
            empty = torch.zeros(0, dtype=torch.float32, device=self.device)
            return Scores(empty, empty.long())
        limits = self._limits(path, max_tokens_per_batch, max_pairs_per_batch, deterministic, prefilled)
        projected = None if deterministic else projected
        clues, rows, parts = PassClues(partial(self.compute_clues, projected=projected), batch), [], []
        for read in schedule(batch, limits, self._rotary_tables(batch, projected)):
            prefix = None  # the one before is not needed any more
            if read.shared:
                ids = [batch.documents[d].ids for d in read.documents]
                prefix = self.engine.cached_prefill(ids, cache, deterministic=deterministic)
            for pairs in read.suffixes:
                own = clues.of(pairs, read.clues_of)
                rows.append(pairs)
                parts.append(self._score_group(batch.select(pairs), *own, read.documents, prefix, limits.recompute))
        return in_order(rows, parts)

    def _limits(
        self, path: str, max_tokens: int | None, max_pairs: int | None, deterministic: bool, prefilled: bool
    ) -> Limits:
        """What decides the passes of a call of `forward`, whose arguments these are."""
        config, engine = self.qpeft_config, self.engine
        return Limits(
            device=self.device,
            dtype=engine.table.dtype,
            max_tokens=max_tokens or default_tokens(self.device),
            max_pairs=max_pairs,
            micro_batch=config.suffix_micro_batch,
            with_grad=torch.is_grad_enabled(),
            deterministic=deterministic,
            unpadded=bool(engine.why_unpadded),
            shared=path == "document_first" and engine.shares_prefixes(self.clues is not None),
            prefilled=prefilled,
            clue_per_token=config.clues == "attention",
            clues_per_pair=(config.k or 0) if config.clues == "top_k" else 0,
            clue_bytes=4 * engine.table.shape[1],
            clues_of_lists=config.source != "document",
        )

    def _rotary_tables(self, batch: PairBatch, projected: ProjectedRows | None) -> list[int]:
        """Which rotary table of the LM each pair is read with; 0: the one that prefixes are cached with."""

        @torch.no_grad()
        def clue_counts() -> list[int]:
            return counts_of(self.compute_clues(batch, projected=projected), len(batch))

        most = 0 if self.clues is None else 2 * (self.qpeft_config.k or 1) * max(map(len, batch.queries))
        return self.engine.table_of_each(batch, self.prompt.suffix, clue_counts, most)

    @_in_passes
    def compute_clues(
        self, batch: PairBatch, explain: bool = False, projected: ProjectedRows | None = None
    ) -> Clues | None:
        """Clues of every pair of the batch; None for ``clues="none"``.

        Args:
            batch: from `encode`.
            explain: whether the result has an explanation.
            projected: for `AttentionClues`, table rows to reuse between calls.
        """
        if self.clues is None:
            return None
        inputs = ClueInputs.from_batch(batch, self.device, self.qpeft_config.source)
        reused = {"projected": projected} if isinstance(self.clues, AttentionClues) else {}
        return self.clues(inputs, self.engine.table, self.engine.scale, explain, **reused)

    def _score_group(
        self,
        batch: PairBatch,
        clues: Clues | None,
        counts: Sequence[int],
        documents: list[int],
        prefix: PrefixKV | EncoderStates | None,
        recompute: bool,
    ) -> Scores:
        """Scores of the pairs of one suffix pass.

        Args:
            clues, counts: the clues of the pairs, and how many each has.
            documents, prefix: the documents that were read before, and what was made of them; None: read whole prompts.
            recompute: whether activations are computed again in the backward pass instead of being kept for it.
        """
        vectors = None if clues is None else clues.embeds[clues.mask]
        rows = self._rows(batch, counts, with_prefix=prefix is None)
        prefix_rows = None
        if prefix is not None:
            place = {d: i for i, d in enumerate(documents)}
            order = [place[d] for _, d in batch.pairs]
            if order != list(range(len(prefix.lengths))):
                prefix_rows = to_device(np.array(order), self.device)
        run, arguments = self.engine.log_likelihood, (rows, vectors, prefix, prefix_rows)
        if self.generated_lora is not None:
            run, arguments = self._with_generated_lora, (batch, *arguments)
        if recompute:  # own_state, because the backward pass runs outside of this method's state of torch
            log_p = checkpoint(own_state()(run), *arguments, use_reentrant=False)
        else:
            log_p = run(*arguments)
        return Scores(rows.sum_of_each_pair(log_p), self._count_tokens(log_p, rows.sum_of_each_pair, batch))

    def _rows(self, batch: PairBatch, counts: Sequence[int], with_prefix: bool) -> Rows:
        """What the LM reads of each pair, and what it is asked for."""
        return self.engine.assemble(batch, self.prompt.suffix, counts, with_prefix)

    def _with_generated_lora(self, batch: PairBatch, rows, vectors, prefix, prefix_rows) -> Tensor:
        """`log_likelihood` with the update that each pair's query generates, on the suffixes only."""
        gates = self.generated_lora.gates_of_pairs(batch, self.engine.table)
        updates = self.generated_lora.updates(gates, rows.suffix)
        return self.engine.log_likelihood(rows, vectors, prefix, prefix_rows, updates)

    @_in_passes
    def merge_for(self, query: str) -> dict[str, Tensor]:
        """Weights of the LM's suffix passes for one query, by parameter name; prefixes keep the LM's own.

        Raises: ValueError without a generated LoRA.
        """
        if self.generated_lora is None:
            raise ValueError("merge_for: the model has no generated LoRA; set generated_lora_rank in QPeftConfig")
        return self.generated_lora.merged(self.prompt.queries([query])[0], self.engine.table)

    @torch.no_grad()
    def score(self, pairs: Sequence[tuple[str, Document]], **options) -> Scores:
        """Scores of (query, document) pairs, without gradient; ``options`` as in `forward`."""
        return self(self.encode(pairs), **options)

    # -- parameters and files ------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable parameters, and all parameters of LM and clue module."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return trainable, sum(p.numel() for p in self.parameters())

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def save_pretrained(self, folder) -> None:
        """Write ``adapter_config.json``, ``adapter_model.safetensors`` and a model card; see `adapter_files`."""
        from .adapters.files import save_adapter

        save_adapter(self, folder)

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """Save to a temporary folder and upload it; ``kwargs`` go to `huggingface_hub.HfApi.create_repo`."""
        from .adapters.files import push_adapter

        return push_adapter(self, repo_id, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        folder,
        lm=None,
        tokenizer=None,
        is_trainable: bool = False,
        max_document_tokens: int | None = None,
        max_query_tokens: int | None = None,
        **lm_kwargs,
    ) -> QPeftModel:
        """Load an adapter; the LM named in its config is loaded unless ``lm`` (a model or a name) is given."""
        from .adapters.files import load_adapter

        limits = {"max_document_tokens": max_document_tokens, "max_query_tokens": max_query_tokens}
        limits = {name: limit for name, limit in limits.items() if limit is not None}
        return load_adapter(cls, folder, lm, tokenizer, is_trainable, limits, **lm_kwargs)


def get_qpeft_model(lm, config: QPeftConfig, tokenizer=None) -> QPeftModel:
    """Wrap a causal or an encoder–decoder LM, or a `peft` model of one, for Q-PEFT.

    The LM may be used elsewhere too, in other threads as well: passes leave nothing in it. A thread that changes it
    while another scores does so inside `QPeftModel.exclusive`.

    Args:
        lm: the model, put into eval mode; its own parameters are frozen, or trained with ``train_lm`` (an adapter's
            stay as they are).
        config: `QPeftConfig`.
        tokenizer: loaded from ``lm.name_or_path`` if None.
    Raises: ValueError for an LM that is neither (encoder-only, or without a head); TypeError for what is no LM (a name,
        a pipeline, a classifier, swapped arguments), with the right call.
    """
    expect_lm_arguments("get_qpeft_model", lm, config, tokenizer)
    from .adapters.files import describe_lm
    from .lm.loading import load_tokenizer

    name = getattr(lm, "name_or_path", None) or getattr(lm.config, "_name_or_path", None) or None
    if tokenizer is None:
        if not name:
            raise ValueError("get_qpeft_model: tokenizer must be given, because the LM has no name_or_path")
        tokenizer = load_tokenizer(name)
    config = replace(config, base_model_name_or_path=config.base_model_name_or_path or name)
    model = QPeftModel(lm, config, tokenizer)
    model.qpeft_config = replace(model.qpeft_config, base_model=describe_lm(model.engine))
    return model


def _usable(lm: nn.Module) -> nn.Module:
    """The LM itself, whose modules the passes run.

    Raises: ValueError for one without memory.
    """
    if hasattr(lm, "_orig_mod"):
        logger.warning("the LM comes from torch.compile; passes run it uncompiled, unless Reranker has compile=True")
        lm = lm._orig_mod
    if getattr(getattr(lm.get_input_embeddings(), "weight", None), "is_meta", False):
        raise ValueError(
            "QPeftModel: the LM's weights are on the meta device, without values; load the LM outside of "
            "torch.device('meta')"
        )
    return lm


def build_prompt(tokenizer, config: QPeftConfig, encoder_decoder: bool = False) -> Prompt:
    """The prompt of a config: `Prompt`, or `official.prompt.OfficialPrompt`.

    encoder_decoder: whether the LM is one.
    Raises: ValueError for an option that such an LM does not have.
    """
    for name, value in (("layout", "document_first"), ("compat", "none")):
        if encoder_decoder and getattr(config, name) != value:
            raise ValueError(
                f"QPeftConfig: {name}={getattr(config, name)!r} is for causal LMs, this one is an "
                f"encoder–decoder; leave {name} out"
            )
    if config.compat == "official":
        from .official.prompt import OfficialPrompt

        return OfficialPrompt(tokenizer, config)
    return Prompt(tokenizer, config, encoder_decoder)


def build_token_count(config: QPeftConfig, tokenizer) -> tuple[CountTokens, bool]:
    """How the tokens of a score are counted, and whether documents are ranked by the mean instead of the sum."""
    if config.compat == "official":
        return partial(count_uncertain_tokens, decode=tokenizer.decode), True
    return count_all_tokens, False


def build_clues(config: QPeftConfig, table: Tensor, tokenizer) -> nn.Module | None:
    """The clue module of a resolved config over an embedding table [V, D]; None for ``clues="none"`` (UPR)."""
    if config.clues == "none":
        return None
    if config.compat == "official":
        return build_official_clues(config, table, tokenizer)
    if config.clues == "attention" and not config.filters:
        return AttentionClues(config, table.shape[1])
    allowed = allowed_ids(tokenizer, len(table), config.filters)
    if config.clues == "attention":
        return AttentionClues(config, table.shape[1], allowed)
    return TopKClues(config, table, allowed)
