"""Measures against hand-computed values, missing queries, paired tests, tables."""

import json
import math
import re
import shutil
import statistics

import numpy as np
import pytest
from rich.console import Console
from scipy import stats
from small_data import shared_data

from qpeft_ext import formats
from qpeft_ext.evaluation.comparison import compare_table
from qpeft_ext.evaluation.measures import evaluate, parse_measures
from qpeft_ext.evaluation.significance import changes, format_p, holm, paired_test

QRELS = {"a": {"x": 2, "y": 1, "z": 0}, "b": {"x": 1}, "c": {"w": 1}}
RUN = {"a": [("y", 3.0), ("n", 2.0), ("x", 1.0)], "b": [("n", 1.0), ("x", 0.5)], "other": [("x", 1.0)]}


def test_hand_computed():
    result = evaluate(RUN, QRELS, ["nDCG@10", "RR@10", "Success@1", "R@100", "P@2"])
    dcg, ideal = 1 + 2 / math.log2(4), 2 + 1 / math.log2(3)
    assert result.per_query["nDCG@10"] == pytest.approx({"a": dcg / ideal, "b": 1 / math.log2(3), "c": 0.0})
    assert result.per_query["RR@10"] == {"a": 1.0, "b": 0.5, "c": 0.0}
    assert result.per_query["Success@1"] == {"a": 1.0, "b": 0.0, "c": 0.0}
    assert result.per_query["R@100"] == {"a": 1.0, "b": 1.0, "c": 0.0}
    assert result.means["RR@10"] == pytest.approx(0.5)  # over all three: the missing query is a 0
    assert (result.num_queries, result.num_missing, result.num_unjudged) == (3, 1, 1)


@pytest.mark.parametrize("relevance", [1_000_001, 2**31 - 1, -(10**7)])
def test_grades_that_no_table_of_trec_eval_holds_are_refused(relevance):
    with pytest.raises(ValueError, match="query 'q', document 'b': expected a relevance of at most 1,000,000, got"):
        evaluate({"q": [("a", 2.0)]}, {"q": {"a": 1, "b": relevance}}, ["nDCG@10"])
    assert evaluate({"q": [("a", 2.0)]}, {"q": {"a": 1_000_000}}, ["nDCG@10"]).means == {"nDCG@10": 1.0}


@pytest.mark.parametrize("where", ["a query", "a document of the run", "a document of the qrels"])
def test_an_id_with_a_zero_byte_is_refused(where):
    """trec_eval would know "a" and "a\0b" as one id, and give a mean over one query more than there are."""
    run, qrels = {"q": [("a", 1.0)]}, {"q": {"a": 1}}
    if where == "a query":
        run, qrels = {"q\0x": run["q"]}, {"q\0x": qrels["q"]}
    elif where == "a document of the run":
        run["q"].append(("a\0b", 0.5))
    else:
        qrels["q"]["a\0b"] = 2
    with pytest.raises(ValueError, match="zero byte, at which trec_eval cuts it; rename it"):
        evaluate(run, qrels, ["RR@10"])


@pytest.mark.parametrize("grades", [{"a": -2}, {"a": -11}, {"a": -1000, "c": -3}])
def test_a_query_with_grades_below_0_alone(grades):
    """trec_eval ends the process for some of them."""
    run = {"q": [("a", 2.0), ("b", 1.0)], "r": [("x", 1.0)]}
    found = evaluate(run, {"q": grades, "r": {"x": 1}}, ["nDCG@10", "RR@10", "AP", "R@5", "Judged@1"])
    assert found.per_query["nDCG@10"] == found.per_query["RR@10"] == found.per_query["AP"] == {"q": 0.0, "r": 1.0}
    assert found.per_query["Judged@1"] == {"q": 1.0, "r": 1.0}


def test_ties_keep_the_order_of_the_run():
    """trec_eval alone would order equal scores by id, downwards: "n" before "m"."""
    for order in ("mn", "nm"):
        result = evaluate({"q": [(d, 1.0) for d in order]}, {"q": {"m": 1}}, ["RR@10"])
        assert result.means["RR@10"] == (1.0 if order == "mn" else 0.5)
        as_trec_eval = evaluate({"q": [(d, 1.0) for d in order]}, {"q": {"m": 1}}, ["RR@10"], ties="trec_eval")
        assert as_trec_eval.means["RR@10"] == 0.5


def test_memory_and_file_have_the_same_values(tmp_path):
    rng = np.random.default_rng(0)
    qrels = {f"q{i}": {f"d{j}": int(j % 3 == 0) for j in range(20)} for i in range(30)}
    scores = -300 - rng.integers(0, 5, (30, 20)) * 1e-6  # equal as float32
    run = {
        q: sorted(((f"d{j}", float(scores[i, j])) for j in range(20)), key=lambda c: -c[1]) for i, q in enumerate(qrels)
    }
    formats.write_run(tmp_path / "run", run)
    measures = ["nDCG@10", "RR@10", "AP"]
    assert (
        evaluate(run, qrels, measures).per_query
        == evaluate(formats.read_run(tmp_path / "run"), qrels, measures).per_query
    )


def test_dl19_baseline():
    folder = shared_data("dl19")
    run = formats.read_run(folder / "runs" / "BM25.trec.gz")
    result = evaluate(run, formats.beir.read_qrels(folder), ["nDCG@10"])
    assert result.num_queries == 43 and result.num_missing == 0
    assert result.means["nDCG@10"] == pytest.approx(0.5058, abs=5e-5)


def test_dl19_figures_are_those_of_trec_eval():
    """Query by query, against the wrapper of trec_eval itself; BM25's run has equal scores."""
    pytrec_eval = pytest.importorskip("pytrec_eval", reason="pytrec_eval-terrier is not installed")
    folder = shared_data("dl19")
    qrels = formats.beir.read_qrels(folder)
    for name in ("BM25", "D_BERT_KD_TASB"):
        run = formats.read_run(folder / "runs" / f"{name}.trec.gz")
        assert_as_trec_eval(pytrec_eval, run, qrels, ties="trec_eval")


def assert_as_trec_eval(pytrec_eval, run, qrels, ties):
    result = evaluate(run, qrels, list(TREC_EVAL), ties=ties)
    scores = {q: {d: float(np.float32(s)) for d, s in ranking} for q, ranking in run.items() if ranking}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, set(TREC_EVAL.values())).evaluate(scores)
    for ours, measure in TREC_EVAL.items():
        expected = {q: theirs[q][measure] if q in theirs else 0.0 for q in qrels}
        assert result.per_query[ours] == pytest.approx(expected, abs=1e-6), ours
        assert result.means[ours] == pytest.approx(sum(expected.values()) / len(qrels), abs=1e-6)


TREC_EVAL = {
    "nDCG@10": "ndcg_cut_10",
    "nDCG": "ndcg",
    "AP": "map",
    "RR": "recip_rank",
    "P@5": "P_5",
    "R@100": "recall_100",
    "R@1000": "recall_1000",
    "Success@5": "success_5",
}


@pytest.mark.parametrize("seed, ties", [(0, "order"), (1, "order"), (2, "trec_eval"), (3, "trec_eval")])
def test_random_runs_have_the_figures_of_trec_eval(seed, ties):
    """Missing queries, unjudged documents, negative judgements, queries without a relevant document."""
    pytrec_eval = pytest.importorskip("pytrec_eval", reason="pytrec_eval-terrier is not installed")
    rng = np.random.default_rng(seed)
    qrels = {f"q{i}": {f"d{j}": int(rng.integers(-1, 4)) for j in rng.choice(60, 20, replace=False)} for i in range(25)}
    run = {}
    for i in rng.permutation(28)[:24]:  # some not judged at all
        documents = rng.choice(80, rng.integers(0, 40), replace=False)
        scores = np.sort(rng.choice(10_000 if ties == "order" else 9, len(documents), replace=ties != "order"))[::-1]
        run[f"q{i}"] = [(f"d{j}", float(s)) for j, s in zip(documents, scores, strict=True)]
    assert_as_trec_eval(pytrec_eval, run, qrels, ties)


def test_judged():
    """Of the first ten: a has 2 judged of 3, b 1 of 2; c has no candidates and does not count."""
    assert evaluate(RUN, QRELS, ["RR@10"]).judged == pytest.approx((2 / 3 + 1 / 2) / 2)
    deep = {"a": [(f"n{i}", -float(i)) for i in range(10)] + [("x", -99.0)]}
    assert evaluate(deep, {"a": {"x": 1}}, ["RR"]).judged == 0.0  # the eleventh does not count
    assert evaluate({"a": []}, {"a": {"x": 1}}, ["RR"]).judged == 0.0


def test_identical_ids():
    run, qrels = {"a": [("a", 2.0), ("x", 1.0)], "b": [("b", 1.0)]}, {"a": {"x": 1}, "b": {"x": 1}}
    assert evaluate(run, qrels, ["RR@10"]).per_query["RR@10"] == {"a": 0.5, "b": 0.0}
    result = evaluate(run, qrels, ["RR@10"], ignore_identical_ids=True)
    assert result.per_query["RR@10"] == {"a": 1.0, "b": 0.0} and result.num_missing == 1
    assert result.num_identical == 2 and run["b"] == [("b", 1.0)]
    table = compare_table({"s": run}, qrels, ["RR@10"], ignore_identical_ids=True)
    assert "s: 2 documents with the id of their query left out" in table.notes()


@pytest.mark.parametrize("name", ["nDCG@", "recall", "nDCG@10@20", "", "__import__('os')", "P@x", "@10", "P(rel='"])
def test_unknown_measures(name):
    with pytest.raises(TypeError, match="measures must be a list, got the string 'nDCG@10'; one measure goes into a"):
        parse_measures("nDCG@10")
    with pytest.raises(ValueError, match="unknown measure .*expected ir_measures names such as nDCG@10"):
        parse_measures([name])


def test_two_names_of_one_measure():
    assert evaluate(RUN, QRELS, ["NDCG@10", "nDCG@10", "nDCG@10"]).means == pytest.approx({"NDCG@10": 0.4642}, abs=1e-3)


def test_what_cannot_be_evaluated():
    with pytest.raises(ValueError, match="no query of the run is in the qrels .*'z', .*'a'"):
        evaluate({"z": [("x", 1.0)]}, QRELS)
    with pytest.raises(ValueError, match="query 'a': the score at rank 2, 2.0, is larger than the one before it, 1.0"):
        evaluate({"a": [("x", 1.0), ("y", 2.0)]}, QRELS)
    with pytest.raises(ValueError, match="query 'a': .* nan, which is not a finite"):
        evaluate({"a": [("x", math.nan)]}, QRELS)
    with pytest.raises(ValueError, match="ties must be one of order, trec_eval, got 'id'"):
        evaluate(RUN, QRELS, ties="id")
    with pytest.raises(ValueError, match="at least one measure"):
        evaluate(RUN, QRELS, [])


# -- paired tests --------------------------------------------------------------------------------------------------


def values(rng, shift):
    return {f"q{i}": float(v) for i, v in enumerate(rng.random(40) + shift * rng.random(40))}


def test_paired_test():
    rng = np.random.default_rng(0)
    first, second = values(rng, 0.0), values(rng, 0.5)
    expected = stats.ttest_rel(list(first.values()), list(second.values())).pvalue
    assert paired_test(first, second) == pytest.approx(expected)
    assert paired_test(first, dict(reversed(second.items()))) == pytest.approx(expected)  # paired by query
    permuted = paired_test(first, second, "permutation")
    assert permuted == paired_test(first, second, "permutation") and abs(permuted - expected) < 0.02


def test_paired_test_at_its_limits():
    same = {"a": 0.5, "b": 0.25}
    for test in ("t-test", "permutation"):
        assert paired_test(same, same, test) == 1.0
        assert math.isnan(paired_test({"a": 1.0}, {"a": 0.0}, test))
    assert paired_test({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 0.0, "b": 0.0, "c": 0.0}) == 0.0
    assert paired_test({"a": 1.0, "b": 1.0}, {"a": 0.0, "b": 0.0}, "permutation") == 0.5  # 2 of the 4 sign patterns
    with pytest.raises(ValueError, match="same queries, got 2 and 1, 1 in common"):
        paired_test(same, {"a": 1.0})
    with pytest.raises(ValueError, match="test must be one of t-test, permutation, got 'chi2'"):
        paired_test(same, same, "chi2")


@pytest.mark.parametrize("seeds", [2, 3, 5, 6, 7])
def test_means_over_seeds_that_all_have_the_same_values_do_not_differ(seeds):
    """Rounding moves 1/5 and 1/9 to another last bit, the same for each query, which is no difference."""
    values = [1 / 5, 2 / 5, 4 / 5, 1 / 9, 2 / 9, 1 / 5, 2 / 5, 1 / 9, 1.0, 0.0]
    means = {str(i): statistics.fmean([value] * seeds) for i, value in enumerate(values)}
    base = dict(zip(means, values, strict=True))
    if seeds in (3, 5):
        assert means != base
    for test in ("t-test", "permutation"):
        assert paired_test(means, base, test) == paired_test(base, means, test) == 1.0
    assert changes(means, base).tolist() == [0.0] * 10
    means["0"] += 1e-9  # a small difference is one, and alone: t = 1 with 9 degrees of freedom
    assert paired_test(means, base) == pytest.approx(2 * stats.t.sf(1, 9))


def test_a_document_that_a_ranking_has_twice_is_refused():
    run = {"q": [("a", 3.0), ("b", 2.0)], "r": [("c", 3.0), ("b", 2.0), ("c", 1.0)]}
    with pytest.raises(
        ValueError, match="^evaluate: document 'c' occurs twice for query 'r'; rank each document once$"
    ):
        evaluate(run, {"q": {"a": 1}, "r": {"c": 1}}, ["RR@10"])


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 × .01, then 2 × .03, then .04 raised
    assert holm([0.9, 0.6]) == [1.0, 1.0] and holm([0.02]) == [0.02] and holm([]) == []
    corrected = holm([0.02, math.nan, 0.03])
    assert corrected[0] == 0.04 and math.isnan(corrected[1]) and corrected[2] == 0.04


# -- tables --------------------------------------------------------------------------------------------------------


def test_compare_table():
    better = {"a": [("x", 2.0), ("y", 1.0)], "b": [("x", 1.0)], "c": [("w", 1.0)]}
    table = compare_table({"first": RUN, "better": better}, QRELS, ["nDCG@10", "RR@10"])
    first, second = table.systems
    assert (table.baseline, table.num_queries, first.difference) == ("first", 3, {})
    assert second.values == {"nDCG@10": 1.0, "RR@10": 1.0}
    assert second.difference["RR@10"] == pytest.approx(0.5)
    assert second.p_value["RR@10"] == pytest.approx(stats.ttest_rel([1, 1, 1], [1, 0.5, 0]).pvalue)
    turned = compare_table({"first": RUN, "better": better}, QRELS, ["RR@10"], baseline="better")
    assert turned.systems[0].difference["RR@10"] == pytest.approx(-0.5)
    with pytest.raises(ValueError, match="the baseline 'worse' is not among the runs first"):
        compare_table({"first": RUN}, QRELS, baseline="worse")


def test_a_table_of_several_systems_is_corrected():
    rng = np.random.default_rng(0)
    qrels = {f"q{i}": {"d0": 1} for i in range(30)}
    runs = {
        name: {q: [(f"d{j}", -float(rank)) for rank, j in enumerate(rng.permutation(9))] for q in qrels}
        for name in "abc"
    } | {"one": {q: [("d0", 1.0)] for q in qrels}}
    table = compare_table(runs, qrels, ["RR@10", "nDCG@10"])
    for measure in table.measures:
        systems = table.systems[1:]
        assert [s.p_holm[measure] for s in systems] == holm([s.p_value[measure] for s in systems])
    assert table.systems[0].p_holm == {} and "Holm-corrected for 3 comparisons" in table.notes()[0]
    assert table.notes()[1] == (
        "Judged@10: a 0.111, b 0.111, c 0.111, one 1.000; documents without a judgement count as not relevant"
    )


def test_table_as_text_and_json():
    table = compare_table({"first": RUN, "second [bold]": RUN}, QRELS, ["nDCG@10", "RR@10"])
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    console.print(table.render())
    text = console.export_text()
    for expected in (
        "second [bold]",
        "0.5000",
        "+0.0000",
        "p=1.000",
        "3 queries; difference to first",
        "first: no candidates for 1 query; it counts as 0",
        "first: 1 query is not in the qrels and does not count",
    ):
        assert expected in text
    one_query = compare_table({"a": {"a": RUN["a"]}, "b": {"a": RUN["a"]}}, {"a": QRELS["a"]}, ["RR@10"])
    assert json.loads(json.dumps(one_query.to_dict(), allow_nan=False))["systems"][1]["p_holm"] == {"RR@10": None}


def test_format_p():
    assert [format_p(p) for p in (0.0004, 0.0312, 1.0, math.nan)] == ["p<.001", "p=.031", "p=1.000", "p –"]


@pytest.mark.parametrize("name, same", [("MAP", "AP"), ("map", "AP"), ("ndcg_cut_10", "nDCG@10"), ("recip_rank", "RR")])
def test_names_of_ir_measures_and_of_trec_eval(name, same):
    assert evaluate(RUN, QRELS, [name]).means[name] == evaluate(RUN, QRELS, [same]).means[same]


@pytest.mark.parametrize(
    "name, meant",
    [
        ("ndcg@10", "nDCG@10"),
        ("nDGC@20", "nDCG@20"),
        ("P", "P@10"),
        ("mrr", "RR"),
        ("Recall", "R@10"),
        ("nDCG@0", "nDCG@10"),
        ("AP(rel=0)", None),
        ("x", None),
    ],
)
def test_what_an_unknown_measure_may_have_meant(name, meant):
    with pytest.raises(ValueError, match="unknown measure") as caught:
        parse_measures([name])
    assert re.findall(r"did you mean (\S+)\?", str(caught.value)) == [meant] * (meant is not None)


@pytest.mark.skipif(shutil.which("perl") is None, reason="gdeval is a perl program")
def test_measures_of_gdeval_with_any_ids():
    """By hand: a document of grade g is what the user wanted with (2^g - 1) / 16. Of ids that end alike, gdeval itself
    makes one query."""
    qrels = {"a-1": {"my x": 1, "y": 3, "z": -1}, "b-1": {"x": 4}, "none": {"x": 0}, "missing": {"x": 1}}
    run = {"a-1": [("my x", 3.0), ("y", 2.0)], "b-1": [("z", 2.0), ("x", 1.0)], "none": [("x", 1.0)]}
    found = evaluate(run, qrels, ["ERR@10", "nDCG@10", "nDCG(dcg='exp-log2')@10"])
    first = 1 / 16 + 15 / 16 * 7 / 16 / 2
    expected = {"a-1": first, "b-1": 15 / 16 / 2, "none": 0, "missing": 0}
    assert found.per_query["ERR@10"] == pytest.approx(expected, abs=1e-5)
    assert found.means["ERR@10"] == pytest.approx((first + 15 / 32) / 4, abs=1e-5)
    gain = (1 + 7 / math.log2(3)) / (7 + 1 / math.log2(3))
    expected = {"a-1": gain, "b-1": 1 / math.log2(3), "none": 0, "missing": 0}
    assert found.per_query["nDCG(dcg='exp-log2')@10"] == pytest.approx(expected, abs=1e-5)
    assert found.per_query["nDCG@10"]["b-1"] == pytest.approx(1 / math.log2(3))
    with pytest.raises(ValueError, match="ERR@10 takes grades of at most 4, got 5 for query 'a'"):
        evaluate({"a": [("x", 1.0)]}, {"a": {"x": 5}}, ["ERR@10"])


def test_commas_within_the_brackets_of_a_measure():
    from qpeft_ext.cli.common import measure_names

    names = ["nDCG@10,RR P(rel=2,judged_only=True)@5", "AP(rel=2)@10, R@5"]
    assert measure_names(names) == ["nDCG@10", "RR", "P(rel=2,judged_only=True)@5", "AP(rel=2)@10", "R@5"]
