"""From the body of a request to a `Job`: texts are looked up, cut and counted, in threads beside the event loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..prefixes.keys import prefix_digest
from ..prompts.passages import Passage
from ..prompts.pieces import DocumentPrefix
from ..prompts.prompt import Document, Prompt, document_text
from ..prompts.worded import WordedPrompt
from ..utils.inputs import short
from ..utils.words import counted
from .ask import Ask, DocumentRecord
from .errors import RequestError
from .job import Job
from .models import Models, Served
from .settings import Limits

_WARNINGS = 20  # of one response


@dataclass
class Prepared:
    """A request that is ready to be scored.

    Attributes:
        ask: what it asks for.
        job: its pairs; with ``passages`` one for each passage of a document; then each distinct query with an empty
            document, if relevances are wanted, which depend on how likely a query is anyway.
        queries: that of each document.
        documents: the texts of the documents, cut where the request has limits of its own.
        passages: those of each document; None where documents are scored as a whole.
        query_tokens: scored tokens of each document's query (`QPeftModel.scored_tokens`).
        bare: for each document the place of its query's pair with an empty document; [] if they are not wanted.
        warnings: what was cut, in words.
        seconds: that this took.
        given_up: set when nobody waits for the answer any more.
    """

    ask: Ask
    job: Job
    queries: list[str]
    documents: list[Document]
    passages: list[list[Passage]] | None
    query_tokens: list[int]
    bare: list[int] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    given_up: threading.Event = field(default_factory=threading.Event)


def prepare(ask: Ask, models: Models, corpus: Mapping[str, Document] | None, limits: Limits) -> Prepared:
    """Make the job of a request.

    Args:
        ask: what it asks for.
        models: of the server.
        corpus: documents by id, or None.
        limits: of the server.
    Raises: RequestError that names the field and what is wrong with it.
    """
    started = time.monotonic()
    served = models.get(ask.model)
    count = len(ask.documents)
    if count > limits.max_documents:
        raise RequestError(
            "invalid",
            f"{ask.document_field} has {count} items, this server takes {limits.max_documents}; send them in parts",
            ask.document_field,
        )
    if served.whole and len(ask.queries) > 1:
        raise RequestError(
            "invalid",
            f"with the model {served.name!r} a score depends on all documents of its query; send one query a request",
            ask.query_field,
        )
    warnings: list[str] = []
    texts = [_resolve(document, place, ask, corpus) for place, document in enumerate(ask.documents)]
    try:
        prepared = _prepared(ask, served, texts, warnings)
    except (ValueError, TypeError) as error:  # of the tokenizer or the prompt
        raise RequestError("invalid", str(error)) from error
    if len(warnings) > _WARNINGS:
        warnings[_WARNINGS:] = [f"and {len(warnings) - _WARNINGS} more"]
    prepared.seconds = time.monotonic() - started
    return prepared


def _prepared(ask: Ask, served: Served, texts: list[Document], warnings: list[str]) -> Prepared:
    prompt, model = served.reranker.model.prompt, served.reranker.model
    queries = [_cut_query(query, place, ask, prompt, warnings) for place, query in enumerate(ask.queries)]
    cut: list[int] = []
    ids = prompt.queries(queries, cut)
    for place in cut:
        length = counted(prompt.max_query_tokens, "tokens")
        warnings.append(f"{_named(ask.query_field, place, len(queries))} was cut to {length}")
    limit = _document_limit(ask, served, max(map(len, ids)))
    texts = [_cut_document(text, place, limit, ask, prompt, warnings) for place, text in enumerate(texts)]
    if len(queries) == 1:
        queries, ids = queries * len(texts), ids * len(texts)
    split = None if served.reranker.passages is None else served.reranker.passages.split(texts)
    parts = [[text] for text in texts] if split is None else [[p.document for p in passages] for passages in split]
    of = [place for place, part in enumerate(parts) for _ in part]  # the document of each pair
    pairs = [(queries[place], text) for place, part in enumerate(parts) for text in part]
    with_bare = served.reranker.reads_bare_queries and not ask.raw_scores
    distinct = {} if not with_bare else {query: place for place, query in reversed(list(enumerate(queries)))}
    bare = {query: len(pairs) + i for i, query in enumerate(distinct)}
    pairs += [(query, "") for query in distinct]
    of += distinct.values()
    prefixes = prompt.documents([text for _, text in pairs])
    for place, prefix in enumerate(prefixes):
        if prefix.cut and split is None:
            _expect_right(ask)
            tokens = prompt.max_document_tokens
            warnings.append(f"{ask.document_field}[{place}] was cut to {tokens} of {tokens + prefix.cut} tokens")
    instruction = ask.instruction if (ask.instruction or "").strip() else None
    clues = model.qpeft_config.k or 0
    shared, suffixes = _parts_of_prompts(prompt, [ids[place] for place in of], prefixes, instruction, clues)
    lengths = [len(prefix.ids) for prefix in shared]
    model.engine.expect_fits(max(suffixes) + max(lengths))
    digests = [prefix_digest(prefix.ids) for prefix in shared]
    lists = [0] * (len(pairs) - len(bare)) + list(range(1, len(bare) + 1))
    job = Job(served, pairs, digests, lengths, suffixes, instruction, lists)
    scored = list(map(model.scored_tokens, ids))
    return Prepared(ask, job, queries, texts, split, scored, [bare[q] for q in queries if bare], warnings)


def _parts_of_prompts(
    prompt: Prompt,
    queries: list[tuple[int, ...]],
    documents: list[DocumentPrefix],
    instruction: str | None,
    clues: int,
) -> tuple[list[DocumentPrefix], list[int]]:
    """Return the prefix of each pair, which pairs may share, and how many tokens follow it.

    Args:
        queries, documents: of each pair.
        instruction: of all of them, or None.
        clues: of a pair, at most.
    """
    if isinstance(prompt, WordedPrompt) and prompt.query_first:
        asked = len(prompt.suffix.asked or ())
        prefixes = prompt.query_prefixes(queries, [instruction] * len(queries))
        return prefixes, [len(document.ids) + asked for document in documents]
    pieces = prompt.suffix if instruction is None else prompt.instructed(instruction)
    return documents, [pieces.least_tokens + clues + len(pieces.last(query)) for query in queries]


def _resolve(document: str | DocumentRecord, place: int, ask: Ask, corpus: Mapping[str, Document] | None) -> Document:
    """Return the text of a document, from the corpus if it has an id only."""
    if isinstance(document, str):
        return document
    if "text" in document:
        return {name: document[name] for name in ("title", "text") if name in document}
    name = f"{ask.document_field}[{place}]"
    if "id" not in document:
        raise RequestError(
            "invalid", f"{name} must be a text, or have a text, an id or one of the rank_fields", ask.document_field
        )
    if corpus is None:
        raise RequestError(
            "invalid", f"{name} has no text, and this server has no --corpus to find its id in", ask.document_field
        )
    try:
        return corpus[document["id"]]
    except KeyError:
        raise RequestError(
            "invalid",
            f"{name}: the corpus has no document {short(document['id'])}; send its text",
            ask.document_field,
        ) from None


def _named(name: str, place: int, count: int) -> str:
    return name if count == 1 else f"{name}[{place}]"


def _cut_query(query: str, place: int, ask: Ask, prompt: Prompt, warnings: list[str]) -> str:
    """Cut a query to the request's own limit. Raises: RequestError if it is empty."""
    name = _named(ask.query_field, place, len(ask.queries))
    if not query.strip():
        raise RequestError("empty", f"{name} must have at least one word, got {short(query)}", ask.query_field)
    limit = ask.max_tokens_per_query
    if limit is None or limit >= prompt.max_query_tokens:
        return query
    cut = _first_tokens(query.strip(), limit, prompt)
    if cut is None:
        return query
    warnings.append(f"{name} was cut to {counted(limit, 'tokens')}")
    return cut


def _document_limit(ask: Ask, served: Served, query_tokens: int) -> int | None:
    """Return the request's own limit for documents, in tokens."""
    limits = [ask.max_tokens_per_document]
    if ask.max_tokens_per_prompt is not None:
        around = served.reranker.model.prompt.least_tokens
        limits.append(max(1, ask.max_tokens_per_prompt - around - query_tokens))
    return min((limit for limit in limits if limit is not None), default=None)


def _cut_document(
    document: Document, place: int, limit: int | None, ask: Ask, prompt: Prompt, warnings: list[str]
) -> Document:
    if limit is None or limit >= prompt.max_document_tokens:
        return document
    cut = _first_tokens(document_text(document), limit, prompt)
    if cut is None:
        return document
    _expect_right(ask)
    warnings.append(f"{ask.document_field}[{place}] was cut to {counted(limit, 'tokens')}")
    if isinstance(document, str) or not document.get("title"):
        return cut
    title = document["title"]
    whole = f"{title} {document['text']}"  # of which the LM reads no white space at the ends
    kept = whole[: len(whole) - len(whole.lstrip()) + len(cut)]
    return {"title": kept[: len(title)], "text": kept[len(title) + 1 :]}


def _first_tokens(text: str, limit: int, prompt: Prompt) -> str | None:
    """Return the text of the first tokens, None if there are no more."""
    offsets = prompt.offsets(text)
    return text[: offsets[limit - 1][1]] if len(offsets) > limit else None


def _expect_right(ask: Ask) -> None:
    if ask.cut_left:
        raise RequestError(
            "invalid", "documents are cut at their end only; leave the direction of truncation out, or send less text"
        )
