"""What is known of the LM, and the prefix pass: once per distinct document. The suffix pass is in `suffix_pass`."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from ..lm.attention import LMAttention, find_attention
from ..lm.attention_backend import without_cudnn_attention
from ..lm.decoder import find_decoder
from ..lm.head import LikelihoodHead
from ..lm.lock import in_this_thread
from ..lm.norms import LMNorms, find_norms
from ..lm.rope import RotaryTables, find_rotary_tables
from ..lm.row_wise import RowWiseModules, find_row_wise
from ..lm.state import LMState, LMVersion
from ..prefixes.cache import DocumentCache
from ..prefixes.kv import Layout, PrefixKV
from ..prefixes.tiers import PrefixKey
from ..prompts.pairs import PairBatch, Rows, assemble_rows, pad
from ..prompts.prompt import DocumentPrefix, SuffixPieces
from ..utils.memory import return_freed_memory
from .path_check import check_paths
from .schedule import shape_step
from .suffix_pass import log_likelihood, outputs


class _PrefixIsStored(Exception):
    pass


class _PrefixCache(DynamicCache):
    """Knows when the last layer has handed in its keys and values; ``ends`` the pass there: the rest is not read."""

    def __init__(self, last_layer: int, ends: bool = True, **kwargs) -> None:
        super().__init__(**kwargs)
        self.last_layer, self.ends, self.complete = last_layer, ends, False

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        result = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == self.last_layer:
            self.complete = True
            if self.ends:
                raise _PrefixIsStored
        return result


class BaseEngine:
    """What is known of a frozen LM of any kind; see `Engine` and `encoder_decoder.EncoderDecoderEngine`.

    Attributes:
        table: input embeddings [V, D].  scale: what the embedding module multiplies a row with.
        head: `LikelihoodHead`.
        soft_prompt: trained virtual tokens in every prefix (`SoftPrompt`), or None.
        why_plain: why keys and values of prefixes cannot be shared ("" when they can).
        why_unpadded: why each pair has a pass of its own ("" where several share one).
        context: the longest prompt, in tokens (None: unlimited).
        rotary: which prompts are read with the same rotary tables.
        suffix_decoder: what suffix passes run: the decoder, compiled or not.
        row_wise: what follows the last attention; suffix passes run it on the rows that the head reads.
        norms: norms of the layers that have a faster form, for the passes.
    """

    is_encoder_decoder = False

    def __init__(self, lm) -> None:
        self.lm = lm
        self.decoder = self.suffix_decoder = find_decoder(lm, lambda: self._own_logits((0, 1, 2), (1,)))
        self.why_unpadded = ""
        self.soft_prompt = None
        self.row_wise = RowWiseModules()
        self.norms = LMNorms()
        self.context, self._context_is = _context(lm.config.get_text_config())
        self.rotary = RotaryTables()

    def compile(self, backend: str = "inductor") -> None:
        """`torch.compile` the decoder for suffix passes, with dynamic shapes; prefix passes stay as they are."""
        if not self.is_compiled:
            self.suffix_decoder = torch.compile(self.decoder, dynamic=True, backend=backend)
            self.row_wise, self.norms = RowWiseModules(), LMNorms()  # what comes and goes would compile it again

    def own_forward(self, before: Sequence[int], query: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What the LM itself makes of one prompt, from ids: logits [L, V] and its decoder's hidden states [L, D].

        query: what is given of it.  L: of the whole prompt, or of what the decoder of an encoder–decoder LM reads.
        """
        hidden = []
        note = in_this_thread(lambda *call: hidden.append(call[-1].last_hidden_state))
        handle = self.decoder.register_forward_hook(note)
        try:
            logits = self._own_logits(before, query)
        finally:
            handle.remove()
        return logits[0], hidden[-1][0]

    def _own_logits(self, before: Sequence[int], query: Sequence[int]) -> Tensor:
        ids = torch.tensor([[*before, *query]], device=self.device)
        return self.lm(input_ids=ids, use_cache=False).logits

    @property
    def is_compiled(self) -> bool:
        return self.suffix_decoder is not self.decoder

    @property
    def embeddings(self):
        """The module that embeds document and clue tokens."""
        return self.lm.get_input_embeddings()

    @property
    def table(self) -> Tensor:
        return self.embeddings.weight

    @property
    def device(self) -> torch.device:
        return self.table.device

    @property
    def prefix_is_trained(self) -> bool:
        """Whether prefixes get gradients: of an adapter in the LM, or of a soft prompt."""
        modules = (module for module in (self.soft_prompt, self.lm) if module is not None)
        return any(parameter.requires_grad for module in modules for parameter in module.parameters())

    def version(self) -> LMVersion:
        """What prefixes are computed with: the LM and the soft prompt, as they are now."""
        return LMState.of(self.lm, self.soft_prompt).version()

    def embed(self, ids: Tensor, prefix_starts: Tensor | None = None) -> Tensor:
        """``inputs_embeds`` of ids [B, L]; with the soft prompt if rows hold prefixes, that of row i from slot
        ``prefix_starts[i]`` on.
        """
        embeds = self._embed_tokens(ids)
        if prefix_starts is None or self.soft_prompt is None:
            return embeds
        return self.soft_prompt.put_into(embeds, prefix_starts)

    def _embed_tokens(self, ids: Tensor) -> Tensor:
        return self.embeddings(ids)

    def _embedding_scale(self) -> float:
        module, table = self.embeddings, self.table
        if not table.is_floating_point() or table.dim() != 2:
            raise ValueError(
                f"the input embeddings must be a floating [V, D] table, got {table.dtype} {list(table.shape)}"
            )
        wrapped = hasattr(module, "base_layer")  # an adapter may have changed a few rows anywhere
        ids = torch.arange(len(table) if wrapped else min(64, len(table)), device=table.device)
        rows, embedded = table[ids].float(), module(ids).float()
        if embedded.shape != rows.shape:
            raise ValueError(f"the input embeddings give width {embedded.shape[-1]}, their table has {rows.shape[-1]}")
        scale = float((rows * embedded).sum() / (rows * rows).sum().clamp_min(1e-30))
        scale = float(getattr(module, "scalar_embed_scale", scale))  # exact where the module states it (Gemma 3)
        if not torch.allclose(rows * scale, embedded, rtol=2e-2, atol=1e-6):
            raise ValueError("the input embeddings are not a scaled table; clues need the table (merge an adapter on "
                             "them: merge_and_unload)")
        return 1.0 if abs(scale - 1) < 1e-6 else scale

    def table_of_each(
        self, batch: PairBatch, pieces: SuffixPieces, clue_counts: Callable[[], Sequence[int]], most_clues: int
    ) -> list[int]:
        """Which rotary table each pair's prompt is read with (`RotaryTables.of`).

        clue_counts: gives the clues of each pair; only asked if ``most_clues``, the most that one may have, matter.
        """
        def tables(counts: Sequence[int]) -> list[int]:
            return [self.rotary.of(len(pieces.lay_out(batch.documents[d].ids, count)[0])
                                   + len(pieces.scored(batch.queries[q])))
                    for (q, d), count in zip(batch.pairs, counts, strict=True)]  # fmt: skip

        if self.rotary.limit is None or not any(tables([most_clues] * len(batch))):
            return [0] * len(batch)
        return tables(clue_counts())

    def expect_fits(self, tokens: int) -> None:
        if self.context and tokens > self.context:
            raise ValueError(
                f"a prompt of {tokens} tokens or more does not fit the LM's {self._context_is} of {self.context}; "
                f"lower max_document_tokens{'' if self.soft_prompt is None else ', num_virtual_tokens'} or "
                "max_query_tokens"
            )


def _context(config) -> tuple[int | None, str]:
    """The longest prompt, and what it is.

    Sparse attention chooses some keys for each query where there are more (Doge, DeepSeek-V3.2). Ties are broken in a
    way that depends on all that is read, so that an LM's own scores of a longer prompt depend on what shares its pass.
    """
    limits = {"max_position_embeddings": "context", "keep_window_size": "full attention (keep_window_size)",
              "index_topk": "full attention (index_topk)"}  # fmt: skip
    found = [(value, words) for name, words in limits.items() if isinstance(value := getattr(config, name, None), int)]
    return min(found, default=(None, "context"), key=lambda limit: limit[0])


class Engine(BaseEngine):
    """Runs a frozen causal LM on prefixes and suffixes.

    Args:
        lm: the model.  why_plain: a reason not to share prefixes that is known beforehand.
    Attributes (and those of `BaseEngine`):
        last_layer: the last one that stores keys and values; a prefix pass ends there (-1: it runs to its end).
        takes_positions: whether the decoder has ``position_ids`` (Bloom counts the mask instead).
        cache_argument: what the decoder calls the cache.
        attention: a faster one than the LM's, for the passes.
    """

    def __init__(self, lm, why_plain: str = "") -> None:
        super().__init__(lm)
        parameters = inspect.signature(self.decoder.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self.cache_argument = "cache" if "cache" in parameters else "past_key_values"  # renamed in transformers 5.24
        self.last_layer = -1  # unknown
        self.attention = LMAttention()
        with torch.no_grad():
            self.scale = self._embedding_scale()
            self.rotary = find_rotary_tables(self.decoder, self.context)
            self.head = LikelihoodHead(lm, self.own_forward)
            self.why_plain = why_plain or self._why_plain()
            if self.last_layer >= 0:
                self.row_wise = self._row_wise()
            if not self.why_plain:
                self.norms = find_norms(self.decoder)
                ids = torch.arange(3, device=self.device)[None]
                self.attention = find_attention(lm, self.decoder, lambda mask: self.decoder(
                    input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state)  # fmt: skip
            found = check_paths(self, try_shared=not self.why_plain)
            self.why_plain, self.why_unpadded = self.why_plain or found.why_plain, found.why_unpadded

    def _why_plain(self) -> str:
        try:
            ids = torch.zeros(1, 3, dtype=torch.long, device=self.device)
            cache = self._run_prefix(self.embed(ids), None, None)
            self.layout = Layout.of(PrefixKV.from_cache(cache, [3]))
            if not any(hasattr(module, "_hf_hook") for module in self.lm.modules()):  # a hook may count on the end
                self.last_layer = max(i for i, layer in enumerate(cache.layers) if layer.is_initialized)
        except (TypeError, AttributeError, ValueError) as error:
            return f"its cache cannot be shared ({str(error).splitlines()[0]})"
        return ""

    def _row_wise(self) -> RowWiseModules:
        """Checked on three tokens, of which one is read."""
        ids, row = torch.arange(3, device=self.device)[None], torch.tensor([1], device=self.device)
        cache = _PrefixCache(self.last_layer, ends=False, config=self.lm.config)

        def run(cache: DynamicCache | None = None) -> Tensor:
            given = {} if cache is None else {self.cache_argument: cache}
            return self.decoder(input_ids=ids, use_cache=cache is not None, **given).last_hidden_state

        found = find_row_wise(self.decoder, lambda: run(cache), lambda: cache.complete)
        expected = run()[0, 1]
        with found.only(row, (1, 3)):
            got = run()[0, 1]
        error, size = (got - expected).float().abs().max(), expected.float().abs().max()
        return found if error <= 1e-2 * size else RowWiseModules()

    def _run_prefix(self, embeds: Tensor, mask: Tensor | None, positions: Tensor | None) -> DynamicCache:
        cache = _PrefixCache(self.last_layer, config=self.lm.config)
        extra = {self.cache_argument: cache}
        if self.takes_positions and positions is not None:
            extra["position_ids"] = positions
        with contextlib.suppress(_PrefixIsStored), self.attention.active(prefixes=True), self.norms.active():
            self.decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=True, **extra)
        return cache

    def shares_prefixes(self, with_clues: bool) -> bool:
        """Whether a document is read once for all its queries; ``with_clues``: whether clues follow it."""
        return not self.why_plain

    def assemble(self, batch: PairBatch, pieces: SuffixPieces, clue_counts: Sequence[int], with_prefix: bool) -> Rows:
        """The rows of a pass; see `assemble_rows`."""
        step = 1 if with_prefix else shape_step(self.device, self.table.dtype)
        spare = int(with_prefix and self.rotary.limit is not None)  # a prompt's last token counts in its length
        return assemble_rows(batch, pieces, clue_counts, self.device, with_prefix, step, spare)

    @without_cudnn_attention()
    def log_likelihood(self, rows: Rows, clue_embeds: Tensor | None, prefix: PrefixKV | None = None,
                       prefix_rows: Tensor | None = None) -> Tensor:  # fmt: skip
        """log p of every query token of the rows, [N]; see `suffix_pass.log_likelihood`."""
        return log_likelihood(self, rows, clue_embeds, prefix, prefix_rows)

    def outputs(self, rows: Rows, clue_embeds: Tensor | None, prefix: PrefixKV | None = None) -> Tensor:
        """What the head reads of rows whose prefixes are those of ``prefix``; see `suffix_pass.outputs`."""
        return outputs(self, rows, clue_embeds, prefix)

    def token_bytes(self) -> tuple[int, float]:
        """Bytes of a prefix token that are kept for its queries, and bytes that a pass takes to read it in a layer."""
        kept = 0 if self.why_plain else self.layout.nbytes(1)
        layers = max(1, getattr(self.lm.config.get_text_config(), "num_hidden_layers", 1))
        return kept, 2 * kept / layers  # gathered, and joined with the suffix's

    def prefix_bytes(self, prefixes: Sequence[DocumentPrefix]) -> int:
        """Bytes of keys and values of prefixes, alone and unpadded."""
        return sum(self.layout.nbytes(len(prefix.ids)) for prefix in prefixes)

    def prefill(self, prefixes: Sequence[Sequence[int]]) -> PrefixKV:
        """One left-padded pass over document prefixes; with grad only where `prefix_is_trained`.

        Where the LM has several rotary tables, one for those of each.
        """
        lengths = [len(ids) for ids in prefixes]
        if len({self.rotary.of(length) for length in lengths}) > 1:
            return PrefixKV.collate([self.read_prefixes([prefix]) for prefix in prefixes])
        return self.read_prefixes(prefixes)

    @without_cudnn_attention()
    def read_prefixes(self, prefixes: Sequence[Sequence[int]]) -> PrefixKV:
        """The pass of `prefill`, with one rotary table for all."""
        lengths = [len(ids) for ids in prefixes]
        self.expect_fits(max(lengths))
        step = shape_step(self.device, self.table.dtype) if len(lengths) > 1 else 1
        width = -(-max(lengths) // step) * step
        if self.device.type == "cpu":
            return_freed_memory(share=0.02)
        ids, _ = pad([[0] * (width - len(row)) + list(row) for row in prefixes], self.device)
        starts = width - torch.tensor(lengths, device=self.device)
        slots = torch.arange(width, device=self.device)
        positions = (slots - starts[:, None]).clamp_min(0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.prefix_is_trained):
            embeds = self.embed(ids, starts)
            return PrefixKV.from_cache(self._run_prefix(embeds, (slots >= starts[:, None]).long(), positions), lengths)

    def cache_keys(self, prefixes: Sequence[Sequence[int]], one_by_one: bool = False) -> list[PrefixKey]:
        version = self.version()
        return [DocumentCache.key(version, prefix, one_by_one) for prefix in prefixes]

    def cached_prefill(
        self, prefixes: Sequence[Sequence[int]], cache: DocumentCache | None, one_by_one: bool = False
    ) -> PrefixKV:
        """`prefill`, reading and filling the cache. ``one_by_one``: each prefix alone, unpadded."""
        with_grad = torch.is_grad_enabled() and self.prefix_is_trained
        if with_grad and one_by_one:
            return PrefixKV.collate([self.prefill([prefix]) for prefix in prefixes])
        if with_grad or (cache is None and not one_by_one):
            return self.prefill(prefixes)
        keys = self.cache_keys(prefixes, one_by_one)
        stored = [None] * len(keys) if cache is None else cache.fetch(keys, self.layout, self.device)
        missing = [i for i, entry in enumerate(stored) if entry is None]
        groups = [[i] for i in missing] if one_by_one else [missing] if missing else []
        for group in groups:
            fresh = self.prefill([prefixes[i] for i in group])
            if len(group) == len(prefixes) and (cache is None or not cache.stores):
                return fresh
            for i, entry in zip(group, fresh.split(), strict=True):
                stored[i] = entry
                if cache is not None:
                    cache.put(keys[i], entry)
            if cache is not None and len(group) == len(prefixes) and not one_by_one:
                return fresh  # a cold cache costs one copy, not two
        # a GPU would make a launch of every copy, and a compiled pass a graph of every number of prefixes
        one_by_one_copies = self.device.type == "cpu" and not self.is_compiled
        return (PrefixKV.side_by_side if one_by_one_copies else PrefixKV.collate)(stored)
