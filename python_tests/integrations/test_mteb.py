"""The plug-in for MTEB, with mteb and its offline mock tasks."""

import json

import pytest

pytest.importorskip("mteb", reason="mteb is not installed; see `make test-plugins`")
import mteb
from mteb.mocks import MockInstructionReranking, MockMultilingualRerankingTask, MockRerankingTask, MockRetrievalTask
from mteb.models.models_protocols import CrossEncoderProtocol, SearchProtocol
from stub_server import DOCUMENTS

from qpeft_ext.integrations.mteb import QPeftSearch, _query_text


def evaluated(model, task, folder=None):
    return mteb.evaluate(
        model, task, cache=None, overwrite_strategy="always", prediction_folder=folder, show_progress_bar=False
    )[0]


def test_it_is_of_the_kind_search_and_not_of_another(reranker):
    model = QPeftSearch(reranker, name="a/b", revision="r")
    assert isinstance(model, SearchProtocol) and not isinstance(model, CrossEncoderProtocol)
    assert (model.mteb_model_meta.name, model.mteb_model_meta.revision) == ("a/b", "r")
    assert QPeftSearch(reranker).mteb_model_meta.name == "qpeft_ext/reranker"


def test_results_of_one_model_are_not_given_for_another(reranker, tmp_path):
    """MTEB keeps results by name and revision, and adapters in folders of the same name have the same name."""

    ranked = []

    class Adapter:
        adapter = "folder/adapter"

        def rank_many(self, *given, **options):
            ranked.append(self)
            return reranker.rank_many(*given, **options)

        rank = predict = rank_many

    cache = mteb.ResultCache(tmp_path)
    models = [QPeftSearch(Adapter()), QPeftSearch(Adapter()), QPeftSearch(Adapter(), revision="r")]
    assert {model.mteb_model_meta.name for model in models} == {"qpeft_ext/adapter"}
    for model in [*models, QPeftSearch(Adapter(), revision="r")]:
        mteb.evaluate(model, MockRerankingTask(), cache=cache, show_progress_bar=False)
    assert ranked == [model._source.ranker for model in models]  # of the same revision the results are there


@pytest.mark.parametrize("task", [MockRerankingTask, MockMultilingualRerankingTask, MockInstructionReranking])
def test_reranking_tasks(reranker, task, tmp_path):
    task = task()
    result = evaluated(QPeftSearch(reranker), task, tmp_path)
    assert result.scores
    (path,) = tmp_path.rglob("*.json")
    predictions = json.loads(path.read_text())
    task.load_data()  # MTEB lets go of it
    for subset, splits in task.dataset.items():
        data = splits["test"]
        texts = {row["id"]: {"title": row.get("title") or "", "text": row["text"]} for row in data["corpus"]}
        for row in data["queries"]:
            own = list(data["top_ranked"][row["id"]])
            rows = reranker.rank(row["text"], [texts[doc_id] for doc_id in own], instruction=row.get("instruction"))
            found = predictions[subset]["test"][row["id"]]
            assert found == pytest.approx({own[row["corpus_id"]]: row["score"] for row in rows})


def test_a_retrieval_task_needs_a_first_stage(reranker, tmp_path):
    with pytest.raises(ValueError, match="this task has no candidates to rerank"):
        evaluated(QPeftSearch(reranker), MockRetrievalTask())
    task = MockRetrievalTask()
    first = mteb.get_model("mteb/baseline-random-encoder")
    evaluated(first, task, tmp_path)
    result = evaluated(QPeftSearch(reranker), task.convert_to_reranking(tmp_path, top_k=2))
    assert result.scores


def test_candidates_by_a_url(stub):
    model = QPeftSearch(stub.url, model="m")
    model.index([{"id": f"d{i}", "text": text, "title": None} for i, text in enumerate(DOCUMENTS)])
    queries = [{"id": "q", "text": "boat sea", "instruction": "near"}, {"id": "r", "text": "moon"}]
    found = model.search(queries, top_k=2, top_ranked={"q": ["d0", "d1", "d0", "d2"]})
    assert found == {"q": {"d1": 1.0, "d0": 0.5}, "r": {}}
    assert [body["instruction"] for _, _, body in stub.requests] == ["near"]
    assert model.mteb_model_meta.name == "qpeft_ext/m"
    with pytest.raises(ValueError, match="the corpus lacks the candidate 'x' of query 'q'"):
        model.search(queries, top_k=2, top_ranked={"q": ["x"]})


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "a"}, "a"),
        ({"text": "a", "instruction": "b"}, "a"),
        ({"text": ["a", "b"]}, "a; b"),
        ({"text": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "user: a; assistant: b"),
    ],
)
def test_texts_of_queries(row, text):
    assert _query_text(row) == text
