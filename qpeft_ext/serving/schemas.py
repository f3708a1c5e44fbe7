"""Bodies of requests: Cohere v2; Cohere v1, Jina and vLLM, which share a route; TEI; vLLM's scores.

Unknown fields are ignored and ``null`` stands for the default, because real clients send both.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, field_validator, model_validator

from .ask import Ask, DocumentRecord

Count = Annotated[int, Field(ge=0)]
Limit = Annotated[int, Field(ge=1)]
_EXAMPLE_QUERY = "sort the items of a list"
_EXAMPLE_DOCUMENTS = ["Delete a file or an empty folder.", "Return a new list with the items in ascending order."]


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", str_strip_whitespace=False)


class Document(BaseModel):
    """A document with its text, or with the id of one in the server's corpus."""

    model_config = ConfigDict(extra="allow")
    id: str | int | None = None
    text: str | None = None
    title: str | None = None

    def record(self, fields: list[str] | None = None) -> DocumentRecord:
        """Return the fields that are there; with ``rank_fields`` those that it names, joined to a text.

        A document with none of these fields has no text then, but may have an id.
        """
        given = {"id": None if self.id is None else str(self.id), "text": self.text, "title": self.title}
        if fields:
            sent = self.model_dump(include=self.model_fields_set)  # not attributes, which a class has of other names
            named = [sent[name] for name in fields if name in sent]
            text = " ".join(_as_text(value) for value in named if value is not None)
            given = {"id": given["id"], "text": text if named else None}
        return {name: value for name, value in given.items() if value is not None}


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


Documents = Annotated[list[str | Document], Field(min_length=1, examples=[_EXAMPLE_DOCUMENTS])]
Query = Annotated[str, Field(min_length=1, examples=[_EXAMPLE_QUERY])]


class RelevantSpans(_Body):
    """Cohere's options for the spans of a document that made it relevant."""

    mode: Literal["enabled", "disabled"] | None = "enabled"
    threshold: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = 0.1
    max_spans: Limit | None = None
    likelihood: bool | None = Field(None, description="Weigh sentences by the LM; slower. Ours, not Cohere's.")


class _Options(_Body):
    """Options of every route but TEI's: those of vLLM, which has all of these routes, and ours."""

    model: str | None = None
    max_tokens_per_doc: Limit | None = None
    max_tokens_per_query: Limit | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    use_activation: bool | None = None
    raw_scores: bool | None = Field(None, description="Log-likelihoods of the query in nats, not relevances in [0, 1].")
    instruction: str | None = Field(None, description="What makes a document relevant, in words for the LM.")

    def options(self) -> dict[str, Any]:
        """Return them as arguments of `Ask`."""
        prompt = self.truncate_prompt_tokens or 0
        return {
            "model": self.model,
            "max_tokens_per_document": self.max_tokens_per_doc,
            "max_tokens_per_query": self.max_tokens_per_query,
            "max_tokens_per_prompt": prompt if prompt > 0 else None,
            "cut_left": self.truncation_side == "left",
            "raw_scores": bool(self.raw_scores) or self.use_activation is False,
            "instruction": self.instruction,
        }


class CohereRequest(_Options):
    """``POST /v2/rerank``."""

    query: Query
    documents: Documents
    top_n: Count | None = None
    return_documents: bool | None = False
    priority: int | None = None
    threshold: FiniteFloat | None = Field(None, description="Leave out results whose score is smaller.")
    relevant_spans: RelevantSpans | None = None

    def spans(self) -> dict | None:
        """Return the options of spans, None where none are wanted."""
        wanted = self.relevant_spans
        if wanted is None or wanted.mode == "disabled":
            return None
        threshold = 0.1 if wanted.threshold is None else wanted.threshold
        return {"threshold": threshold, "max_spans": wanted.max_spans, "likelihood": wanted.likelihood}

    def ask(self) -> Ask:
        """Return what is asked for."""
        return Ask(
            "query",
            "documents",
            [self.query],
            [d if isinstance(d, str) else d.record() for d in self.documents],
            top_n=self.top_n,
            threshold=self.threshold,
            return_documents=bool(self.return_documents),
            spans=self.spans(),
            **self.options(),
        )


class RerankRequest(CohereRequest):
    """``POST /rerank`` and ``/v1/rerank`` with ``documents``: Jina, vLLM, Infinity, and Cohere's first version."""

    rank_fields: list[str] | None = None

    def ask(self) -> Ask:
        """Return what is asked for."""
        ask = super().ask()
        ask.documents = [d if isinstance(d, str) else d.record(self.rank_fields) for d in self.documents]
        return ask


class TeiRequest(_Body):
    """``POST /rerank`` with ``texts``: text-embeddings-inference."""

    query: Query
    texts: Annotated[list[str], Field(min_length=1, examples=[_EXAMPLE_DOCUMENTS])]
    truncate: bool | None = None
    truncation_direction: Literal["left", "Left", "right", "Right"] | None = None
    raw_scores: bool | None = False
    return_text: bool | None = False

    def ask(self) -> Ask:
        """Return what is asked for; long texts are always cut, whatever ``truncate`` says."""
        return Ask(
            "query",
            "texts",
            [self.query],
            list(self.texts),
            cut_left=(self.truncation_direction or "right").lower() == "left",
            raw_scores=bool(self.raw_scores),
            return_documents=bool(self.return_text),
        )


Texts = Query | Annotated[list[Query], Field(min_length=1)]
Items = Annotated[str | list[str | Document], Field(examples=[_EXAMPLE_DOCUMENTS])]
_NAMES = (("queries", "documents"), ("queries", "items"), ("text_1", "text_2"), ("data_1", "data_2"))


class ScoreRequest(_Options):
    """``POST /score`` and ``/v1/score``: vLLM. One text against several, or as many as there are on the other side."""

    queries: Texts | None = None
    documents: Items | None = None
    items: Items | None = None
    text_1: Texts | None = None
    text_2: Items | None = None
    data_1: Texts | None = None
    data_2: Items | None = None

    @model_validator(mode="after")
    def _one_pair_of_fields(self) -> ScoreRequest:
        given = [name for name in dict.fromkeys(sum(_NAMES, ())) if getattr(self, name) is not None]
        if tuple(given) not in _NAMES:
            wanted = ", ".join(f"{first} and {second}" for first, second in _NAMES)
            raise ValueError(f"expected one of these pairs of fields: {wanted}; got {' and '.join(given) or 'none'}")
        first, second = self._sides()
        if not second or len(first) not in (1, len(second)):
            raise ValueError(
                f"{given[0]} must be one text, or as many as {given[1]}; got {len(first)} and {len(second)}"
            )
        return self

    def _names(self) -> tuple[str, str]:
        return next(pair for pair in _NAMES if all(getattr(self, name) is not None for name in pair))

    def _sides(self) -> tuple[list[str], list[str | Document]]:
        first, second = (getattr(self, name) for name in self._names())
        return [first] if isinstance(first, str) else first, [second] if isinstance(second, str) else second

    def ask(self) -> Ask:
        """Return what is asked for."""
        first, second = self._sides()
        documents = [d if isinstance(d, str) else d.record() for d in second]
        return Ask(*self._names(), first, documents, **self.options())


class LoadRequest(_Body):
    """``POST /v1/models``: an adapter below the server's ``--models-root``."""

    name: Annotated[str, Field(min_length=1, max_length=200, examples=["code"])]
    adapter: Annotated[str, Field(min_length=1, max_length=1000, examples=["code-adapter"])]

    @field_validator("name")
    @classmethod
    def _can_be_deleted(cls, name: str) -> str:
        if not name.isprintable() or {"", ".", ".."} & set(name.split("/")):
            raise ValueError(
                "expected a name that DELETE /v1/models/NAME can have: printable, and between slashes neither nothing "
                "nor '.' or '..'"
            )
        return name
