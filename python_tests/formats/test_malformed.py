"""Malformed files of every format: an error that names file and line, whatever the bytes are."""

import gzip
import json
from pathlib import Path

import pytest
from formats.format_readers import READERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qpeft_ext.formats import dpr, open_collection

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


@pytest.mark.slow
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
