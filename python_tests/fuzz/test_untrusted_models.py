"""Models and adapters of strangers: no code of theirs runs, and nothing is unpickled."""

import ast
import io
import json
import os
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qpeft_ext as qpeft
from qpeft_ext.adapters.files import load_weights_into
from qpeft_ext.cli import main
from qpeft_ext.lm.loading import lm_digest, load_config, load_lm, load_tokenizer

pytestmark = pytest.mark.slow


ROOT = Path(__file__).parents[2]
PAIRS = [("why tides", "the moon pulls"), ("who", "a boat")]


# -- remote code -----------------------------------------------------------------------------------------------------


def calls_of_transformers(path: Path):
    """Calls that could run code which lies beside a model."""
    own = {"QPeftModel", "QPeftConfig", "Reranker", "PeftModel", "cls", "qpeft"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
        owner = getattr(getattr(node, "func", None), "value", None)
        if (
            name == "pipeline"
            or name in ("from_pretrained", "from_config")
            and getattr(owner, "id", "") not in own
            and getattr(owner, "attr", "") not in own
        ):
            yield node


def test_every_call_that_could_run_remote_code_forbids_it():
    calls = [
        (path, call)
        for folder in ("qpeft_ext", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        for call in calls_of_transformers(path)
    ]
    assert len(calls) >= 5
    for path, call in calls:
        forbids = [k for k in call.keywords if k.arg == "trust_remote_code" and ast.unparse(k.value) == "False"]
        assert forbids, f"{path}, line {call.lineno}: trust_remote_code=False is missing"


@pytest.fixture
def evil_lm(job, tmp_path):
    """A model folder with code of its own, which leaves a trace when it runs."""
    folder = job / "lm"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.LM"}}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "evil.py").write_text(
        textwrap.dedent(f"""
        open({str(tmp_path / "ran")!r}, "w")
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        class EvilConfig(LlamaConfig): model_type = "evil"
        class LM(LlamaForCausalLM): config_class = EvilConfig
        class Evil(PreTrainedTokenizerFast): pass
        """)
    )
    return folder


def test_code_of_a_model_folder_does_not_run_though_yes_is_typed(evil_lm, job, tmp_path, monkeypatch, capsys):
    command = f"rerank --base-model {evil_lm} --upr --data {job}/data --run {job}/data/run.trec --output {tmp_path}/o"
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 50))
    assert main(command.split()) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "which is never run" in err, err
    assert "[y/N]" not in out and not (tmp_path / "ran").exists() and not (tmp_path / "o").exists()


@pytest.mark.parametrize("load", [load_lm, load_config, load_tokenizer])
def test_no_loader_runs_code(load, evil_lm, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises((ValueError, OSError), match="cannot load"):
        load(evil_lm)
    assert not (tmp_path / "ran").exists() and lm_digest(evil_lm)


def test_remote_code_cannot_be_asked_for(job):
    with pytest.raises(ValueError, match="is not run"):
        load_lm(job / "lm", trust_remote_code=True)
    with pytest.raises(ValueError, match="is not run"):
        qpeft.Reranker.from_pretrained(job / "adapter", lm_kwargs={"trust_remote_code": True})
    path = job / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trust_remote_code": True}))
    with pytest.raises(ValueError, match="unknown option 'trust_remote_code'"):
        qpeft.Reranker.from_pretrained(job / "adapter")


@pytest.mark.parametrize(
    "change",
    [
        {"attn_implementation": "some/kernel"},
        {"_attn_implementation": "some/kernel"},
        {"experts_implementation": "some/kernel"},
    ],
)
def test_a_config_cannot_name_kernels_of_the_hub(change, job):
    path = job / "lm" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="asks for code from the Hub"):
        load_lm(job / "lm")


# -- pickles ---------------------------------------------------------------------------------------------------------


class Trap:
    """Leaves a trace when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (os.environ["TRAP"],)


def pickled(path: Path, state: dict) -> None:
    torch.save(state | {"trap": Trap()}, path)


@pytest.fixture
def no_pickles(monkeypatch, tmp_path):
    """`torch.load` is never called."""
    monkeypatch.setenv("TRAP", str(tmp_path / "unpickled"))

    def load(*args, **kwargs):
        raise AssertionError(f"torch.load{args}")

    monkeypatch.setattr(torch, "load", load)


def load_it(model, folder, job):
    return qpeft.QPeftModel.from_pretrained(folder, job / "lm")


def load_into(model, folder, job):
    return load_weights_into(model, folder)


@pytest.mark.parametrize("load", [load_it, load_into])
def test_an_adapter_of_the_lm_is_safetensors_or_refused(load, lora, job, no_pickles, tmp_path):
    model, folder = lora
    load(model, folder, job)
    weights = folder / "lm_adapter" / "adapter_model.safetensors"
    pickled(weights.with_suffix(".bin"), load_file(weights))
    load(model, folder, job)  # beside a safetensors file nobody reads it
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="no adapter_model.safetensors .*pickle"):
        load(model, folder, job)
    assert not (tmp_path / "unpickled").exists()


def test_the_lm_is_safetensors_or_refused(job, no_pickles, tmp_path):
    weights = job / "lm" / "model.safetensors"
    pickled(job / "lm" / "pytorch_model.bin", load_file(weights))
    load_lm(job / "lm")
    weights.unlink()
    with pytest.raises(OSError, match="cannot load the base LM"):
        load_lm(job / "lm")
    for name in ("pytorch_model.bin", "../lm/pytorch_model.bin", "../other_lm/model.safetensors"):
        index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
        (job / "lm" / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="no safetensors file of the folder"):
            load_lm(job / "lm")
    assert not (tmp_path / "unpickled").exists()


def test_an_adapter_beside_an_lm_is_refused(lora, job, no_pickles):
    """transformers would load it too: other scores than of the LM that was named."""
    source = lora[1] / "lm_adapter"
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (job / "lm" / file).write_bytes((source / file).read_bytes())
    with pytest.raises(ValueError, match="has one beside it"):
        load_lm(job / "lm")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "megatron.evil"}, "megatron_config makes peft load something"),
        ({"peft_type": "XLORA", "adapters": {"a": "/tmp/a"}}, "adapters makes peft load something"),
        ({"prompt_tuning_init_state_dict_path": "/tmp/x.bin"}, "prompt_tuning_init_state_dict_path makes peft load"),
        ({"init_lora_weights": "pissa_niter_999999999999"}, "at most 100 iterations"),
        ({"init_lora_weights": "pissa_niter_²"}, "at most 100 iterations"),
        ({"peft_type": "NOPE"}, "cannot load the LM's adapter"),
        ({"peft_type": None}, "expected a config of peft"),
        ({"r": 10**12}, "cannot load the LM's adapter .*asks for r=1000000000000, and nothing"),
        ({"rank_pattern": {"q_proj": 10**12}}, "asks for q_proj=1000000000000"),
    ],
)
def test_a_config_of_peft_loads_nothing_else(change, message, lora, job):
    path = lora[1] / "lm_adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_it(None, lora[1], job)


def test_lora_survives_saving_and_loading(lora, job):
    model, folder = lora
    expected = qpeft.Reranker(model).predict(PAIRS)
    assert qpeft.Reranker(load_it(model, folder, job)).predict(PAIRS).tolist() == expected.tolist()


def test_the_helpers_of_this_file_would_see_a_pickle(job, monkeypatch, tmp_path):
    """Otherwise the tests above could pass for another reason."""
    monkeypatch.setenv("TRAP", str(tmp_path / "unpickled"))
    pickled(tmp_path / "x.bin", {})
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert (tmp_path / "unpickled").is_dir()
