"""Rows of data sets of the Hub that no file of ours could have, through a stub of the library ``datasets``."""

import sys
from types import SimpleNamespace

import pytest

from qpeft_ext.formats import open_collection

CORPUS = [{"_id": "a", "title": None, "text": "sea"}, {"_id": 2, "title": "T", "text": ""}]
QUERIES = [{"_id": "q", "text": "why"}, {"_id": 7, "text": "when"}]
QRELS = [
    {"query-id": "q", "corpus-id": "a", "score": 1},
    {"query-id": 7, "corpus-id": 2, "score": 2.0},
    {"query-id": "q", "corpus-id": 2, "score": -1},
]


class Rows(list):
    """What is used of a `datasets.Dataset`."""

    _fingerprint = "rows"

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)

    @property
    def column_names(self):
        return list(super().__getitem__(0))


@pytest.fixture
def opened(monkeypatch):
    def opened(corpus=CORPUS, queries=QUERIES, qrels=QRELS):
        sets = {
            "corpus": {"corpus": Rows(corpus)},
            "queries": {"queries": Rows(queries)},
            "qrels": {"test": Rows(qrels)},
        }
        library = SimpleNamespace(
            get_dataset_config_names=lambda name: list(sets), load_dataset=lambda name, part: sets[part]
        )
        monkeypatch.setitem(sys.modules, "datasets", library)
        return open_collection("hf:owner/name")

    return opened


def test_numbers_are_ids_and_no_title_is_an_empty_one(opened):
    data = opened()
    assert dict(data.corpus) == {
        "a": {"id": "a", "title": "", "text": "sea"},
        "2": {"id": "2", "title": "T", "text": ""},
    }
    assert data.queries() == {"q": "why", "7": "when"}
    assert data.qrels() == {"q": {"a": 1, "2": -1}, "7": {"2": 2}}


def test_a_row_that_is_there_twice_counts_once(opened):
    """Nobody can remove it from a data set of the Hub."""
    data = opened(queries=[*QUERIES, QUERIES[0]], qrels=[*QRELS, QRELS[0]])
    assert data.queries() == opened().queries() and data.qrels() == opened().qrels()


@pytest.mark.parametrize(
    "rows, message",
    [
        ({"_id": "b", "title": "", "text": None}, "row 3 of corpus: expected a text under 'text', got None"),
        ({"_id": "b", "title": 5, "text": "x"}, "row 3 of corpus: expected a text under 'title', got 5"),
        ({"_id": None, "title": "", "text": "x"}, "row 3 of corpus: expected an id under '_id', got None"),
    ],
)
def test_documents_that_are_none(opened, rows, message):
    """A missing text was the word "None" for BM25."""
    with pytest.raises(ValueError, match=f"hf:owner/name, {message}"):
        dict(opened(corpus=[*CORPUS, rows]).corpus)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"_id": "r", "text": None}, "expected a text under 'text', got None"),
        ({"_id": "r", "text": " "}, "expected a text under 'text', got ' '"),
        ({"_id": " ", "text": "x"}, "expected an id under '_id', got ' '"),
        ({"_id": "7", "text": "x"}, "the query id '7' has had another text; ids must be unique"),
    ],
)
def test_queries_that_are_none(opened, row, message):
    with pytest.raises(ValueError, match=f"hf:owner/name, row 3 of queries: {message}"):
        opened(queries=[*QUERIES, row]).queries()


@pytest.mark.parametrize(
    "row, message",
    [
        ({"query-id": None, "corpus-id": "a", "score": 1}, "expected an id under 'query-id', got None"),
        ({"query-id": "q", "corpus-id": "", "score": 1}, "expected an id under 'corpus-id', got ''"),
        ({"query-id": "q", "corpus-id": "a", "score": 0}, "document 'a' has had another relevance for query 'q'"),
    ],
)
def test_judgements_that_are_none(opened, row, message):
    with pytest.raises(ValueError, match=f"hf:owner/name, row 4 of qrels: {message}"):
        opened(qrels=[*QRELS, row]).qrels()
