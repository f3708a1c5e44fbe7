"""The APIs that a request may speak: how its body is read, answered, and refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import responses
from .errors import COHERE, JINA, OPENAI, TEI, ErrorShape
from .ranked import Ranked
from .schemas import CohereRequest, RerankRequest, ScoreRequest, TeiRequest


@dataclass(frozen=True)
class Api:
    """One API.

    Attributes:
        schema: of the body; it has a method ``ask``.
        respond: makes the body of the response.
        errors: how its clients read errors.
    """

    schema: type[CohereRequest] | type[RerankRequest] | type[TeiRequest] | type[ScoreRequest]
    respond: Callable[[Ranked], Any]
    errors: ErrorShape


COHERE_API = Api(CohereRequest, responses.cohere, COHERE)
JINA_API = Api(RerankRequest, responses.jina, JINA)
TEI_API = Api(TeiRequest, responses.tei, TEI)
SCORE_API = Api(ScoreRequest, responses.scores, OPENAI)


def rerank_api(parsed: dict[str, Any]) -> Api:
    """Return the API of a body for ``/rerank``, which has "texts" for TEI and "documents" for the others."""
    return TEI_API if "texts" in parsed and "documents" not in parsed else JINA_API
