"""``qpeft convert``: what a target can hold comes back, what it cannot is counted, nothing is left half-written."""

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_data import DOCUMENTS, QRELS, QUERIES, RUN, write_folder

from qpeft_ext import formats
from qpeft_ext.cli import main
from qpeft_ext.formats import open_collection
from qpeft_ext.formats.convert import TARGETS, convert
from qpeft_ext.formats.source import Source

CORPUS = {i: {"id": i, "title": title, "text": text} for i, (title, text) in DOCUMENTS.items()}
CANDIDATES = {doc_id for ranking in RUN.values() for doc_id, _ in ranking}  # all but none: d1 to d6


@pytest.fixture
def source(tmp_path):
    return Source(open_collection(write_folder(tmp_path / "data")), run=RUN)


def there_and_back(source, path, target):
    done = convert(source, path, target)
    return open_collection(path), done


def test_beir(source, tmp_path):
    data, done = there_and_back(source, tmp_path / "out", "beir")
    assert dict(data.corpus) == CORPUS and data.queries() == QUERIES and data.qrels() == QRELS
    assert str(done) == "wrote 6 documents, 3 queries, 4 judgements; not held: 9 candidates"


def test_msmarco(source, tmp_path):
    source.data.corpus  # noqa: B018  (from the folder as it is)
    data, done = there_and_back(source, tmp_path / "out", "msmarco")
    assert {i: d["text"] for i, d in data.corpus.items()} == {i: d["text"] for i, d in CORPUS.items()}
    assert data.queries() == QUERIES and data.qrels() == QRELS and data.splits == ["test"]
    assert {q: [d for d, _ in r] for q, r in data.candidates().items()} == {
        q: [d for d, _ in r] for q, r in RUN.items()
    }
    assert done.lost["titles"] == 3 and done.lost["scores of candidates (their order is kept)"] == 9


def test_trec(source, tmp_path):
    done = convert(source, tmp_path / "out", "trec")
    assert formats.read_qrels(tmp_path / "out" / "qrels.test.txt") == QRELS
    assert [[d for d, _ in r] for r in formats.read_run(tmp_path / "out" / "run.test.trec").values()] == [
        [d for d, _ in r] for r in RUN.values()
    ]
    assert done.lost["texts of documents"] == 6 and done.lost["texts of queries"] == 3


@pytest.mark.parametrize("name", ["out.json", "out.json.gz"])
def test_upr(source, tmp_path, name):
    data, done = there_and_back(source, tmp_path / name, "upr")
    assert data.queries() == QUERIES and data.candidates() == RUN and dict(data.corpus) == CORPUS
    assert {q: {d for d, label in labels.items() if label} for q, labels in data.qrels().items()} == {
        "q1": {"d1"},
        "q2": {"d3"},
        "q3": {"d2"},
    }
    assert +done.lost == {"grades other than 0 and 1": 1}  # d1's 2


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
def test_rankllm(source, tmp_path, name):
    data, done = there_and_back(source, tmp_path / name, "rankllm")
    assert data.queries() == QUERIES and data.candidates() == RUN and dict(data.corpus) == CORPUS
    assert +done.lost == {"judgements": 4} and done.written == {"candidates": 9, "queries": 3}


def test_training_examples(source, tmp_path):
    """From qrels and candidates; jsonl keeps everything, DPR's json the texts and ids of documents."""
    data, done = there_and_back(source, tmp_path / "out.jsonl", "jsonl")
    examples = list(data.examples())
    assert [e["query_id"] for e in examples] == list(QRELS) and not +done.lost
    dpr, done = there_and_back(Source(data), tmp_path / "out.json", "dpr")
    back = list(dpr.examples())
    assert [e["positives"] for e in back] == [e["positives"] for e in examples]
    assert [e["negatives"] for e in back] == [e["negatives"] for e in examples]
    assert done.lost["query ids"] == 3 and dpr.qrels() == {"0": {"d1": 1}, "1": {"d3": 1}, "2": {"d2": 1}}
    again, _ = there_and_back(Source(dpr), tmp_path / "again.jsonl", "jsonl")
    assert [e["positives"] for e in again.examples()] == [e["positives"] for e in examples]


def test_what_does_not_belong_together_is_counted(source, tmp_path):
    source.run = {"q1": [("d1", 2.0), ("gone", 1.0)], "unknown": [("d1", 1.0)]}
    for target, name in (("upr", "a.json"), ("rankllm", "a.jsonl"), ("msmarco", "folder")):
        data, done = there_and_back(source, tmp_path / name, target)
        assert [d for d, _ in data.candidates()["q1"]] == ["d1"], target
        assert done.lost["candidates that the corpus does not hold"] == 1
        assert done.lost["candidates of queries without text"] == 1
    assert data.parts == ("corpus", "queries", "qrels", "candidates")


def test_queries_of_other_splits_stay_out(source, tmp_path):
    """BEIR keeps the queries of all splits in one file; in a file of one split they would count as unanswered."""
    source.run = {"q1": RUN["q1"]}
    (tmp_path / "data" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq2\td3\t1\n")
    for target, name in (("upr", "a.json"), ("rankllm", "a.jsonl"), ("msmarco", "folder")):
        data, done = there_and_back(source, tmp_path / name, target)
        assert list(data.queries()) == ["q1", "q2"] and done.lost["queries of other splits"] == 1, target


def test_one_format_after_the_other(source, tmp_path):
    """beir → rankllm → upr → rankllm → beir: queries, candidates and their texts arrive."""
    for place, target in enumerate(["rankllm", "upr", "rankllm", "beir"]):
        run = source.run
        convert(source, tmp_path / str(place), target)
        source = Source(open_collection(tmp_path / str(place)), run=run if target == "beir" else None)
    assert source.data.queries() == QUERIES and dict(source.data.corpus) == {i: CORPUS[i] for i in source.data.corpus}
    assert set(source.data.corpus) == CANDIDATES and run == RUN


_TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=12)
_IDS = st.sampled_from(["wiki:1", "wiki:Moon", "\ufeffd1"]) | st.text(
    st.characters(categories=["L", "N", "P", "Cf"]), min_size=1, max_size=5
)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["beir", "upr", "rankllm", "msmarco"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(texts=st.dictionaries(_IDS, st.tuples(_TEXT, _TEXT), min_size=1, max_size=4), query=_TEXT, number=st.integers(0))
def test_any_text_comes_back(tmp_path_factory, target, texts, query, number):
    """Quotation marks, line ends, byte order marks, empty texts: whatever JSON and tsv may trip over."""
    folder = tmp_path_factory.mktemp("any")
    (folder / "data").mkdir()
    with open(folder / "data" / "corpus.jsonl", "w", encoding="utf-8") as file:
        for doc_id, (title, text) in texts.items():
            file.write(json.dumps({"_id": doc_id, "title": title, "text": text}) + "\n")
    query = query if query.strip() and not query.startswith("[CLS]") else "what"
    (folder / "data" / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": query}))
    run = {"q": [(doc_id, -float(i)) for i, doc_id in enumerate(texts)]}
    source = Source(open_collection(folder / "data"), run=run)
    try:
        data, done = there_and_back(source, folder / "out", target)
    except ValueError as error:
        assert "doc_id" in str(error) or "the id" in str(error)
        return
    lossy = target == "msmarco"
    flat = (lambda text: re.sub(r"[\t\n\r]+", " ", text)) if lossy else str
    assert data.queries() == {"q": flat(query)}
    for doc_id, (title, text) in texts.items():
        assert data.corpus[doc_id] == {"id": doc_id, "title": "" if lossy else title, "text": flat(text)}
    if target != "beir":
        assert [d for d, _ in data.candidates()["q"]] == list(texts)


# -- the command ---------------------------------------------------------------------------------------------------


def test_command(tmp_path, capsys):
    folder = write_folder(tmp_path / "data", ".gz")
    assert (
        main(
            ["convert", str(folder), str(tmp_path / "o.jsonl"), "--to", "rankllm", "--run", str(folder / "run.trec.gz")]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "wrote 9 candidates, 3 queries; not held: 4 judgements" in out
    assert open_collection(tmp_path / "o.jsonl").candidates()["q1"] == RUN["q1"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{data}", "{out}", "--to", "csv"], "must be one of beir, msmarco, trec, upr, rankllm, dpr, jsonl, got 'csv'"),
        (["{data}", "{out}", "--to", "upr"], "upr is made of queries, candidates, but"),
        (["{data}", "{data}", "--to", "msmarco"], "is there already; name a new folder"),
        (["{data}", "{out}/below/it", "--to", "beir"], "does not exist; create it first"),
        (["{data}", "{out}", "--to", "beir", "--split", "dev"], "has no split 'dev'; there are: test, train"),
        (["{data}/corpus.jsonl", "{out}", "--to", "trec"], "trec is made of qrels or candidates, but"),
        (
            ["{data}/corpus.jsonl", "{out}", "--to", "jsonl"],
            "a training example is made of queries, qrels, corpus, but",
        ),
        (["{data}/nothing", "{out}", "--to", "beir"], "nothing: no such file or folder"),
    ],
)
def test_what_cannot_be_converted(tmp_path, capsys, arguments, message):
    folder = write_folder(tmp_path / "data")
    places = {"data": folder, "out": tmp_path / "out"}
    assert main(["convert", *(argument.format(**places) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"data", "cache"}


@pytest.mark.parametrize("target", ["beir", "msmarco", "trec", "upr", "rankllm"])
def test_what_a_target_does_not_hold_is_read_first(tmp_path, target):
    """A passage with two texts, of which TREC files hold neither; answers that nobody but UPR's json holds."""
    top = tmp_path / "top1000.dev"
    top.write_text("1\t2\twhy\tsea\n3\t2\twho\tmoon\n")
    with pytest.raises(ValueError, match="top1000.dev, line 2: document '2' has another text than on line 1"):
        convert(Source(open_collection(top)), tmp_path / "out", target)

    class Unanswered(formats.beir.Folder):
        parts = ("corpus", "queries", "qrels", "answers")

        def answers(self, split=None):
            raise ValueError("answers that cannot be read")

    with pytest.raises(ValueError, match="answers that cannot be read"):
        convert(Source(Unanswered(write_folder(tmp_path / "data")), run=RUN), tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", TARGETS)
def test_a_bad_document_leaves_nothing(tmp_path, target):
    """The error comes in the middle of writing."""
    folder = write_folder(tmp_path / "data")
    (folder / "queries.jsonl").write_text('{"_id": "q 1", "text": "a"}\n{"_id": "q2", "text": "b"}\n')
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq 1\td1\t1\n")
    source = Source(open_collection(folder), run={"q 1": [("d1", 1.0)], "q2": [("d1", 1.0), ("d 2", 0.5)]})

    def broken(_):
        raise ValueError("a document that cannot be read")

    source.data.corpus.parse = lambda *_: broken(_)
    with pytest.raises(ValueError):
        convert(source, tmp_path / "out", target)
    assert {path.name for path in tmp_path.iterdir()} == {"data", "cache"}
