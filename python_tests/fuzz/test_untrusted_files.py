"""Folders that a stranger made: none of their code runs, no pickle is read, no planted link is written through, and
what is made of private files is as private."""

import ast
import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from families.tiny import tiny_lm, tiny_tokenizer
from jobs.tiny_job import copy_job, make_job
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import qpeft_ext as qpeft
from qpeft_ext.adapters.files import load_weights_into
from qpeft_ext.cli import main
from qpeft_ext.formats import Corpus
from qpeft_ext.lm.loading import lm_digest, load_config, load_lm, load_tokenizer
from qpeft_ext.utils.files import AtomicWriter, save_file_with, save_folder_with, write_text
from qpeft_ext.utils.locks import open_lock_file

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
    assert len(calls) >= 6
    for path, call in calls:
        forbids = [k for k in call.keywords if k.arg == "trust_remote_code" and ast.unparse(k.value) == "False"]
        assert forbids, f"{path}, line {call.lineno}: trust_remote_code=False is missing"


@pytest.fixture(scope="module")
def whole_job(tmp_path_factory):
    return make_job(tmp_path_factory.mktemp("untrusted"))


@pytest.fixture
def job(whole_job, tmp_path, monkeypatch):
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path / "cache"))
    return copy_job(whole_job, tmp_path / "job")


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


def test_code_of_a_model_folder_does_not_run_though_yes_is_typed(evil_lm, job, tmp_path):
    command = f"rerank --base-model {evil_lm} --upr --data {job}/data --run {job}/data/run.trec --output {tmp_path}/o"
    got = subprocess.run(
        [sys.executable, "-m", "qpeft_ext.cli", *command.split()],
        input="y\n" * 50,
        text=True,
        capture_output=True,
        cwd=ROOT,
    )
    assert got.returncode == 2 and got.stderr.count("\n") == 1 and "which is never run" in got.stderr, got.stderr
    assert "[y/N]" not in got.stdout and not (tmp_path / "ran").exists() and not (tmp_path / "o").exists()


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


@pytest.fixture
def lora(job, tmp_path):
    """An adapter folder whose LM has a LoRA."""
    lm = get_peft_model(tiny_lm("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="top_k", k=2, rank=4), tiny_tokenizer())
    model.save_pretrained(tmp_path / "lora")
    return model, tmp_path / "lora"


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
        ({"peft_type": "NOPE"}, "cannot load the LM's adapter"),
        ({"peft_type": None}, "expected a config of peft"),
        ({"r": 10**12}, "cannot load the LM's adapter"),
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


# -- links -----------------------------------------------------------------------------------------------------------


def test_saving_an_adapter_writes_through_no_link(lora, tmp_path):
    model, _ = lora
    shared, victim = tmp_path / "shared", tmp_path / "victim"
    shared.mkdir(), victim.mkdir()
    (victim / "file").write_text("precious")
    for name in ("README.md", "adapter_config.json", "adapter_model.safetensors"):
        for link in (name, f".{name}.tmp"):
            (shared / link).symlink_to(victim / "file")
    (shared / "lm_adapter").symlink_to(victim)
    model.save_pretrained(shared)
    assert [path.name for path in victim.iterdir()] == ["file"] and (victim / "file").read_text() == "precious"
    assert not any((shared / name).is_symlink() for name in ("README.md", "adapter_config.json", "lm_adapter"))
    assert qpeft.QPeftConfig.from_pretrained(shared).clues == "top_k"
    left = {path.name for path in shared.iterdir() if path.name.startswith(".") and not path.is_symlink()}
    assert not left


def test_lock_files_and_parts_are_no_links(job, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "disk").mkdir()
    for link in (tmp_path / "disk" / ".lock", tmp_path / "out.trec.part"):
        link.symlink_to(victim)
    with pytest.raises(ValueError, match="is a link"):
        qpeft.DocumentCache(0, disk=tmp_path / "disk", disk_bytes=1 << 20)
    for more in ("", " --no-resume"):
        assert (
            main(
                (
                    f"rerank --base-model {job}/lm --upr --data {job}/data --run {job}/data/run.trec --output "
                    f"{tmp_path}/out.trec{more}"
                ).split()
            )
            == 2
        )
    assert victim.read_text() == "precious"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        open_lock_file(tmp_path / "pipe")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a link to another user")
def test_a_link_of_another_user_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run").symlink_to(tmp_path / "victim")
    os.lchown(tmp_path / "run", 12345, 12345)
    with pytest.raises(ValueError, match="a link that another user made"):
        write_text(tmp_path / "run", "new")
    write_text(tmp_path / "run", "new", follow=False)
    assert (tmp_path / "victim").read_text() == "precious" and not (tmp_path / "run").is_symlink()


def test_folders_that_libraries_fill(tmp_path):
    """A second save takes the place of the first; stale shards would be loaded instead of the new weights."""
    folder = tmp_path / "lm"

    def save(names):
        def write(path):
            Path(path).mkdir()
            for name in names:
                (Path(path) / name).write_text(names[name])

        return write

    save_folder_with(folder, save({"a-1.safetensors": "1", "a-2.safetensors": "1", "a.index.json": "1", "c.json": "1"}))
    (folder / "notes.txt").write_text("kept")
    save_folder_with(folder, save({"a.safetensors": "2", "c.json": "2"}))
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "a.safetensors": "2",
        "c.json": "2",
        "notes.txt": "kept",
    }

    def fail(path):
        save({"a.safetensors": "3"})(path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_folder_with(folder, fail)
    assert (folder / "a.safetensors").read_text() == "2" and os.listdir(tmp_path) == ["lm"]


# -- permissions -----------------------------------------------------------------------------------------------------


def permissions(folder: Path) -> set[int]:
    return {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("mode, expected", [(0o600, 0o600), (0o640, 0o640), (0o644, 0o644)])
def test_what_is_made_of_a_private_corpus_is_private(mode, expected, job, tmp_path):
    corpus = job / "data" / "corpus.jsonl"
    corpus.chmod(mode)
    before = os.umask(0o022)
    try:
        bm25 = f"retrieve --data {job}/data --output {tmp_path}/out"
        assert main(bm25.split()) == 0
        index = f"index {job}/data --out {tmp_path}/index --base-model {job}/lm"
        assert main(index.split()) == 0
        assert permissions(tmp_path / "cache") == permissions(tmp_path / "index") == {expected}
        assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "index").stat().st_mode & 0o777 == expected | (expected & 0o444) >> 2
        corpus.chmod(0o600)
        Corpus(corpus)
        assert {p.stat().st_mode & 0o777 for p in (tmp_path / "cache").glob("corpus-*")} == {0o600}
    finally:
        os.umask(before)


def test_a_disk_cache_is_for_one_user(job, tmp_path):
    cache = qpeft.DocumentCache(0, disk=tmp_path / "disk", disk_bytes=1 << 24)
    qpeft.Reranker.from_pretrained(job / "adapter", cache=cache).predict(PAIRS)
    assert permissions(tmp_path / "disk") == {0o600} and (tmp_path / "disk").stat().st_mode & 0o777 == 0o700


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path):
    before = os.umask(0o022)
    try:
        for name in ("a", "b"):
            write_text(tmp_path / name, "x")
        assert permissions(tmp_path) == {0o644}
        for name in ("a", "b"):
            (tmp_path / name).chmod(0o600)
        write_text(tmp_path / "a", "y")
        save_file_with(tmp_path / "b", lambda path: save_file({}, path))
        assert permissions(tmp_path) == {0o600}
    finally:
        os.umask(before)


def test_an_error_of_the_disk_names_the_file(tmp_path):
    def full(path):
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left on device") as caught:
        save_file_with(tmp_path / "weights", full)
    assert caught.value.filename == str(tmp_path / "weights") and caught.value.errno == errno.ENOSPC
    writer = AtomicWriter(tmp_path / "run")
    writer.file.close()
    writer.file = writer.stream = open("/dev/full", "wb")
    writer.write(b"x")
    with pytest.raises(OSError, match="No space left on device") as caught:
        writer.close()
    assert caught.value.filename == str(tmp_path / "run") and not list(tmp_path.iterdir())


def test_the_helpers_of_this_file_would_see_a_pickle(job, monkeypatch, tmp_path):
    """Otherwise the tests above could pass for another reason."""
    monkeypatch.setenv("TRAP", str(tmp_path / "unpickled"))
    pickled(tmp_path / "x.bin", {})
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert (tmp_path / "unpickled").is_dir()
