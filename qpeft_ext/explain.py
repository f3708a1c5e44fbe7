"""Which document tokens became clues, where they stand in the text, and with which weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .prompt import Document, document_text


@dataclass(frozen=True)
class ClueSpan:
    """A document token that gives a clue.

    start, end: characters in `Explanation.text`.  token: its text.
    weight: similarity (top_k), or attention averaged over heads and query tokens (attention).
    query_token: the query token most similar (top_k) or most attending (attention).
    """

    start: int
    end: int
    token: str
    weight: float
    query_token: str


@dataclass(frozen=True)
class Explanation:
    """The clues of one pair. ``text``: title and text as the LM read them; ``clues``: best first, then by place."""

    query: str
    text: str
    clues: list[ClueSpan]


@torch.no_grad()
def explain_pair(model, query: str, document: Document) -> Explanation:
    """Explain one (query, document) pair of a `QPeftModel`; no clues for ``clues="none"``."""
    batch = model.encode([(query, document)])
    text = document_text(document)
    clues = model.compute_clues(batch, explain=True)
    if clues is None or not clues.mask.any():
        return Explanation(query, text, [])
    offsets = model.prompt.offsets(document)
    query_tokens = [*(model.tokenizer.decode([i]).strip() for i in batch.queries[0]), ""]  # at -1: chosen at random
    document_ids = batch.documents[0].document_ids
    facts = clues.explanation
    spans = []
    if "weights" in facts:
        weights = facts["weights"][0].float().mean(0)[: len(batch.queries[0])]  # [T, S]
        rows = zip(weights.mean(0).tolist(), weights.argmax(0).tolist(), strict=True)
        for place, (weight, query_place) in enumerate(rows):
            spans.append((place, weight, query_place))
    else:
        triples = zip(*(facts[name][0].tolist() for name in ("clue_ids", "scores", "query_positions")), strict=True)
        for clue_id, score, query_place in triples:
            spans += [(place, score, query_place) for place, i in enumerate(document_ids) if i == clue_id]
    found = [
        ClueSpan(*offsets[place], text[slice(*offsets[place])], weight, query_tokens[query_place])
        for place, weight, query_place in spans
        if place < len(offsets) and offsets[place][0] < offsets[place][1]  # a space of ours has no place in the text
    ]
    return Explanation(query, text, sorted(found, key=lambda span: (-span.weight, span.start)))
