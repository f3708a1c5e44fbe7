"""Several adapters on one LM, loaded and unloaded while the server runs; documents by id; an index that grows."""

import errno
import shutil
from urllib.parse import quote

import numpy as np
import pytest
from prefixes.tiny_index import corpus as tiny_corpus
from prefixes.tiny_index import make
from prefixes.tiny_index import model as tiny_model
from serving.tiny_service import DEMO, spec

import qpeft_ext as qpeft
from qpeft_ext.prefixes import tiers
from qpeft_ext.serving.ask import Ask
from qpeft_ext.serving.errors import RequestError
from qpeft_ext.serving.models import Models, Served
from qpeft_ext.serving.prepare import prepare
from qpeft_ext.serving.ranked import rank
from qpeft_ext.serving.scoring_thread import held_prefixes, score_pairs

pytestmark = pytest.mark.slow


ASKED = {"query": "sort a list", "documents": ["sorted(items)", "os.remove(path)"], "raw_scores": True}


@pytest.fixture
def folder(service):
    """The packaged adapter in a folder below the root, which the test may spoil."""
    place = service.spec.models_root / "mine"
    shutil.copytree(DEMO / "adapter", place)
    yield place
    shutil.rmtree(place, ignore_errors=True)
    for served in list(service.models)[1:]:
        service.models.unload(served.name)


def test_an_adapter_is_loaded_used_listed_and_forgotten(client, service, folder):
    assert client.post("/v1/models", json={"name": "second", "adapter": "mine"}).json()["id"] == "second"
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["code", "second"]
    first, second = (service.models.get(name).reranker for name in ("code", "second"))
    assert second.model.lm is first.model.lm
    assert second.cache is first.cache
    both = [client.post("/v2/rerank", json=ASKED | {"model": name}).json() for name in ("code", "second")]
    assert both[0]["results"] == both[1]["results"]
    assert both[1]["meta"]["cached_tokens"] > 0  # what the first model read
    shutil.rmtree(folder)  # it is in memory
    assert client.post("/v2/rerank", json=ASKED | {"model": "second"}).json()["results"] == both[0]["results"]
    assert client.delete("/v1/models/second").json() == {"id": "second", "object": "model", "deleted": True}
    for path, body in (("/v2/rerank", ASKED), ("/score", {"text_1": "a", "text_2": "b"})):
        answer = client.post(path, json=body | {"model": "second"})
        assert answer.status_code == 404
        assert "there is no model 'second' here; there are: code" in str(answer.json())
    assert client.delete("/v1/models/second").status_code == 404


@pytest.mark.parametrize("name", ["org/second", "a b?c#d%", "größe", "a:b@c"])
def test_a_model_of_any_name_can_be_forgotten(client, folder, name):
    assert client.post("/v1/models", json={"name": name, "adapter": "mine"}).json()["id"] == name
    assert client.post("/v2/rerank", json=ASKED | {"model": name}).status_code == 200
    assert client.delete(f"/v1/models/{quote(name, safe='')}").json()["id"] == name
    assert client.post("/v2/rerank", json=ASKED | {"model": name}).status_code == 404


@pytest.mark.parametrize("name", ["a\n", "a\0b", "/a", "a/", "a//b", "..", "a/../b", "."])
def test_names_that_no_path_has_are_refused(client, folder, name):
    answer = client.post("/v1/models", json={"name": name, "adapter": "mine"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "name"


def test_no_name_forgets_nothing_and_long_ones_are_not_sent_back(client, service):
    assert client.delete("/v1/models/").status_code in (404, 405)
    assert [served.name for served in service.models] == ["code"]
    answer = client.post("/v2/rerank", json=ASKED | {"model": "m" * 10_000})
    assert answer.status_code == 404 and len(answer.content) < 300


@pytest.mark.parametrize("name", ["..", ".", "/", "../models/../..", "missing", "mine/adapter_config.json", "a\0b"])
def test_only_folders_below_the_root_are_loaded(client, service, folder, name):
    (service.spec.models_root / "out").symlink_to(DEMO / "adapter")
    try:
        for asked in (name, "out"):
            answer = client.post("/v1/models", json={"name": "x", "adapter": asked})
            assert answer.status_code == 400
            assert "below the server's --models-root" in answer.json()["error"]["message"]
    finally:
        (service.spec.models_root / "out").unlink()


def test_a_broken_adapter_is_refused_without_telling_where_it_lies(client, folder):
    (folder / "adapter_model.safetensors").write_bytes(b"no weights")
    answer = client.post("/v1/models", json={"name": "x", "adapter": "mine"})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert "mine" in message and str(folder) not in message
    assert client.post("/v1/models", json={"name": "code", "adapter": "mine"}).status_code == 400  # the name is taken
    assert len(client.get("/v1/models").json()["data"]) == 1


def test_models_are_loaded_with_a_root_only(service):
    models = Models(spec(), service.cache)
    with pytest.raises(RequestError, match="--models-root") as caught:
        models.load_below_root("x", "mine")
    assert caught.value.kind == "forbidden"


def test_an_adapter_with_an_lm_of_its_own_shares_it_with_none(client, service, folder):
    (folder / "lm_adapter").mkdir()
    answer = client.post("/v1/models", json={"name": "x", "adapter": "mine"})
    assert "changes the LM, so that no other can share it" in answer.json()["error"]["message"]


def test_the_lm_alone_is_served_without_clues(service):
    models = Models(spec(models={"lm": None}, token_limits={"max_document_tokens": 64}), service.cache)
    served = models.load("lm", None)
    assert served.reranker.model.clues is None
    assert served.limits == {"max_document_tokens": 64, "max_query_tokens": 64}
    with pytest.raises(ValueError, match="lower max_document_tokens"):
        Models(spec(token_limits={"max_document_tokens": 10**6}), service.cache).load("long", None)


# -- documents by id, caches and indexes, with a tiny LM ---------------------------------------------------------------


class OneModel:
    """Models of a server with one reranker."""

    def __init__(self, reranker):
        self.served = Served("tiny", reranker)

    def get(self, name):
        return self.served


def ids(*names):
    return Ask("query", "documents", ["why?"], [{"id": name} for name in names])


def test_documents_are_named_by_id(service):
    models = OneModel(qpeft.Reranker(tiny_model()))
    job = prepare(ids("d1", "d2"), models, tiny_corpus(), service.spec.limits).job
    assert [document["text"] for _, document in job.pairs[:2]] == [tiny_corpus()[name]["text"] for name in ("d1", "d2")]
    with pytest.raises(RequestError, match=r"documents\[1\]: the corpus has no document 'nine'; send its text"):
        prepare(ids("d1", "nine"), models, tiny_corpus(), service.spec.limits)
    with pytest.raises(RequestError, match="no --corpus"):
        prepare(ids("d1"), models, None, service.spec.limits)


def test_an_index_that_has_grown_is_taken_over(tmp_path, service):
    model, documents = tiny_model(), tiny_corpus()
    first = {name: documents[name] for name in list(documents)[:2]}
    make(tmp_path / "index", model, first)
    cache = qpeft.DocumentCache(0, index=tmp_path / "index")
    models = OneModel(qpeft.Reranker(model, cache=cache))
    asked = ids(*list(documents)[:3])
    asked.raw_scores = True  # so that there is no pair with an empty document
    job = prepare(asked, models, documents, service.spec.limits).job
    assert held_prefixes(job, [0, 1, 2]) == [True, True, False]
    assert not cache.renew_index()
    make(tmp_path / "index", model, documents)
    assert cache.renew_index()
    assert not cache.renew_index()
    assert held_prefixes(job, [0, 1, 2]) == [True, True, True]
    scores = models.served.reranker.predict(job.pairs)
    assert cache.misses == 0
    np.testing.assert_allclose(scores, qpeft.Reranker(model).predict(job.pairs), rtol=1e-5, atol=1e-5)
    (tmp_path / "index" / "manifest.json").write_text("{")
    assert not cache.renew_index()


def test_a_full_disk_of_the_cache_ends_the_writing_and_not_the_service(tmp_path, service, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tiers, "write_prefixes", full)
    model, documents = tiny_model(), tiny_corpus()
    models = OneModel(qpeft.Reranker(model, cache=qpeft.DocumentCache(0, disk=tmp_path / "cache", disk_bytes=1 << 20)))
    job = prepare(ids(*documents), models, documents, service.spec.limits).job
    expected = qpeft.Reranker(model).predict(job.pairs)
    for _ in range(2):
        np.testing.assert_allclose(models.served.reranker.predict(job.pairs), expected, rtol=1e-5, atol=1e-5)


def test_long_documents_are_scored_by_passages(service):
    reranker = qpeft.Reranker(tiny_model(), passages="max", passage_tokens=32, deterministic=True)
    documents = ["One sentence. " * 2 + "Tides rise with the moon. " * 2 + "Waves are no tides. " * 3, "A short one."]
    ask = Ask("query", "documents", ["why do tides rise?"], documents, raw_scores=True)
    prepared = prepare(ask, OneModel(reranker), None, service.spec.limits)
    assert len(prepared.job.pairs) > 3 and not prepared.warnings
    score_pairs({prepared.job: list(range(len(prepared.job.pairs)))}, lambda: None)
    assert [
        {"corpus_id": result.index, "score": result.score, "passage": result.passage} for result in rank(prepared).best
    ] == reranker.rank("why do tides rise?", documents)
