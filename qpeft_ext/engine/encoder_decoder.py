"""Encoder–decoder LMs (T5, T0, FLAN-T5, BART): the encoder reads document and clues, the decoder scores the query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from ..lm.head import LikelihoodHead
from ..lm.passes import Hook
from ..lm.probe_ids import ordinary_ids
from ..lm.rope import find_rotary_tables
from ..prefixes.cache import DocumentCache
from ..prompts.pairs import PairBatch, pack_ragged, pad, to_device
from ..prompts.pieces import CluesFirstPieces, SuffixPieces
from .base import BaseEngine
from .path_check import check_paths
from .read_slots import ReadSlots
from .rows import Rows, assemble_rows, with_clues


@dataclass
class EncoderStates:
    """The encoder's output for N right-padded inputs.

    hidden: states, [N, S, D].  mask: int64 [N, S], 0 at padding.  lengths: true lengths of the inputs, N ints.
    """

    hidden: Tensor
    mask: Tensor
    lengths: list[int]


@dataclass
class EncoderDecoderRows:
    """Decoder inputs of B pairs, and encoder inputs where the encoder has not read the documents yet.

    encoder: rows for the encoder; None where it has read the documents before.
    ids: the decoder's input ids, right-padded, [B, T] int64.
    read: the decoder's slots whose outputs are read: before each scored token, N, and before each answer.
    target_ids: the scored tokens, [N] int64.
    suffix: None, because everything that the decoder reads is the suffix (see `Rows`).
    """

    encoder: Rows | None
    ids: Tensor
    read: ReadSlots
    target_ids: Tensor
    suffix: None = None

    def sum_of_each_pair(self, of_targets: Tensor) -> Tensor:
        """Add up numbers of the scored tokens, [N], for each pair, [B]; in a table [B, T], which fixes the order."""
        table = of_targets.new_zeros(self.ids.numel()).index_copy(0, self.read.of_targets(), of_targets)
        return table.view(self.ids.shape).sum(1)


class EncoderDecoderEngine(BaseEngine[EncoderDecoderRows, EncoderStates]):
    """Runs a frozen encoder–decoder LM.

    An encoder reads in both directions, so the states of a document depend on what follows it. Without clues nothing
    follows: each distinct document is encoded once, and the decoders of all its queries read the same states. With
    clues every pair has its own row in an encoder pass. There are no keys and values to cache.

    Attributes (and those of `BaseEngine`):
        encoder: the module.
        start: the token that a decoder begins with.
    Raises: ValueError for an encoder that does not read embeddings as it reads ids.
    """

    is_encoder_decoder = True
    why_not_cached = (
        "an encoder–decoder LM has no keys and values of a document alone: its encoder reads in both directions"
    )

    def __init__(self, lm: Any) -> None:
        self.encoder, self.start = lm.get_encoder(), _start_token(lm)
        super().__init__(lm)
        with torch.no_grad():
            self.scale = self._embedding_scale() * self._scale_inside
            self._expect_reads_embeddings()
            # T5 scales its decoder's output before the head, FLAN-T5 does not
            heads = (LikelihoodHead(lm, self.own_forward, scale) for scale in (None, self.table.shape[1] ** -0.5))
            first = next(heads)
            self.head = first if first.fused else next((head for head in heads if head.fused), first)
            found = check_paths(self, try_shared=True)
            self.why_unpadded, self._shares = found.why_unpadded, not found.why_not_shared
            self.rotary = find_rotary_tables(lm, self.context)
            if self.rotary.limit is not None:
                self.why_unpadded = "its rotary tables depend on the longest text that is read"

    @property
    def embeddings(self) -> Any:
        return self.encoder.get_input_embeddings()

    @property
    def _scale_inside(self) -> float:
        """The factor by which the encoder multiplies embeddings of ids, but not embeddings that it is given."""
        return float(getattr(self.encoder, "embed_scale", None) or 1.0)  # Pegasus, Marian

    def _expect_reads_embeddings(self) -> None:
        ids = torch.tensor([ordinary_ids(self.lm, 4)], device=self.device)
        of_ids = self.encoder(input_ids=ids).last_hidden_state.float()
        ours = self.encoder(inputs_embeds=self.embed(ids)).last_hidden_state.float()
        if not torch.allclose(of_ids, ours, rtol=2e-2, atol=2e-2 * float(of_ids.abs().max())):
            raise ValueError(
                f"the encoder of this {self.lm.config.model_type} does not read embeddings as it reads "
                "ids, so that clues cannot be given to it"
            )

    def _own_logits(self, before: Sequence[int], query: Sequence[int]) -> Tensor:
        ids, given = (torch.tensor([row], device=self.device) for row in ((*before,), (self.start, *query)))
        return self.lm(input_ids=ids, decoder_input_ids=given, use_cache=False).logits

    def shares_prefixes(self, with_clues: bool) -> bool:
        return self._shares and not with_clues

    def token_bytes(self) -> tuple[int, float]:
        state = self.table.shape[1] * self.table.element_size()
        return state, 5 * state  # the gathered state, its keys and values, and their transposed copies

    def cached_prefill(
        self, prefixes: Sequence[Sequence[int]], cache: DocumentCache | None = None, deterministic: bool = False
    ) -> EncoderStates:
        """Read prefixes; nothing is cached, and with ``deterministic`` the schedule gives one prefix at a time."""
        return self.read_prefixes(prefixes)

    def read_prefixes(self, prefixes: Sequence[Sequence[int]]) -> EncoderStates:
        """Run the encoder on right-padded prefixes; with gradient only where the LM itself is trained."""
        ids, mask = pad(prefixes, self.device)
        with self.lm_passes.prefix(), torch.set_grad_enabled(torch.is_grad_enabled() and self.prefix_is_trained):
            embeds = self.embed(ids, ids.new_zeros(len(ids)))
            return self._encode(embeds, mask.long(), [len(row) for row in prefixes])

    def _embed_tokens(self, ids: Tensor) -> Tensor:
        return self.embeddings(ids) * self._scale_inside

    def _encode(self, embeds: Tensor, mask: Tensor, lengths: Sequence[int]) -> EncoderStates:
        self.expect_fits(embeds.shape[1])
        states = self.encoder(inputs_embeds=embeds, attention_mask=mask)
        return EncoderStates(states.last_hidden_state, mask, list(lengths))

    def assemble(
        self, batch: PairBatch, pieces: SuffixPieces | CluesFirstPieces, clue_counts: Sequence[int], with_prefix: bool
    ) -> EncoderDecoderRows:
        """Lay out the rows of a pass; with ``with_prefix`` each pair has its own row for the encoder too."""
        encoder = None
        if with_prefix:  # a prompt without its query
            asked = replace(batch, queries=[()] * len(batch.queries))
            unscored = replace(pieces, scored_before=(), scored_after=(), asked=None)
            encoder = assemble_rows(asked, unscored, clue_counts, self.device, with_prefix=True)
        queries = [batch.queries[q] for q, _ in batch.pairs]
        targets, decoded = map(pieces.scored, queries), [(*pieces.given, *pieces.read(query)) for query in queries]
        target_ids, offsets = pack_ragged(list(targets))
        ids, _ = pad([(self.start, *row) for row in decoded], self.device)
        places = np.arange(ids.shape[1]) - len(pieces.given)
        scored = np.flatnonzero((places >= 0) & (places < np.diff(offsets)[:, None]))
        last = np.arange(len(decoded)) * ids.shape[1] + np.array([len(row) for row in decoded])
        read = ReadSlots.of(scored, None if pieces.asked is None else last, self.device)
        return EncoderDecoderRows(encoder, ids, read, to_device(target_ids, self.device))

    def outputs(
        self,
        rows: EncoderDecoderRows,
        clue_embeds: Tensor | None,
        prefix: EncoderStates | None = None,
        prefix_rows: Tensor | None = None,
        updates: Sequence[tuple[nn.Module, Hook]] = (),
    ) -> Tensor:
        self.expect_fits(rows.ids.shape[1])
        self.rotary.reset()
        if prefix is None:
            assert rows.encoder is not None  # `assemble` with ``with_prefix``
            ids = rows.encoder.ids
            embeds = with_clues(self.embed(ids, ids.new_zeros(len(ids))), rows.encoder, clue_embeds)
            with self.lm_passes.prefix():
                prefix = self._encode(embeds, rows.encoder.mask, ())
        hidden, mask = prefix.hidden, prefix.mask
        if prefix_rows is not None:
            hidden, mask = hidden[prefix_rows], mask[prefix_rows]
        with self.lm_passes.whole(updates):
            if self.head.fused:
                given = {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}
                output = self.suffix_decoder(input_ids=rows.ids, use_cache=False, **given)
                return output.last_hidden_state.flatten(0, 1)[rows.read.slots]
            states = BaseModelOutput(hidden)
            output = self.lm(decoder_input_ids=rows.ids, encoder_outputs=states, attention_mask=mask, use_cache=False)
            return output.logits.flatten(0, 1)[rows.read.slots]


def _start_token(lm: Any) -> int:
    for config in (lm.config, getattr(lm, "generation_config", None)):
        if (start := getattr(config, "decoder_start_token_id", None)) is not None:
            return start
    raise ValueError(
        f"the config of this {lm.config.model_type} must have a decoder_start_token_id, the token that "
        "its decoder begins with"
    )
