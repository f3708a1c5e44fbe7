"""Qrels of any shape, and what cannot be read."""

import pytest
from small_data import write_lines

from qpeft_ext import formats
from qpeft_ext.formats import beir, trec

HEADER = "query-id\tcorpus-id\tscore"
WANTED = {"q1": {"d1": 2, "d4": -1}, "q2": {"d3": 1}}


@pytest.mark.parametrize(
    "lines",
    [
        ["q1 0 d1 2", "q1\t0\td4\t-1", "q2 Q0 d3 1"],  # TREC
        ["q1 0 d1 2.0", "q1 0 d4 -1.", "q2 0 d3 +1"],
        ["q1 \t0 \td1 \t2", "q1\t0\td4\t-1", "q2\t0\td3\t1 "],
        [HEADER, "q1\td1\t2", "q1\td4\t-1", "q2\td3\t1"],  # BEIR
        ["\ufeff" + HEADER + "\r", "q1\td1\t2\r", "q1\td4\t-1\r", "q2\td3\t1\r"],
        ["query-id corpus-id score", "q1 d1 2", "q1  d4  -1", "q2 d3 1"],
        ["q1\td1\t2", "q1\td4\t-1", "q2\td3\t1"],  # neither header nor iteration
        ["docid qid rel", "d1 q1 2", "d4 q1 -1", "d3 q2 1"],  # other names, another order
        ["qid\tQ0\tdoc_id\trelevance", "q1\t0\td1\t2", "q1\t0\td4\t-1", "q2\t0\td3\t1.0"],
    ],
)
def test_qrels_of_any_shape(tmp_path, lines):
    write_lines(tmp_path / "qrels", lines)
    assert formats.read_qrels(tmp_path / "qrels") == beir.read_qrels(tmp_path / "qrels") == WANTED


def test_ids_with_blanks_between_tabs(tmp_path):
    for number, lines in enumerate((["q 1\t0\td 1\t2"], ["q 1\td 1\t2"], [HEADER, "q 1\td 1\t2"])):
        write_lines(tmp_path / f"qrels{number}", lines)
        assert formats.read_qrels(tmp_path / f"qrels{number}") == {"q 1": {"d 1": 2}}
    write_lines(tmp_path / "run", ["q 1\tQ0\td 1\t1\t1e-3\tmy system"])
    assert formats.read_run(tmp_path / "run") == {"q 1": [("d 1", 0.001)]}
    assert trec.find_line(tmp_path / "run", "q 1", "d 1") == 1
    with pytest.raises(ValueError, match="query_id must be text without white space in a TREC run, got 'q 1'"):
        formats.write_run(tmp_path / "again", formats.read_run(tmp_path / "run"))
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "lines, message",
    [
        (
            ["q1 0 d1 1", "q1 0 d 2 1"],
            "line 2: expected 4 columns as on the first line, got 5.* an id with blanks needs",
        ),
        (["q1 d1 1", "q1 d 2 1"], "line 2: expected 3 columns as on the first line, got 4"),
        (["q1 my doc 1"], "line 1: expected 0 or Q0 as the second of 4 columns"),
        (["q1 0 my doc 1"], "line 1: expected query_id 0 doc_id relevance .TREC. or .*got 5"),
        (
            ["query-id,corpus-id,score", "q1,d1,1"],
            "line 1: expected columns with tabs or blanks between them, got commas",
        ),
        (["q1 0 d1 0.5"], "line 1: expected a whole number as relevance, got '0.5'"),
        (["q1 0 d1 1", "q1 0 d2 99999999999"], "line 2: expected a relevance of at most 1,000,000, got '99999999999'"),
        (["q1 0 d1 nan"], "line 1: expected a whole number as relevance, got 'nan'"),
        (["question passage gold", "q1 d1 1"], "line 1: expected a whole number as relevance, or a header such as"),
        (["q1\t0\t\t1"], "line 1: one of the 4 columns is empty"),
        ([HEADER], "the qrels are empty"),
        (["q1 0 d1 1", "q1 0 d1 1"], "line 2: document 'd1' is judged twice for query 'q1'"),
    ],
)
def test_qrels_that_cannot_be_read(tmp_path, lines, message):
    write_lines(tmp_path / "qrels", lines)
    with pytest.raises(ValueError, match=message):
        formats.read_qrels(tmp_path / "qrels")


def test_a_header_of_tab_separated_texts_is_none(tmp_path):
    from qpeft_ext.formats import msmarco

    write_lines(tmp_path / "queries.dev.tsv", ["qid\tquery", "q 1\twhy", "qid\twho"])
    assert msmarco.read_queries(tmp_path / "queries.dev.tsv") == {"q 1": "why", "qid": "who"}
    write_lines(tmp_path / "collection.tsv", ["pid\tpassage", "1\tthe sea"])
    assert list(formats.open_collection(tmp_path).corpus) == ["1"]
