"""Every format behind `open_collection`: what it holds, that it streams, that malformed input names file and line."""

import gzip
import json
import pickle
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
from formats.format_readers import READERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_data import DOCUMENTS, QRELS, QUERIES, write_folder, write_lines

from qpeft_ext import formats
from qpeft_ext.formats import answers, dpr, json_records, msmarco, open_collection
from qpeft_ext.formats.json_records import read_records

D1 = {"id": "d1", "title": DOCUMENTS["d1"][0], "text": DOCUMENTS["d1"][1]}
HITS = {"q1": [("d2", 2.0), ("d1", 1.0)]}
ENDINGS = pytest.mark.parametrize("ending", ["", ".gz"])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path / "cache"))


def write_json(path, value, indent=None):
    return write_lines(path, [json.dumps(value, ensure_ascii=False, indent=indent)])


# -- what each format holds ----------------------------------------------------------------------------------------


@ENDINGS
def test_beir(tmp_path, ending):
    data = open_collection(write_folder(tmp_path / "data", ending))
    assert (data.format, data.parts, data.splits) == ("beir", ("corpus", "queries", "qrels"), ["test", "train"])
    assert data.corpus["d1"] == D1 and data.queries() == QUERIES and data.qrels() == data.qrels("train") == QRELS
    with pytest.raises(ValueError, match=r"data \(beir\) holds no candidates; it holds corpus, queries, qrels"):
        data.candidates()


@ENDINGS
def test_msmarco_folder(tmp_path, ending):
    write_lines(tmp_path / f"collection.tsv{ending}", ["0\tthe sea", "1\t", '2\tmoon "light'])
    write_lines(tmp_path / f"queries.dev.small.tsv{ending}", ["7\twhy tides", "8\tmoon"])
    write_lines(tmp_path / f"qrels.dev.small.tsv{ending}", ["7\t0\t0\t1", "8\t0\t2\t1"])
    write_lines(tmp_path / f"top1000.dev.small{ending}", ['7\t2\twhy tides\tmoon "light', "7\t0\twhy tides\tthe sea"])
    write_lines(tmp_path / f"queries.train.tsv{ending}", ["9\tsea"])
    write_lines(tmp_path / f"qidpidtriples.train.tsv{ending}", ["9\t0\t1", "9\t0\t2", "9\t0\t2", "9\t2\t1"])
    (tmp_path / "top1000.eval.tar.gz").touch()  # an archive is no split
    data = open_collection(tmp_path)
    assert data.parts == ("corpus", "queries", "qrels", "candidates", "examples")
    assert data.splits == ["dev.small", "train"]
    assert list(data.corpus) == ["0", "1", "2"] and data.corpus["2"]["text"] == 'moon "light'
    assert data.queries("dev.small") == {"7": "why tides", "8": "moon"}
    assert data.qrels("dev.small") == {"7": {"0": 1}, "8": {"2": 1}}
    assert [doc_id for doc_id, _ in data.candidates("dev.small")["7"]] == ["2", "0"]  # the order of the file
    first, second = data.examples("train")
    assert first["query_id"] == "9" and [d["id"] for d in first["negatives"]] == ["1", "2"]
    assert [d["id"] for d in second["positives"]] == ["2"]
    with pytest.raises(ValueError, match="which split\\? there are: dev.small, train"):
        data.qrels()
    with pytest.raises(ValueError, match="has no split 'test'; there are: dev.small, train"):
        data.qrels("test")
    with pytest.raises(ValueError, match="has no qrels.train.tsv"):
        data.qrels("train")


@ENDINGS
def test_msmarco_single_files(tmp_path, ending):
    top = open_collection(
        write_lines(tmp_path / f"top1000.dev{ending}", ["7\t2\twhy\tmoon", "8\t2\twho\tmoon", "7\t0\twhy\tsea"])
    )
    assert top.parts == ("corpus", "queries", "candidates") and top.queries() == {"7": "why", "8": "who"}
    assert {q: [d for d, _ in ranking] for q, ranking in top.candidates().items()} == {"7": ["2", "0"], "8": ["2"]}
    assert dict(top.corpus) == {
        "2": {"id": "2", "title": "", "text": "moon"},
        "0": {"id": "0", "title": "", "text": "sea"},
    }
    assert open_collection(write_lines(tmp_path / f"c.tsv{ending}", ["0\tsea"])).corpus["0"]["text"] == "sea"
    rows = write_lines(tmp_path / f"triples{ending}", ["why\tsea\tmoon", "why\tsea\twind", "who\tme\tyou"])
    assert list(msmarco.read_triples(rows)) == [
        {"query": "why", "positives": ["sea"], "negatives": ["moon", "wind"]},
        {"query": "who", "positives": ["me"], "negatives": ["you"]},
    ]
    (tmp_path / "folder").mkdir()
    write_lines(tmp_path / "folder" / f"top1000.dev{ending}", ["7\t2\twhy\tmoon"])
    assert open_collection(tmp_path / "folder").corpus["2"]["text"] == "moon"  # without a collection.tsv


PASSAGES = ["id\ttext\ttitle", '1\t"the ""big"" sea, 1984"\tTides', "2\tmoon\tMoon", '3\t"so" he said "no"\t"""A"" b"']


@ENDINGS
def test_dpr_passages_have_the_text_before_the_title(tmp_path, ending):
    corpus = open_collection(write_lines(tmp_path / f"psgs_w100.tsv{ending}", PASSAGES)).corpus
    assert corpus["1"] == {"id": "1", "title": "Tides", "text": 'the "big" sea, 1984'} and len(corpus) == 3
    assert corpus["3"] == {"id": "3", "title": '"A" b', "text": '"so" he said "no"'}


DPR_TRAIN = [
    {
        "question": "why",
        "answers": ["sea"],
        "positive_ctxs": [{"title": "T", "text": "p", "passage_id": "1"}],
        "negative_ctxs": [{"title": "N", "text": "n", "passage_id": "2"}],
        "hard_negative_ctxs": [{"title": "H", "text": "h", "passage_id": "3", "score": 1.5}],
    },
    {"question": "who", "answers": [], "positive_ctxs": []},
]


@ENDINGS
def test_dpr_training(tmp_path, ending):
    data = open_collection(write_json(tmp_path / f"nq-train.json{ending}", DPR_TRAIN, indent=1))
    assert data.parts == ("corpus", "queries", "answers", "qrels", "examples")
    (example,) = data.examples()
    assert (example["query_id"], example["query"], example["answers"]) == ("0", "why", ["sea"])
    assert [d["id"] for d in example["positives"]] == ["1"] and [d["id"] for d in example["negatives"]] == ["3", "2"]
    assert data.left_out == {"questions without a positive passage": 1}
    assert data.queries() == {"0": "why", "1": "who"} and data.qrels() == {"0": {"1": 1}}
    assert data.corpus["3"] == {"id": "3", "title": "H", "text": "h"} and len(data.corpus) == 3
    without = json.loads(json.dumps(DPR_TRAIN).replace('"passage_id"', '"other"'))
    data = open_collection(write_json(tmp_path / "b.json", without))
    assert data.parts == ("queries", "answers", "examples") and "id" not in next(data.examples())["positives"][0]


UPR = [
    {
        "question": "[CLS] why tides [SEP]",
        "answers": ["the sea"],
        "ctxs": [{"id": 2, "score": "1.5", "has_answer": False}, {"id": "wiki:1", "score": 2, "has_answer": True}],
    },
    {"question": "who", "answers": ["moon"], "ctxs": [{"id": "2", "score": 0.5}, {"id": "1", "score": 0.5}]},
]


@ENDINGS
def test_upr_with_passages_from_the_tsv(tmp_path, ending):
    (tmp_path / "retriever-outputs" / "bm25").mkdir(parents=True)
    write_lines(tmp_path / "wikipedia-split" / f"psgs_w100.tsv{ending}", PASSAGES)  # as UPR's download lies
    data = open_collection(write_json(tmp_path / "retriever-outputs" / "bm25" / f"nq-test.json{ending}", UPR))
    assert data.parts == ("corpus", "queries", "answers", "qrels", "candidates")
    assert data.queries() == {"0": "why tides", "1": "who"} and data.answers() == {"0": ["the sea"], "1": ["moon"]}
    assert data.candidates() == {"0": [("1", 2.0), ("2", 1.5)], "1": [("2", 0.5), ("1", 0.5)]}
    assert data.qrels() == {"0": {"2": 0, "1": 1}, "1": {"2": 1, "1": 0}}  # the second: labelled by the matching rule
    assert formats.read_qrels(data.place) == data.qrels()
    assert data.corpus["2"]["title"] == "Moon"


@pytest.mark.parametrize("indent", [None, 2])
def test_upr_with_texts_and_pyserinis_shape(tmp_path, indent):
    record = {
        "question": "why",
        "answers": ["SEA"],
        "contexts": [
            {"docid": "5", "score": "9.5", "text": '"Big Tides"\nthe sea'},
            {"docid": "6", "score": "9", "text": "wind"},
        ],
    }
    data = open_collection(write_json(tmp_path / "run.json", {"17": record, "18": record}, indent))
    assert list(data.queries()) == ["17", "18"] and data.qrels()["18"] == {"5": 1, "6": 0}
    assert dict(data.corpus) == {
        "5": {"id": "5", "title": "Big Tides", "text": "the sea"},
        "6": {"id": "6", "title": "", "text": "wind"},
    }


def test_upr_without_passages_anywhere(tmp_path):
    data = open_collection(write_json(tmp_path / "nq.json", UPR[:1]))
    assert data.parts == ("queries", "answers", "qrels", "candidates") and data.qrels() == {"0": {"2": 0, "1": 1}}
    with pytest.raises(FileNotFoundError, match="nq.json holds no passages.* psgs_w100.tsv or wikipedia-split/psgs_w"):
        data.corpus  # noqa: B018


@ENDINGS
def test_dpr_folder_and_questions(tmp_path, ending):
    write_lines(tmp_path / f"psgs_w100.tsv{ending}", PASSAGES)
    write_json(tmp_path / f"nq-test.json{ending}", UPR)
    write_json(tmp_path / f"nq-train.json{ending}", DPR_TRAIN)
    write_lines(tmp_path / f"webq.qa.csv{ending}", ["what year\t['1984', \"'84\"]", 'quoted\t"[""a \'b\'""]"'])
    data = open_collection(tmp_path)
    assert data.splits == ["nq-test", "nq-train", "webq.qa"]
    assert data.queries("nq-test")["1"] == "who" and len(list(data.examples("nq-train"))) == 1
    assert data.answers("webq.qa") == {"0": ["1984", "'84"], "1": ["a 'b'"]}
    questions = open_collection(tmp_path / f"webq.qa.csv{ending}")
    assert questions.parts == ("corpus", "queries", "answers") and questions.corpus["2"]["text"] == "moon"
    run = {"0": [("2", 2.0), ("1", 1.0)]}
    assert answers.answer_qrels([run], questions.answers(), questions.corpus) == {"0": {"2": 0, "1": 1}, "1": {}}


RANKLLM = [
    {
        "query": {"text": "why", "qid": 1},
        "candidates": [
            {"docid": "d2", "score": 1.0, "doc": {"title": "Moon", "contents": "round"}},
            {"docid": 1, "score": 2, "doc": "sea"},
        ],
    },
    {"query": {"text": "who", "qid": "x"}, "candidates": [{"docid": 1, "score": 2, "doc": {"text": "sea"}}]},
]
OLD_RANKLLM = [{"query": "why", "hits": [{"qid": "1", "docid": "d2", "rank": 1, "score": 0.5, "content": "round"}]}]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl", "a.jsonl.gz"])
def test_rankllm(tmp_path, name):
    if "jsonl" in name:
        path = write_lines(tmp_path / name, map(json.dumps, RANKLLM))
    else:
        path = write_json(tmp_path / name, RANKLLM, indent=1)
    data = open_collection(path)
    assert data.queries() == {"1": "why", "x": "who"}
    assert data.candidates() == {"1": [("1", 2.0), ("d2", 1.0)], "x": [("1", 2.0)]}
    assert dict(data.corpus) == {
        "d2": {"id": "d2", "title": "Moon", "text": "round"},
        "1": {"id": "1", "title": "", "text": "sea"},
    }
    old = open_collection(write_json(tmp_path / "old.json", OLD_RANKLLM))
    assert old.queries() == {"1": "why"} and old.corpus["d2"]["text"] == "round"


@ENDINGS
def test_jsonl(tmp_path, ending):
    lines = ['{"id": 1, "contents": "sea"}', '{"docid": "b", "title": "T", "text": ""}']
    corpus = open_collection(write_lines(tmp_path / f"docs.jsonl{ending}", lines)).corpus
    assert corpus["1"]["text"] == "sea" and corpus["b"]["title"] == "T"
    assert pickle.loads(pickle.dumps(corpus))["b"] == corpus["b"]
    data = open_collection(write_lines(tmp_path / f"train.jsonl{ending}", ['{"query": "q", "positives": ["p"]}']))
    assert data.parts == ("examples",) and next(data.examples())["negatives"] == []


# -- libraries -----------------------------------------------------------------------------------------------------


def ir_dataset(**parts):
    """What `qpeft_ext.formats.ir_datasets` uses of a data set of that library."""
    documents = [
        SimpleNamespace(doc_id="a", title="T", text="sea", default_text=lambda: "T sea"),
        SimpleNamespace(doc_id="b", body="moon", default_text=lambda: "moon whole"),
    ]
    queries = [
        SimpleNamespace(query_id="1", text="why", answers=("sea",)),
        SimpleNamespace(query_id="2", title="who", answers=(), default_text=lambda: "who"),
    ]
    there = {"docs": True, "queries": True, "qrels": True, "scoreddocs": False} | parts
    return SimpleNamespace(
        **{f"has_{part}": (lambda found=found: found) for part, found in there.items()},
        docs_store=lambda: SimpleNamespace(get={document.doc_id: document for document in documents}.__getitem__),
        docs_count=lambda: None,
        docs_iter=lambda: iter(documents),
        queries_iter=lambda: iter(queries),
        queries_cls=lambda: SimpleNamespace(_fields=("query_id", "text", "answers")),
        dataset_id=lambda: "lib/small",
        qrels_iter=lambda: (SimpleNamespace(query_id="1", doc_id="a", relevance=r) for r in (1, 2, 0)),
        scoreddocs_iter=lambda: (SimpleNamespace(query_id="1", doc_id=d, score=s) for d, s in (("a", 1), ("b", 2))),
    )


def test_ir_datasets_with_a_stub_of_the_library(monkeypatch):
    registry = {"lib/small": ir_dataset(), "lib/scored": ir_dataset(scoreddocs=True, qrels=False)}
    monkeypatch.setitem(sys.modules, "ir_datasets", SimpleNamespace(load=registry.__getitem__))
    data = open_collection("lib/small")
    assert data.parts == ("corpus", "queries", "answers", "qrels") and data.queries() == {"1": "why", "2": "who"}
    assert dict(data.corpus) == {
        "a": {"id": "a", "title": "T", "text": "sea"},
        "b": {"id": "b", "title": "", "text": "moon whole"},
    }
    assert data.answers() == {"1": ["sea"], "2": []} and data.qrels() == {"1": {"a": 2}}
    with pytest.raises(ValueError, match=r"lib/small \(ir_datasets\) holds no candidates"):
        data.candidates()
    assert open_collection("lib/scored").candidates() == {"1": [("b", 2.0), ("a", 1.0)]}
    with pytest.raises(FileNotFoundError, match="lib/none: no such file or folder.*ir_datasets knows no such id"):
        open_collection("lib/none")


def test_without_the_libraries(monkeypatch):
    for name in ("ir_datasets", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(FileNotFoundError, match=r"no such file.*BEIR.*hf:owner/name.*pip install qpeft_ext\[ir_data"):
        open_collection("beir/scifact/test")
    with pytest.raises(ImportError, match=r"pip install qpeft_ext\[datasets\]"):
        open_collection("hf:BeIR/scifact").parts  # noqa: B018


def test_hugging_face_datasets_on_disk(tmp_path):
    library = pytest.importorskip("datasets", reason="the extra qpeft_ext[datasets] is not installed")

    def rows_of(rows):  # with a fingerprint of our own: some versions of pyarrow and dill cannot compute one
        import pyarrow

        return library.Dataset(pyarrow.Table.from_pylist(rows), fingerprint=str(len(rows)))

    def save(name, rows):
        rows_of(rows).save_to_disk(str(tmp_path / name))

    save("mteb/corpus", [{"_id": "a", "title": "T", "text": "sea"}, {"_id": "b", "title": "", "text": "moon"}])
    save("mteb/queries", [{"_id": "1", "text": "why"}])
    library.DatasetDict({"test": rows_of([{"query-id": "1", "corpus-id": "a", "score": 1}])}).save_to_disk(
        str(tmp_path / "mteb" / "qrels")
    )
    data = open_collection(tmp_path / "mteb")
    assert data.parts == ("corpus", "queries", "qrels") and data.splits == ["test"]
    assert data.corpus["b"] == {"id": "b", "title": "", "text": "moon"} and list(data.corpus) == ["a", "b"]
    assert data.queries() == {"1": "why"} and data.qrels() == {"1": {"a": 1}}
    save(
        "tevatron",
        [
            {
                "query_id": "1",
                "query": "why",
                "positive_passages": [{"docid": "a", "title": "", "text": "p"}],
                "negative_passages": [{"docid": "b", "title": "T", "text": "n"}],
            }
        ],
    )
    assert list(open_collection(tmp_path / "tevatron").examples()) == [
        {
            "query_id": "1",
            "query": "why",
            "positives": [{"id": "a", "title": "", "text": "p"}],
            "negatives": [{"id": "b", "title": "T", "text": "n"}],
        }
    ]
    save("triplets", [{"anchor": "why", "positive": "p", "negative": "n"}])
    assert list(open_collection(tmp_path / "triplets").examples("train")) == [
        {"query": "why", "positives": ["p"], "negatives": ["n"]}
    ]
    for name, rows, message in [
        ("twice", [{"_id": "a", "text": ""}] * 2, "row 2 of corpus: the document id 'a' occurs twice"),
        ("keys", [{"id": "a", "text": ""}], "corpus: expected the columns _id, text, got id, text; _id is missing"),
    ]:
        save(f"{name}/corpus", rows)
        with pytest.raises(ValueError, match=message):
            open_collection(tmp_path / name).corpus  # noqa: B018
    for name, row, message in [
        ("e1", {"anchor": "why", "other": "p"}, "e1, row 1 of train: expected a query .* got the keys anchor, o"),
        ("e2", {"query": " ", "positive": "p"}, "e2, row 1 of train: expected a text as the query"),
        ("e3", {"query": "q", "positives": []}, "e3, row 1 of train: the positives are empty"),
        ("e4", {"query": "q", "positives": [1]}, "e4, row 1 of train: expected texts or objects with 'text'"),
    ]:
        save(name, [row])
        with pytest.raises(ValueError, match=message):
            list(open_collection(tmp_path / name).examples())


# -- streaming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 64])
def test_records_across_the_borders_of_what_is_read(tmp_path, size, monkeypatch):
    """The same records however few bytes come at once."""
    whole = json_records._Text.more

    def little(text):
        read = text.file.read
        text.file = SimpleNamespace(read=lambda _: read(size))
        try:
            whole(text)
        finally:
            text.file = SimpleNamespace(read=read)

    records = [{"question": f'é\u2028 月 {i} \\" ]}}', "n": [1e-3, -0.5, None, True, {"a": [[]]}]} for i in range(5)]
    monkeypatch.setattr(json_records._Text, "more", little)
    for name, value in [("list", records), ("object", {str(i): r for i, r in enumerate(records)})]:
        for indent in (None, 3):
            path = write_json(tmp_path / f"{name}.json", value, indent)
            assert [record for _, _, record in read_records(path, "question")] == records
    path = write_lines(tmp_path / "a.jsonl", map(json.dumps, records))
    places, _, _ = zip(*read_records(path, "question"), strict=True)
    assert [str(place) for place in places] == [f"{i}, record {i}" for i in range(1, 6)]
    path = write_json(tmp_path / "b.json", records)
    assert str(list(read_records(path, "question"))[-1][0]) == "1, record 5"


def test_a_long_list_is_not_held(tmp_path):
    """Ten thousand records of 10 kB, of which a traced reader holds a few at a time."""
    import tracemalloc

    path = tmp_path / "long.json.gz"
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.write("[" + ",".join(json.dumps({"question": str(i), "text": "x" * 10_000}) for i in range(3000)) + "]")
    tracemalloc.start()
    count = sum(1 for _ in read_records(path, "question"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 3000 and peak < 12e6, peak


# -- the matching rule ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, answer, held",
    [
        ("The Beatles sang it.", "the beatles", True),
        ("It was beat.", "Beatles", False),
        ("beatles", "the beatles", False),
        ("in 1984, they", "1984", True),
        ("in 19845", "1984", False),
        ("U.S. Army", "U.S.", True),
        ("US Army", "U.S.", False),
        ("Zu\u0308rich", "Z\u00fcrich", True),
        ("Zurich", "Z\u00fcrich", False),
        ("a  b\tc", "a b c", True),
        ("snake_case", "snake", True),
        ("anything", "", False),
        ("anything", " \t", False),
        ("", "a", False),
        ("東京", "東", False),
        ("50 % of", "50%", True),
        ("a b a b c", "a b c", True),
    ],
)
def test_has_answer(text, answer, held):
    assert answers.has_answer(text, ["never there", answer]) is held


_SOME = st.text(
    st.sampled_from("aAbé\u0301ß9٣ _-.'’,%\u00a0\u3000\t\n\u200b東京\u093e")
    | st.characters(max_codepoint=0x2FFF, exclude_categories=["Cn", "Cs"]),
    max_size=12,
)


@settings(max_examples=400, deadline=None)
@given(text=_SOME, answer=_SOME, joined=st.booleans())
def test_has_answer_is_dprs_rule(text, answer, joined):
    """Against DPR's tokenizer as it is written there, with the Unicode classes of the package regex."""
    regex = pytest.importorskip("regex")

    def tokens(value):
        pattern = r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]"
        return [token.lower() for token in regex.findall(pattern, unicodedata.normalize("NFD", value))]

    text = f"{text} {answer} {text}" if joined else text
    wanted, there = tokens(answer), tokens(text)
    expected = any(there[i : i + len(wanted)] == wanted for i in range(len(there))) if wanted else False
    assert answers.has_answer(text, [answer]) is expected


def test_labels_of_a_candidate_that_is_not_in_the_corpus(tmp_path):
    write_lines(tmp_path / "psgs_w100.tsv", PASSAGES[:2])
    data = open_collection(write_json(tmp_path / "nq.json", UPR))  # its second question has no labels
    with pytest.raises(ValueError, match="nq.json: passage '2' of query '1' is not in .*psgs_w100.tsv; the files do"):
        data.qrels()
    with pytest.raises(ValueError, match="document 'z' of query '0' is in the run but not in the corpus"):
        answers.answer_qrels([{"0": [("z", 1.0)]}], {"0": ["a"]}, {})


# -- malformed input -----------------------------------------------------------------------------------------------


def record(value):
    return json.dumps([value]).encode()


def retrieved(passages):
    return record({"question": "q", "answers": [], "ctxs": passages})


def request(candidates):
    return record({"query": {"text": "q", "qid": 1}, "candidates": candidates})


MALFORMED = {
    "beir corpus": [
        (b'{"_id": "a", "text": "x"}\n{"_id": "b"}', "line 2: expected the key 'text', got the keys ['_id']"),
        (b'{"_id": 0.5, "text": "x"}', "line 1: expected text under '_id', got 0.5"),
        (b'{"_id": "a", "text": "x"}\n\n{"_id": "a", "text": "x"}', "line 3: the document id 'a' was already"),
        (b'{"_id": "a", "title": 3, "text": "x"}', "line 1: expected text under 'title', got 3"),
        (b'{"_id": "a", "text": "x"} {', "line 1: expected one JSON object"),
        (b"", "the corpus is empty"),
        (b'{"_id": "a", "text": "\xe9"}', "line 1: expected UTF-8, got the byte 0xe9"),
    ],
    "beir queries": [
        (b'{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}', "line 2: the query id 'a' occurs twice"),
        (b'{"_id": "a", "text": " "}', "line 1: 'text' is empty"),
        (b'{"text": "x"}', "line 1: expected the key '_id'"),
        (b'{"_id": "a", "text": ["x"]}', "line 1: expected text under 'text', got ['x']"),
        (b"\n\n", "no queries"),
        (b'{"_id": "a", "text": "x"}\n"b"', "line 2: expected a JSON object, got 'b'"),
    ],
    "beir qrels": [
        (b"query-id\tcorpus-id\tscore\nq\td", "line 2: expected 3 columns"),
        (b"", "the qrels are empty"),
        (b"query-id\tcorpus-id\tscore\nq\t\t1", "line 2: one of the 3 columns is empty"),
        (b"query-id\tcorpus-id\tscore\nq\td\t1.5", "line 2: expected a whole number as relevance, got '1.5'"),
        (b"query-id\tcorpus-id\tscore\nq\td\t1\nq\td\t0", "line 3: document 'd' is judged twice for query 'q'"),
    ],
    "trec run": [
        (b"q Q0 d 1 1.0", "line 1: expected 6 columns"),
        (b"q Q0 d 1 1.0 t\nq Q0 d 2 0.5 t", "line 2: document 'd' occurs twice for query 'q'"),
        (b"q Q0 d 1 NaN t", "line 1: expected a finite number as score, got 'NaN'"),
        (b"q Q0 d 1 -inf t", "got '-inf'"),
        (b"q Q0 d 1 1_0 t", "got '1_0'"),
        (b"q Q0 d 1 1,5 t", "got '1,5'"),
        (b"q Q0 d one 1.0 t", "line 1: expected a whole number as rank, got 'one'"),
        (b"", "the run is empty"),
        (b"q Q0 d 1 1.0 t\nq Q0 \xff 1 1.0 t", "line 2: expected UTF-8"),
    ],
    "qrels": [
        (b"q 0 d", "line 1: expected a whole number as relevance, or a header"),
        (b"q 0 d high", "got 'q 0 d high'"),
        (b"q 0 d 1\nq 0 d 1", "line 2: document 'd' is judged twice"),
        (b"", "the qrels are empty"),
        (b"q 0 d 99999999999999999999", "line 1: expected a whole number as relevance"),
        (b"q 0 d 1\n\xe9 0 d 1", "line 2: expected UTF-8, got the byte 0xe9"),
    ],
    "msmarco top1000 corpus": [
        (b"1\t2\tq\tp\n1\t2\tr\tother", "line 2: document '2' has another text than on line 1"),
        (b"1\t2\tq", "line 1: expected 4 columns"),
        (b"1\t \tq\tp", "line 1: the column pid is empty"),
        (b"", "the corpus is empty; expected lines qid"),
        (b"1\t2\tq\tp\n1\t3\tq\t\xff", "line 2: expected UTF-8"),
    ],
    "msmarco collection": [
        (b"1\tsea\n2", "line 2: expected 2 columns pid <tab> passage, got 1"),
        (b"1\tsea\tmore", "line 1: expected 2 columns"),
        (b"\tsea", "line 1: the column pid is empty"),
        (b"1\ta\n2\tb\n1\tc", "line 3: the document id '1' was already on line 1"),
        (b"1\t\xff", "line 1: expected UTF-8, got the byte 0xff"),
        (b"\n", "the corpus is empty; expected lines pid"),
    ],
    "msmarco queries": [
        (b"1\ta\n1\tb", "line 2: the query id '1' occurs twice"),
        (b"1\t ", "line 1: the column query is empty"),
        (b"1 a", "line 1: expected 2 columns"),
        (b"", "no queries"),
        (b"1\ta\n\xc3", "line 2: expected UTF-8"),
    ],
    "msmarco top1000": [
        (b"1\t2\tq", "line 1: expected 4 columns"),
        (b"1\t2\tq\tp\n1\t3\tother\tp", "line 2: query '1' had another text"),
        (b"1\t2\tq\tp\n1\t2\tq\tp", "line 2: passage '2' occurs twice for query '1'"),
        (b"1\t\tq\tp", "line 1: the column pid is empty"),
        (b"", "no candidates; expected lines qid"),
    ],
    "msmarco triples": [
        (b"q\tp", "line 1: expected 3 columns query <tab> positive <tab> negative"),
        (b"", "no triples"),
        (b"q\tp\tn\n\tp\tn", "line 2: the column query is empty"),
        (b"q\t\tn", "line 1: the column positive is empty"),
        (b"q\tp\tn\n\xff", "line 2: expected UTF-8"),
    ],
    "msmarco triples of ids": [
        (b"1\t2\t3\n9\t2\t3", "line 2: query '9' is not in the queries"),
        (b"", "no triples"),
        (b"9" * 5000 + b"\t2\t3", "line 1: query '" + "9" * 592 + "…"),
        (b"1\t8\t3", "line 1: passage '8' is not in the collection"),
        (b"1\t2\t7", "line 1: passage '7' is not"),
        (b"1\t2", "line 1: expected 3 columns"),
    ],
    "dpr passages": [
        (b"id\ttext\ttitle\n1\ta", "line 2: expected 3 columns id <tab> text <tab> title"),
        (b"id\ttext\ttitle", "the corpus is empty; expected a header"),
        (b"\ta\tb", "line 1: expected 3 columns"),
        (b"1\ta\tb\n1\ta\tb", "line 2: the document id '1' was already on line 1"),
        (b"1\t\xe9\tb", "line 1: expected UTF"),
    ],
    "dpr questions": [
        (b"why", "line 1: expected 2 columns question <tab>"),
        (b"why\tsea", "line 1: expected a list of texts as answers"),
        (b"why\t['a', 3]", "line 1: expected a list of texts"),
        (b"\t['a']", "line 1: expected 2 columns"),
        (b"why\t['a']\nwho\t['a'", "line 2: expected a list of texts"),
        (b"", "no questions"),
        (b"why\t__import__('os').system('x')", "line 1: expected a list of texts"),
    ],
    "dpr training": [
        (
            record({"question": "q"}),
            "line 1, record 1: expected a list of passages under 'positive_ctxs', got no such key",
        ),
        (record({"question": "", "answers": [], "positive_ctxs": []}), "line 1, record 1: 'question' is empty"),
        (record({"question": "q", "positive_ctxs": [{"title": "t"}]}), "record 1: expected the key 'text'"),
        (
            record({"question": "q", "positive_ctxs": [], "answers": "a"}),
            "record 1: expected a list of texts as answers",
        ),
        (
            record({"question": "q", "positive_ctxs": [{"passage_id": 1, "text": "p"}, {"text": "p"}], "answers": []})[
                :-1
            ]
            + b', {"question": "w", "answers": [], "positive_ctxs": 7}]',
            "record 2: expected a list of passages under 'positive_ctxs', got 7",
        ),
        (b'[\n{"question": "q"},\n3]', "line 3, record 2: expected a JSON object, got 3"),
        (b"[]", "no questions"),
        (b"[", "the file ends in the middle"),
    ],
    "upr": [
        (
            record({"question": "q", "answers": []}),
            "line 1, record 1: expected a list of passages under 'ctxs', got None",
        ),
        (retrieved([{"score": 1}]), "expected a passage with an 'id', got the keys"),
        (retrieved([{"id": 1}]), "finite number under 'score', got no such key"),
        (retrieved([{"id": 1, "score": "nan"}]), "under 'score', got 'nan'"),
        (retrieved([{"id": 1, "score": 10**400}]), "finite number under 'score', got 1000"),
        (retrieved([{"id": 1, "score": 1}] * 2), "passage '1' occurs twice"),
        (record({"question": "q", "ctxs": []}), "expected a list of texts as answers, got 'no such key'"),
        (retrieved([{"id": 1, "score": 1, "has_answer": "yes"}]), "true or false"),
        (b'{"1": {"question": "q", "answers": [], "ctxs": []}, "1": {"question": "q"}}', "record 2: the query id '1'"),
        (b'[{"question": "q", "answers": [], "ctxs": []}] x', "expected the end of the file, got 'x'"),
        (b"", "no questions"),
    ],
    "upr corpus": [
        (
            retrieved([{"id": 1, "score": 1, "text": "a"}, {"id": 2, "score": 1}]),
            "line 1, record 1: passage '2' has no text, others have",
        ),
        (
            json.dumps(
                [{"question": "q", "answers": [], "ctxs": [{"id": 1, "score": 1, "text": t}]} for t in "ab"]
            ).encode(),
            "line 1, record 2: document '1' has another text than on line 1",
        ),
        (retrieved([{"id": 1, "score": 1, "text": 3}]), "expected text under 'text'"),
        (retrieved([]), "the corpus is empty"),
        (b"[1]", "record 1: expected a JSON"),
    ],
    "rankllm": [
        (record({"query": {"text": "q", "qid": 1}}), "line 1, record 1: expected a list of candidates"),
        (record({"query": {"text": "q"}, "candidates": []}), "record 1: expected the key 'qid'"),
        (record({"query": {"text": " ", "qid": 1}, "candidates": []}), "record 1: 'text' is empty"),
        (request([{"score": 1, "doc": "d"}]), "expected the key 'docid'"),
        (request([{"docid": 1, "score": 1, "doc": 3}]), "under 'doc', got 3"),
        (request([{"docid": 1, "score": None}]), "under 'score', got None"),
        (request([{"docid": 1, "score": 1, "doc": {"x": 1}}]), "key 'text'"),
        (
            b'{"query": {"text": "q", "qid": 1}, "candidates": []}\n' * 2,
            "line 2, record 2: the query id '1' occurs twice",
        ),
        (b"", "no queries"),
    ],
    "jsonl corpus": [
        (b'{"text": "a"}', "line 1: expected the key '_id'"),
        (b'{"id": 1}', "line 1: expected the key 'text'"),
        (b'{"id": 1, "text": "a"}\n{"id": "1", "text": "a"}', "line 2: the document id '1' was already on line 1"),
        (b'{"id": 1, "text": null}', "line 1: expected text under 'text', got None"),
        (b'{"id": 1, "text": "a"}\n[]', "line 2: expected a JSON object"),
        (b'{"id": 1, "text": "a"', "line 1: expected one"),
    ],
    "jsonl examples": [
        (b'{"query": "q"}', "line 1: expected a query and its documents: "),
        (b"", "no training examples"),
        (b'{"query": "q", "positives": []}', "line 1: 'positives' is empty"),
        (b"[]", "line 1: expected a JSON object"),
        (
            b'{"query": "q", "positives": ["p"], "negatives": 3}',
            "line 1: expected a list of documents under 'negatives'",
        ),
        (b'{"query": "", "positives": ["p"]}', "line 1: 'query' is empty"),
    ],
}
CASES = [(name, i) for name, cases in MALFORMED.items() for i in range(len(cases))]


@pytest.mark.parametrize("name, i", CASES)
def test_malformed(tmp_path, name, i):
    content, message = MALFORMED[name][i]
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        READERS[name](tmp_path / "file")
    assert str(caught.value).startswith(str(tmp_path / "file")) and message in str(caught.value)
    assert "\n" not in str(caught.value) and not list((tmp_path / "cache").glob("*"))


def test_there_are_five_of_each():
    assert READERS.keys() - {"any"} == MALFORMED.keys() and min(map(len, MALFORMED.values())) >= 5


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "a file of no known format; looked for json with .*UPR.*; .*tsv"),
        (b"a b c", "a file of no known format"),
        (b"q1 Q0 d1 1 0.5 tag", "looks like a TREC run, which has no texts; give it as --run"),
        (b'{"x": 1}', "a file of no known format"),
        (b"\xff", "line 1: expected UTF-8"),
        (b"[1]", "expected a JSON object"),
    ],
)
def test_files_of_no_known_format(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_collection(tmp_path / "file")


def test_places_of_no_known_format(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"folder of no known format; looked for a folder with corpus.jsonl \(BEIR\); "
        r"a folder with collection.tsv or top1000.\* \(MS MARCO\); .*psgs_w100.tsv",
    ):
        open_collection(tmp_path)
    (tmp_path / "x.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="x.gz: not a whole gzip file"):
        open_collection(tmp_path / "x.gz")


_PIECES = st.sampled_from(
    [
        b"[",
        b"]",
        b"{",
        b"}",
        b",",
        b":",
        b'"',
        b"\n",
        b"\t",
        b"\\",
        b"\xff",
        b"\x00",
        b"1",
        b"null",
        b"-Infinity",
        b" ",
        b'"question": "q"',
        b'"ctxs": [{"id": 1, "score": 2, "text": "t"}]',
        b'"answers": []',
        b'"1": ',
        b"9" * 5000,
        b'"positive_ctxs": [{"text": "p", "passage_id": 1}]',
        b'{"query": {"text": "q", "qid": 1}, "candidates": []}',
        b'"\\ud800"',
        b"[" * 2000,
        b"id\ttext\ttitle\n",
        b"1\t2\t3\n",
        b"1\t2\t3\t4\n",
        b"why\t['a']\n",
        b"\xef\xbb\xbf",
    ]
) | st.binary(max_size=6)


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(pieces=st.lists(_PIECES, max_size=14), compressed=st.booleans(), cut=st.none() | st.integers(0, 80))
def test_any_bytes_give_a_result_or_a_value_error(tmp_path, name, pieces, compressed, cut):
    data = b"".join(pieces)
    path = tmp_path / ("file.gz" if compressed else "file")
    path.write_bytes((gzip.compress(data, mtime=0) if compressed else data)[:cut])
    try:
        READERS[name](path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 1200 + len(str(path))
    except FileNotFoundError as error:  # retriever output without texts
        assert dpr.PASSAGES in str(error)
    assert not list((tmp_path / "cache").glob("*.tmp"))
    Path(path).unlink()
