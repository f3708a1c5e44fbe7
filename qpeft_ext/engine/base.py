"""The part of an engine that causal and encoder–decoder LMs have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, Generic, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from ..adapters.soft_prompt import SoftPrompt
from ..lm.decoder import find_decoder
from ..lm.head import LikelihoodHead
from ..lm.packed import expect_plain
from ..lm.passes import Hook, LMPasses, hooked
from ..lm.rope import RotaryTables
from ..lm.state import LMState, LMVersion
from ..prefixes.cache import DocumentCache
from ..prompts.pairs import PairBatch
from ..prompts.pieces import CluesFirstPieces, SuffixPieces

RowsT = TypeVar("RowsT")  # what a pass reads: `Rows` or `EncoderDecoderRows`
PrefixT = TypeVar("PrefixT")  # what a prefix pass gives: `PrefixBatch` or `EncoderStates`


class LMParts(NamedTuple):
    """The parts of an LM that an engine has looked at, which may have become something else since.

    Attributes:
        embeddings, head: the modules; an adapter that is put into the LM takes their places.
        dtype, rows: those of the table of input embeddings.
        gives_tuples: whether its config has ``return_dict=False``.
    """

    embeddings: Any
    head: Any
    dtype: torch.dtype
    rows: int
    gives_tuples: bool

    def expect_rows_of(self, before: LMParts) -> None:
        """Raises: ValueError if there are other token ids than before."""
        if self.rows != before.rows:
            raise ValueError(
                f"the LM has {self.rows} input embeddings, and had {before.rows} when the model was made: resize them "
                "(resize_token_embeddings) before get_qpeft_model"
            )


class BaseEngine(ABC, Generic[RowsT, PrefixT]):
    """Runs a frozen LM on document prefixes and on suffixes: `CausalEngine` or `EncoderDecoderEngine`.

    Args:
        lm: the language model, in the dtype in which it will be used.
    Attributes:
        table: input embeddings [V, D].
        scale: the factor by which the embedding module multiplies a row of the table.
        head: log p of tokens from final hidden states.
        soft_prompt: trained virtual tokens in every prefix, or None.
        why_not_cached: why there are no keys and values of prefixes to cache and share; "" where there are.
        why_unpadded: why each pair has a pass of its own; "" where several share one.
        context: the longest prompt, in tokens; None: unlimited.
        rotary: tells which prompts are read with the same rotary tables.
        decoder: the LM's decoder.  suffix_decoder: the same, compiled or not, for suffix passes.
        lm_passes: the changes that passes make in the LM, and restore.
    """

    is_encoder_decoder = False
    head: LikelihoodHead
    scale: float
    why_not_cached: str

    def __init__(self, lm: Any) -> None:
        self.lm = lm
        self.decoder = find_decoder(lm, lambda: self._own_logits((0, 1, 2), (1,)))
        self.suffix_decoder: Callable[..., Any] = self.decoder
        self.why_unpadded = ""
        self.soft_prompt: SoftPrompt | None = None
        self.lm_passes = LMPasses(lm)
        self.context, self._context_is = _context(lm.config.get_text_config())
        self.rotary = RotaryTables()

    def with_soft_prompt(self, soft_prompt: SoftPrompt | None) -> Self:
        """Make the same engine with trained virtual tokens in every prefix."""
        engine = copy(self)
        engine.soft_prompt = soft_prompt
        return engine

    @abstractmethod
    def outputs(
        self,
        rows: RowsT,
        clue_embeds: Tensor | None,
        prefix: PrefixT | None = None,
        prefix_rows: Tensor | None = None,
        updates: Sequence[tuple[nn.Module, Hook]] = (),
    ) -> Tensor:
        """Compute the input of the head at each slot that is read, [R, D], or the LM's logits, [R, V].

        They are logits where the head is left to the LM (`LikelihoodHead.fused`).

        Args:
            rows: from `assemble`.
            clue_embeds: the clue vectors of all rows, [number of clues, D], or None.
            prefix: what a prefix pass gave, where the rows are suffixes; None: the rows are whole prompts.
            prefix_rows: for each row its place in ``prefix``, int64 [B]; None: row i reads place i.
            updates: forward hooks that change the outputs of modules (`GeneratedLora.updates`).
        Raises: ValueError if a prompt is longer than the LM's context.
        """

    @abstractmethod
    def assemble(
        self, batch: PairBatch, pieces: SuffixPieces | CluesFirstPieces, clue_counts: Sequence[int], with_prefix: bool
    ) -> RowsT:
        """Lay out the rows of a pass.

        Args:
            batch: the pairs.
            pieces: the fixed tokens around clues and queries.
            clue_counts: the number of clues of each pair.
            with_prefix: whether each row is a whole prompt; otherwise it is a suffix.
        """

    @abstractmethod
    def read_prefixes(self, prefixes: Sequence[Sequence[int]]) -> PrefixT:
        """Run one pass over document prefixes; with gradient only where `prefix_is_trained`.

        Args:
            prefixes: token ids of each.
        """

    @abstractmethod
    def cached_prefill(
        self, prefixes: Sequence[Sequence[int]], cache: DocumentCache | None, deterministic: bool = False
    ) -> PrefixT:
        """Read prefixes, those that a cache has from there; put the others into it.

        Args:
            prefixes: token ids of each.
            cache: None: all are computed.
            deterministic: whether each prefix is computed unpadded, in a pass of its own.
        """

    @abstractmethod
    def shares_prefixes(self, with_clues: bool) -> bool:
        """Tell whether a document is read once for all its queries.

        Args:
            with_clues: whether clues follow the document.
        """

    @abstractmethod
    def token_bytes(self) -> tuple[int, float]:
        """Count the bytes of a prefix token that are kept for its queries, and those that a layer takes to read it."""

    def compile(self, backend: str = "inductor") -> None:
        """`torch.compile` the decoder for suffix passes, with dynamic shapes; prefix passes stay as they are."""
        if not self.is_compiled:
            self.suffix_decoder = torch.compile(self.decoder, dynamic=True, backend=backend)
            self.lm_passes = self.lm_passes.compiled()

    def own_forward(self, before: Sequence[int], query: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Run the LM's own forward on the ids of one prompt: its logits [L, V] and its decoder's hidden states [L, D].

        Args:
            before: ids before the query; the encoder of an encoder–decoder LM reads them.
            query: the ids of the query that are read. L counts all ids that the decoder reads.
        """
        hidden: list[Tensor] = []
        with hooked(after=[(self.decoder, lambda *call: hidden.append(call[-1].last_hidden_state))]):
            logits = self._own_logits(before, query)
        return logits[0], hidden[-1][0]

    def _own_logits(self, before: Sequence[int], query: Sequence[int]) -> Tensor:
        ids = torch.tensor([[*before, *query]], device=self.device)
        return self.lm(input_ids=ids, use_cache=False).logits

    @property
    def is_compiled(self) -> bool:
        return self.suffix_decoder is not self.decoder

    @property
    def reads_in_place(self) -> bool:
        """True if a suffix pass reads the prefixes of a cache where they lie."""
        return False

    @property
    def embeddings(self) -> Any:
        """The module that embeds document and clue tokens."""
        return self.lm.get_input_embeddings()

    @property
    def table(self) -> Tensor:
        return self.embeddings.weight

    @property
    def device(self) -> torch.device:
        return self.table.device

    def lm_parts(self) -> LMParts:
        """Return the parts of the LM as they are now."""
        head, table = self.lm.get_output_embeddings(), self.table
        return LMParts(self.embeddings, head, table.dtype, len(table), gives_tuples(self.lm))

    @property
    def prefix_is_trained(self) -> bool:
        """True if prefixes need a gradient: for an adapter in the LM, the LM itself or a soft prompt."""
        modules = (module for module in (self.soft_prompt, self.lm) if module is not None)
        return any(parameter.requires_grad for module in modules for parameter in module.parameters())

    def version(self) -> LMVersion:
        """Give the version of the LM and the soft prompt, with which prefixes are computed now."""
        return LMState.of(self.lm, self.soft_prompt).version()

    def embed(self, ids: Tensor, prefix_starts: Tensor | None = None) -> Tensor:
        """Embed ids [B, L] as the LM does: ``inputs_embeds`` [B, L, D].

        Args:
            ids: int64 [B, L].
            prefix_starts: where the document prefix of each row begins, int64 [B], so that the soft prompt is put
                there; None: the rows have no prefix.
        """
        embeds = self._embed_tokens(ids)
        if prefix_starts is None or self.soft_prompt is None:
            return embeds
        return self.soft_prompt.put_into(embeds, prefix_starts)

    def _embed_tokens(self, ids: Tensor) -> Tensor:
        return self.embeddings(ids)

    def _embedding_scale(self) -> float:
        module, table = self.embeddings, self.table
        expect_plain(table, "clues need rows of the table of input embeddings, which")
        if table.dim() != 2:
            raise ValueError(f"the input embeddings must be a table [V, D], got {list(table.shape)}")
        wrapped = hasattr(module, "base_layer")  # an adapter may have changed a few rows anywhere
        ids = torch.arange(len(table) if wrapped else min(64, len(table)), device=table.device)
        rows, embedded = table[ids].float(), module(ids).float()
        if embedded.shape != rows.shape:
            raise ValueError(f"the input embeddings give width {embedded.shape[-1]}, their table has {rows.shape[-1]}")
        scale = float((rows * embedded).sum() / (rows * rows).sum().clamp_min(1e-30))
        scale = float(getattr(module, "scalar_embed_scale", scale))  # exact where the module states it (Gemma 3)
        if not torch.allclose(rows * scale, embedded, rtol=2e-2, atol=1e-6):
            raise ValueError(
                "the input embeddings are not a scaled table; clues need the table (merge an adapter on "
                "them: merge_and_unload)"
            )
        return 1.0 if abs(scale - 1) < 1e-6 else scale

    def table_of_each(
        self,
        batch: PairBatch,
        pieces: SuffixPieces | CluesFirstPieces,
        clue_counts: Callable[[], Sequence[int]],
        most_clues: int,
    ) -> list[int]:
        """Give the rotary table that each pair's prompt is read with (`RotaryTables.of`).

        Args:
            batch: the pairs.
            pieces: the fixed tokens around clues and queries.
            clue_counts: gives the number of clues of each pair; called only if ``most_clues`` for all could matter.
            most_clues: the largest number of clues that a pair may have.
        """

        def tables(counts: Sequence[int]) -> list[int]:
            own = [batch.suffix_of(q, pieces) for q, _ in batch.pairs]
            return [self.rotary.of(len(around.lay_out(batch.documents[d].ids, count)[0])
                                   + len(around.last(batch.queries[q])))
                    for around, (q, d), count in zip(own, batch.pairs, counts, strict=True)]  # fmt: skip

        if self.rotary.limit is None or not any(tables([most_clues] * len(batch))):
            return [0] * len(batch)
        return tables(clue_counts())

    def expect_fits(self, tokens: int, behind: str = "max_query_tokens") -> None:
        """Check that a prompt is not longer than the LM's context.

        Args:
            tokens: of the prompt.
            behind: the option that limits what stands behind the document, for the message.
        Raises: ValueError that names the options to lower.
        """
        if self.context and tokens > self.context:
            raise ValueError(
                f"a prompt of {tokens} tokens or more does not fit the LM's {self._context_is} of {self.context}; "
                f"lower max_document_tokens{'' if self.soft_prompt is None else ', num_virtual_tokens'} or "
                f"{behind}"
            )


def gives_tuples(lm: Any) -> bool:
    """Tell whether the modules of an LM return tuples, by its config. Most LMs then fail by themselves."""
    return not all(getattr(config, "return_dict", True) for config in (lm.config, lm.config.get_text_config()))


def _context(config) -> tuple[int | None, str]:
    """Find the longest prompt, in tokens (None: unlimited), and the words for this limit.

    Sparse attention (Doge, DeepSeek-V3.2) chooses some of the keys once there are more than a limit. It breaks ties in
    a way that depends on all rows of a pass, so that the LM's own scores of longer prompts depend on the batch.
    """
    names = {"max_position_embeddings": "context", "keep_window_size": "full attention (keep_window_size)",
              "index_topk": "full attention (index_topk)"}  # fmt: skip
    found = [(value, words) for name, words in names.items() if isinstance(value := getattr(config, name, None), int)]
    return min(found, default=(None, "context"), key=lambda limit: limit[0])
