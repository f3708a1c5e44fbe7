"""Judge whether a passage contains the answer, by the rule of DPR's evaluation (https://arxiv.org/abs/2004.04906).

Passage and answer are Unicode-normalised (NFD) and cut into tokens: runs of letters, digits and combining marks, and
single other characters that are neither separators nor control characters. The passage contains the answer if the
answer's lower-cased tokens follow each other in it. Only the text counts, not the title, as in DPR and UPR.
"""

from __future__ import annotations

import functools
import re
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from .trec import Qrels, Run


@functools.cache
def _token() -> re.Pattern:
    """Return the pattern of a token; Python's patterns lack Unicode categories, so they are written as ranges."""
    kinds = (
        ({"L": "w", "N": "w", "M": "w", "Z": "s", "C": "s"}.get(unicodedata.category(chr(code))[0], "o"), code)
        for code in range(sys.maxunicode + 1)
    )
    ranges: dict[str, list[str]] = {"w": [], "s": [], "o": []}
    for kind, run in groupby(kinds, key=lambda item: item[0]):
        codes = [code for _, code in run]
        ranges[kind].append(f"\\U{codes[0]:08x}-\\U{codes[-1]:08x}")
    return re.compile(f"[{''.join(ranges['w'])}]+|[^{''.join(ranges['s'])}]")


def answer_tokens(text: str) -> list[str]:
    """Return the tokens of ``text``, lower-cased."""
    return [token.lower() for token in _token().findall(unicodedata.normalize("NFD", text))]


def has_answer(text: str, answers: Iterable[str]) -> bool:
    """Return True if ``text`` contains one of ``answers``. An answer without any token is in no text."""
    tokens = answer_tokens(text)
    for answer in answers:
        wanted = answer_tokens(answer)
        if wanted and any(
            tokens[i : i + len(wanted)] == wanted
            for i in range(len(tokens) - len(wanted) + 1)
            if tokens[i] == wanted[0]
        ):
            return True
    return False


def answer_qrels(
    runs: Sequence[Run], answers: Mapping[str, Sequence[str]], corpus: Mapping[str, dict], known: Qrels | None = None
) -> Qrels:
    """Judge every candidate of ``runs`` by `has_answer`: 1 or 0, so that Success@k is the paper's top-k accuracy.

    R@k with these qrels is the share of the retrieved passages with an answer that are in the top k.

    Args:
        runs: the candidates to judge.
        answers: query_id → short answers; each of its queries is in the result, with or without candidates.
        corpus: doc_id → document.
        known: labels that exist already; they are kept.
    Raises: ValueError for a candidate that is not in the corpus.
    """
    qrels: Qrels = {}
    for query_id, wanted in answers.items():
        judged = qrels.setdefault(query_id, dict((known or {}).get(query_id, {})))
        for doc_id in dict.fromkeys(doc_id for run in runs for doc_id, _ in run.get(query_id, ())):
            if doc_id in judged:
                continue
            if doc_id not in corpus:
                raise ValueError(
                    f"document {doc_id!r} of query {query_id!r} is in the run but not in the corpus; "
                    f"the run belongs to another corpus"
                )
            judged[doc_id] = int(has_answer(corpus[doc_id]["text"], wanted))
    return qrels
