"""Options that would have no effect beside the others are refused, in one line that says which and why."""

import json
from pathlib import Path

import pytest

from qpeft_ext.cli import main
from qpeft_ext.demo.adapters import ADAPTER
from qpeft_ext.lm.loading import BASE_LM

LM = f"--base-model {BASE_LM}"
ROWS = {
    "fuse a.trec b.trec --output o --normalization z_score": "--normalization belongs to --method scores",
    "fuse a.trec b.trec --output o --measure RR@10": "--measure belongs to --method scores",
    "fuse a.trec b.trec --output o --dev-qrels q.tsv": "--dev-qrels belongs to --method scores",
    "fuse a.trec b.trec --output o --method scores --weights 1,2 --k 10": "--k belongs to --method rrf",
    "fuse a.trec b.trec --output o --method scores --weights 1,2 --dev-run a.trec --dev-run b.trec --dev-qrels q.tsv": (
        "--dev-run is for choosing weights, and --weights gives them"
    ),
    "evaluate --qrels q.tsv --split dev a.trec": "q.tsv is a qrels file, which has no split dev",
    f"distill --teacher {ADAPTER} {LM} --train e.jsonl --output o --margin 1": "does nothing with margin_mse",
    "convert e.jsonl o --to trec --num-negatives 3": "--num-negatives is of --to dpr and jsonl, and does nothing with",
    "convert e.jsonl o --to rankllm --seed 0": "--seed is of --to dpr and jsonl, and does nothing with rankllm",
    "convert e.jsonl o --to jsonl --num-negatives 3": "--num-negatives is of data with qrels, and e.jsonl has training",
    "convert e.jsonl o --to dpr --seed 1": "--seed is of data with qrels, and e.jsonl has training examples",
    "convert e.jsonl o --to jsonl --run a.trec": "--run is of data with qrels, and e.jsonl has training examples",
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.trec").write_text("q1 Q0 d1 1 2.0 x\nq1 Q0 d2 2 1.0 x\n")
    (tmp_path / "q.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    example = {"query": "a query", "positives": ["a text"], "negatives": ["another text"]}
    (tmp_path / "e.jsonl").write_text(json.dumps(example) + "\n")


@pytest.mark.parametrize("arguments", ROWS)
def test_an_option_without_effect_is_refused(arguments, files, capsys):
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert ROWS[arguments] in error and error.count("\n") == 1


def test_the_same_options_where_they_have_one(files, capsys):
    assert main("fuse a.trec b.trec --output o --method scores --weights 1,2 --normalization z_score".split()) == 0
    assert main("fuse a.trec b.trec --output o --k 10".split()) == 0
    assert main("evaluate --qrels q.tsv a.trec".split()) == 0
    assert main("convert e.jsonl c.jsonl --to jsonl".split()) == 0


def test_negatives_are_drawn_where_examples_are_made(files):
    Path("data/qrels").mkdir(parents=True)
    Path("data/corpus.jsonl").write_text("".join(f'{{"_id": "d{i}", "text": "text {i}"}}\n' for i in range(9)))
    Path("data/queries.jsonl").write_text('{"_id": "q1", "text": "a query"}\n')
    Path("data/qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    candidates = "".join(f"q1 Q0 d{i} {i + 1} {9 - i}.0 x\n" for i in range(9))
    Path("candidates.trec").write_text(candidates)
    for number, options in enumerate(("--num-negatives 3", "--num-negatives 3 --seed 5", "")):
        run = f"convert data {number}.jsonl --to jsonl --run candidates.trec {options}"
        assert main(run.split()) == 0
    few, others, most = (json.loads(Path(f"{number}.jsonl").read_text())["negatives"] for number in range(3))
    assert len(few) == len(others) == 3 and few != others and len(most) == 8  # all but the relevant one
