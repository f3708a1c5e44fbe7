"""Measures that ir_measures confuses when it computes them at once, and those that it cannot compute."""

from math import log2

import pytest

pytest.importorskip("ir_measures", reason="ir_measures is not installed")

from qpeft_ext.evaluation import evaluate  # noqa: E402
from qpeft_ext.evaluation.measures import is_measure  # noqa: E402

RUN = {"q": [("a", 3.0), ("b", 2.0), ("c", 1.0)]}
QRELS = {"q": {"a": 1, "c": 2}}


def ndcg(gain_of_1: float, gain_of_2: float) -> float:
    """nDCG of `RUN`: a has rank 1, c rank 3; the ideal ranking is c, a."""
    return (gain_of_1 + gain_of_2 / log2(4)) / (gain_of_2 + gain_of_1 / log2(3))


@pytest.mark.parametrize("cutoff", range(3, 19))  # which of the two was wrong depended on the hashes of their names
def test_gains_belong_to_one_measure(cutoff):
    plain, with_gains = f"nDCG@{cutoff}", f"nDCG(gains={{0:0,1:1,2:{cutoff}}})@{cutoff}"
    for names in ([plain, with_gains], [with_gains, plain]):
        found = evaluate(RUN, QRELS, names)
        assert list(found.means) == names
        assert found.means[plain] == pytest.approx(ndcg(1, 2), abs=1e-6)
        assert found.means[with_gains] == pytest.approx(ndcg(1, cutoff), abs=1e-6)


@pytest.mark.parametrize("cutoff", range(1, 13))
def test_judged_documents_alone_belong_to_one_measure(cutoff):
    """Only two of the three documents are judged."""
    found = evaluate(RUN, QRELS, ["NumRet", f"P(judged_only=True)@{cutoff}"])
    assert found.means == {"NumRet": 3, f"P(judged_only=True)@{cutoff}": pytest.approx(min(2, cutoff) / cutoff)}


def test_levels_of_recall_that_differ_by_little():
    """Precision is 1 at the first relevant document, and 2 / 3 at the second."""
    found = evaluate(RUN, QRELS, ["IPrec@0.5", "IPrec@0.501", "IPrec@0.9"])
    assert found.means["IPrec@0.5"] == 1 and found.means["IPrec@0.501"] > 0
    assert found.means["IPrec@0.9"] == pytest.approx(2 / 3)


def test_what_ir_measures_cannot_compute():
    """Accuracy divides by the number of candidates that are not relevant."""
    with pytest.raises(ValueError, match=r"evaluate: ir_measures cannot compute Accuracy of this run .*; leave it out"):
        evaluate({"q": [("a", 1.0)]}, QRELS, ["nDCG@10", "Accuracy"])
    assert evaluate(RUN, {"q": {"a": 1}}, ["Accuracy"]).means == {"Accuracy": 1}


@pytest.mark.parametrize(
    "name", ["P@99999999999", "AP(rel=9999999999)", "nDCG(gains={1:2000000000})", "nDCG(gains={1:0.5})"]
)
def test_numbers_beyond_those_of_trec_eval(name):
    assert not is_measure(name)
