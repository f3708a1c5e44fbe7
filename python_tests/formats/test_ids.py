"""Ids that come back as they were written: "wiki:" before them, byte order marks, blanks at their ends."""

import json
from unittest import mock

import pytest
from small_data import write_folder, write_lines

from qpeft_ext import formats
from qpeft_ext.formats import dpr, msmarco, open_collection
from qpeft_ext.formats.convert import convert
from qpeft_ext.formats.source import Source

PASSAGES = ["id\ttext\ttitle", "1\tthe sea\tTides", "2\tmoon\tMoon"]


def write_json(path, value):
    return write_lines(path, [json.dumps(value)])


def test_ids_of_passages_in_the_file_stay_as_they_are(tmp_path):
    """Only before ids of psgs_w100.tsv "wiki:" is dropped: other ids may begin with it, and differ in it alone."""
    passages = [{"id": "wiki:1", "score": 2, "text": "the sea"}, {"id": "1", "score": 1, "text": "wind"}]
    record = {"question": "why", "answers": ["sea"], "ctxs": passages}
    data = open_collection(write_json(tmp_path / "run.json", [record]))
    assert data.candidates() == {"0": [("wiki:1", 2.0), ("1", 1.0)]} and data.qrels() == {"0": {"wiki:1": 1, "1": 0}}
    assert list(data.corpus) == ["wiki:1", "1"] and data.corpus["wiki:1"]["text"] == "the sea"
    assert data.judge(None, [{"0": [("wiki:1", 1.0)]}]) == data.qrels()

    write_lines(tmp_path / "psgs_w100.tsv", PASSAGES)  # a folder of DPR: its corpus has the ids
    write_json(tmp_path / "run.json", [record | {"ctxs": passages[:1]}])
    folder = open_collection(tmp_path)
    assert folder.candidates() == {"0": [("1", 2.0)]} and folder.qrels() == {"0": {"1": 1}} and "1" in folder.corpus
    judged = folder.judge(None, [{"0": [("1", 2.0), ("2", 1.0)]}])  # also what BM25 finds in the other passages
    assert judged == {"0": {"1": 1, "2": 0}}


MARK = "\ufeff"
MARKED = {  # a byte order mark behind the first line, as `cat a b` leaves it
    "run.trec": (["q1 Q0 d1 1 1.0 t", MARK + "q2 Q0 d1 1 1.0 t"], formats.read_run),
    "qrels.tsv": (["q1\td1\t1", MARK + "q2\td1\t1"], formats.read_qrels),
    "queries.dev.tsv": (["1\twhy", MARK + "2\twho"], msmarco.read_queries),
    "top1000.dev": (["1\t2\twhy\tsea", MARK + "2\t2\twho\tsea"], msmarco.read_top),
    "collection.tsv": (["1\tsea", MARK + "2\tmoon"], msmarco.MsmarcoCorpus),
    "psgs_w100.tsv": (["id\ttext\ttitle", MARK + "2\tmoon\tMoon"], dpr.Passages),
}


@pytest.mark.parametrize("name", MARKED)
def test_a_byte_order_mark_is_part_of_no_id(name, tmp_path):
    lines, read = MARKED[name]
    with pytest.raises(ValueError, match=f"{name}, line 2: the line begins with a byte order mark, .*remove the mark"):
        read(write_lines(tmp_path / name, lines))
    assert len(read(write_lines(tmp_path / name, [MARK + lines[0], lines[1].removeprefix(MARK)]))) > 0


def test_ids_that_a_reader_would_change_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="query_id must not begin with a byte order mark"):
        formats.write_run(tmp_path / "run", {MARK + "q": [("d", 1.0)]})
    formats.write_run(tmp_path / "run", {"q": [(MARK + "d", 1.0)]})
    assert formats.read_run(tmp_path / "run") == {"q": [(MARK + "d", 1.0)]}
    for query_id, doc_id in ((" q1", "d1"), ("q1", "d1 "), (MARK + "q1", "d1")):
        data = write_folder(tmp_path / f"data {query_id}{doc_id}")
        write_lines(data / "queries.jsonl", [json.dumps({"_id": query_id, "text": "why"})])
        write_lines(data / "corpus.jsonl", [json.dumps({"_id": doc_id, "text": "sea"})])
        (data / "qrels" / "train.tsv").unlink()
        source = Source(open_collection(data))
        with mock.patch.object(Source, "qrels", {query_id: {doc_id: 1}}), pytest.raises(ValueError, match="rename it"):
            convert(source, tmp_path / "out", "beir")
        assert not (tmp_path / "out").exists()
