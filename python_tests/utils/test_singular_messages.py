"""Messages about one query, one document, one example: none of them says "1 queries"."""

import re
from collections import Counter
from pathlib import Path

import pytest

from qpeft_ext.evaluation.calibration import Calibration
from qpeft_ext.evaluation.comparison import compare_table
from qpeft_ext.formats.convert import convert
from qpeft_ext.formats.jsonl import ExampleCounts
from qpeft_ext.formats.source import Conversion
from qpeft_ext.prefixes.tiers import MemoryTier
from qpeft_ext.ranking.run import RerankedRun
from qpeft_ext.synthesis.filters import Counts

LOST = {  # what `qpeft convert` counts, of one and of two
    "queries' answers": "query's answers",
    "titles": "title",
    "candidates": "candidate",
    "query ids": "query id",
    "training examples": "training example",
    "queries of other splits": "query of other splits",
    "scores of candidates (their order is kept)": "score of a candidate (its order is kept)",
    "texts of documents": "text of a document",
    "texts of queries": "text of a query",
    "candidates that the corpus does not hold": "candidate that the corpus does not hold",
    "candidates of queries without text": "candidate of a query without text",
    "grades other than 0 and 1": "grade other than 0 and 1",
    "judgements of documents that are no candidates": "judgement of a document that is no candidate",
    "documents that are no candidates": "document that is no candidate",
    "queries without a relevant document": "query without a relevant document",
    "queries without one in the corpus": "query without one in the corpus",
    "relevant documents that the corpus does not hold": "relevant document that the corpus does not hold",
    "texts with a tab or line end (a space now)": "text with a tab or line end (a space now)",
    "questions without a positive passage": "question without a positive passage",
}
DROPPED = {  # why `qpeft synthesize` drops queries
    "documents have no text": "document has no text",
    "have no word": "has no word",
    "hold undecodable bytes": "holds undecodable bytes",
    "repeat themselves (fewer than half of the words differ)": "repeats itself (fewer than half of the words differ)",
    "are longer than max_query_tokens": "is longer than max_query_tokens",
    "are copied from their document": "is copied from its document",
    "are the same as another of their document": "is the same as another of its document",
    "were generated for several documents": "was generated for several documents",
    "do not bring their document back among BM25's best 20": "does not bring its document back among BM25's best 20",
}


@pytest.mark.parametrize(("many", "one"), LOST.items())
def test_conversions(many, one):
    assert str(Conversion(Counter(), Counter({many: 2}))) == f"wrote nothing; not held: 2 {many}"
    assert str(Conversion(Counter({many: 1}), Counter())) == f"wrote 1 {one}; not held: nothing"


def test_all_that_a_conversion_counts_is_above():
    """Every text that `convert` counts by, as it stands in its source."""
    source = Path(convert.__code__.co_filename).read_text()
    names = set(re.findall(r'done\.(?:lost|written)\["([^"]+)"\]', source))
    assert names - LOST.keys() <= {"documents", "queries", "judgements"} and len(names) > 12


@pytest.mark.parametrize(("many", "one"), DROPPED.items())
def test_synthesis(many, one):
    text = str(Counts(1, 2, kept=1, fewer_negatives=1, dropped=Counter({many: 1})))
    assert text == (f"1 of 2 queries for 1 document is kept; dropped:\n  1 {one}\n1 has fewer negatives than asked for")
    text = str(Counts(2, 4, kept=2, fewer_negatives=2, dropped=Counter({many: 2})))
    assert text == (
        f"2 of 4 queries for 2 documents are kept; dropped:\n  2 {many}\n2 have fewer negatives than asked for"
    )


def test_training_examples():
    assert str(ExampleCounts(1, 1, 1, 1, 1, 1)) == (
        "1 training example; 1 query without a relevant document left out; 1 query left out because the corpus holds "
        "none of its relevant documents; 1 relevant document is not in the corpus; 1 query is not in the run; 1 "
        "example has fewer negatives than asked for"
    )
    assert str(ExampleCounts(2, 2, 2, 2, 2, 2)) == (
        "2 training examples; 2 queries without a relevant document left out; 2 queries left out because the corpus "
        "holds none of their relevant documents; 2 relevant documents are not in the corpus; 2 queries are not in the "
        "run; 2 examples have fewer negatives than asked for"
    )


def test_reranking():
    result = RerankedRun({"a": [], "b": []}, 1, 1.0, num_resumed=1, truncated=1, long_sentences=1)
    assert str(result) == (
        "1 query, 1 pair in 1.0 s (1 pairs/s, 1.000 s per query); 1 document cut to max_document_tokens; 1 sentence "
        "longer than a passage, split; 1 query was there already"
    )
    tier = MemoryTier("memory", 10)
    assert str(tier).startswith("memory: 0 prefixes, ")
    tier._entries["key"] = None
    assert str(tier).startswith("memory: 1 prefix, ")


def test_evaluation_and_calibration():
    run = {"q": [("q", 2.0), ("d", 1.0)], "other": [("d", 1.0)]}
    notes = compare_table({"a": run}, {"q": {"d": 1}}, ["RR@10"], ignore_identical_ids=True).notes()
    assert notes[0] == "1 query"
    assert "a: 1 document with the id of its query left out" in notes
    assert "a: 1 query is not in the qrels and does not count" in notes
    names = "pairs", "queries", "ece", "ece_before", "brier_skill", "brier_skill_before"
    measured = dict.fromkeys(names, 1) | {"data": "x"}
    assert Calibration(0.0, 1.0, 0.0, measured=measured).describe().startswith("fitted to 1 pair of 1 query of x; on ")
