"""The padded rows that the LM reads, and the tokens that are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..prompts.pairs import PairBatch, pack_ragged, pad, to_device
from ..prompts.pieces import CluesFirstPieces, SuffixPieces
from .read_slots import ReadSlots


@dataclass
class Rows:
    """B right-padded rows of LM input, L tokens wide.

    The last token of a query that is scored is only a target, so it is not in the row. Where an answer is read instead,
    a row ends with the question and nothing is a target.

    ids: int64 [B, L], 0 at clue slots and padding.  mask: int64 [B, L], 0 at padding.  positions: int64 [B, L].
    clue_slots: flat indices into [B·L] of the clue vectors, in the order of ``Clues.embeds[Clues.mask]``.
    read: the slots whose outputs are read: before each scored token, N, and before each answer.
    target_ids: the scored tokens, [N].
    target_slots: flat indices into [B·T] of the targets, [N], where T is ``longest_query``.
    end: one more than the largest position of a token.
    suffix: which slots of a whole prompt belong to its suffix, bool [B, L]; None where the rows are suffixes only.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    clue_slots: Tensor
    read: ReadSlots
    target_ids: Tensor
    target_slots: Tensor
    longest_query: int
    end: int
    suffix: Tensor | None = None

    def sum_of_each_pair(self, of_targets: Tensor) -> Tensor:
        """Add up numbers of the targets, [N], for each pair, [B]; in a table [B, T], which fixes the order."""
        table = of_targets.new_zeros(len(self.ids) * self.longest_query)
        return table.index_copy(0, self.target_slots, of_targets).view(len(self.ids), -1).sum(1)


def assemble_rows(
    batch: PairBatch,
    pieces: SuffixPieces | CluesFirstPieces,
    clue_counts: Sequence[int],
    device: torch.device,
    with_prefix: bool,
    width_step: int = 1,
    spare: int = 0,
) -> Rows:
    """Lay out the suffixes of the pairs, or their whole prompts.

    Only clues that exist take a slot, because sliding windows would count a gap inside a row.

    Args:
        batch: the pairs.
        pieces: the fixed tokens around clues and queries, where the batch has none of its own (``suffixes``).
        clue_counts: the number of clues of each pair.
        device: where the tensors go.
        with_prefix: whether rows are whole prompts (the plain path).
        width_step: L becomes a multiple of it.
        spare: slots of padding after the longest row that count in ``end``.
    """
    queries = [batch.suffix_of(q, pieces).scored(batch.queries[q]) for q, _ in batch.pairs]
    rows, before, clue_starts, suffix_starts = [], [], [], []
    for (q, document_index), count in zip(batch.pairs, clue_counts, strict=True):
        around, document = batch.suffix_of(q, pieces), batch.documents[document_index].ids if with_prefix else ()
        row, clue_start, suffix_start = around.lay_out(document, count)
        before.append(len(row))
        rows.append(row + around.read(batch.queries[q]))
        clue_starts.append(clue_start)
        suffix_starts.append(suffix_start)
    prefix_lengths = np.array([len(batch.documents[d].ids) for _, d in batch.pairs])
    query_lengths = np.array([len(query) for query in queries])
    lengths, counts = np.array([len(row) for row in rows]), np.array(clue_counts)
    width, longest_query = -(-int(lengths.max() + spare) // width_step) * width_step, int(query_lengths.max())
    first_slots = np.arange(len(rows)) * width
    starts = np.zeros_like(lengths) if with_prefix else prefix_lengths
    suffix = to_device(np.arange(width) >= np.array(suffix_starts)[:, None], device) if with_prefix else None
    ids, mask = pad(rows, device, width)
    return Rows(
        ids,
        mask.long(),
        to_device(starts[:, None] + np.arange(width), device),
        to_device(_spans(first_slots + np.array(clue_starts), counts), device),
        ReadSlots.of(
            _spans(first_slots + np.array(before) - 1, query_lengths),
            None if pieces.asked is None else first_slots + lengths - 1,
            device,
        ),
        to_device(pack_ragged(queries)[0], device),
        to_device(_spans(np.arange(len(rows)) * longest_query, query_lengths), device),
        longest_query,
        int((starts + lengths).max()) + spare,
        suffix,
    )


def _spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate the spans start, start + 1, … of these lengths."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)


def with_clues(embeds: Tensor, rows: Rows, clue_embeds: Tensor | None) -> Tensor:
    """Put the clue vectors into their slots of the rows' embeddings, [B, L, D]."""
    if clue_embeds is None or not len(clue_embeds):
        return embeds
    return embeds.flatten(0, 1).index_copy(0, rows.clue_slots, clue_embeds.to(embeds.dtype)).view_as(embeds)
