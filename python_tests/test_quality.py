"""The quality experiments: their splits do not overlap, and their figures are those of the package."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "quality"))

collection = pytest.importorskip("collection")
experiment = pytest.importorskip("experiment")
analyse = pytest.importorskip("analyse")

from small_data import write_lines  # noqa: E402

from qpeft_ext import formats  # noqa: E402
from qpeft_ext.demo import harvest  # noqa: E402
from qpeft_ext.evaluate import evaluate, paired_test  # noqa: E402
from qpeft_ext.losses import listwise  # noqa: E402

DOCUMENTS = {f"d{i}": {"id": f"d{i}", "title": f"d{i}", "text": f"word{i} text of all"} for i in range(40)}


def split_with_scores(seed: int):
    """20 queries with 15 candidates; the document of two queries is not among them."""
    rng = np.random.default_rng(seed)
    queries = {f"d{i}": f"word{i}" for i in range(20)}
    run = {}
    for i, q in enumerate(queries):
        others = [d for d in DOCUMENTS if d != q]
        docs = [*rng.choice(others, 14, replace=False), "d39" if i < 2 else q]
        run[q] = [(str(d), 0.0) for d in dict.fromkeys(docs)]
    split = collection.Split(queries, DOCUMENTS, run)
    return split, [np.sort(rng.normal(size=len(run[q])))[rng.permutation(len(run[q]))] for q in split.found()]


def as_run(split, scores):
    run = {q: [] for q in split.queries}
    for q, row in zip(split.found(), scores, strict=True):
        run[q] = sorted(((d, float(s)) for (d, _), s in zip(split.run[q], row, strict=True)), key=lambda x: -x[1])
    return run


def test_compare_agrees_with_evaluate():
    split, first = split_with_scores(0)
    second = [row[::-1] for row in first]
    result = experiment.compare(first, second, split)
    qrels = {q: {q: 1} for q in split.queries}
    both = [evaluate(as_run(split, scores), qrels, ["nDCG@10"]) for scores in (first, second)]
    assert result["queries"] == 20 and result["found"] == 18
    for name, evaluation in zip(("ndcg", "upr"), both, strict=True):
        assert result[name] == pytest.approx(evaluation.means["nDCG@10"])
    assert result["p"] == pytest.approx(paired_test(*(e.per_query["nDCG@10"] for e in both)))
    assert result["margin"] == pytest.approx(
        np.mean([row[i] - np.delete(row, i).mean() for row, i in zip(first, experiment.places(split), strict=True)])
    )


def test_ties_count_against_the_relevant_document():
    assert collection.ndcg([np.zeros(10), np.zeros(11)], [0, 10]) == pytest.approx([1 / np.log2(11), 0])


def test_listwise_loss_is_that_of_training():
    split, scores = split_with_scores(1)
    where = experiment.places(split)
    scores = [row[:15] for row in scores]
    losses = [
        listwise(torch.tensor(row)[None], torch.arange(len(row))[None] == i, torch.ones(1, len(row)).bool(), 0.25)
        for row, i in zip(scores, where, strict=True)
    ]
    assert analyse.listwise_loss(scores, where, 0.25) == pytest.approx(float(torch.stack(losses).mean()))


def test_splits_do_not_overlap(monkeypatch, tmp_path):
    names = {"dev": harvest.DEV_PACKAGES, "train": collection.UNREAD_PACKAGES, "test": harvest.TEST_PACKAGES}

    def read(packages, show_progress_bar):
        part = next(part for part, expected in names.items() if packages == expected)
        ids = [f"{part}.d{i}" for i in range(40)]
        documents = {id: {"id": id, "title": id, "text": f"{id} text"} for id in ids}
        return harvest.Collection(documents, {id: f"query of {id}" for id in ids}, {id: {id: 1} for id in ids}, {}, {})

    monkeypatch.setattr(harvest, "harvest", read)
    for name, count in (("STOP_QUERIES", 5), ("DEV_QUERIES", 20), ("TEST_QUERIES", 7)):
        monkeypatch.setattr(collection, name, count)
    splits = {n: collection.load_split(n, tmp_path, lambda text: "d0" not in text) for n in collection.DEPTH}
    assert {n: len(s.queries) for n, s in splits.items()} == {"train": 39, "stop": 5, "dev": 20, "test": 7}
    others = {*harvest.TRAIN_PACKAGES, *harvest.DEV_PACKAGES, *harvest.TEST_PACKAGES}
    assert others.isdisjoint(collection.UNREAD_PACKAGES)
    assert len(set().union(*(s.queries for s in splits.values()))) == 39 + 5 + 20 + 7
    again = collection.load_split("dev", tmp_path, None)  # kept
    assert again.queries == splits["dev"].queries


def test_halves_have_about_as_many_queries():
    make = pytest.importorskip("make_collections")
    a, b = make.halves(list("edcba"), {"a": 10, "b": 6, "c": 5, "d": 1, "e": 1})
    assert (a, b) == (["a", "d", "e"], ["b", "c"])


def test_articles_are_kept_back_whole(tmp_path):
    make = pytest.importorskip("make_collections")
    source, folder = tmp_path / "squad", tmp_path / "choose"
    corpus = [json.dumps({"_id": f"p{i}", "title": f"article {i // 3}", "text": f"text {i}"}) for i in range(30)]
    write_lines(source / "corpus.jsonl.gz", corpus)
    write_lines(source / "queries.jsonl.gz", [json.dumps({"_id": f"q{i}", "text": f"what {i}"}) for i in range(60)])
    rows = [f"q{i}\tp{i // 2}\t1" for i in range(40)]  # the last ten paragraphs have no training question
    write_lines(source / "qrels" / "train.tsv.gz", ["query-id\tcorpus-id\tscore", *rows])
    make.write_squad(source, folder)
    found = {split: (folder / "qrels" / f"{split}.tsv").read_text().splitlines()[1:] for split in ("train", "dev")}
    assert sorted(found["train"] + found["dev"]) == sorted(rows)
    articles = {split: {int(row.split("\t")[1][1:]) // 3 for row in part} for split, part in found.items()}
    assert not articles["train"] & articles["dev"] and len(articles["dev"]) == 6
    assert formats.Corpus(folder)["p7"]["text"] == "text 7"
