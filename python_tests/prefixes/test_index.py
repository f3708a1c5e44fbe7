"""Indexes: made, killed, resumed, damaged, used by the reranker; what does not fit is refused."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import transformers
from families.tiny import tiny_lm, tiny_tokenizer
from jobs.tiny_job import copy_job, make_job
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from small_data import DOCUMENTS, QUERIES, RUN

import qpeft_ext as qpeft
from qpeft_ext import formats
from qpeft_ext.cli import main
from qpeft_ext.engine.causal import CausalEngine
from qpeft_ext.prefixes import index as prefix_index
from qpeft_ext.prefixes import index_writer as index_run
from qpeft_ext.prefixes.index import PrefixIndex, shard_paths
from qpeft_ext.prefixes.index_writer import IndexWriter
from qpeft_ext.prefixes.kv import PrefixKV
from qpeft_ext.utils.files import AtomicWriter


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path / "cache"))


def model(lm=None, **options) -> qpeft.QPeftModel:
    return qpeft.get_qpeft_model(lm or tiny_lm("llama"), qpeft.QPeftConfig(clues="none", **options), tiny_tokenizer())


def corpus(documents=DOCUMENTS) -> dict[str, dict]:
    return {i: {"id": i, "title": title, "text": text} for i, (title, text) in documents.items()}


def make(folder: Path, of=None, documents=None, **options) -> index_run.Survey:
    """An index with a shard for every prefix or two, unless told otherwise."""
    with IndexWriter(of or model(), documents or corpus(), folder, **({"shard_bytes": 1} | options)) as writer:
        survey = writer.survey(show_progress_bar=False)
        writer.expect_room(survey)
        writer.run(survey, show_progress_bar=False)
    return survey


def contents(folder: Path) -> dict[str, torch.Tensor]:
    """Every prefix of an index by name, read with the safetensors library; none may be there twice."""
    found = {}
    for path in shard_paths(folder):
        with safe_open(path, "pt") as shard:
            assert not found.keys() & set(shard.keys())
            found |= {name: shard.get_tensor(name).clone() for name in shard.keys()}  # not the memory map
    return found


def scores(of, cache=None, **options):
    pairs = [(query, document) for query in QUERIES.values() for document in corpus().values()]
    return of.score(pairs, cache=cache, **options).query_log_likelihood


def command(capsys, *arguments) -> str:
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def error(capsys, *arguments) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    return err


# -- making and using -----------------------------------------------------------------------------------------------


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


def trained(of, folder, **options) -> dict[str, torch.Tensor]:
    """Weights after two steps."""
    examples = [
        {"query": query, "positives": [corpus()[i]], "negatives": [corpus()["d1" if i != "d1" else "d2"]]}
        for query, i in zip(QUERIES.values(), corpus(), strict=False)
    ]
    arguments = transformers.TrainingArguments(
        str(folder / "out"),
        per_device_train_batch_size=len(examples),
        max_steps=2,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = qpeft.QPeftTrainer(of, arguments, examples, **options)
    trainer.train()
    return {name: p.detach() for name, p in of.named_parameters() if p.requires_grad}


def clues_model(lm=None, **options) -> qpeft.QPeftModel:
    config = qpeft.QPeftConfig(
        **{"clues": "attention", "num_heads": 4, "rank": 8, "queries_per_group": len(QUERIES), "temperature": 1.0}
        | options
    )
    return qpeft.get_qpeft_model(lm or tiny_lm("llama"), config, tiny_tokenizer())


def test_training_with_an_index(tmp_path, monkeypatch):
    """The same weights, and no document is read, whatever is trained beside the LM."""
    make(tmp_path / "index")
    for options in ({}, {"clues": "top_k"}, {"clues": "none", "generated_lora_rank": 2}):
        expected = trained(clues_model(**options), tmp_path)
        cache = qpeft.DocumentCache(0, index=tmp_path / "index")
        with monkeypatch.context() as patch:
            patch.setattr(CausalEngine, "prefill", lambda *_: pytest.fail("a prefix was computed"))
            found = trained(clues_model(**options), tmp_path, cache=cache)
        assert found.keys() == expected.keys() and cache.hits and not cache.misses
        for name, weight in found.items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)


def test_training_refuses_an_index_that_is_of_no_use(tmp_path):
    make(tmp_path / "index")
    cache = qpeft.DocumentCache(0, index=tmp_path / "index")
    lora = get_peft_model(tiny_lm("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    for of in (clues_model(lora), clues_model(num_virtual_tokens=2), clues_model(train_lm=True, clues="none")):
        with pytest.raises(ValueError, match="^QPeftTrainer: an index is of no use to this model: its soft prompt, or"):
            trained(of, tmp_path, cache=cache)
    with pytest.raises(ValueError, match="^QPeftTrainer: an index is of no use to this model: layout='clues_first'"):
        trained(clues_model(layout="clues_first"), tmp_path, cache=cache)
    with pytest.raises(ValueError, match="was made with max_document_tokens 256, here it is 9"):
        trained(clues_model(max_document_tokens=9), tmp_path, cache=cache)
    with pytest.raises(ValueError, match="was made with an LM with other weights"):
        trained(clues_model(tiny_lm("llama", 1)), tmp_path, cache=cache)
    with pytest.raises(ValueError, match="cache and cache_bytes exclude each other"):
        trained(clues_model(), tmp_path, cache=cache, cache_bytes=1)


def test_train_with_an_index(job, tmp_path, capsys, monkeypatch):
    arguments = [
        "train",
        "--base-model",
        job / "lm",
        "--data",
        job / "data",
        "--rank",
        8,
        "--max-steps",
        2,
        "--device",
        "cpu",
        "--output",
    ]
    assert "none is no index" in error(capsys, *arguments, tmp_path / "no", "--index", tmp_path / "none")
    assert not (tmp_path / "no").exists()
    assert main([str(a) for a in (*arguments, tmp_path / "plain")]) == 0
    command(capsys, "index", job / "data", "--out", tmp_path / "index", "--base-model", job / "lm")
    monkeypatch.setattr(CausalEngine, "prefill", lambda *_: pytest.fail("a prefix was computed"))
    assert main([str(a) for a in (*arguments, tmp_path / "mine", "--index", tmp_path / "index")]) == 0
    plain, mine = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "mine"))
    for name, weight in mine.items():
        torch.testing.assert_close(weight, plain[name], rtol=0, atol=1e-4)


def test_what_an_index_does_not_have_is_not_copied_for_nothing(tmp_path, monkeypatch):
    lm = model()
    make(tmp_path, lm, corpus({"other": ("", "another text")}))
    expected = scores(lm)
    monkeypatch.setattr(PrefixKV, "split", lambda _: pytest.fail("prefixes that nothing stores were copied"))
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


# -- kills and damage -----------------------------------------------------------------------------------------------


def killed_at(monkeypatch, moment: str, occurrence: int) -> None:
    """Let this process die by SIGKILL at the given call, in the middle of writing where something is written."""
    seen = 0

    def now() -> bool:
        nonlocal seen
        seen += 1
        return seen == occurrence

    write, replace = AtomicWriter.write, os.replace

    def write_half(self, data):
        if now():
            write(self, bytes(data)[: len(data) // 2])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, data)

    def replace_and_die(source, target):
        replace(source, target)
        if now():
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(
        *((AtomicWriter, "write", write_half) if moment == "write" else (os, "replace", replace_and_die))
    )


@pytest.mark.parametrize(
    "moment, occurrence",
    [
        ("write", 1),
        ("replace", 1),  # the first manifest
        ("write", 3),
        ("replace", 2),
        ("write", 6),
        ("replace", 4),  # shards
        ("write", 14),
        ("replace", 8),  # the last manifest
    ],
)
def test_a_killed_run_goes_on(moment, occurrence, tmp_path, monkeypatch):
    """The result is that of a run that was not disturbed, bit by bit; no stored prefix is computed again."""
    lm, folder = model(), tmp_path / "index"
    make(tmp_path / "expected", lm, deterministic=True)
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        killed_at(monkeypatch, moment, occurrence)
        make(folder, lm, deterministic=True)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    there = len(contents(folder))
    if moment == "write" or occurrence < 8:
        with pytest.raises((ValueError, FileNotFoundError), match="is not complete|is no index"):
            PrefixIndex(folder)
    prefill, computed = CausalEngine.prefill, []
    monkeypatch.setattr(CausalEngine, "prefill", lambda self, group: computed.append(group) or prefill(self, group))
    assert make(folder, lm, deterministic=True).there == there
    assert len(computed) == 6 - there
    ours, expected = contents(folder), contents(tmp_path / "expected")
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)
    assert not list(folder.glob(".*.tmp")) and json.loads((folder / "manifest.json").read_text())["complete"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [True, False], ids=["interrupted", "killed"])
def test_stopped_after_any_pass_the_files_are_those_of_one_run(kept, dtype, tmp_path, monkeypatch):
    """To the byte, though passes hold several documents: those that were stored already are computed along.

    An interrupt writes what is computed, in a shard that is filled up later; a kill loses it.
    """
    documents = {f"d{i}": ("", " ".join(["tide moon sea", "boat", "wind"][: 1 + i % 3]) + f" {i}") for i in range(14)}
    lm = model(tiny_lm("llama").to(dtype))
    options = {
        "documents": corpus(documents),
        "max_tokens_per_batch": 4 * 55,
        "shard_bytes": 3 * lm.engine.packing.numel(20) * dtype.itemsize,
    }
    make(tmp_path / "grown", lm, documents=corpus(dict(list(documents.items())[:3])))  # a run may begin with an index
    shutil.copytree(tmp_path / "grown", tmp_path / "expected")
    prefill, passes = CausalEngine.prefill, []
    monkeypatch.setattr(CausalEngine, "prefill", lambda self, group: passes.append(len(group)) or prefill(self, group))
    make(tmp_path / "expected", lm, **options)
    expected, count = files(tmp_path / "expected"), len(passes)
    assert count >= 3 and max(passes) > 1 and len(expected) > 4, passes
    for stop in range(1, count, 1 if dtype == torch.bfloat16 else 2):
        for again in (0, 1):  # stopped once, or twice
            folder = tmp_path / f"{stop}-{again}"
            shutil.copytree(tmp_path / "grown", folder)
            for number in (stop, again)[: 1 + again]:
                with stopped_at(monkeypatch, prefill, number, kept), contextlib.suppress(KeyboardInterrupt):
                    make(folder, lm, **options)
            make(folder, lm, **options)
            assert files(folder) == expected, (stop, again)


@contextlib.contextmanager
def stopped_at(monkeypatch, prefill, number: int, kept: bool):
    seen, stopped = [], []

    def stop(self, group):
        seen.append(group)
        if len(seen) > number:
            stopped.append(True)
            raise KeyboardInterrupt
        return prefill(self, group)

    write = IndexWriter._write_shard
    with monkeypatch.context() as patch:
        patch.setattr(CausalEngine, "prefill", stop)
        patch.setattr(IndexWriter, "_write_shard", lambda self: write(self) if kept or not stopped else None)
        yield


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:-70] + b"x" + b[-69:], lambda b: b""])
def test_a_damaged_shard_costs_its_documents_and_nothing_else(damage, tmp_path, caplog):
    lm = model()
    make(tmp_path, lm, deterministic=True)
    expected, whole = scores(lm, deterministic=True), contents(tmp_path)
    path = shard_paths(tmp_path)[2]
    path.write_bytes(damage(path.read_bytes()))
    cache = qpeft.DocumentCache(0, index=tmp_path)
    for _ in range(2):
        assert torch.equal(scores(lm, cache, deterministic=True), expected)
    assert (cache.hits, cache.misses) == (10, 2)
    assert [record.message.startswith(f"{path} is damaged") for record in caplog.records] == [True]  # said once
    cache.index._told.clear()
    if make(tmp_path, lm, deterministic=True).missing:  # damage inside a prefix is only seen when it is read
        assert {name: flat.tolist() for name, flat in contents(tmp_path).items()} == {
            name: flat.tolist() for name, flat in whole.items()
        }


def test_a_shard_that_vanishes_while_it_is_used_is_a_miss(tmp_path, caplog):
    lm = model()
    make(tmp_path, lm)
    cache, expected = qpeft.DocumentCache(0, index=tmp_path), scores(lm)
    shard_paths(tmp_path)[0].unlink()
    torch.testing.assert_close(scores(lm, cache), expected, rtol=0, atol=1e-4)
    assert cache.misses >= 1 and "No such file" in caplog.text


def test_ctrl_c_keeps_what_was_computed_and_says_how_to_go_on(job, tmp_path, capsys, monkeypatch):
    prefill, calls = CausalEngine.prefill, []

    def interrupted(self, group):
        calls.append(group)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return prefill(self, group)

    monkeypatch.setattr(CausalEngine, "prefill", interrupted)
    arguments = [
        "index",
        str(job / "data"),
        "--out",
        str(tmp_path / "index"),
        "--base-model",
        str(job / "lm"),
        "--deterministic",
    ]
    assert main(arguments) == 130
    assert capsys.readouterr().err == (
        "qpeft index: error: interrupted; what was computed is kept, and the same command goes on from there\n"
    )
    assert len(contents(tmp_path / "index")) == 3
    monkeypatch.undo()
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path / "cache"))
    assert "3 of them are there already; 3 to compute" in command(capsys, *arguments)


# -- what is refused ------------------------------------------------------------------------------------------------


def test_an_index_that_does_not_fit_is_refused_with_the_figures(job, tmp_path, capsys, monkeypatch):
    class Usage:
        free = 1000

    monkeypatch.setattr(index_run.shutil, "disk_usage", lambda _: Usage)
    said = error(capsys, "index", job / "data", "--out", tmp_path / "index", "--base-model", job / "lm")
    assert re.search(r"the index needs \d+\.\d kB more, but .* has 1\.0 kB free", said)
    assert not shard_paths(tmp_path / "index")


def test_a_disk_that_fills_up_ends_the_run_with_one_line(job, tmp_path, capsys, monkeypatch):
    write = AtomicWriter.write

    def full(self, data):
        if self.path.name.startswith("shard"):
            raise OSError(28, "No space left on device")
        write(self, data)

    monkeypatch.setattr(AtomicWriter, "write", full)
    said = error(capsys, "index", job / "data", "--out", tmp_path / "index", "--base-model", job / "lm")
    assert "No space left on device; make room and run the same command again" in said


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
