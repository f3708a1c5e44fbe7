"""Explanations of pairs: the tokens that became clues, where they stand in the text, and with which weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..adapters.layers import Clues
from ..model import QPeftModel
from ..prompts.prompt import Document, as_documents, document_text, expect_query
from ..utils.words import counted


@dataclass(frozen=True)
class ClueSpan:
    """A document token that gives a clue.

    Attributes:
        start, end: its characters in `Explanation.text`.
        token: its text.
        weight: similarity ("top_k"), 1 for a random choice, or attention averaged over heads and query tokens
            ("attention").
        query_token: the query token most similar ("top_k") or most attending ("attention"); "" for a random choice.
    """

    start: int
    end: int
    token: str
    weight: float
    query_token: str


@dataclass(frozen=True)
class ClueToken:
    """A clue of "top_k" as the LM gets it, whether or not its token stands in the document.

    Attributes:
        token, weight, query_token: as in `ClueSpan`.
        gate: the factor of its vector; 1 without ``score_gate``.
    """

    token: str
    weight: float
    query_token: str
    gate: float


@dataclass(frozen=True)
class AttentionMap:
    """Attention of every head from every query token to every document token.

    Attributes:
        weights: float32 [H, T, S]; they add up to 1 over S.
        query_tokens: T texts.
        spans: S times (start, end) in `Explanation.text`.
    """

    weights: Tensor
    query_tokens: list[str]
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class Explanation:
    """The clues of one pair.

    Attributes:
        query: the query.
        text: title and text of the document as the LM read them.
        clues: tokens in the text, the largest weight first, then by their place.
        text_start: where the document's own text begins, behind the title; negative if spaces before it were cut.
        tokens: the clues of "top_k" in the order of the prompt.
        attention: the weights of "attention"; None for other clues.
        gate_norms: for a generated LoRA, the norm of g(query) − 1 in each target layer: how far its update is from the
            one that is the same for every query.
    """

    query: str
    text: str
    clues: list[ClueSpan]
    text_start: int = 0
    tokens: list[ClueToken] = field(default_factory=list)
    attention: AttentionMap | None = None
    gate_norms: dict[str, float] = field(default_factory=dict)

    def place_in_document(self, span: ClueSpan) -> tuple[int, int] | None:
        """Return (start, end) in the document as it was given; None if it is in the title.

        Args:
            span: one of `clues`. For a dict the places are those in its "text".
        """
        start, end = span.start - self.text_start, span.end - self.text_start
        return None if end <= 0 else (max(0, start), end)  # many tokenizers count the space before a word as its own


@torch.no_grad()
def explain_pair(
    model: QPeftModel,
    query: str,
    document: Document,
    candidates: Iterable[Document] | None = None,
    truncate_queries: bool = False,
) -> Explanation:
    """Explain one (query, document) pair.

    Args:
        model: a `QPeftModel`; with ``clues="none"`` there is nothing to explain.
        query: a string.
        document: a string, or a dict with "text" and perhaps "title".
        candidates: with ``source="candidates"`` the list that the document is ranked in; None for the document only.
        truncate_queries: whether a query that is too long is cut.
    Raises: ValueError if the document is not among the candidates.
    """
    expect_query(query, "explain: the query")
    text, row, pairs = document_text(document, "explain: the document"), 0, [(query, document)]
    if candidates is not None and model.qpeft_config.source == "candidates":
        listed = as_documents(candidates, "explain: candidates")
        texts = [document_text(candidate) for candidate in listed]
        if text not in texts:
            raise ValueError(f"explain: the document must be one of the candidates, got {text[:60]!r}")
        row, pairs = texts.index(text), [(query, candidate) for candidate in listed]
    batch = model.encode(pairs, truncate_queries=truncate_queries)
    clues = model.compute_clues(batch, explain=True)
    start = text_start(document)
    if clues is None or not clues.mask[row].any():
        return Explanation(query, text, [], start, gate_norms=_gate_norms(model, batch.queries[0]))
    clues = clues[[row]]
    explanation = clues.explanation or {}
    query_tokens = [model.tokenizer.decode([i]).strip() for i in batch.queries[0]]
    document_ids, offsets = batch.documents[batch.pairs[row][1]].document_ids, model.prompt.offsets(document)
    tokens: list[ClueToken] = []
    attention = None
    if "weights" in explanation:
        weights = explanation["weights"][0, :, : len(query_tokens), : len(document_ids)].float().cpu()
        attention = AttentionMap(weights, query_tokens, offsets)
        mean = weights.mean(0)  # [T, S]
        found = zip(mean.mean(0).tolist(), (query_tokens[t] for t in mean.argmax(0).tolist()), strict=True)
        places = [(place, weight, token) for place, (weight, token) in enumerate(found)]
    else:
        places, tokens = [], _clue_tokens(model.tokenizer, clues, query_tokens)
        clue_ids = explanation["clue_ids"]
        for clue_id, clue in zip(clue_ids[clue_ids >= 0].tolist(), tokens, strict=True):
            places += [(s, clue.weight, clue.query_token) for s, i in enumerate(document_ids) if i == clue_id]
    spans = [
        ClueSpan(*offsets[place], text[slice(*offsets[place])], weight, query_token)
        for place, weight, query_token in places
        if place < len(offsets) and offsets[place][0] < offsets[place][1]  # a space of ours has no place in the text
    ]
    spans.sort(key=lambda span: (-span.weight, span.start))
    return Explanation(query, text, spans, start, tokens, attention, _gate_norms(model, batch.queries[0]))


def describe_model(model: QPeftModel) -> list[str]:
    """Return the parts of a model in words: its LM, its trained modules, and its score where that is another kind."""
    config = model.qpeft_config
    name = config.base_model_name_or_path or getattr(model.lm, "name_or_path", "") or "no name"
    kind = {
        "top_k": f"top_k clues (k={config.k})",
        "attention": f"attention clues ({counted(config.num_heads, 'heads')})",
        "none": "no clues",
    }[config.clues]
    lora = f", generated LoRA of rank {config.generated_lora_rank}" if config.generated_lora_rank else ""
    soft_prompt = f", soft prompt of {counted(n, 'tokens')}" if (n := config.num_virtual_tokens) else ""
    dtype = str(model.engine.table.dtype).removeprefix("torch.")
    score = "" if config.score == "likelihood" else f", score {config.score}"
    return [f"{type(model.lm).__name__} {name!r}, {dtype} on {model.device}", kind + lora + soft_prompt + score]


def _gate_norms(model: QPeftModel, query: tuple[int, ...]) -> dict[str, float]:
    if model.generated_lora is None:
        return {}
    gates = model.generated_lora.gates([query], model.engine.table)[0]
    return dict(zip(model.generated_lora.names, (gates - 1).norm(dim=1).tolist(), strict=True))


def _clue_tokens(tokenizer: Any, clues: Clues, query_tokens: list[str]) -> list[ClueToken]:
    """The clues of one pair in their order."""
    explanation = clues.explanation or {}
    chosen = explanation["clue_ids"] >= 0
    facts = {name: fact[chosen].tolist() for name, fact in explanation.items()}
    gates = facts.get("gates", [1.0] * len(facts["clue_ids"]))
    rows = zip(facts["clue_ids"], facts["scores"], facts["query_positions"], gates, strict=True)
    return [ClueToken(tokenizer.decode([i]).strip(), score, query_tokens[t] if t >= 0 else "", gate)
            for i, score, t, gate in rows]  # fmt: skip


def text_start(document: Document) -> int:
    """Where the document's own text begins in `document_text`."""
    if isinstance(document, str):
        return len(document.lstrip()) - len(document)
    title = document.get("title") or ""
    joined = f"{title} {document['text']}"
    return len(title) + 1 - (len(joined) - len(joined.lstrip()))
