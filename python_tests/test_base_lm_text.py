"""What a base LM is trained on: passages with the questions that it may read, and their share of the batches."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from small_data import write_folder, write_lines

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "base_lm"))

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
    asked = {text.title: text.sentences for text in texts if text.sentences}
    assert asked == {"Tides": ["why do tides rise"], "Moon": ["moon month"]}


def test_a_missing_folder_is_named(root):
    (root / "cosqa").rename(root / "other")
    with pytest.raises(FileNotFoundError, match="cosqa is not there; --passages expects a folder with squad, dl19"):
        passages.passage_texts(root)


def test_batches_have_the_share_of_passages(root, monkeypatch):
    definitions = [data.Text(f"m.f{i}", f"def f{i}(x):\n    return x + {i}", [f"Add {i} to a number"] if i % 2 else [])
                   for i in range(20)]
    monkeypatch.setattr(data, "training_texts", lambda: definitions)
    texts = data.prepare(root / "made", 300, 40, 20, seed=0, passages=root)
    assert texts.first_passage == 20 and len(texts.documents) == 20 + 36
    drawn, original = [], train.prompt_rows

    def watched(document, *rest):
        drawn.append(document)
        return original(document, *rest)

    monkeypatch.setattr(train, "prompt_rows", watched)
    of_passages = {texts.documents[i].tobytes() for i in range(20, 56)}
    for share in (0.0, 0.75):
        drawn.clear()
        batches = train.query_batches(train.Recipe(batch=32, passages=share), texts, 0, decaying=False)
        assert len(batches) == 8 and len(drawn) == 256
        found = np.mean([document.tobytes() in of_passages for document in drawn])
        assert found == pytest.approx(share, abs=0.1)
    assert json.loads((root / "made" / "tokenizer.json").read_text())
