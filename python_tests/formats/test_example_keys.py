"""Training examples under the keys of other libraries, and with values of numpy and tables: the same examples."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from small_data import write_lines
from training.tiny_training import EXAMPLES, trainer, weights

from qpeft_ext import formats
from qpeft_ext.formats.example_keys import ExampleKeys, view
from qpeft_ext.training.sampling import StreamedTrainingExamples, TrainingExamples

pytestmark = pytest.mark.slow


OWN = {"query": "why tides", "positives": ["the sea"], "negatives": ["a lamp", "fog"]}
SPELLINGS = [
    OWN,
    {"anchor": "why tides", "positive": "the sea", "negative": ["a lamp", "fog"]},  # sentence-transformers
    {"query": "why tides", "positive": "the sea", "negative_1": "a lamp", "negative_2": "fog"},
    {"query": "why tides", "positive": "the sea", "negative_10": "fog", "negative_9": "a lamp"},
    {"query": "why tides", "answer": "the sea", "negative": "a lamp", "negative_1": "fog", "negative_2": None},
    {"question": "why tides", "docs": ["a lamp", "the sea", "fog"], "labels": [0, 1, 0]},
    {"query": "why tides", "documents": np.array(["a lamp", "the sea", "fog"]), "label": np.array([0.0, 1.0, 0.0])},
    {"query": "why tides", "docs": ("a lamp", "the sea", "fog"), "score": [False, True, False]},
    {"query": "why tides", "pos": ["the sea"], "neg": ["a lamp", "fog"]},  # FlagEmbedding
    {"query": np.str_("why tides"), "positives": np.array(["the sea"]), "negatives": np.array(["a lamp", "fog"], "O")},
]


@pytest.mark.parametrize("example", SPELLINGS)
def test_one_example_in_many_spellings(example):
    before = repr(example)
    assert dict(ExampleKeys("x").own(example)) == OWN and repr(example) == before
    member = TrainingExamples([example] * 2, 2, 0)[0, 0]
    assert sorted(d.document for d in member.negatives) == ["a lamp", "fog"]
    assert next(iter(StreamedTrainingExamples([example], 2, 0))).positives[0].document == "the sea"


def test_our_own_examples_stay_as_they_are():
    assert view(EXAMPLES, "x") is EXAMPLES and ExampleKeys("x").own(EXAMPLES[0]) is EXAMPLES[0]


def test_negatives_may_be_missing():
    for missing in ({}, {"negatives": None}, {"negatives": float("nan")}):
        assert ExampleKeys("x").own({"query": "q", "positives": ["p"], **missing})["negatives"] == []
    assert ExampleKeys("x").own({"anchor": "q", "positive": "p", "negative": None})["negatives"] == []


def test_documents_of_tevatron_and_scores_of_flag_embedding(tmp_path):
    tevatron = {
        "query_id": 7,
        "query": "why",
        "positive_passages": [{"docid": "3", "title": "Sea", "text": "tides"}],
        "negative_passages": [{"docid": 4, "title": "", "text": "fog"}],
    }
    flag = {
        "query": "why",
        "pos": ["tides"],
        "neg": ["fog", "lamps"],
        "pos_scores": [2.0],
        "neg_scores": [0.5, -1.0],
        "pos_id": ["3"],
        "neg_id": [4, 5],
    }
    path = write_lines(tmp_path / "train.jsonl", map(json.dumps, [tevatron, flag]))
    assert formats.read_examples(path) == [
        {
            "query_id": 7,
            "query": "why",
            "positives": [{"id": "3", "title": "Sea", "text": "tides"}],
            "negatives": [{"id": 4, "title": "", "text": "fog"}],
        },
        {
            "query": "why",
            "positives": [{"id": "3", "text": "tides"}],
            "positive_scores": [2.0],
            "negatives": [{"id": 4, "text": "fog"}, {"id": 5, "text": "lamps"}],
            "negative_scores": [0.5, -1.0],
        },
    ]
    data = formats.open_collection(path)
    assert data.parts == ("examples",) and len(list(data.examples())) == 2


def test_what_is_not_used_is_said_once(tmp_path, caplog):
    row = {"query": "q", "pos": ["p"], "neg": ["n"], "prompt": "Answer yes or no."}
    path = write_lines(tmp_path / "train.jsonl", map(json.dumps, [row, row]))
    with caplog.at_level(logging.WARNING):
        assert formats.read_examples(path)[1]["prompt"] == "Answer yes or no."
    assert [record.message for record in caplog.records] == [
        f"{path}: the key 'prompt' is not used: the prompt is the same for all examples: instruction and template of "
        "QPeftConfig"
    ]


@pytest.mark.parametrize(
    "example, message",
    [
        ({"query": "q", "passage": "p", "label": 1}, "one document and its label is no training example"),
        (
            {"sentence1": "q", "sentence2": "p"},
            "expected a query and its documents: .* got the keys sentence1, sentence2",
        ),
        ({"query": "q"}, "expected a query and its documents"),
        (
            {"question": "q", "positive_ctxs": [], "answers": []},
            "keys of DPR's training files: give the whole JSON file",
        ),
        ({"query": "q", "docs": ["a", "b"], "labels": [1]}, "as many labels under 'labels'"),
        (
            {"query": "q", "docs": ["a", "b"], "labels": [0.9, 0.2]},
            r"expected 1 .relevant. or 0 under 'labels', got \[0.9",
        ),
        ({"query": "q", "pos": ["a"], "positive": "b"}, "the keys positive and pos both name positives"),
        ({"query": "q", "pos": ["a"], "neg": ["b"], "negative_1": "c"}, "neg and negative_1 both name negatives"),
        ({"query": "q", "pos": ["a"], "pos_id": ["1", "2"]}, "an id under 'pos_id' for each of 1 document,"),
        ({"query": "q", "docs": ["a", "b"], "labels": [0, 0]}, "positives.* is empty"),
        ({"query": "q", "pos": [3]}, "a text|a string"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, example, message):
    path = write_lines(tmp_path / "train.jsonl", [json.dumps({"query": "q", "pos": ["p"]}), json.dumps(example)])
    with pytest.raises(ValueError, match=f"train.jsonl, line 2: .*(?:{message})"):
        formats.read_examples(path)
    with pytest.raises(ValueError, match=f"^training example 1.*(?:{message})"):
        trainer(tmp_path, examples=[{"query": "q", "pos": ["p"]}, example])


class Table:
    """What `view` asks of a pandas DataFrame."""

    columns, iloc = ("anchor", "positive", "negative"), None

    def to_dict(self, orient):
        assert orient == "records"
        return [
            {
                "anchor": e["query"],
                "positive": e["positives"][0]["text"],
                "negative": np.array([d["text"] for d in e["negatives"]]),
            }
            for e in EXAMPLES
        ]


class Columns:
    """What is asked of a `datasets.Dataset`."""

    column_names = ("query_id", "anchor", "positive", "negative")

    def __init__(self):
        self.rows = [
            {"query_id": e["query_id"], **row} for e, row in zip(EXAMPLES, Table().to_dict("records"), strict=True)
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]


def test_training_does_not_depend_on_the_spelling(tmp_path):
    texts = [
        {
            "query": e["query"],
            "positives": [e["positives"][0]["text"]],
            "negatives": [d["text"] for d in e["negatives"]],
        }
        for e in EXAMPLES
    ]
    trained = []
    for examples in (texts, Table(), Columns(), Table().to_dict("records")):
        job = trainer(tmp_path, examples=examples)
        job.train()
        trained.append(weights(job.model))
    for other in trained[1:]:
        assert all(torch.equal(other[name], value) for name, value in trained[0].items())


@pytest.mark.parametrize(
    "options, without, wanted",
    [
        ({"in_batch_negatives": False}, 12, "error"),
        ({"queries_per_group": 1}, 12, "error"),
        ({"in_batch_negatives": False, "num_hard_negatives": 0}, 0, "error"),
        ({"in_batch_negatives": False}, 1, "warning"),
        ({"in_batch_negatives": False, "loss": "pointwise_pairwise"}, 12, "warning"),
        ({"in_batch_negatives": False, "loss": "pointwise"}, 12, None),
        ({}, 12, None),
        ({"in_batch_negatives": False, "num_random_negatives": 2}, 12, None),
    ],
)
def test_a_loss_without_anything_to_compare_with(tmp_path, caplog, options, without, wanted):
    from training.tiny_training import tiny_model

    examples = [{**e, "negatives": [] if i < without else e["negatives"]} for i, e in enumerate(EXAMPLES)]
    model = tiny_model(**{"loss": "listwise"} | options)
    if wanted == "error":
        with pytest.raises(ValueError, match="12 of 12 training examples have no negatives.*set in_batch_negatives"):
            trainer(tmp_path, model, examples)
        return
    with caplog.at_level(logging.WARNING, "qpeft_ext.training.trainer"):
        trainer(tmp_path, model, examples)
    assert ("no negatives, and loss" in caplog.text) == (wanted == "warning")


def test_pandas_and_arrow(tmp_path):
    pandas = pytest.importorskip("pandas")
    first = {"query": "why tides", "positive": "the sea", "negative_1": "a lamp", "negative_2": "fog"}
    second = {"query": "who", "positive": "gulls", "negative_1": None, "negative_2": pandas.NA}
    frame = pandas.DataFrame([first, second])
    wanted = [OWN, {"query": "who", "positives": ["gulls"], "negatives": []}]
    assert view(frame, "x") == view([row for _, row in frame.iterrows()], "x") == wanted
    arrow = pytest.importorskip("pyarrow")
    assert view(arrow.Table.from_pylist([dict(OWN)]), "x") == [OWN]
