"""What says where an LM is on the Hub reaches its config, its weights and its tokenizer."""

import pytest
import small_data
import transformers

import qpeft_ext as qpeft
from qpeft_ext.cli import main
from qpeft_ext.lm.loading import BASE_LM

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
            if hasattr(loaded, "config"):
                loaded.config._commit_hash = keywords["revision"]
            within.pop()
            return loaded

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)

    for kind in (transformers.AutoConfig, transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        record(kind)
    monkeypatch.setattr("transformers.utils.peft_utils.find_adapter_config_file", lambda *_, **__: None)
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


def test_rerank(calls, tmp_path):
    data, run = small_data.write_folder(tmp_path / "data"), tmp_path / "run.trec"
    where = ["--base-model", "some/lm", "--revision", "v2", "--device", "cpu"]
    assert main(["rerank", "--data", str(data), "--upr", "--output", str(run), "--top-k", "2", *where]) == 0
    assert calls.keys() == {"AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"}
    assert {call.get("revision") for made in calls.values() for call in made} == {"v2"}
