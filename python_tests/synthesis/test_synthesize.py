"""``qpeft synthesize``: from documents to an adapter, resuming after a real kill, and what is refused."""

import gzip
import json
import signal

import pytest
import transformers
from families.tiny import tiny_lm
from jobs.processes import forked_command
from small_data import write_lines
from synthesis.word_tokenizer import WORDS, word_tokenizer

import qpeft_ext as qpeft
from qpeft_ext import formats
from qpeft_ext.cli import main
from qpeft_ext.ranking.first_stage import bm25_run
from qpeft_ext.synthesis.generator import QueryGenerator
from qpeft_ext.synthesis.training_set import PartialQueries

pytest.importorskip("bm25s", reason="the extra qpeft_ext[bm25] is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A corpus of 60 documents, the first of them empty, and a random LM over a few words."""
    folder = tmp_path_factory.mktemp("job")
    write_lines(
        folder / "docs.jsonl",
        (
            json.dumps(
                {"id": f"d{i}", "text": " ".join(WORDS[(7 * i + j * (1 + i % 5)) % 20] for j in range(i and 2 + i % 9))}
            )
            for i in range(60)
        ),
    )
    lm = tiny_lm("llama")
    lm.resize_token_embeddings(len(word_tokenizer()))
    lm.save_pretrained(folder / "lm")
    word_tokenizer().save_pretrained(folder / "lm")
    return folder


def command(job, output, *options):
    return [
        "synthesize",
        "--data",
        str(job / "docs.jsonl"),
        "--base-model",
        str(job / "lm"),
        "--output",
        str(output),
        "--device",
        "cpu",
        "--max-new-tokens",
        "8",
        "--max-tokens-per-batch",
        "120",
        "--min-tokens",
        "2",
        "--keep-unfinished",
        "--queries-per-document",
        "2",
        *map(str, options),
    ]


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def expected(job, tmp_path_factory):
    """The file of one process that nothing happens to."""
    folder = tmp_path_factory.mktemp("expected")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QPEFT_CACHE", str(folder / "cache"))
        assert main(command(job, folder / "out.jsonl")) == 0
    return folder / "out.jsonl"


def test_from_documents_to_an_adapter(job, expected, tmp_path, capsys):
    rows, about = read_rows(expected), json.loads(expected.with_name("out.jsonl.json").read_text())
    corpus = formats.open_collection(job / "docs.jsonl").corpus
    assert len(rows) == about["queries"]["kept"] > 20 and about["queries"]["generated"] == 2 * 59
    assert sum(about["queries"]["dropped"].values()) == 2 * 59 + 1 - len(rows)  # and the document without text
    assert about["base model"] == str(job / "lm") and about["settings"]["seed"] == 0
    run = bm25_run(corpus, {row["query_id"]: row["query"] for row in rows}, 41)
    order = list(corpus)
    assert [order.index(row["positives"][0]["id"]) for row in rows] == sorted(
        order.index(row["positives"][0]["id"]) for row in rows
    )
    for row in rows:
        (document,) = row["positives"]
        assert row["query_id"].rpartition("-")[0] == document["id"] and document == corpus[document["id"]]
        assert [d for d, _ in run[row["query_id"]]].index(document["id"]) == row["round_trip_rank"] - 1 < 20
        others = {d for d, _ in run[row["query_id"]]} - {document["id"]}
        assert len(row["negatives"]) == min(11, len(others)) and {d["id"] for d in row["negatives"]} <= others
    assert formats.read_examples(expected) == rows
    assert (
        main(
            [
                "train",
                "--base-model",
                str(job / "lm"),
                "--train",
                str(expected),
                "--output",
                str(tmp_path / "a"),
                "--rank",
                "8",
                "--max-steps",
                "2",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert f"{len(rows)} training examples" in capsys.readouterr().out


def test_scores_are_the_rerankers(job, expected):
    lm, config = qpeft.load_lm(job / "lm"), qpeft.QPeftConfig(clues="none")
    reranker = qpeft.Reranker(qpeft.get_qpeft_model(lm, config))
    rows = read_rows(expected)[:10]
    scores = reranker.predict([(row["query"], row["positives"][0]) for row in rows])
    for row, score in zip(rows, scores, strict=True):
        assert row["log_likelihood"] == pytest.approx(score / reranker.model.prompt.count(row["query"]), abs=1e-5)


def test_killed(job, expected, tmp_path, capsys):
    """SIGKILL in the middle, a torn line behind it; the same command ends with the file of an undisturbed run."""
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    process = forked_command(command(job, out))
    process.wait_for_size(part, 1500)
    process.kill()
    assert process.end()[0] == -signal.SIGKILL and not out.exists()
    lines = part.read_bytes().splitlines(keepends=True)
    assert 1 < len(lines)
    part.write_bytes(b"".join(lines[:-1]) + lines[-1][:-1])  # complete but for its end
    there = sum(len(json.loads(line)) for line in lines[:-1])
    assert main(command(job, out)) == 0
    text = capsys.readouterr().out
    assert f"{part} keeps the queries of {there} of 60 documents: going on from there" in text
    assert out.read_bytes() == expected.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out.jsonl", "out.jsonl.json"]


def interrupt_after(monkeypatch, batches):
    add, seen = PartialQueries.add, []

    def interrupted(self, batch):
        if len(seen) == batches:
            raise KeyboardInterrupt
        seen.append(1)
        add(self, batch)

    monkeypatch.setattr(PartialQueries, "add", interrupted)


def test_interrupted(job, expected, tmp_path, capsys, monkeypatch):
    """Other settings of the LM's part are refused; other filters are not, since they come last."""
    out, part = tmp_path / "out.jsonl.gz", tmp_path / "out.jsonl.gz.part"
    interrupt_after(monkeypatch, 4)
    assert main(command(job, out)) == 130
    monkeypatch.undo()
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path / "cache"))
    there = sum(len(json.loads(line)) for line in part.read_text().splitlines())
    assert capsys.readouterr().err == (
        f"qpeft synthesize: error: interrupted; {part} keeps the queries of {there} of 60 documents: the same command "
        f"goes on from there\n"
    )
    before = part.read_bytes()
    for options, difference in (
        (["--seed", 1], "seed was 0, is 1"),
        (["--top-p", 0.5], "top_p was 0.95, is 0.5"),
        (["--documents", 7], "documents was 60, is 7"),
        (["--instruction", "Ask:"], "instruction was Please write"),
        (["--dtype", "bfloat16"], "dtype was None, is bfloat16"),
    ):
        assert main(command(job, out, *options)) == 2
        assert difference in capsys.readouterr().err and part.read_bytes() == before
    assert main(command(job, out, "--min-log-likelihood", -1e-9)) == 2
    error = capsys.readouterr().err
    assert "none of the 118 generated queries was kept; loosen the filters: " in error and " have no word, " in error
    assert "keeps the queries of 59 of 60 documents" in error and not out.exists()
    monkeypatch.setattr(QueryGenerator, "__call__", lambda *_: pytest.fail("it is all there"))
    assert main(command(job, out)) == 0
    assert gzip.decompress(out.read_bytes()) == expected.read_bytes() and not part.exists()


def test_a_part_that_was_changed(job, expected, tmp_path, caplog, monkeypatch):
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    interrupt_after(monkeypatch, 3)
    assert main(command(job, out)) == 130
    monkeypatch.undo()
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path / "cache"))
    first, second, *rest = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join([first, *rest, second]))  # what was whole before the change is kept
    with caplog.at_level("WARNING"):
        assert main(command(job, out)) == 0
    assert f"{part} was changed from line 2 on" in caplog.text
    assert out.read_bytes() == expected.read_bytes()
    out.unlink()
    assert main(command(job, out, "--no-resume", "--documents", 5, "--num-negatives", 0, "--no-round-trip")) == 0
    assert all(row["negatives"] == [] and row["round_trip_rank"] is None for row in read_rows(out))


def test_what_is_refused(job, tmp_path, capsys):
    transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=24, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    ).save_pretrained(tmp_path / "t5")
    word_tokenizer().save_pretrained(tmp_path / "t5")
    capsys.readouterr()
    folder = tmp_path / "data"
    write_lines(folder / "queries.jsonl", ['{"_id": "q", "text": "x"}'])
    for options, message in [
        (["--base-model", tmp_path / "t5"], "T5"),
        (["--documents", 0], "--documents must be at"),
        (["--round-trip-top", 0], "--round-trip-top must be at least 1, got 0"),
        (["--top-p", 2], "top_p must be"),
        (["--keep-fraction", 0], "keep_fraction must be above 0"),
        (["--data", folder], "no BEIR folder with corpus"),
        (["--output", tmp_path], "is a folder"),
        (["--max-query-tokens", 0], "max_query_tokens must be at least 1"),
        (["--max-new-tokens", 600], "context of 512; lower max_document_tokens or max_new_tokens"),
        (["--no-round-trip", "--round-trip-top", 3], "--no-round-trip keeps queries whatever BM25 finds"),
    ]:
        assert main(command(job, tmp_path / "out", *options)) == 2, options
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert {path.name for path in tmp_path.iterdir()} <= {"t5", "data", "cache"}, options
