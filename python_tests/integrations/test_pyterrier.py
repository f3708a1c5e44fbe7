"""The plug-in for PyTerrier, with pyterrier (no Java)."""

import pytest
from stub_server import DOCUMENTS, QUERY

pytest.importorskip("pyterrier", reason="pyterrier is not installed; see `make test-plugins`")
import pandas as pd
import pyterrier as pt

from qpeft_ext.integrations.pyterrier import QPeftTransformer, to_pyterrier


@pytest.fixture
def results():
    """Two queries whose rows are mixed, with an index of their own."""
    rows = [("q2", "moon", 3), ("q1", QUERY, 0), ("q1", QUERY, 1), ("q2", "moon", 2), ("q1", QUERY, 2)]
    frame = pd.DataFrame(
        [(qid, query, f"d{i}", DOCUMENTS[i], 1.0, 0) for qid, query, i in rows],
        columns=["qid", "query", "docno", "text", "score", "rank"],
    )
    return frame.set_index(pd.Index([10, 8, 6, 4, 2]))


def test_inspection_by_its_own_test_class(reranker, monkeypatch):
    monkeypatch.setenv("PT_TEST_TRANSFORMER_REPORTS", "0")
    case = pt.testing.transformer_test_class(lambda: QPeftTransformer(reranker))
    case.setUpClass()
    case("test_inspect_io").debug()
    ((given, made),) = case.io_configs
    assert set(given) == {"qid", "docno", "query", "text"} and made == [*given, "score", "rank"]
    schematic = pt.schematic.transformer_schematic(case.transformer)  # drawing one needs the network
    assert schematic["label"] == "Q-PEFT" and schematic["help_url"].startswith("https://")


def test_each_query_is_ranked(reranker, results):
    before = results.copy()
    ranked = QPeftTransformer(reranker)(results)
    pd.testing.assert_frame_equal(results, before)
    expected = []
    for qid, query, places in (("q2", "moon", [3, 2]), ("q1", QUERY, [0, 1, 2])):
        rows = reranker.rank(query, [DOCUMENTS[i] for i in places])
        expected += [(qid, f"d{places[row['corpus_id']]}", rank, row["score"]) for rank, row in enumerate(rows)]
    found = list(ranked[["qid", "docno", "rank", "score"]].itertuples(index=False, name=None))
    assert found == expected
    assert [DOCUMENTS[int(row.docno[1:])] for row in ranked.itertuples()] == ranked["text"].tolist()


def test_by_a_url_with_titles_behind_another_transformer(stub, results):
    results["title"] = "moon"
    pipeline = pt.Transformer.from_df(results) >> QPeftTransformer(stub.url, title_field="title", api_key="k") % 1
    ranked = pipeline(results[["qid", "query"]].drop_duplicates())
    assert dict(zip(ranked["qid"], ranked["docno"], strict=True)) == {"q1": "d1", "q2": "d3"}
    assert {"title": "moon", "text": DOCUMENTS[0]} in stub.requests[-1][2]["documents"] + stub.requests[0][2][
        "documents"
    ]


def test_a_missing_title_is_none(stub, results):
    results["title"] = ["moon", None, float("nan"), "", "sun"]
    QPeftTransformer(stub.url, title_field="title")(results)
    sent = [document for _, _, body in stub.requests for document in body["documents"]]
    texts = results["text"].tolist()
    expected = [{"title": "moon", "text": texts[0]}, *texts[1:4], {"title": "sun", "text": texts[4]}]
    assert sorted(sent, key=str) == sorted(expected, key=str)


def test_rows_that_belong_to_no_query_or_to_two(reranker, results):
    """They were left out, or scored for the query of the first row."""
    transformer = QPeftTransformer(reranker)
    with pytest.raises(ValueError, match="row 1 of the frame has no qid"):
        transformer(results.assign(qid=["q2", None, "q1", "q2", "q1"]))
    with pytest.raises(ValueError, match="the qid 'q2' has several queries: 'moon' and 'sun'"):
        transformer(results.assign(query=["moon", QUERY, QUERY, "sun", QUERY]))


def test_an_empty_frame_and_a_missing_column(reranker, results):
    transformer = QPeftTransformer(reranker)
    empty = transformer(results[:0])
    assert len(empty) == 0 and list(empty.columns) == ["qid", "query", "docno", "text", "score", "rank"]
    assert empty["score"].dtype == "float64" and empty["rank"].dtype == "int64"
    with pytest.raises(pt.validate.InputValidationError, match="text"):
        transformer(results.drop(columns="text"))


def test_long_documents_by_passages(reranker):
    words = [f"w{i}" for i in range(12)]
    frame = pd.DataFrame([("q", "w3", "d", " ".join(words))], columns=["qid", "query", "docno", "text"])
    passages = pt.text.sliding(text_attr="text", length=4, stride=4, prepend_attr=None)
    ranked = (passages >> QPeftTransformer(reranker) >> pt.text.max_passage())(frame)
    best = reranker.rank("w3", [" ".join(words[i : i + 4]) for i in (0, 4, 8)])[0]
    assert ranked[["docno", "score"]].values.tolist() == [["d", best["score"]]]


def test_a_run_becomes_a_frame():
    run = {"q1": [("b", 2.5), ("a", 1.0)], "q2": [("c", -1.0)], "q3": []}
    frame = to_pyterrier(run, {"q1": "one", "q2": "two", "q3": "three"})
    assert frame.to_dict("list") == {
        "qid": ["q1", "q1", "q2"],
        "docno": ["b", "a", "c"],
        "score": [2.5, 1.0, -1.0],
        "rank": [0, 1, 0],
        "query": ["one", "one", "two"],
    }
    pt.validate.result_frame(frame, extra_columns=["query"])
    assert list(to_pyterrier({}).columns) == ["qid", "docno", "score", "rank"]
    qrels = pd.DataFrame([("q1", "a", 1), ("q2", "c", 1)], columns=["qid", "docno", "label"])
    assert pt.Evaluate(frame, qrels, ["recip_rank"])["recip_rank"] == pytest.approx((1 / 2 + 1) / 2)
    with pytest.raises(ValueError, match=r"no text for 'q2' \(2 of 3\)"):
        to_pyterrier(run, {"q1": "one"})
