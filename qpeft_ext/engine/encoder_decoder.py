"""Encoder–decoder LMs (T5, T0, FLAN-T5, BART): the encoder reads document and clues, the decoder scores the query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from ..lm.head import LikelihoodHead
from ..lm.passes import Hook
from ..lm.rope import find_rotary_tables
from ..prompts.pairs import PairBatch, pack_ragged, pad, to_device
from ..prompts.prompt import SuffixPieces
from .base import BaseEngine
from .path_check import check_paths, ordinary_ids
from .rows import Rows, assemble_rows, with_clues


@dataclass
class EncoderStates:
    """What the encoder made of N right-padded inputs: hidden [N, S, D], mask [N, S] int64; lengths, N ints."""

    hidden: Tensor
    mask: Tensor
    lengths: list[int]


@dataclass
class EncoderDecoderRows:
    """B pairs.

    encoder: what the encoder reads, or None where it has read the documents before.
    ids: what the decoder reads, right-padded, [B, T] int64.
    slots: flat indices into [B·T] of the decoder slots whose output predicts a scored token, [N].
    target_ids: those tokens, [N] int64.
    suffix: None: all that the decoder reads is the suffix (see `Rows`).
    """

    encoder: Rows | None
    ids: Tensor
    slots: Tensor
    target_ids: Tensor
    suffix: None = None

    def sum_of_each_pair(self, of_targets: Tensor) -> Tensor:
        """Sums over the targets of each pair, [N] -> [B]; through a table [B, T], so that their order is fixed."""
        return of_targets.new_zeros(self.ids.numel()).index_copy(0, self.slots, of_targets).view(self.ids.shape).sum(1)


class EncoderDecoderEngine(BaseEngine):
    """Runs a frozen encoder–decoder LM.

    An encoder reads in both directions, so that what follows the document changes what is made of it. Without clues
    nothing follows: each distinct document is encoded once, and the decoders of all its queries read the same states.
    With clues every pair has an encoder pass of its own. There are no keys and values to cache.

    Attributes (and those of `BaseEngine`): encoder: the module.  start: the token that a decoder begins with.
    Raises: ValueError for an encoder that does not read embeddings as it reads ids.
    """

    is_encoder_decoder = True
    why_plain = "an encoder–decoder LM has no keys and values of a document alone: its encoder reads in both directions"

    def __init__(self, lm) -> None:
        self.encoder, self.start = lm.get_encoder(), _start_token(lm)
        super().__init__(lm)
        with torch.no_grad():
            self.scale = self._embedding_scale() * self._scale_inside
            self._expect_reads_embeddings()
            # T5's decoder is scaled before the head, FLAN-T5's is not
            heads = (LikelihoodHead(lm, self.own_forward, scale) for scale in (None, self.table.shape[1] ** -0.5))
            first = next(heads)
            self.head = first if first.fused else next((head for head in heads if head.fused), first)
            found = check_paths(self, try_shared=True)
            self.why_unpadded, self._shares = found.why_unpadded, not found.why_plain
            self.rotary = find_rotary_tables(lm, self.context)
            if self.rotary.limit is not None:
                self.why_unpadded = "its rotary tables depend on the longest text that is read"

    @property
    def embeddings(self):
        return self.encoder.get_input_embeddings()

    @property
    def _scale_inside(self) -> float:
        """What the encoder itself multiplies embedded ids with, and given embeddings not (Pegasus, Marian)."""
        return float(getattr(self.encoder, "embed_scale", None) or 1.0)

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
        """Whether a document is read once for all its queries."""
        return self._shares and not with_clues

    def token_bytes(self) -> tuple[int, float]:
        """Bytes of a prefix token that are kept for its queries, and bytes that a pass takes to read it in a layer."""
        state = self.table.shape[1] * self.table.element_size()
        return state, 5 * state  # the state gathered, its keys and values, and those once more, transposed

    def cached_prefill(
        self, prefixes: Sequence[Sequence[int]], cache=None, deterministic: bool = False
    ) -> EncoderStates:
        """`read_prefixes`. ``cache`` is not used, and documents that must be read one by one are in groups of one."""
        return self.read_prefixes(prefixes)

    def read_prefixes(self, prefixes: Sequence[Sequence[int]]) -> EncoderStates:
        """One right-padded pass of the encoder; with grad only where the LM itself is trained."""
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
        self, batch: PairBatch, pieces: SuffixPieces, clue_counts: Sequence[int], with_prefix: bool
    ) -> EncoderDecoderRows:
        """The rows of a pass. ``with_prefix``: each pair has an encoder row of its own."""
        encoder = None
        if with_prefix:  # a prompt without its query
            asked = replace(batch, queries=[()] * len(batch.queries))
            unscored = replace(pieces, scored_before=(), scored_after=())
            encoder = assemble_rows(asked, unscored, clue_counts, self.device, with_prefix=True)
        targets = [pieces.scored(batch.queries[q]) for q, _ in batch.pairs]
        ids, _ = pad([(self.start, *pieces.given, *row[:-1]) for row in targets], self.device)
        places = np.arange(ids.shape[1]) - len(pieces.given)
        slots = np.flatnonzero((places >= 0) & (places < np.array([[len(row)] for row in targets])))
        target_ids, _ = pack_ragged(targets)
        return EncoderDecoderRows(encoder, ids, to_device(slots, self.device), to_device(target_ids, self.device))

    def outputs(
        self,
        rows: EncoderDecoderRows,
        clue_embeds: Tensor | None,
        prefix: EncoderStates | None = None,
        prefix_rows: Tensor | None = None,
        updates: Sequence[tuple[nn.Module, Hook]] = (),
    ) -> Tensor:
        """What the head reads for each scored token, [N, D]; where it is left to the LM, its logits [N, V].

        Args:
            clue_embeds: the clue vectors of ``rows.encoder.clue_slots``, [number of clues, D], or None.
            prefix, prefix_rows: states of the distinct documents and the one of each row, int64 [B].
            updates: forward hooks that change the outputs of modules of the decoder (`GeneratedLora.updates`).
        Raises: ValueError if encoder or decoder would read more than the LM's context.
        """
        self.expect_fits(rows.ids.shape[1])
        self.rotary.reset()
        if prefix is None:
            ids = rows.encoder.ids
            embeds = with_clues(self.embed(ids, ids.new_zeros(len(ids))), rows.encoder, clue_embeds)
            with self.lm_passes.prefix():
                prefix = self._encode(embeds, rows.encoder.mask, ())
        hidden, mask = prefix.hidden, prefix.mask
        if prefix_rows is not None:
            hidden, mask = hidden[prefix_rows], mask[prefix_rows]
        with self.lm_passes.whole(updates):
            if self.head.fused:
                read = {"encoder_hidden_states": hidden, "encoder_attention_mask": mask, "use_cache": False}
                return self.suffix_decoder(input_ids=rows.ids, **read).last_hidden_state.flatten(0, 1)[rows.slots]
            states = BaseModelOutput(hidden)
            read = {"encoder_outputs": states, "attention_mask": mask, "use_cache": False}
            return self.lm(decoder_input_ids=rows.ids, **read).logits.flatten(0, 1)[rows.slots]


def _start_token(lm) -> int:
    for config in (lm.config, getattr(lm, "generation_config", None)):
        if (start := getattr(config, "decoder_start_token_id", None)) is not None:
            return start
    raise ValueError(
        f"the config of this {lm.config.model_type} must have a decoder_start_token_id, the token that "
        "its decoder begins with"
    )
