"""BM25 as a first stage, through the library ``bm25s``."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from tqdm.auto import tqdm

from .formats.trec import Run

_WORD = r"(?u)[^\W_]+"


def bm25_run(
    corpus: Mapping[str, dict], queries: Mapping[str, str], k: int = 100, *,
    k1: float = 0.9, b: float = 0.4, show_progress_bar: bool | None = None,
) -> Run:
    """The ``k`` best documents for every query by BM25 over title and text.

    Tokens are made by bm25s: lower case, runs of letters and digits (an underscore separates, so that names in code
    are found by their parts), without the longer of its English stop word lists, no stemming. k1 and b are the values
    that MS MARCO and BEIR baselines use, not bm25s' defaults.

    Args:
        corpus: doc_id -> {"title"?, "text"}, for instance a `formats.Corpus`.
        queries: query_id -> text.
        k: more than the corpus holds means all of it.
        show_progress_bar: None: only on a terminal.
    Returns: the run, queries in their given order. Documents without any word of the query are not in it, so a
        query may have fewer than ``k`` candidates, or none.
    Raises: ImportError without bm25s; ValueError for an empty corpus or k < 1.
    """
    try:
        import bm25s
    except ImportError:
        raise ImportError("BM25 needs the package bm25s: pip install qpeft_ext[bm25]") from None
    if k < 1:
        raise ValueError(f"bm25_run: k must be at least 1, got {k}")
    if not len(corpus):
        raise ValueError("bm25_run: the corpus is empty")
    hidden = None if show_progress_bar is None else not show_progress_bar
    doc_ids = list(corpus)
    tokenizer = bm25s.tokenization.Tokenizer(lower=True, splitter=_WORD, stopwords="english_plus", stemmer=None)
    # one text at a time, so that the corpus is never held as text; int32 takes an eighth of a list of ints
    documents = map(corpus.__getitem__, tqdm(doc_ids, "BM25: reading", unit=" documents", delay=1, disable=hidden))
    texts = (f"{document.get('title') or ''} {document['text']}" for document in documents)
    tokens = [np.asarray(ids, dtype=np.int32) for ids in tokenizer.streaming_tokenize(texts, allow_empty=False)]
    vocabulary = tokenizer.get_vocab_dict()
    if not vocabulary:
        return {query_id: [] for query_id in queries}
    retriever = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numpy")
    retriever.index((tokens, vocabulary), show_progress=False)
    run: Run = {}
    for query_id, text in tqdm(queries.items(), "BM25: searching", unit=" queries", delay=1, disable=hidden):
        known = next(tokenizer.streaming_tokenize([text], update_vocab=False, allow_empty=False))
        run[query_id] = _best(retriever.get_scores(known), doc_ids, k) if known else []
    return run


def _best(scores: np.ndarray, doc_ids: list[str], k: int) -> list[tuple[str, float]]:
    """The ``k`` best of ``scores`` [documents] above zero; equal scores in the order of the corpus."""
    if len(scores) > k:
        kth = np.partition(scores, -k)[-k]
        places = np.flatnonzero((scores >= kth) & (scores > 0))
    else:
        places = np.flatnonzero(scores > 0)
    places = places[np.argsort(-scores[places], kind="stable")][:k]
    return [(doc_ids[place], float(scores[place])) for place in places]
