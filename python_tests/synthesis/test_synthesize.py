"""``qpeft synthesize``: what an LM writes against a slow restatement, every filter, resuming after a real kill."""

import gzip
import json
import math
import random
import signal
from collections import Counter

import pytest
import torch
import transformers
from families.tiny import DOCUMENTS, tiny_lm, tiny_tokenizer
from jobs.long_job import Process
from small_data import write_lines
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import qpeft_ext as qpeft
from qpeft_ext import formats
from qpeft_ext.cli import main
from qpeft_ext.ranking.first_stage import bm25_run
from qpeft_ext.synthesis.filters import Counts, Filters, KeptQuery, select
from qpeft_ext.synthesis.generator import GeneratedQuery, QueryGenerator, Sampling
from qpeft_ext.synthesis.training_set import PartialQueries, choose_documents, round_trip

pytest.importorskip("bm25s", reason="the extra qpeft_ext[bm25] is not installed")
KEYS = ["a", "b", "c", "d"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path / "cache"))


def generator(family="llama", tokenizer=None, max_tokens_per_batch=None, lm=None, **sampling):
    config = qpeft.QPeftConfig(clues="none")
    model = qpeft.get_qpeft_model(lm or tiny_lm(family), config, tokenizer or tiny_tokenizer())
    options = {"max_new_tokens": 10, "queries_per_document": 2, "seed": 3} | sampling
    return QueryGenerator(model, Sampling(**options), max_tokens_per_batch)


# -- generation ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def slow_tokens(model, document, sampling, key, number):
    """One token after the other from whole prompts, without a cache, drawn as the docstrings say."""
    prompt = model.prompt
    ids = [*prompt.documents([document])[0].ids, *prompt.suffix.bare_question]
    draw, new = random.Random(f"{sampling.seed} {number} {key}"), []
    ends = (
        [1]
        + [model.tokenizer.convert_tokens_to_ids("Ċ")]
        + [  # </s> and the bytes that end a line
            model.tokenizer(chr(code), add_special_tokens=False)["input_ids"][0] for code in (11, 12, 13, 28, 29, 30)
        ]
    )
    while len(new) < sampling.max_new_tokens and not (new and new[-1] in ends):
        logits = model.lm(torch.tensor([ids + new])).logits[0, -1].double()
        if not sampling.temperature:
            new.append(int(logits.argmax()))
            continue
        p = (logits / sampling.temperature).softmax(-1)
        order = p.sort(descending=True).indices[: sampling.top_k or None]
        nucleus, total = [], 0.0
        whole = float(p[order].sum())
        for i in order.tolist():  # the likeliest until their share reaches top_p, at least one
            if nucleus and total >= sampling.top_p * whole:
                break
            nucleus.append(i)
            total += float(p[i])
        number_drawn, below = draw.random() * total, 0.0
        for i in sorted(nucleus):
            below += float(p[i])
            if below > number_drawn:
                break
        new.append(i)
    return new


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"top_p": 0.5, "temperature": 0.7},
        {"top_k": 5},
        {"top_p": 1.0},
        {"temperature": 0.0, "queries_per_document": 1},
    ],
)
def test_tokens_are_those_of_a_slow_loop(sampling):
    write = generator(**sampling)
    for key, document, queries in zip(KEYS, DOCUMENTS, write(KEYS, DOCUMENTS), strict=True):
        for number, query in enumerate(queries):
            assert query == _scored(write, document, slow_tokens(write.model, document, write.sampling, key, number))


def _scored(write, document, tokens):
    query = write._query(tokens)
    if query.text and write.model.prompt.fits(query.text):
        score = write.model(write.model.encode([(query.text, document)]), path="plain").mean_query_log_likelihood
        query = GeneratedQuery(query.text, query.ended, pytest.approx(float(score), abs=1e-5), query.num_tokens)
    return query


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma3", "bloom", "mamba"])
def test_queries_do_not_depend_on_the_batch(family):
    """Left padding, windows, recurrent state; alone, all together, and in another order."""
    write = generator(family)

    def texts(keys):
        documents = [DOCUMENTS[KEYS.index(key)] for key in keys]
        rows = write(keys, documents)
        return {key: [(query.text, query.ended) for query in queries] for key, queries in zip(keys, rows, strict=True)}

    whole = texts(KEYS)
    assert texts(KEYS[::-1]) == whole == {key: texts([key])[key] for key in KEYS}
    assert len({text for queries in whole.values() for text, _ in queries if text}) > 4
    assert generator(family, seed=4)(["a"], DOCUMENTS[:1])[0] != write(["a"], DOCUMENTS[:1])[0]


def test_the_lms_own_settings_do_not_matter():
    """What a generation_config.json may say: other sampling, penalties, beams."""
    lm = tiny_lm("llama")
    lm.generation_config.update(
        do_sample=True,
        temperature=0.1,
        top_k=1,
        repetition_penalty=5.0,
        num_beams=3,
        no_repeat_ngram_size=1,
        min_length=300,
        max_length=400,
    )
    assert generator(lm=lm)(KEYS, DOCUMENTS) == generator()(KEYS, DOCUMENTS)


def test_several_end_tokens():
    lm = tiny_lm("llama")
    lm.generation_config.eos_token_id = [1, 77]
    write = generator(lm=lm)
    assert write.has_end and write._ends[[1, 77]].all() and not write._ends[78]
    assert write._query([70, 71, 77]) == write._query([70, 71, 1]) != write._query([70, 71, 78])


def test_out_of_memory_halves_the_batch(monkeypatch, caplog):
    write = generator()
    expected, whole, seen = write(KEYS, DOCUMENTS), QueryGenerator._continue, []

    def little(self, prompts, seeds):
        seen.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError
        return whole(self, prompts, seeds)

    monkeypatch.setattr(QueryGenerator, "_continue", little)
    assert [[q.text for q in queries] for queries in write(KEYS, DOCUMENTS)] == [
        [q.text for q in queries] for queries in expected
    ]
    assert seen == [8, 4, 2, 2, 4, 2, 2] and "out of memory: generating 4 prompts at a time" in caplog.text


def test_batches():
    write = generator(max_tokens_per_batch=2 * 2 * (80 + 10 + 10))
    documents = ["x" * n for n in (5, 30, 7, 0, 30)]
    batches = write.batches(documents)
    assert sorted(place for batch in batches for place in batch) == [0, 1, 2, 3, 4] and batches[0][0] in (1, 4)
    lengths = [len(prefix.ids) + len("Question:") + 10 for prefix in write.model.prompt.documents(documents)]
    assert all(len(batch) == 1 or 2 * len(batch) * max(lengths[i] for i in batch) <= 400 for batch in batches)
    with pytest.raises(ValueError, match="does not fit the LM's context of 512; lower max_document_tokens"):
        generator(max_new_tokens=500).batches(["x"])


def test_a_query_ends_with_its_line():
    write = generator()
    for text, expected, ended in [
        (" why tides?\n", "why tides?", True),
        (" why  tides\t", "why tides", False),
        ("\n", "", True),
        (" a</s>", "a", True),
        (" a\r", "a", True),
        ("", "", False),
    ]:
        query = write._query(write.model.tokenizer(text, add_special_tokens=False)["input_ids"])
        assert (query.text, query.ended) == (expected, ended), text


def test_a_tokenizer_without_spaces():
    """As the demo's: the pieces are set apart."""
    tokenizer = word_tokenizer()
    assert generator(tokenizer=tokenizer)._query([2, 3, 4]).text == "tide moon sea"
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *WORDS])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert tokenizer.decode([1, 2]) == "tidemoon"
    assert generator(tokenizer=tokenizer)._query([2, 3]).text == "moon sea"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"queries_per_document": 0}, "queries_per_document must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"temperature": math.nan}, "temperature must be 0 or above, got nan"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, got 0"),
        ({"top_p": 1.1}, "top_p"),
        ({"temperature": 0, "queries_per_document": 2}, "temperature 0 writes the same query each time"),
    ],
)
def test_impossible_sampling(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"min_tokens": 0}, "min_tokens must be at least 1"),
        ({"keep_fraction": 0}, "keep_fraction must be above 0"),
        ({"keep_fraction": 1.5}, "got 1.5"),
        ({"min_log_likelihood": 0.5}, "0 at most, got 0.5"),
        ({"min_log_likelihood": math.nan}, "got nan"),
        ({"num_negatives": -1}, "num_negatives must be at least 0"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"round_trip_top": -1}, "round_trip_top must be at least 0"),
    ],
)
def test_impossible_filters(options, message):
    with pytest.raises(ValueError, match=message):
        Filters(**options)


# -- filters -------------------------------------------------------------------------------------------------------


CORPUS = {
    f"d{i}": {"id": f"d{i}", "title": "", "text": text}
    for i, text in enumerate(
        [
            "the sea rises because the moon pulls it twice a day",
            "boats lie in the harbour at low tide",
            "wind makes waves",
            "the moon is round",
            "",
        ]
    )
}


def query(text, ended=True, log_likelihood=-1.0, num_tokens=5):
    return GeneratedQuery(text, ended, log_likelihood, num_tokens)


def kept_texts(generated, dropped=None, **filters):
    generated = {doc_id: generated.get(doc_id, []) for doc_id in CORPUS if CORPUS[doc_id]["text"]}
    kept = select(generated, CORPUS, list(CORPUS), Filters(**filters), Counter() if dropped is None else dropped)
    return [query.text for query in kept]


@pytest.mark.parametrize(
    "bad, filters, why",
    [
        (query(""), {}, "have no word"),
        (query("?! …"), {}, "have no word"),
        (query("why\ufffd tides"), {}, "hold undecodable bytes"),
        (query("why tides", ended=False), {}, "have no end within max_new_tokens"),
        (query("why", num_tokens=2), {}, "have fewer than 3 tokens"),
        (query("sea sea sea moon moon"), {}, "repeat themselves"),
        (query("why tides", log_likelihood=None), {}, "are longer than max_query_tokens"),
        (query("The Moon pulls it!"), {}, "are copied from their document"),
        (query("why tides", log_likelihood=-2.01), {"min_log_likelihood": -2.0}, "have a mean log-likelihood below -2"),
    ],
)
def test_each_filter(bad, filters, why):
    """Of two queries the bad one goes, is counted under its reason, and the good one stays."""
    dropped = Counter()
    assert kept_texts({"d0": [query("why do tides rise", log_likelihood=-2.0), bad]}, dropped, **filters) == [
        "why do tides rise"
    ]
    reasons = [reason for reason, count in dropped.items() if count and reason != "documents have no text"]
    assert len(reasons) == 1 and reasons[0].startswith(why)
    assert dropped["documents have no text"] == 1  # d4


def test_what_is_no_fault():
    good = [query("moon pulls it"), query("sea sea moon wind"), query("潮の満ち引きはなぜ")]  # three words are no copy
    assert kept_texts({"d0": good}) == [q.text for q in good]
    assert kept_texts({"d0": [query("why tides", ended=False)]}, keep_unfinished=True) == ["why tides"]


def test_equal_queries():
    dropped = Counter()
    generated = {"d0": [query("Why tides?"), query("why TIDES"), query("what is it")], "d1": [query("What is it?")]}
    assert kept_texts(generated, dropped) == ["Why tides?"]
    assert dropped["are the same as another of their document"] == 1
    assert dropped["were generated for several documents"] == 2


def test_the_likeliest_fraction():
    generated = {
        "d0": [query(f"query {x}", log_likelihood=x) for x in (-3.0, -1.0, -2.0)],
        "d1": [query("other one", log_likelihood=-2.5)],
    }
    dropped = Counter()
    assert kept_texts(generated, dropped, keep_fraction=0.5) == ["query -1.0", "query -2.0"]  # their order stays
    assert dropped["are not among the likeliest"] == 2
    assert len(kept_texts(generated, keep_fraction=0.51)) == 3  # rounded up


def test_round_trip_and_negatives():
    """Against BM25 asked for each query by itself."""
    texts = {"d0": "moon twice", "d1": "waves wind", "d2": "waves", "d3": "zebra"}
    kept = [KeptQuery(f"{doc_id}-0", doc_id, text, -1.5) for doc_id, text in texts.items()]
    counts, filters = Counts(4, 4), Filters(round_trip_top=1, num_negatives=2, depth=3)
    examples = list(round_trip(kept, CORPUS, filters, 0, counts))
    assert [(e["query_id"], e["query"], e["round_trip_rank"]) for e in examples] == [
        ("d0-0", "moon twice", 1),
        ("d2-0", "waves", 1),
    ]
    assert examples[0]["positives"] == [CORPUS["d0"]] and examples[0]["log_likelihood"] == -1.5
    assert [document["id"] for document in examples[0]["negatives"]] == ["d3"]  # the other one with a moon
    assert counts.dropped == {"do not bring their document back among BM25's best 1": 2} and counts.fewer_negatives == 2
    wide = list(round_trip(kept, CORPUS, Filters(round_trip_top=0), 0, Counts(4, 4)))
    run = bm25_run(CORPUS, {e["query_id"]: e["query"] for e in wide})
    ranks = {e["query_id"]: e["round_trip_rank"] for e in wide}
    places = {q: [doc_id for doc_id, _ in ranking] for q, ranking in run.items()}
    assert ranks == {q: found.index(q[:2]) + 1 if q[:2] in found else None for q, found in places.items()}
    assert ranks["d1-0"] is None and ranks["d2-0"] == 1
    bare = list(round_trip(kept, CORPUS, Filters(round_trip_top=0, num_negatives=0), 0, Counts(4, 4)))
    assert [e["negatives"] for e in bare] == [[]] * 4 and {e["round_trip_rank"] for e in bare} == {None}


def test_choice_of_documents():
    ids = [f"d{i}" for i in range(50)]
    some = choose_documents(dict.fromkeys(ids), 10, 0)
    assert len(some) == 10 and some == sorted(some, key=ids.index) == choose_documents(dict.fromkeys(ids), 10, 0)
    assert some != choose_documents(dict.fromkeys(ids), 10, 1)
    assert choose_documents(dict.fromkeys(ids), None, 0) == choose_documents(dict.fromkeys(ids), 99, 0) == ids


# -- the command ---------------------------------------------------------------------------------------------------

WORDS = "tide moon sea boat harbour wind wave month earth low high pull rope lamp fog gull net pier map sail".split()


def word_tokenizer():
    """One token per word of `WORDS`, which keeps the spaces; </s> ends."""
    vocabulary = {"<unk>": 0, "</s>": 1} | {f"▁{word}": i for i, word in enumerate(WORDS, 2)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


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
    process = Process(command(job, out))
    process.wait_for_size(part, 1500)
    process.popen.kill()
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
    assert "none of the 118 generated queries was kept; loosen the filters: " in error
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
        (["--max-new-tokens", 600], "does not fit the LM's context of 512"),
    ]:
        assert main(command(job, tmp_path / "out", *options)) == 2, options
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert {path.name for path in tmp_path.iterdir()} <= {"t5", "data", "cache"}, options
