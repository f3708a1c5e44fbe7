"""Indexes: made, used by the reranker, and refused where they do not fit."""

from __future__ import annotations

import json
import pickle
import re

import pytest
import torch
from families.tiny import tiny_lm
from jobs.tiny_job import copy_job
from small_data import RUN
from tiny_index import command, contents, corpus, error, make, model, scores

import qpeft_ext as qpeft
from qpeft_ext import formats
from qpeft_ext.engine.causal import CausalEngine
from qpeft_ext.prefixes import index as prefix_index
from qpeft_ext.prefixes.index import PrefixIndex, shard_paths
from qpeft_ext.prefixes.index_writer import IndexWriter
from qpeft_ext.prefixes.kv import PrefixKV

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache_folder")]


def test_scores_with_an_index(tmp_path, monkeypatch):
    lm = model()
    survey = make(tmp_path, lm)
    assert (survey.documents, survey.distinct, survey.there, survey.missing) == (6, 6, 0, 6)
    expected, expected_bits = scores(lm), scores(lm, deterministic=True)
    cache = qpeft.DocumentCache(0, index=tmp_path)
    monkeypatch.setattr(CausalEngine, "prefill", lambda *_: pytest.fail("a prefix was computed"))
    torch.testing.assert_close(scores(lm, cache), expected, rtol=0, atol=1e-4)
    assert (cache.hits, cache.misses) == (6, 0) and "index: 6 prefixes" in repr(cache)
    with pytest.raises(ValueError, match="computed in batches, which deterministic scores cannot use"):
        scores(lm, cache, deterministic=True)
    monkeypatch.undo()
    make(tmp_path / "alone", lm, deterministic=True)
    monkeypatch.setattr(CausalEngine, "prefill", lambda *_: pytest.fail("a prefix was computed"))
    alone = qpeft.DocumentCache(0, index=tmp_path / "alone")
    assert torch.equal(scores(lm, alone, deterministic=True), expected_bits)
    torch.testing.assert_close(scores(lm, alone), expected, rtol=0, atol=1e-4)


def test_the_bytes_are_known_before(tmp_path):
    with IndexWriter(model(), corpus(), tmp_path) as writer:
        survey = writer.survey()
        writer.run(survey)
    written = sum(path.stat().st_size for path in shard_paths(tmp_path))
    assert written <= survey.nbytes <= written + 1000
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["bytes"] == written and manifest["shards"] == 1 and manifest["complete"] is True


def test_the_command(job, tmp_path, capsys):
    mine = copy_job(job, tmp_path / "mine")
    arguments = ["index", mine / "data", "--out", tmp_path / "index", "--model", mine / "adapter"]
    out = command(capsys, *arguments)
    assert re.search(r"6 documents, 6 different ones; 6 to compute, \d+\.\d kB to write to", out)
    assert "is complete: qpeft rerank --index" in out
    assert "6 of them are there already; 0 to compute, 0 bytes" in command(capsys, *arguments)
    # a document that changed, and one that is new: the others are not computed again
    lines = (mine / "data" / "corpus.jsonl").read_text().replace("in a month", "in four weeks")
    (mine / "data" / "corpus.jsonl").write_text(lines + '{"_id": "d7", "title": "", "text": "new"}\n')
    out = command(capsys, *arguments)
    assert "7 documents, 7 different ones, 5 of them are there already; 2 to compute" in out
    assert len(contents(tmp_path / "index")) == 8


def test_rerank_with_an_index(job, tmp_path, capsys, monkeypatch):
    mine = copy_job(job, tmp_path / "mine")
    command(capsys, "index", mine / "data", "--out", tmp_path / "index", "--model", mine / "adapter")
    arguments = [
        "rerank",
        "--model",
        mine / "adapter",
        "--data",
        mine / "data",
        "--run",
        mine / "data" / "run.trec",
        "--output",
    ]
    command(capsys, *arguments, tmp_path / "plain.trec")
    monkeypatch.setattr(CausalEngine, "prefill", lambda *_: pytest.fail("a prefix was computed"))
    out = command(capsys, *arguments, tmp_path / "mine.trec", "--index", tmp_path / "index", "--upr")
    assert out.count("100% cache hits") == 2
    monkeypatch.undo()
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path / "cache"))
    plain, ours = (formats.read_run(tmp_path / name) for name in ("plain.trec", "mine.trec"))
    assert list(plain) == list(ours) == list(RUN)
    for query_id, ranking in plain.items():
        assert dict(ours[query_id]) == pytest.approx(dict(ranking), abs=1e-4)
    lines = (mine / "data" / "corpus.jsonl").read_text().replace("in a month", "in four weeks")
    (mine / "data" / "corpus.jsonl").write_text(lines)  # what is missing is computed
    assert "83% cache hits" in command(capsys, *arguments, tmp_path / "mine.trec", "--index", tmp_path / "index")
    arguments += [tmp_path / "no.trec", "--index", tmp_path / "index"]
    said = error(capsys, *arguments, "--max-document-tokens", 9)
    assert "was made with max_document_tokens 256, here it is 9" in said
    said = error(capsys, *arguments, "--base-model", mine / "lm", "--dtype", "bfloat16")
    assert "was made with the LM in float32, this one is in bfloat16; say --dtype float32" in said
    assert "is no index" in error(capsys, *arguments[:-1], tmp_path)


def test_what_an_index_does_not_have_is_not_copied_for_nothing(tmp_path, monkeypatch):
    lm = model()
    make(tmp_path, lm, corpus({"other": ("", "another text")}))
    expected = scores(lm)
    monkeypatch.setattr(PrefixKV, "split", lambda *_: pytest.fail("prefixes that nothing stores were copied"))
    assert torch.equal(scores(lm, qpeft.DocumentCache(0, index=tmp_path)), expected)


def test_equal_texts_are_stored_once(tmp_path):
    documents = corpus() | {"again": corpus()["d1"]}
    assert (make(tmp_path, documents=documents).distinct, len(contents(tmp_path))) == (6, 6)


def test_out_of_memory_halves_the_batch(tmp_path, monkeypatch):
    prefill, tried = CausalEngine.prefill, []

    def failing(self, prefixes):
        tried.append(len(prefixes))
        if len(prefixes) > 2:
            raise torch.OutOfMemoryError("pretended")
        return prefill(self, prefixes)

    monkeypatch.setattr(CausalEngine, "prefill", failing)
    make(tmp_path)
    assert len(contents(tmp_path)) == 6 and tried[:3] == [6, 3, 1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"max_document_tokens": 9}, "was made with max_document_tokens 256, here it is 9"),
        ({"instruction": "Write."}, "was made with another template"),
        ({"lm": lambda: tiny_lm("llama", seed=1)}, "was made with an LM with other weights than this one"),
        (
            {"lm": lambda: tiny_lm("llama", dtype=torch.bfloat16)},
            "was made with the LM in float32, this one is in bfloat1",
        ),
        ({"lm": lambda: tiny_lm("qwen3")}, "was made with an LM of type llama, this one is of type qwen3"),
        ({"lm": lambda: with_lora()}, "was made with another adapter in the LM"),
        ({"lm": lambda: eager()}, "was made with the attention implementation sdpa, this LM uses eager"),
    ],
)
def test_another_lm_or_template_is_one_clear_error(change, message, tmp_path):
    make(tmp_path)
    lm = change.pop("lm", lambda: None)()
    other = model(lm, **change)
    with pytest.raises(ValueError, match=message):
        qpeft.Reranker(other, cache=qpeft.DocumentCache(index=tmp_path)).predict([("tides", "text")])
    with pytest.raises(ValueError, match=message):
        make(tmp_path, other)


def test_a_refused_writer_leaves_the_folder_to_others(tmp_path):
    make(tmp_path)
    with pytest.raises(ValueError, match="max_document_tokens") as kept:  # as a notebook keeps the last error
        IndexWriter(model(max_document_tokens=9), corpus(), tmp_path)
    assert make(tmp_path).missing == 0 and kept.tb is not None


def with_lora():
    import peft

    return peft.get_peft_model(tiny_lm("llama"), peft.LoraConfig(target_modules=["q_proj"]))


def eager():
    lm = tiny_lm("llama")
    lm.set_attn_implementation("eager")
    return lm


def test_a_pickled_reranker_opens_its_index_again(tmp_path):
    make(tmp_path)
    reranker = qpeft.Reranker(model(), cache=qpeft.DocumentCache(0, index=tmp_path))
    documents = list(corpus().values())
    expected = reranker.rank("why do tides rise", documents)
    again = pickle.loads(pickle.dumps(reranker))
    assert again.rank("why do tides rise", documents) == expected
    assert again.cache.index.hits == reranker.cache.index.hits > 0 and again.cache.index.folder == tmp_path


def test_another_tokenizer_is_named(tmp_path):
    make(tmp_path)
    other = model()
    encode = other.prompt._text_tokenizer
    other.prompt._text_tokenizer = lambda texts: [ids[::-1] if len(ids) > 30 else ids for ids in encode(texts)]
    with pytest.raises(ValueError, match="was made with another tokenizer"):
        PrefixIndex(tmp_path).expect_prompt(other.prompt)


def test_what_is_no_index(job, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(FileNotFoundError, match="is no index: it has no manifest.json"):
        qpeft.DocumentCache(index=tmp_path / "full")
    with pytest.raises(ValueError, match="is no index and holds thesis.txt"):
        make(tmp_path / "full")
    for text in ("{", "[]", '{"format": "other"}', '{"format": "qpeft_ext index 1", "complete": 1}'):
        (tmp_path / "full" / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="not a readable manifest"):
            PrefixIndex(tmp_path / "full")
    with pytest.raises(ValueError, match="an index is of no use to this model: its cache cannot be shared"):
        make(tmp_path / "index", model(tiny_lm("mamba")))
    assert "--model ADAPTER or --base-model LM" in error(capsys, "index", job / "data", "--out", tmp_path / "x")
    with IndexWriter(model(), corpus(), tmp_path / "index"):
        with pytest.raises(ValueError, match="in use by another process"):
            make(tmp_path / "index")


def test_a_search_finds_every_digest_and_no_other(tmp_path, monkeypatch):
    """Also digests with zeros at their ends and with equal beginnings."""
    digests = [bytes([a, *[0] * 30, b]) for a in (0, 1, 255) for b in (0, 1)] + [b"\1" * 31 + b"\0"]
    monkeypatch.setattr(prefix_index, "read_manifest", lambda _: {"complete": True})
    index = PrefixIndex(tmp_path)
    rows = [(digest, 0, i, 1, 0) for i, digest in enumerate(digests)]
    monkeypatch.setattr(PrefixIndex, "_read_shard", lambda self, _: prefix_index.np.array(rows, prefix_index._ROW))
    monkeypatch.setattr(prefix_index, "shard_paths", lambda _: [tmp_path])
    index = PrefixIndex(tmp_path)
    assert [int(index._find(digest)["offset"]) for digest in digests] == list(range(len(digests)))
    assert all(index._find(bytes([a]) * 32) is None for a in range(2, 256))


@pytest.mark.parametrize(
    "other, options, message",
    [
        (lambda: tiny_lm("llama", seed=1), {}, "it is of another LM"),
        (lambda: tiny_lm("llama"), {"deterministic": True}, "it was made with deterministic=True"),
        (lambda: tiny_lm("llama"), {"kv_dtype": "bfloat16"}, "torch.bfloat16"),
    ],
)
def test_a_shard_of_another_index_is_not_read(other, options, message, tmp_path, caplog):
    """The shards are whole and name the same documents, as after one index is copied over a larger one."""
    lm, here = model(), {"kv_dtype": "float16"} if "kv_dtype" in options else {}  # of as many bytes as bfloat16
    make(tmp_path / "mine", lm, **here)
    expected = scores(lm, qpeft.DocumentCache(0, kv_dtype=here.get("kv_dtype")))
    make(tmp_path / "other", model(other()), **options)
    for path in shard_paths(tmp_path / "mine"):
        path.write_bytes((tmp_path / "other" / path.name).read_bytes())
    cache = qpeft.DocumentCache(0, index=tmp_path / "mine")
    torch.testing.assert_close(scores(lm, cache), expected, rtol=0, atol=1e-4)
    assert cache.misses == 6 and message in caplog.text
    before = contents(tmp_path / "mine")
    with pytest.raises(ValueError, match=rf"shard-000000.*{message}.*move it away"):
        make(tmp_path / "mine", lm, **here)
    assert contents(tmp_path / "mine").keys() == before.keys()
