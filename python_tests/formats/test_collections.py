"""Every format behind `open_collection`: the parts that it has, and that they are read one by one."""

import json
import pickle
import sys
from types import SimpleNamespace

import pytest
from small_data import DOCUMENTS, QRELS, QUERIES, write_folder, write_lines

from qpeft_ext import formats
from qpeft_ext.formats import answers, msmarco, open_collection

D1 = {"id": "d1", "title": DOCUMENTS["d1"][0], "text": DOCUMENTS["d1"][1]}
HITS = {"q1": [("d2", 2.0), ("d1", 1.0)]}
ENDINGS = pytest.mark.parametrize("ending", ["", ".gz"])


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
    with pytest.raises(FileNotFoundError, match=r"no such file.*BEIR.*hf:owner/name.*pip install 'qpeft_ext\[ir_data"):
        open_collection("beir/scifact/test")
    with pytest.raises(ImportError, match=r"pip install 'qpeft_ext\[datasets\]'"):
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


def test_labels_of_a_candidate_that_is_not_in_the_corpus(tmp_path):
    write_lines(tmp_path / "psgs_w100.tsv", PASSAGES[:2])
    data = open_collection(write_json(tmp_path / "nq.json", UPR))  # its second question has no labels
    with pytest.raises(ValueError, match="nq.json: passage '2' of query '1' is not in .*psgs_w100.tsv; the files do"):
        data.qrels()
    with pytest.raises(ValueError, match="document 'z' of query '0' is in the run but not in the corpus"):
        answers.answer_qrels([{"0": [("z", 1.0)]}], {"0": ["a"]}, {})
