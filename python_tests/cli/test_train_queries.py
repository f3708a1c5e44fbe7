"""``--queries`` of `qpeft train`: which examples are trained on."""

import json

import pytest
from jobs.tiny_job import save_lm
from small_data import write_folder, write_lines

from qpeft_ext.cli import main

pytestmark = pytest.mark.slow


def test_some_of_the_queries(tmp_path, monkeypatch):
    """Drawn with the seed, in the order that they have, from files and from collections."""
    from qpeft_ext.training import fit as module

    write_folder(tmp_path / "data")
    command = ("train", "--base-model", save_lm(tmp_path / "lm"), "--output", tmp_path / "adapter", "--device", "cpu")
    words = [f"word {i}" for i in range(20)]
    write_lines(
        tmp_path / "examples.jsonl",
        (json.dumps({"query": word, "positives": [word], "negatives": ["no"]}) for word in words),
    )
    seen = []
    monkeypatch.setattr(module, "QPeftTrainer", lambda **given: seen.append(given["train_dataset"]) or 1 / 0)

    def queries(*options) -> list[str]:
        with pytest.raises(ZeroDivisionError):
            main([str(x) for x in (*command, *options)])
        return [example["query"] for example in seen.pop()]

    file = ("--train", tmp_path / "examples.jsonl", "--queries")
    drawn, others = queries(*file, 5), queries(*file, 5, "--seed", 1)
    assert len(set(drawn)) == len(set(others)) == 5 and drawn != others
    assert drawn == sorted(drawn, key=words.index) and queries(*file, 5) == drawn
    assert queries(*file, 50) == words
    assert len(queries("--data", tmp_path / "data", "--run", tmp_path / "data" / "run.trec", "--queries", 2)) == 2
