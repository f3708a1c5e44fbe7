"""What a base LM is trained on: passages with the questions that it may read, and their share of the batches."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from small_data import write_folder, write_lines

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "base_lm"))

batches = pytest.importorskip("batches")
data = pytest.importorskip("data")
passages = pytest.importorskip("passages")
train = pytest.importorskip("train")


@pytest.fixture
def root(tmp_path):
    for name in passages.PASSAGES:
        write_folder(tmp_path / name)
    folder = write_folder(tmp_path / "quality" / "squad-choose")
    write_lines(folder / "qrels" / "lm.tsv", ["query-id\tcorpus-id\tscore", "q1\td1\t1", "q1\td4\t0", "q3\td2\t1"])
    return tmp_path


def test_questions_are_those_of_the_split_alone(root):
    texts = passages.passage_texts(root)
    assert len(texts) == 6 * len(passages.PASSAGES)
    asked = {title: questions for title, _, questions in texts if questions}
    assert asked == {"Tides": ["why do tides rise"], "Moon": ["moon month"]}


def test_a_missing_folder_is_named(root):
    (root / "cosqa").rename(root / "other")
    with pytest.raises(FileNotFoundError, match="cosqa is not there; --passages expects a folder with squad, dl19"):
        passages.passage_texts(root)


def test_batches_have_the_share_of_passages(root, monkeypatch):
    definitions = [
        data.Text(f"m.f{i}", f"def f{i}(x):\n    return x + {i}", [f"Add {i} to a number"] if i % 2 else [])
        for i in range(20)
    ]
    monkeypatch.setattr(data, "training_texts", lambda: definitions)
    texts = data.prepare(root / "made", 300, 40, 20, seed=0, passages=root)
    assert texts.first_passage == 20 and len(texts.documents) == 20 + 36
    drawn, original = [], batches.prompt_rows

    def watched(document, *rest):
        drawn.append(document)
        return original(document, *rest)

    monkeypatch.setattr(batches, "prompt_rows", watched)
    of_passages = {texts.documents[i].tobytes() for i in range(20, 56)}
    for share in (0.0, 0.75):
        drawn.clear()
        made = batches.query_batches(train.Recipe(batch=32, passages=share), texts, 0, decaying=False)
        assert len(made) == 8 and len(drawn) == 256
        found = np.mean([document.tobytes() in of_passages for document in drawn])
        assert found == pytest.approx(share, abs=0.1)
    assert json.loads((root / "made" / "tokenizer.json").read_text())
    recipe = train.Recipe(batch=32, passages=0.75, steps=8, copy_batch=4, copy_ids=50)
    ids = [train.copy_batch(recipe, step) for step in range(3)]
    assert all(row.shape[1] % 2 == 0 and 1 <= row.min() and row.max() < 50 for row in ids)
    read = train.query_batches(recipe, texts, 0, decaying=False)
    assert train.tokens_seen(recipe, texts, 3, 5) == {
        "copy": sum(row.numel() for row in ids),
        "query": sum(len(row[0]) for batch in read[:5] for row in batch),
    }


def test_each_stage_has_its_learning_rate(root, monkeypatch):
    definitions = [
        data.Text(f"m.f{i}", f"def f{i}(x):\n    return x + {i}", [f"Add {i} to a number"]) for i in range(20)
    ] + [data.Text(f"m.g{i}", f"def g{i}(): {i}", []) for i in range(9)]
    monkeypatch.setattr(data, "training_texts", lambda: definitions)
    monkeypatch.setattr(train, "DevSet", lambda *args: type("Dev", (), {"evaluate": lambda self, model: {}})())
    rates, update = [], train.Run.update
    monkeypatch.setattr(
        train.Run, "update", lambda self, loss, rate: (rates.append((self.stage, rate)), update(self, loss, rate))
    )
    recipe = train.Recipe(
        vocabulary=300,
        layers=1,
        width=16,
        inner_width=16,
        heads=2,
        key_value_heads=1,
        warmup=1,
        copy_most_steps=2,
        copy_batch=2,
        steps=8,
        batch=2,
        decay=0.01,
        copy_learning_rate=5e-4,
        learning_rate=1e-3,
        max_document_tokens=40,
        max_query_tokens=20,
        document_loss_tokens=2,
    )
    train.train(recipe, root / "run", 100, 100, None)
    assert rates[:3] == [("copy", 5e-4), ("copy", 5e-4), ("query", 1e-3)] and len(rates) == 10


def test_likelihoods_and_validation_loss_are_the_rerankers(monkeypatch):
    """`Reranker` is another way to the same numbers."""
    import evaluate

    import qpeft_ext as qpeft
    from qpeft_ext.demo import harvest
    from qpeft_ext.lm.loading import BASE_LM

    texts = ["def add(x, y): return x + y", "def area(r): return 3.14 * r ** 2", "class Stack: pop = push = None"]
    documents = {f"d{i}": {"id": f"d{i}", "title": f"m.f{i}", "text": text} for i, text in enumerate(texts)}
    queries = {"q0": "Add two numbers", "q1": "the area of a circle, given its radius", "q2": "last in first out"}
    qrels = {"q0": {"d2": 1}, "q1": {"d1": 1}, "q2": {"d0": 1}}
    monkeypatch.setattr(
        harvest, "harvest", lambda *args, **options: harvest.Collection(documents, queries, qrels, {}, {})
    )
    lm = qpeft.load_lm(str(BASE_LM), dtype="float32")
    model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none"))
    dev = evaluate.DevSet(model.prompt, 0, candidates=3)
    pairs = [(q, d) for q in range(3) for d in range(3)]
    sums = qpeft.Reranker(model).predict([(queries[f"q{q}"], documents[f"d{d}"]) for q, d in pairs])
    found = dev.log_likelihoods(lm, pairs)
    np.testing.assert_allclose([tokens.sum().item() for tokens in found], sums, atol=1e-3)
    measured, relevant = dev.evaluate(lm), sums[[2, 4, 6]].sum()
    assert measured["loss"] == pytest.approx(-relevant / sum(map(len, dev.queries)), abs=2e-4)
    characters = sum(len(text.replace(" ", "")) for text in queries.values())
    assert measured["loss_per_character"] == pytest.approx(-relevant / characters, abs=2e-4)
