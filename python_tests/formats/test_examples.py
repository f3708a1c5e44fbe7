"""Training examples: round trips, and how they are made from qrels and a run."""

import pytest
from small_data import write_lines

from qpeft_ext import formats

# -- training examples ---------------------------------------------------------------------------------------------


def test_examples_round_trip(tmp_path):
    examples = [
        {"query_id": "q", "query": "é", "positives": ["a", {"id": "x", "title": "t", "text": ""}], "negatives": []},
        {"query": "b", "positives": [{"text": "p", "title": None}], "negatives": ["n"], "more": 1},
    ]
    assert formats.write_examples(tmp_path / "train.jsonl.gz", examples) == 2
    assert formats.read_examples(tmp_path / "train.jsonl.gz") == examples
    write_lines(tmp_path / "b.jsonl", ['{"query": "q", "positives": ["p"]}'])
    assert formats.read_examples(tmp_path / "b.jsonl")[0]["negatives"] == []


def make_examples(**options):
    corpus = {f"d{i}": {"id": f"d{i}", "title": "", "text": f"text {i}"} for i in range(60)}
    run = {q: [(f"d{i}", 60.0 - i) for i in range(60)] for q in ("q1", "q2", "q3")}
    qrels = {
        "q1": {"d3": 1, "d50": 2, "d7": 0},
        "q2": {"d1": 1, "gone": 1},
        "q3": {"gone": 1},
        "q4": {"d1": 0},
        "q5": {"d2": 1},
    }
    queries = {q: f"query {q}" for q in qrels}
    return formats.training_examples(queries, qrels, options.pop("run", run), corpus, **options)


def test_training_examples():
    examples, counts = make_examples()
    first = examples[0]
    assert [example["query_id"] for example in examples] == ["q1", "q2", "q5"]
    assert [document["id"] for document in first["positives"]] == ["d50", "d3"]  # more relevant first
    negatives = [int(document["id"][1:]) for document in first["negatives"]]
    assert len(negatives) == 11 and negatives == sorted(negatives)
    assert max(negatives) <= 40 and not {3, 50} & set(negatives)  # of the 40 best that are not relevant
    assert counts.__dict__ == {
        "examples": 3,
        "without_relevant": 1,
        "without_candidates": 1,
        "missing_positives": 2,
        "without_positives": 1,
        "fewer_negatives": 1,
    }
    assert str(counts).startswith("3 training examples; 1 query without a relevant document left out; ")


def test_negatives_depend_on_seed_and_query_only():
    whole = {example["query_id"]: example for example in make_examples()[0]}
    assert whole == {example["query_id"]: example for example in make_examples()[0]}
    assert make_examples(seed=1)[0][0]["negatives"] != whole["q1"]["negatives"]
    ids = [[document["id"] for document in whole[q]["negatives"]] for q in ("q1", "q2")]
    assert ids[0] != ids[1]
    assert make_examples(run=None)[0][0]["negatives"] == []
    assert len(make_examples(num_negatives=100)[0][0]["negatives"]) == 40


def test_training_examples_that_cannot_be_made():
    with pytest.raises(ValueError, match="document 'zz' of query 'q1' is in the run but not in the corpus"):
        make_examples(run={"q1": [("zz", 1.0)]})
    with pytest.raises(ValueError, match="query 'q' is in the qrels but not in the queries"):
        formats.training_examples({}, {"q": {"d": 1}}, None, {})
    with pytest.raises(ValueError, match="no training example .*1 query left out because the corpus holds none of its"):
        formats.training_examples({"q": "?"}, {"q": {"d": 1}}, None, {})
