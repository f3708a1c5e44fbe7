"""A reranker that exists at the command line and on a server, without an adapter."""

from __future__ import annotations

import numpy as np
import pytest
from cli.in_process import run_command
from families.tiny import tiny_lm
from prompts.reranker_tokenizers import qwen_tokenizer
from small_data import DOCUMENTS, QUERIES, RUN, write_folder

import qpeft_ext as qpeft
from qpeft_ext import formats
from qpeft_ext.cli import main
from qpeft_ext.serving.ask import Ask
from qpeft_ext.serving.models import Models
from qpeft_ext.serving.prepare import prepare
from qpeft_ext.serving.settings import Limits, ServeSpec

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``data`` and two copies of one LM, of which one has a name that tells what it is."""
    folder = tmp_path_factory.mktemp("known")
    write_folder(folder / "data")
    tokenizer = qwen_tokenizer()
    for name in ("Qwen3-Reranker-0.6B", "my-lm"):
        tiny_lm("qwen3", vocab_size=len(tokenizer)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def expected_scores(folder, query_id: str) -> dict[str, float]:
    reranker = qpeft.Reranker.from_lm(folder / "Qwen3-Reranker-0.6B", device="cpu")
    corpus = formats.Corpus(folder / "data")
    ids = [doc_id for doc_id, _ in RUN[query_id]]
    ranked = reranker.rank(QUERIES[query_id], [corpus[doc_id] for doc_id in ids])
    return {ids[row["corpus_id"]]: row["score"] for row in ranked}


@pytest.mark.parametrize("options", [
    ["--base-model", "Qwen3-Reranker-0.6B"],
    ["--base-model", "my-lm", "--template", "qwen3_reranker"],
    ["--base-model", "Qwen3-Reranker-0.6B", "--cache-bytes", "10000000", "--passages", "max"],
], ids=["by name", "by template", "cached"])  # fmt: skip
def test_rerank(folder, tmp_path, capsys, monkeypatch, options):
    monkeypatch.chdir(folder)
    out = run_command(
        capsys, "rerank", *options, "--data", "data", "--run", "data/run.trec", "--device", "cpu",
        "--output", tmp_path / "out.trec",
    )  # fmt: skip
    written = formats.read_run(tmp_path / "out.trec")
    assert list(written) == list(RUN)
    for query_id, ranking in written.items():
        expected = expected_scores(folder, query_id)
        assert [doc_id for doc_id, _ in ranking] == list(expected)
        assert [score for _, score in ranking] == pytest.approx(list(expected.values()), abs=1e-4)
    assert "│reranker" in out


@pytest.mark.parametrize(("options", "message"), [
    (["--base-model", "my-lm"], "is no known reranker: set template to the one that it was trained with"),
    (["--base-model", "my-lm", "--template", "qwen3"], "template must be one of qpeft"),
    (["--base-model", "my-lm", "--template", "missing.jinja"], "there is no file missing.jinja"),
    (["--base-model", "Qwen3-Reranker-0.6B", "--option", "yes_words=ja"], "this template has yes_words=('yes',)"),
    (["--base-model", "my-lm", "--upr", "--option", "seed=1"], "--option is for an LM that is a reranker itself"),
    (["--base-model", "my-lm", "--template", "no.jinja"], "is no template of Jinja2"),
    (["--base-model", "my-lm", "--template", "query.jinja"], "must write {{ document }} once"),
    (["--base-model", "my-lm", "--template", "qwen3_reranker", "--upr"], "UPR scores by the likelihood of the query"),
])  # fmt: skip
def test_bad_input_is_one_line(folder, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(folder)
    (folder / "no.jinja").write_text("no variables")
    (folder / "query.jinja").write_text("{{ query }}")
    rest = ["--data", "data", "--run", "data/run.trec", "--device", "cpu", "--output", str(tmp_path / "out.trec")]
    assert main(["rerank", *options, *rest]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in err
    assert not (tmp_path / "out.trec").exists()


def test_an_index_is_refused(folder, tmp_path, capsys):
    command = ["index", "--base-model", str(folder / "my-lm"), "--template", "qwen3_reranker", "--device", "cpu"]
    assert main([*command, str(folder / "data"), "--out", str(tmp_path / "index")]) == 2
    assert "its template has the query before the document" in capsys.readouterr().err


def test_a_file_as_template(folder, tmp_path, capsys):
    file = tmp_path / "mine.jinja"
    file.write_text("Query: {{ query }}\nDocument: {{ document }}\nRelevant:")
    lm = folder / "my-lm"
    run_command(
        capsys, "rerank", "--base-model", lm, "--template", file, "--option", "yes_words=1", "--option", "no_words=0",
        "--data", folder / "data", "--run", folder / "data" / "run.trec", "--device", "cpu",
        "--output", tmp_path / "out.trec",
    )  # fmt: skip
    written = formats.read_run(tmp_path / "out.trec")
    words = {"yes_words": ("1",), "no_words": ("0",)}
    reranker = qpeft.Reranker.from_lm(lm, file.read_text(), device="cpu", config=words)
    corpus = formats.Corpus(folder / "data")
    for query_id, ranking in written.items():
        pairs = [(QUERIES[query_id], corpus[doc_id]) for doc_id, _ in ranking]
        assert [score for _, score in ranking] == pytest.approx(reranker.predict(pairs).tolist(), abs=1e-4)


def test_a_server_has_it(folder):
    name = str(folder / "Qwen3-Reranker-0.6B")
    spec = ServeSpec(models={"known": None}, base_model=name, lm_options={"device": "cpu"})
    cache = qpeft.DocumentCache(1 << 24)
    models = Models(spec, cache)
    served = models.load("known", None)
    prompt = served.reranker.model.prompt
    assert served.reranker.model.qpeft_config.template == "qwen3_reranker"
    texts = [text for _, text in DOCUMENTS.values()][:3]
    job = prepare(Ask("query", "documents", ["why tides?"], texts), models, None, Limits()).job
    assert len(set(job.digests)) == 1, "the candidates share what stands before them"
    (prefix,) = prompt.query_prefixes(prompt.queries(["why tides?"]))
    assert set(job.prefix_tokens) == {len(prefix.ids)}
    assert job.suffix_tokens == [len(d.ids) + len(prompt.suffix.asked) for d in prompt.documents(texts)]
    scores = served.reranker.predict(job.pairs)
    relevances = served.reranker.relevance([query for query, _ in job.pairs], scores)
    assert relevances == pytest.approx(1 / (1 + np.exp(-scores.astype(float))))
