"""What says where an LM is on the Hub reaches its config, its weights and its tokenizer."""

import pytest
import small_data
import transformers

import qpeft_ext as qpeft
from qpeft_ext.cli import main
from qpeft_ext.lm.loading import BASE_LM

pytestmark = pytest.mark.slow


ADAPTER = BASE_LM.parent / "adapter"
WHERE = {"revision": "v2", "token": "secret", "local_files_only": True}


@pytest.fixture
def calls(monkeypatch):
    """The keywords of our calls of transformers, by class; every LM is the packaged one, with a commit of its own."""
    seen: dict[str, list[dict]] = {}
    within: list[str] = []  # transformers calls itself

    def record(kind):
        load = kind.from_pretrained

        def from_pretrained(name, *arguments, **keywords):
            if not within:
                seen.setdefault(kind.__name__, []).append(keywords)
            within.append(name)
            kept = {key: value for key, value in keywords.items() if key not in WHERE}
            loaded = load(str(BASE_LM), *arguments, **kept)
            model = loaded[0] if isinstance(loaded, tuple) else loaded  # a model comes with a report of its loading
            if hasattr(model, "config"):
                model.config._commit_hash = keywords.get("revision")
                model.name_or_path = name
            within.pop()
            return loaded

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)

    for kind in (transformers.AutoConfig, transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        record(kind)
    monkeypatch.setattr("transformers.utils.peft_utils.find_adapter_config_file", lambda *_, **__: None)
    monkeypatch.setattr("qpeft_ext.lm.loading.expect_in_reach", lambda *_: None)
    return seen


@pytest.mark.parametrize(
    "load",
    [
        lambda: qpeft.QPeftModel.from_pretrained(ADAPTER, "some/lm", **WHERE),
        lambda: qpeft.Reranker.from_pretrained(ADAPTER, "some/lm", lm_kwargs=WHERE),
    ],
    ids=["model", "reranker"],
)
def test_from_pretrained(load, calls):
    load()
    assert calls.keys() == {"AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"}
    for made in calls.values():
        for call in made:
            assert {name: call.get(name) for name in WHERE} == WHERE


@pytest.fixture
def adapter(calls, tmp_path):
    """The folder of an adapter whose LM was loaded from the commit c0ffee of some/lm."""
    lm = qpeft.load_lm("some/lm", revision="c0ffee")
    qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="top_k", rank=4)).save_pretrained(tmp_path / "adapter")
    calls.clear()
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("arguments", "revision"),
    [
        ({}, "c0ffee"),
        ({"lm": "some/lm"}, "c0ffee"),
        ({"revision": "v2"}, "v2"),
        ({"lm": "other/lm"}, None),
    ],
)
def test_an_adapter_finds_its_commit_again(arguments, revision, adapter, calls):
    model = qpeft.QPeftModel.from_pretrained(adapter, **arguments)
    assert calls.keys() == {"AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"}
    assert {call.get("revision") for made in calls.values() for call in made} == {revision}
    assert model.qpeft_config.base_model["revision"] == "c0ffee"


def test_the_commit_of_an_adapter_is_checked(adapter):
    path = adapter / "adapter_config.json"
    path.write_text(path.read_text().replace("c0ffee", "../c0ffee"))
    with pytest.raises(ValueError, match=r"revision of base_model must be a commit of the Hub, got '../c0ffee'"):
        qpeft.QPeftModel.from_pretrained(adapter)


@pytest.mark.parametrize(("where", "revision"), [([], "c0ffee"), (["--revision", "v2"], "v2")])
def test_rerank_with_the_commit_of_an_adapter(where, revision, adapter, calls, tmp_path):
    data, run = small_data.write_folder(tmp_path / "data"), tmp_path / "run.trec"
    where = [*where, "--device", "cpu", "--top-k", "2"]
    assert main(["rerank", "--data", str(data), "--model", str(adapter), "--output", str(run), *where]) == 0
    assert {call.get("revision") for made in calls.values() for call in made} == {revision}


def test_rerank(calls, tmp_path):
    data, run = small_data.write_folder(tmp_path / "data"), tmp_path / "run.trec"
    where = ["--base-model", "some/lm", "--revision", "v2", "--device", "cpu"]
    assert main(["rerank", "--data", str(data), "--upr", "--output", str(run), "--top-k", "2", *where]) == 0
    assert calls.keys() == {"AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"}
    assert {call.get("revision") for made in calls.values() for call in made} == {"v2"}
