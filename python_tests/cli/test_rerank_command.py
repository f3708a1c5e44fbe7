"""`qpeft rerank`: what it prints and writes when all is well."""

import json
import re
import shutil

import pytest
from cli.in_process import run_command
from jobs.tiny_job import copy_job, make_job, save_adapter
from small_data import DOCUMENTS, QUERIES, RUN, write_folder, write_lines

import qpeft_ext as qpeft
from qpeft_ext import formats
from qpeft_ext.cli import main
from qpeft_ext.ranking.systems import Systems, SystemsSpec

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return make_job(tmp_path_factory.mktemp("job"))


def test_rerank(job, tmp_path, capsys):
    """The written run is what the public API gives, query by query."""
    out = run_command(
        capsys,
        "rerank",
        "--model",
        job / "adapter",
        "--data",
        job / "data",
        "--run",
        job / "data" / "run.trec",
        "--output",
        tmp_path / "out.trec",
        "--upr",
        "--similarity-only",
        "--device",
        "cpu",
        "--measures",
        "nDCG@10 RR@10",
    )
    reranker = qpeft.Reranker.from_pretrained(job / "adapter")
    corpus = formats.Corpus(job / "data")
    written = formats.read_run(tmp_path / "out.trec")
    assert list(written) == list(RUN)
    for query_id, ranking in written.items():
        ids = [doc_id for doc_id, _ in RUN[query_id]]
        expected = reranker.rank(QUERIES[query_id], [corpus[doc_id] for doc_id in ids])
        assert [doc_id for doc_id, _ in ranking] == [ids[row["corpus_id"]] for row in expected]
        assert [s for _, s in ranking] == pytest.approx([row["score"] for row in expected], abs=1e-4)
    for system in ("run ", "Q-PEFT-R", "UPR", "similarity only"):
        assert f"│{system}" in out
    assert "Q-PEFT-R: 3 queries, 9 pairs in" in out and "pairs/s" in out and "wrote 9 lines to" in out
    assert "3 queries; difference to run" in out


def test_a_first_stage_called_as_the_system_keeps_its_row(job, tmp_path, capsys):
    """The run of UPR, reranked by UPR once more: both are in the table, and are compared."""
    formats.write_run(tmp_path / "UPR.trec", RUN)
    options = ["--upr", "--base-model", job / "lm", "--data", job / "data", "--device", "cpu"]
    out = run_command(capsys, "rerank", *options, "--run", tmp_path / "UPR.trec", "--output", tmp_path / "out.trec")
    assert "│UPR (before)" in out and "│UPR  " in out and "difference to UPR (before)" in out


def test_a_threshold_leaves_documents_out_of_the_run(job, tmp_path, capsys):
    reranker = qpeft.Reranker.from_pretrained(job / "adapter")
    corpus, output = formats.Corpus(job / "data"), tmp_path / "out.trec"
    lists = [[corpus[doc_id] for doc_id, _ in ranking] for ranking in RUN.values()]
    every = reranker.rank_many([QUERIES[query_id] for query_id in RUN], lists, threshold=0)
    relevances = sorted(row["relevance"] for rows in every for row in rows)
    cut = (relevances[3] + relevances[4]) / 2  # of nine
    command = ["rerank", "--model", job / "adapter", "--data", job / "data", "--run", job / "data" / "run.trec"]
    out = run_command(capsys, *command, "--output", output, "--device", "cpu", "--threshold", cut)
    kept = {
        query_id: [ranking[row["corpus_id"]][0] for row in rows if row["relevance"] >= cut]
        for (query_id, ranking), rows in zip(RUN.items(), every, strict=True)
    }
    written = formats.read_run(output)
    assert {query_id: [doc_id for doc_id, _ in written.get(query_id, ())] for query_id in RUN} == kept
    assert "wrote 5 lines" in out and not list(tmp_path.glob("*.part*"))
    assert main([*map(str, command), "--output", str(output), "--threshold", "3"]) == 2
    assert "--threshold must be in [0, 1], got 3" in capsys.readouterr().err


def test_identical_ids_are_left_out_and_counted(job, tmp_path, capsys):
    """They leave a given run, BM25's candidates (of which there are still as many as asked for), and negatives."""
    data = tmp_path / "data"
    data.mkdir()
    write_lines(
        data / "corpus.jsonl",
        [
            json.dumps({"_id": i, "text": text})
            for i, text in (("a", "the sea and the moon"), ("b", "the moon"), ("c", "the sea"))
        ],
    )
    write_lines(
        data / "queries.jsonl",
        [json.dumps({"_id": i, "text": text}) for i, text in (("a", "the sea and the moon"), ("b", "the moon"))],
    )
    (data / "qrels").mkdir()
    write_lines(data / "qrels" / "test.tsv", ["a\tb\t1", "b\tc\t1"])
    run = {"a": [("a", 3.0), ("b", 2.0), ("c", 1.0)], "b": [("b", 3.0), ("a", 2.0)]}
    formats.write_run(tmp_path / "run.trec", run)
    out = run_command(
        capsys,
        "retrieve",
        "--data",
        data,
        "--top-k",
        1,
        "--output",
        tmp_path / "bm25",
        "--measures",
        "nDCG@10",
        "--ignore-identical-ids",
    )
    assert "BM25: 2 candidates with the id of their query are left out" in out
    found = formats.read_run(tmp_path / "bm25")
    assert found["a"][0][0] in ("b", "c") and found["b"][0][0] == "a" and set(map(len, found.values())) == {1}
    rerank = ("rerank", "--model", job / "adapter", "--data", data, "--device", "cpu", "--ignore-identical-ids")
    out = run_command(capsys, *rerank, "--run", tmp_path / "run.trec", "--top-k", 2, "--output", tmp_path / "out")
    assert "run: 2 candidates with the id of their query are left out" in out and "wrote 3 lines" in out
    written = formats.read_run(tmp_path / "out")
    assert {q: sorted(d for d, _ in ranking) for q, ranking in written.items()} == {"a": ["b", "c"], "b": ["a"]}
    out = run_command(capsys, *rerank, "--top-k", 1, "--output", tmp_path / "out2")
    assert "wrote 2 lines" in out
    formats.write_run(tmp_path / "alone.trec", {"a": run["a"], "b": [("b", 1.0)]})  # nothing is left of b
    out = run_command(capsys, *rerank, "--run", tmp_path / "alone.trec", "--output", tmp_path / "out3")
    assert "no candidates for 1 query; it counts as 0" in out and list(formats.read_run(tmp_path / "out3")) == ["a"]


def test_ids_with_blanks_are_named_before_the_work(job, tmp_path, capsys):
    write_lines(tmp_path / "run.tsv", ["q1\tQ0\td1\t1\t1.0\tt", "q1\tQ0\td 2\t2\t0.5\tt"])
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "corpus.jsonl", ['{"_id": "d1", "text": "a"}', '{"_id": "d 2", "text": "b"}'])
    write_lines(tmp_path / "data" / "queries.jsonl", ['{"_id": "q1", "text": "a"}'])
    assert (
        main(
            [
                "rerank",
                "--model",
                str(job / "adapter"),
                "--data",
                str(tmp_path / "data"),
                "--run",
                str(tmp_path / "run.tsv"),
                "--output",
                str(tmp_path / "out"),
            ]
        )
        == 2
    )
    assert "run.tsv, line 2: doc_id must be text without white space in a TREC run" in capsys.readouterr().err
    write_lines(tmp_path / "data" / "queries.jsonl", ['{"_id": "q 1", "text": "a"}'])
    assert main(["retrieve", "--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]) == 2
    assert "data: query_id must be text without white space in a TREC run, got 'q 1'" in capsys.readouterr().err


def test_the_attention_of_the_lm_can_be_chosen(job, tmp_path, capsys, monkeypatch):
    chosen = []
    forward = qpeft.QPeftModel.forward

    def spy(model, *args, **options):
        chosen.append(model.lm.config._attn_implementation)
        return forward(model, *args, **options)

    monkeypatch.setattr(qpeft.QPeftModel, "forward", spy)
    command = ["rerank", "--model", job / "adapter", "--data", job / "data", "--upr"]
    for name in ("eager", "sdpa"):
        run_command(capsys, *command, "--output", tmp_path / f"{name}.trec", "--attention", name)
    assert chosen == ["eager"] * (len(chosen) // 2) + ["sdpa"] * (len(chosen) // 2)
    eager, sdpa = (formats.read_run(tmp_path / f"{name}.trec")["q1"] for name in ("eager", "sdpa"))
    assert dict(eager) == pytest.approx(dict(sdpa), abs=1e-4)
    assert main([*map(str, command), "--output", str(tmp_path / "x"), "--attention", "flush"]) == 2
    assert "cannot load the base LM" in capsys.readouterr().err


@pytest.mark.parametrize("options", [
    {"clues": "top_k", "k": 2, "filters": ("query_tokens",), "similarity": "dot"},
    {"clues": "attention", "k": 3, "num_heads": 2, "filters": ("query_tokens",)},
])  # fmt: skip
def test_similarity_only_is_that_of_the_adapters_clues(job, tmp_path, options):
    save_adapter(tmp_path / "adapter", job / "lm", **options)
    spec = SystemsSpec(str(job / "data"), str(tmp_path / "adapter"), upr=True, similarity_only=True)
    systems = Systems(spec, "cpu")
    queries, texts = list(QUERIES.values()), [f"{title} {text}" for title, text in DOCUMENTS.values()]
    documents = [texts] * len(queries)
    expected = qpeft.Reranker.from_pretrained(tmp_path / "adapter").similarity(queries, documents)
    ranked = systems.ranker("similarity only")(queries, documents)
    assert [sorted(row) for row in ranked] == [list(enumerate(scores)) for scores in expected]
    default = Systems(SystemsSpec(str(job / "data"), base_model=str(job / "lm"), similarity_only=True), "cpu")
    assert default.ranker("similarity only")(queries, documents) != ranked


def test_rerank_with_bm25_and_without_qrels(job, tmp_path, capsys):
    data = write_folder(tmp_path / "data")
    for file in (data / "qrels").iterdir():
        file.unlink()
    out = run_command(
        capsys,
        "rerank",
        "--base-model",
        job / "lm",
        "--upr",
        "--data",
        data,
        "--top-k",
        2,
        "--output",
        tmp_path / "out.trec.gz",
    )
    written = formats.read_run(tmp_path / "out.trec.gz")
    assert list(written) == list(QUERIES) and max(map(len, written.values())) == 2
    assert "nothing is evaluated" in out and "nDCG" not in out


def test_rerank_says_what_it_leaves_out(job, tmp_path, capsys):
    out = run_command(
        capsys,
        "rerank",
        "--base-model",
        job / "lm",
        "--similarity-only",
        "--data",
        job / "data",
        "--run",
        job / "data" / "run.trec",
        "--top-k",
        2,
        "--output",
        tmp_path / "out.trec",
    )
    assert "3 candidates beyond the 2 best of their query are left out" in out
    assert sum(map(len, formats.read_run(tmp_path / "out.trec").values())) == 6


def test_deterministic_output_does_not_depend_on_the_batch(job, tmp_path, capsys):
    for name, budget in (("a", 64), ("b", 4096)):
        run_command(
            capsys,
            "rerank",
            "--model",
            job / "adapter",
            "--data",
            job / "data",
            "--run",
            job / "data" / "run.trec",
            "--output",
            tmp_path / name,
            "--deterministic",
            "--max-tokens-per-batch",
            budget,
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_no_error_empty_document_filtered_tokens_and_more_clues_than_tokens(job, tmp_path, capsys):
    """d5 is empty, in d6 every token is filtered, k is larger than any document: all get finite scores."""
    mine = copy_job(job, tmp_path / "mine")
    save_adapter(mine / "adapter", mine / "lm", k=500, filters=("non_alphabetic", "query_tokens", "stop_words"))
    run_command(
        capsys,
        "rerank",
        "--model",
        mine / "adapter",
        "--data",
        mine / "data",
        "--run",
        mine / "data" / "run.trec",
        "--output",
        tmp_path / "out.trec",
    )
    written = formats.read_run(tmp_path / "out.trec")  # only finite scores can be read
    assert {d for ranking in written.values() for d, _ in ranking} == {"d1", "d2", "d3", "d4", "d5", "d6"}


def test_limits_can_be_raised(job, tmp_path, capsys):
    """What the error about a long query advises works, and cut documents are counted."""
    mine = copy_job(job, tmp_path / "mine")
    lines = (mine / "data" / "queries.jsonl").read_text().replace("moon month", "moon " * 20)
    (mine / "data" / "queries.jsonl").write_text(lines)
    out = run_command(
        capsys,
        "rerank",
        "--model",
        mine / "adapter",
        "--data",
        mine / "data",
        "--run",
        mine / "data" / "run.trec",
        "--output",
        tmp_path / "out.trec",
        "--max-query-tokens",
        200,
        "--max-document-tokens",
        50,
    )
    assert re.search(r"Q-PEFT-R: 3 queries, .*; [1-9] documents? cut to max_document_tokens", out)


def test_long_queries_are_cut_on_request_and_counted(job, tmp_path, capsys):
    mine = copy_job(job, tmp_path / "mine")
    queries = mine / "data" / "queries.jsonl"
    queries.write_text(queries.read_text().replace("moon month", "moon " * 20))
    command = [
        "rerank",
        "--model",
        mine / "adapter",
        "--data",
        mine / "data",
        "--run",
        mine / "data" / "run.trec",
        "--output",
        tmp_path / "out.trec",
        "--truncate-queries",
    ]
    assert "1 of 3 queries is cut to max_query_tokens = 64\n" in run_command(capsys, *command)
    ranked = dict(formats.read_run(tmp_path / "out.trec")["q3"])
    corpus = formats.open_collection(str(mine / "data")).corpus
    reranker = qpeft.Reranker.from_pretrained(mine / "adapter")
    cut = (" " + "moon " * 20)[:64]  # a byte is a token
    for doc_id, score in ranked.items():
        assert score == pytest.approx(reranker.predict((cut, corpus[doc_id])), abs=1e-3)
    reranker.truncate_queries = True
    for doc_id, score in ranked.items():
        assert score == pytest.approx(reranker.predict(("moon " * 20, corpus[doc_id])), abs=1e-3)


def test_an_adapter_that_is_a_whole_lm_needs_no_other(job, tmp_path, capsys):
    """The LM that it was trained from is gone, and so is the tokenizer that was there."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(job / "lm", base)
    save_adapter(adapter, base, clues="none", rank=None, train_lm=True)
    capsys.readouterr()  # transformers' bars
    data = job / "data"
    where = ("rerank", "--model", adapter, "--data", data, "--run", data / "run.trec", "--device", "cpu", "--output")
    run_command(capsys, *where, tmp_path / "before.trec")
    shutil.rmtree(base)
    run_command(capsys, *where, tmp_path / "after.trec")
    assert (tmp_path / "after.trec").read_bytes() == (tmp_path / "before.trec").read_bytes()
    for file in (adapter / "lm").glob("*token*"):  # as earlier versions saved it
        file.unlink()
    assert main([str(x) for x in (*where, tmp_path / "no.trec")]) == 2
    err = capsys.readouterr().err
    assert "copy the files of that LM's tokenizer into the adapter's folder lm" in err and err.count("\n") == 1
