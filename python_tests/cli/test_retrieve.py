"""``qpeft retrieve`` and ``qpeft evaluate`` on collections: which queries, which judgements."""

import gzip
import json
import re

import pytest
from cli.in_process import run_command
from jobs.tiny_job import save_lm
from small_data import QUERIES, shared_data, write_folder, write_lines

from qpeft_ext import formats
from qpeft_ext.cli import main, train
from qpeft_ext.evaluation.measures import evaluate
from qpeft_ext.formats.answers import has_answer
from qpeft_ext.ranking.first_stage import bm25_run

pytestmark = pytest.mark.slow


PASSAGES = ["id\ttext\ttitle", "1\tthe sea rose in 1984\tTides", "2\tthe moon is round\tMoon", "3\tround sea\tSea"]
RECORDS = [
    {"question": "who is round", "answers": ["Moon"], "ctxs": [{"id": 2, "score": 2, "has_answer": False}]},
    {"question": "when did the sea rise", "answers": ["1984"], "ctxs": []},
]


def test_retrieve(tmp_path, capsys):
    folder = write_folder(tmp_path / "data")
    out = run_command(capsys, "retrieve", "--data", folder, "--output", tmp_path / "bm25.gz", "--top-k", 2, "--b", 0.5)
    run = formats.read_run(tmp_path / "bm25.gz")
    expected = bm25_run(formats.Corpus(folder), QUERIES, 2, b=0.5)
    assert {q: [d for d, _ in r] for q, r in run.items()} == {q: [d for d, _ in r] for q, r in expected.items()}
    assert "BM25 (k1 0.9, b 0.5) over 6 documents: wrote 5 lines for 3 queries" in out and "nDCG@10" in out


def test_queries_without_candidates_are_counted_and_unjudged_splits_are_not_evaluated(tmp_path, capsys):
    folder = write_folder(tmp_path / "data")
    write_lines(folder / "queries.jsonl", ['{"_id": "q1", "text": "zebra"}', '{"_id": "q2", "text": "boats"}'])
    for file in (folder / "qrels").iterdir():
        file.unlink()
    out = run_command(capsys, "retrieve", "--data", folder, "--output", tmp_path / "run")
    assert "1 query has no candidate: no document holds a word of it" in out and "nDCG" not in out


def test_question_sets_are_judged_by_their_answers(tmp_path, capsys):
    """The route of the paper: questions, BM25 over psgs_w100, Success@k = top-k accuracy by the matching rule."""
    write_lines(tmp_path / "psgs_w100.tsv.gz", PASSAGES)
    questions = write_lines(tmp_path / "nq.qa.csv", ["when did the sea rise\t['1984']", "who is round\t['moon']"])
    out = run_command(capsys, "retrieve", "--data", questions, "--output", tmp_path / "run", "--measures", "Success@1")
    assert "0.5000" in out  # "sea" and "rise" find passage 3 first, which does not hold 1984
    retrieved = formats.read_run(tmp_path / "run")
    assert [d for d, _ in retrieved["0"]] == ["3", "1"] and retrieved["1"][0][0] in "23"
    again = run_command(capsys, "evaluate", "--qrels", questions, tmp_path / "run", "--measures", "Success@2")
    assert "1.0000" in again and "2 queries" in again


# each in the way its files are written: bare, csv with doubled quotation marks, one-element lists, numbers and names
QUESTION_SETS = {
    "nq": [("who rounded the sea first", ["Wilhelm R\u00f6ntgen", "1984"]), ("what is round", ["the Moon"])],
    "trivia": [('Which "sea" rose?', ["Sea Tides", "the '84 sea", 'a "sea"']), ("what is round?", ["MOON"])],
    "webq": [("what year did the sea rise?", ["1984"]), ("what is round?", ["moon", "sea"])],
    "squad1": [("When did the sea's level rise?", ["1984", "in 1984", "19845"]), ("What's round?", ["moon is"])],
}


@pytest.mark.parametrize("name", QUESTION_SETS)
@pytest.mark.parametrize("quoted", [False, True])
def test_the_papers_question_sets(tmp_path, capsys, name, quoted):
    """Questions with BM25 over psgs_w100, and the same candidates as a retriever's output, without labels: top-k
    accuracy by hand, by the qa.csv and by the json."""

    def column(text):
        return '"' + text.replace('"', '""') + '"' if quoted or '"' in text else text

    write_lines(tmp_path / "psgs_w100.tsv", PASSAGES)
    texts = {columns[0]: columns[1] for columns in (row.split("\t") for row in PASSAGES[1:])}
    questions = write_lines(
        tmp_path / f"{name}-test.qa.csv",
        (f"{column(question)}\t{column(repr(answers))}" for question, answers in QUESTION_SETS[name]),
    )
    data = formats.open_collection(questions)
    assert list(data.queries().values()) == [question for question, _ in QUESTION_SETS[name]]
    assert list(data.answers().values()) == [answers for _, answers in QUESTION_SETS[name]]
    run_command(capsys, "retrieve", "--data", questions, "--output", tmp_path / "run", "--measures", "Success@1")
    run = formats.read_run(tmp_path / "run")
    (tmp_path / "out.json").write_text(
        json.dumps(
            [
                {
                    "question": question,
                    "answers": answers,
                    "ctxs": [{"id": d, "score": str(s)} for d, s in run.get(str(i), [])],
                }
                for i, (question, answers) in enumerate(QUESTION_SETS[name])
            ]
        )
    )
    for k in (1, 2, 3):
        hits = [
            any(
                re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", texts[d], re.IGNORECASE)
                for answer in answers
                for d, _ in run.get(str(i), [])[:k]
            )
            for i, (_, answers) in enumerate(QUESTION_SETS[name])
        ]
        for judge in (questions, tmp_path / "out.json"):
            result = evaluate(run, formats.read_judgements(judge, None, [run]), [f"Success@{k}"])
            assert result.means[f"Success@{k}"] == sum(hits) / 2, (k, judge)
    assert True in hits


def test_labels_of_the_file_win_over_the_rule(tmp_path, capsys):
    write_lines(tmp_path / "psgs_w100.tsv", PASSAGES)
    (tmp_path / "nq-test.json").write_text(json.dumps(RECORDS))
    data = formats.open_collection(tmp_path / "nq-test.json")
    run = {"0": [("3", 2.0), ("2", 1.0)], "1": [("1", 1.0)]}
    assert data.judge(None, [run]) == {"0": {"2": 0, "3": 0}, "1": {"1": 1}}  # 2 holds "moon", but is labelled
    formats.write_run(tmp_path / "run", run)
    out = run_command(capsys, "evaluate", "--qrels", tmp_path / "nq-test.json", tmp_path / "run", "--measures", "RR@10")
    assert "0.5000" in out
    folder = run_command(
        capsys, "evaluate", "--qrels", tmp_path, "--split", "nq-test", tmp_path / "run", "--measures", "RR@10"
    )
    assert folder == out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--qrels", "{folder}", "--split", "dev"], "has no split 'dev'; there are: test, train"),
        (["--qrels", "{folder}/corpus.jsonl"], "(jsonl) holds no qrels; it holds corpus"),
        (["--qrels", "{folder}/none.tsv"], "none.tsv: no such file; expected qrels"),
        (["--qrels", "{folder}", "--ties", "id"], "ties must be one of order, trec_eval, got 'id'"),
    ],
)
def test_what_does_not_judge(tmp_path, capsys, arguments, message):
    folder = write_folder(tmp_path / "data")
    arguments = [argument.format(folder=folder) for argument in arguments]
    assert main(["evaluate", *arguments, str(folder / "run.trec")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "{folder}", "--top-k", "0"], "--top-k must be at least 1, got 0"),
        (["--data", "{folder}", "--b", "2"], "b from 0 to 1"),
        (["--data", "{folder}/run.trec"], "looks like a TREC run, which has no texts"),
        (["--data", "{folder}/corpus.jsonl"], "(jsonl) holds no queries; it holds corpus"),
        (["--data", "{folder}", "--measures", "none"], "unknown measure 'none'"),
        (["--data", "{folder}", "--split", "dev"], "has no split 'dev'; there are: test, train"),
        (["--data", "nowhere/at/all"], "nowhere/at/all: no such file or folder"),
    ],
)
def test_what_cannot_be_retrieved(tmp_path, capsys, arguments, message):
    folder = write_folder(tmp_path / "data")
    code = main(["retrieve", "--output", str(tmp_path / "out"), *(a.format(folder=folder) for a in arguments)])
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_rerank_takes_the_candidates_and_labels_of_the_collection(tmp_path, capsys):
    """No BEIR folder anywhere: retriever output over psgs_w100.tsv, and candidates with texts."""
    save_lm(tmp_path / "lm")
    capsys.readouterr()  # transformers' progress bar
    write_lines(tmp_path / "psgs_w100.tsv.gz", PASSAGES)
    record = {"question": "who is round", "answers": ["moon"], "ctxs": [{"id": i, "score": -i} for i in (1, 2, 3)]}
    (tmp_path / "nq-test.json").write_text(json.dumps([record]))
    options = ["--base-model", tmp_path / "lm", "--upr", "--device", "cpu"]
    out = run_command(
        capsys,
        "rerank",
        "--data",
        tmp_path / "nq-test.json",
        "--output",
        tmp_path / "run",
        "--top-k",
        2,
        "--measures",
        "Success@2",
        *options,
    )
    assert "1 candidate beyond the 2 best of its query is left out" in out and "│candidates" in out and "1.0000" in out
    assert {d for d, _ in formats.read_run(tmp_path / "run")["0"]} == {"1", "2"}
    run_command(capsys, "convert", tmp_path / "nq-test.json", tmp_path / "c.jsonl", "--to", "rankllm")
    out = run_command(
        capsys, "rerank", "--data", tmp_path / "c.jsonl", "--output", tmp_path / "again", "--top-k", 2, *options
    )
    assert "has no judgements for these queries, so nothing is evaluated; its splits: none" in out
    assert (tmp_path / "again").read_text() == (tmp_path / "run").read_text()


def test_train_takes_the_examples_of_the_collection(tmp_path, capsys):
    passage = {"title": "T", "text": "p", "passage_id": "1"}
    (tmp_path / "nq-train.json").write_text(
        json.dumps(
            [
                {"question": "why", "answers": ["a"], "positive_ctxs": [passage], "hard_negative_ctxs": [passage]},
                {"question": "who", "answers": [], "positive_ctxs": []},
            ]
        )
    )
    options = train.TrainOptions(base_model="LM", output=tmp_path / "adapter", data=str(tmp_path / "nq-train.json"))
    examples, dev = train._read(options)
    assert [example["query"] for example in examples] == ["why"] and dev is None
    assert capsys.readouterr().out == "1 training example; 1 question without a positive passage left out\n"


def test_the_matching_rule_on_squad():
    """The paragraph that a question of SQuAD was asked about holds its answer; another one seldom does."""
    folder = shared_data("squad")
    with gzip.open(folder / "queries.jsonl.gz", "rt", encoding="utf-8") as file:
        answers = {record["_id"]: record["answers"] for record in map(json.loads, file) if record.get("answers")}
    gold = {q: next(iter(judged)) for q, judged in formats.beir.read_qrels(folder, "dev").items() if q in answers}
    corpus, some = formats.Corpus(folder), list(gold)[::20]
    held = [has_answer(corpus[gold[q]]["text"], answers[q]) for q in some]
    shifted = [has_answer(corpus[gold[q]]["text"], answers[other]) for q, other in zip(some, some[37:], strict=False)]
    assert len(held) > 250 and sum(held) / len(held) > 0.97 and sum(shifted) / len(shifted) < 0.2
