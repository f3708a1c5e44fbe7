"""`RerankClient`: asks a server for scores, in the shapes of `Reranker`."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import math
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from ..prompts.prompt import Document, as_pairs, document_text, expect_query
from ..utils.inputs import as_list, kind_of, short, whole_number
from ..utils.text import one_line
from ..utils.words import counted

logger = logging.getLogger(__name__)

_ROUTE = "/v1/rerank"
_BUSY = (429, 503)  # the server asks to come back later
_LONGEST_WAIT = 30.0  # seconds, whatever the server asks for
_LONGEST_ANSWER = 64 << 20  # bytes


class RerankClient:
    """A client of `qpeft serve`, and of other servers with the route ``/v1/rerank`` of Cohere, Jina or vLLM.

    It needs no package besides Python's own. A connection is made for each request, so that threads may share a client.
    What the server says about a query (``meta.warnings``), that it was cut for instance, is logged as a warning; that
    documents were cut is not, as with a `Reranker`.

    Args:
        url: where the server is, such as ``http://127.0.0.1:8080``; a path that is given stands before ``/v1/rerank``.
        api_key: sent as ``Authorization: Bearer …``; None sends none.
        model: the name of the model that the server shall use; None leaves it to the server.
        timeout: seconds until a request without an answer is an error.
        retries: how often a request is sent again when the server is busy (429, 503), after the time that it names.
    Raises: ValueError for an URL that is not of http or https or has more in it than host, port and path, or a key that
        a header cannot hold.
    """

    def __init__(
        self, url: str, api_key: str | None = None, model: str | None = None, timeout: float = 60.0, retries: int = 2
    ) -> None:
        _expect_url(url)
        if not timeout > 0:
            raise ValueError(f"RerankClient: timeout must be above 0 seconds, got {timeout}")
        self.url = url.rstrip("/").removesuffix(_ROUTE)
        self.model, self.timeout = model, timeout
        self.retries = whole_number(retries, "RerankClient: retries", 0) or 0
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if api_key is not None:
            if not api_key.isprintable() or max(api_key, default="") > "\xff":  # what a header can hold
                raise ValueError("RerankClient: api_key must be printable Latin-1; does it end with a line break?")
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._opener = urllib.request.build_opener(_NoRedirects, _Http, _Https)

    def __repr__(self) -> str:
        return f"RerankClient({self.url!r}{'' if self.model is None else f', model={self.model!r}'})"

    def rank(
        self,
        query: str,
        documents: Sequence[Any],
        top_k: int | None = None,
        *,
        instruction: str | None = None,
        threshold: float | None = None,
    ) -> list[dict[str, Any]]:
        """Rank the documents of one query, best first.

        Args:
            query: a string.
            documents: strings, or dicts with "text" and perhaps "title"; a title is for servers that know it, such as
                ours. With our server's ``--corpus`` also dicts with the "id" of a document, and no "text".
            top_k: how many to return; None returns all.
            instruction: as for `Reranker.rank`; for servers that know it, such as ours and vLLM.
            threshold: leave out documents whose score is smaller; for our server.
        Returns: a dict for each document: "corpus_id", its place in ``documents``, and "score", the relevance that the
            server sends, float64.
        Raises: TypeError or ValueError as `Reranker.rank`, before anything is sent; RuntimeError with the server's
            words if it answers with an error; ConnectionError or TimeoutError if it does not answer; ValueError for an
            answer in another shape.
        """
        top_k, threshold = whole_number(top_k, "top_k"), as_relevance(threshold)
        expect_query(query, "rank: query")
        return self._ranked(query, _checked(documents, "rank: documents"), top_k, instruction, threshold)

    def _ranked(
        self, query: str, documents: list[Any], top_k: int | None, instruction: str | None, threshold: float | None
    ) -> list[dict[str, Any]]:
        """Do what `rank` does, with arguments that are checked."""
        if not documents:
            return []
        body = {"query": query, "documents": list(map(_sent, documents)), "return_documents": False}
        body |= {} if top_k is None else {"top_n": top_k}
        body |= {} if self.model is None else {"model": self.model}
        body |= {} if instruction is None else {"instruction": instruction}
        body |= {} if threshold is None else {"threshold": threshold}
        least = 0 if threshold else min(len(documents), top_k or len(documents))
        answer = self._post(json.dumps(body).encode())
        rows = self._rows(answer, len(documents), least)
        if said := [text for text in _warnings_of(answer) if not text.startswith("documents[")]:
            logger.warning("%s", one_line(f"{self.url}, for the query {short(query)}: {'; '.join(said)}"))
        rows.sort(key=lambda row: -row["score"])  # stable: equal scores keep the server's order
        return [row for row in rows[:top_k] if threshold is None or row["score"] >= threshold]

    def rank_many(
        self,
        queries: Sequence[str],
        candidates: Sequence[Sequence[Any]],
        top_k: int | None = None,
        *,
        instruction: str | Sequence[str | None] | None = None,
        threshold: float | None = None,
    ) -> list[list[dict[str, Any]]]:
        """Rank the documents of many queries, a request each.

        Args:
            queries, candidates, top_k, instruction, threshold: as for `Reranker.rank_many`.
        Returns: for each query what `rank` returns.
        Raises: as `rank`.
        """
        top_k, threshold = whole_number(top_k, "top_k"), as_relevance(threshold)
        queries = as_list(queries, "rank_many: queries", "one query goes into a list: [query]")
        lists = as_list(candidates, "rank_many: candidates", "give a list of documents for each query")
        each: list[Any] = [instruction] * len(queries)
        if instruction is not None and not isinstance(instruction, str):
            each = as_list(instruction, "rank_many: instruction", "one instruction for all is a string")
        if not len(queries) == len(lists) == len(each):
            raise ValueError(
                f"rank_many: {counted(len(queries), 'queries')}, {counted(len(lists), 'lists')} of candidates and "
                f"{counted(len(each), 'instructions')}; there must be as many of each"
            )
        for i, query in enumerate(queries):
            expect_query(query, f"query {i}")
            lists[i] = _checked(lists[i], f"rank_many: the candidates of query {i}", f" of query {i}")
        asked = zip(queries, lists, each, strict=True)
        return [self._ranked(query, documents, top_k, own, threshold) for query, documents, own in asked]

    def predict(self, pairs: Sequence[tuple[str, Any]], *, instruction: str | None = None) -> np.ndarray:
        """Score (query, document) pairs, in the order given; pairs of one query go into one request.

        Args:
            pairs: (query, document); a document is a string, or a dict with "text" and perhaps "title".
            instruction: as in `rank`, for all pairs.
        Returns: float64 [B].
        Raises: as `rank`.
        """
        checked = as_pairs(pairs, "predict")
        places: dict[str, list[int]] = {}
        for place, (query, _) in enumerate(checked):
            places.setdefault(query, []).append(place)
        scores = np.empty(len(checked))
        for query, own in places.items():
            for row in self._ranked(query, [checked[place][1] for place in own], None, instruction, None):
                scores[own[row["corpus_id"]]] = row["score"]
        return scores

    def _post(self, body: bytes) -> Any:
        request = urllib.request.Request(self.url + _ROUTE, body, self._headers, method="POST")
        for attempt in range(self.retries + 1):
            try:
                with self._opener.open(request, timeout=self.timeout) as answer:
                    return json.loads(answer.read(_LONGEST_ANSWER))
            except urllib.error.HTTPError as error:
                with error:
                    if error.code not in _BUSY or attempt == self.retries:
                        message = f"{self.url} answered {error.code} {error.reason}: {_words_of(error)}"
                        raise RuntimeError(message) from None
                    wait = error.headers.get("retry-after", "1")
            except TimeoutError:
                raise TimeoutError(f"{self.url} did not answer within {self.timeout:g} s") from None
            except (urllib.error.URLError, HTTPException, ConnectionError) as error:
                reason = getattr(error, "reason", error)
                if isinstance(reason, TimeoutError):
                    raise TimeoutError(f"{self.url} did not answer within {self.timeout:g} s") from None
                if reason is error and isinstance(error, ConnectionError):  # those of connecting have a reason
                    raise ConnectionError(
                        f"{self.url} ended the connection without an answer ({reason}); was it stopped, or are "
                        f"{len(body):,} bytes more than it takes?"
                    ) from None
                raise ConnectionError(f"{self.url} cannot be reached: {reason}; is the server running?") from None
            except ValueError:  # no JSON, or no UTF-8
                raise ValueError(f"{self.url}{_ROUTE} did not answer in JSON; is it a rerank server?") from None
            time.sleep(_seconds(wait))
        raise AssertionError("the last attempt returns or raises")

    def _rows(self, answer: Any, count: int, least: int) -> list[dict[str, Any]]:
        """Read an answer. Raises: ValueError if it is no ranking of ``least`` of ``count`` documents."""
        results = answer.get("results") if isinstance(answer, dict) else None
        if not isinstance(results, list):
            raise ValueError(f"{self.url}{_ROUTE}: the answer has no list 'results', got {kind_of(answer)}")
        rows, seen = [], set()
        for result in results:
            fields = result if isinstance(result, dict) else {}
            index, score = fields.get("index"), fields.get("relevance_score")
            known = type(index) is int and 0 <= index < count and index not in seen
            if not known or isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
                raise ValueError(
                    f"{self.url}{_ROUTE}: a result must have an 'index' below {count}, each once, and a number as "
                    f"'relevance_score', got {short(result)}"
                )
            seen.add(index)
            rows.append({"corpus_id": index, "score": float(score)})
        if len(rows) < least:
            raise ValueError(f"{self.url}{_ROUTE}: {counted(len(rows), 'results')}, but {least} were asked for")
        return rows


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Python would send the key to wherever a redirect points."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _ReadsAnswers(http.client.HTTPConnection):
    """Reads what a server answers that ends the connection before it has read the body, as with status 413."""

    def send(self, data: Any) -> None:
        if self.sock is None:
            self.connect()  # what goes wrong here is another error
        # without an answer, reading fails likewise
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
            super().send(data)


class _ReadsSecureAnswers(_ReadsAnswers, http.client.HTTPSConnection):
    pass


class _Http(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_ReadsAnswers, request)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_ReadsSecureAnswers, request)


def as_relevance(threshold: float | None) -> float | None:
    """Check a threshold. Raises: TypeError for no number; ValueError for one that is not between 0 and 1."""
    if threshold is None:
        return None
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float, np.floating)):
        raise TypeError(f"threshold must be a number between 0 and 1, got {kind_of(threshold)}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be a relevance between 0 and 1, got {threshold}")
    return float(threshold)


def _expect_url(url: str) -> None:
    """Raises: ValueError that does not show a password."""
    try:
        parts = urlsplit(url)
        usual = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        usual = usual and not parts.query and not parts.fragment and url.isascii() and not re.search(r"\s", url)
    except ValueError:  # of a port, or of an address in brackets
        usual = False
    if re.match(r"(\w+:)?(//)?[^/]*@", url):
        raise ValueError("RerankClient: url must be like http://127.0.0.1:8080, without a name; give a key as api_key")
    if not usual:
        raise ValueError(f"RerankClient: url must be like http://127.0.0.1:8080, got {short(url)}")


def _checked(documents: Sequence[Any], what: str, of: str = "") -> list[Any]:
    """Read documents once and check each, as a `Reranker` does, but for those that a server knows by their ids."""
    checked = as_list(documents, what, "one document goes into a list: [document]")
    for place, document in enumerate(checked):
        if not (isinstance(document, dict) and "id" in document and "text" not in document):
            document_text(document, f"document {place}{of}")
    return checked


def _sent(document: Document) -> Document:
    """Return a document as most servers know it, a text, unless it has a title; some refuse dicts."""
    if isinstance(document, dict) and "text" in document and not document.get("title"):
        return document["text"]
    return document


def _warnings_of(answer: dict[str, Any]) -> list[str]:
    """Return what Cohere and our server say in ``meta.warnings``; [] where another server has something else there."""
    meta = answer.get("meta")
    said = meta.get("warnings") if isinstance(meta, dict) else None
    return [text for text in said if isinstance(text, str)] if isinstance(said, list) else []


def _words_of(error: urllib.error.HTTPError) -> str:
    """Return what a server says about an error: Jina's "detail", Cohere's "message", OpenAI's "error", or the text."""
    if 300 <= error.code < 400:
        return f"it points to {short(error.headers.get('location', 'nowhere'), quoted=False)}; give the final URL"
    try:
        text = error.read(1 << 16).decode("utf-8", "replace").strip()
    except OSError:
        return "no text"
    try:
        said = json.loads(text)
    except ValueError:
        return text[:300] or "no text"
    for key in ("detail", "error", "message"):
        if isinstance(said, dict) and said.get(key):
            said = said[key]
    return (said if isinstance(said, str) else json.dumps(said))[:300]


def _seconds(text: str) -> float:
    """Return the seconds that a header "retry-after" asks for; 1 for a date."""
    try:
        return min(_LONGEST_WAIT, max(0.0, float(text)))  # 0 for NaN
    except ValueError:
        return 1.0
