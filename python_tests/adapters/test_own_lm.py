"""An adapter whose LM is not where its config says: one line says how to give it, and what LM it was trained on."""

import json
import shutil

import pytest

import qpeft_ext as qpeft
from qpeft_ext.cli import main
from qpeft_ext.lm.loading import BASE_LM

ADAPTER = BASE_LM.parent / "adapter"  # it names "base_lm", which is a folder of the package only
FACTS = "the adapter of an LM with model_type llama, vocab_size 4096, hidden_size 192"
GIVE = r"give the LM: base_model= \(Reranker\), lm= \(QPeftModel\), --base-model \(command line\)$"


@pytest.fixture
def adapter(tmp_path):
    """A function that makes a copy of the packaged adapter whose LM has another name."""

    def named(name):
        folder = tmp_path / "adapter"
        shutil.copytree(ADAPTER, folder)
        config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": name}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    return named


@pytest.mark.parametrize("name", ["./base_lm", "/nowhere/base_lm", "nowhere.gguf", "package:no-such-package"])
def test_the_error_says_how_to_give_the_lm(name, adapter):
    folder = adapter(name)
    for load in (qpeft.Reranker.from_pretrained, qpeft.QPeftModel.from_pretrained):
        with pytest.raises(OSError, match=rf": cannot load the base LM '{name}': .*; {GIVE}") as raised:
            load(folder)
        assert str(raised.value).startswith(f"{folder}: {FACTS}: ") and "\n" not in str(raised.value)


def test_the_packaged_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no base_lm
    with pytest.raises(OSError, match=f"{FACTS}: cannot load the base LM 'base_lm': .*{GIVE}"):
        qpeft.Reranker.from_pretrained(ADAPTER)


def test_an_adapter_that_names_no_lm(adapter):
    with pytest.raises(ValueError, match=f"{FACTS}: it does not name its base LM; {GIVE}"):
        qpeft.Reranker.from_pretrained(adapter(None))


def test_a_wrong_name_that_the_user_gave_is_another_error():
    with pytest.raises(OSError, match="there is no folder ./nowhere$"):
        qpeft.Reranker.from_pretrained(ADAPTER, "./nowhere")


def test_at_the_command_line(adapter, tmp_path, capsys):
    folder, data = adapter("/nowhere/base_lm"), tmp_path / "c.jsonl"
    record = {
        "query": {"text": "a query", "qid": "q"},
        "candidates": [{"docid": "d", "score": 1.0, "doc": {"text": "a text"}}],
    }
    data.write_text(json.dumps(record) + "\n")
    assert main(["rerank", "--data", str(data), "--model", str(folder), "--output", str(tmp_path / "o.trec")]) == 2
    error = capsys.readouterr().err
    assert "; give the LM: " in error and error.endswith("--base-model (command line)\n")
    assert "the adapter of an LM with model_type llama" in error and error.count("\n") == 1
