"""LMs in GGUF files: converted once, loaded by their name, recognised by adapters."""

import shutil
import threading

import pytest
import torch
from lm.tiny_gguf import random_lm, write_gguf

import qpeft_ext as qpeft
from qpeft_ext.lm import gguf
from qpeft_ext.lm.loading import lm_digest, load_config, load_tokenizer

TEXT = "Größe: 12 km"


@pytest.fixture
def conversions(monkeypatch):
    """The names of the files that are converted."""
    names = []
    convert = gguf._convert

    def counted(path, sha256, target, name):
        names.append(name)
        convert(path, sha256, target, name)

    monkeypatch.setattr(gguf, "_convert", counted)
    return names


def logits(lm) -> torch.Tensor:
    return lm(torch.tensor([list(range(40))])).logits


@torch.no_grad()
def test_an_lm_from_a_gguf_file_is_the_one_that_was_written(tiny_file, conversions):
    lm = qpeft.load_lm(tiny_file)
    assert torch.allclose(logits(lm), logits(random_lm()), atol=1e-5)
    assert lm.dtype == torch.float32 and not lm.training
    assert lm.name_or_path == lm.config.name_or_path == str(tiny_file)
    tokenizer = load_tokenizer(tiny_file)
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert len(tokenizer(TEXT)["input_ids"]) == len(TEXT.encode())
    assert load_config(tiny_file).hidden_size == 32
    assert len(lm_digest(tiny_file)) == 16
    assert conversions == ["tiny.gguf"]


@torch.no_grad()
def test_packed_weights_become_bfloat16(tmp_path, tiny_file):
    lm = qpeft.load_lm(write_gguf(tmp_path / "packed.gguf", random_lm(), packed=True))
    assert lm.dtype == torch.bfloat16 and not hasattr(lm.config, "quantization_config")
    assert torch.allclose(logits(lm).float(), logits(random_lm()), atol=0.02)


def test_the_same_content_under_another_name_is_not_converted_again(tmp_path, tiny_file, conversions):
    qpeft.load_lm(tiny_file)
    other = shutil.copy(tiny_file, tmp_path / "other.GGUF")
    assert qpeft.load_lm(other).name_or_path == str(other)
    assert lm_digest(other) == lm_digest(tiny_file)
    assert len(conversions) == 1


@pytest.mark.parametrize(("splitting", "pieces"), [("gpt-2", ["Ċ", "Ċ", "1", "2"]), ("smollm", ["ĊĊ", "1", "2"])])
def test_text_is_split_by_the_rule_of_the_file(splitting, pieces, tmp_path, tiny_file):
    path = write_gguf(tmp_path / "other.gguf", random_lm(), splitting=splitting)
    assert load_tokenizer(path).tokenize("\n\n12") == pieces


def test_two_at_once_convert_once(tiny_file, conversions):
    found = []
    threads = [threading.Thread(target=lambda: found.append(load_config(tiny_file))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and len(conversions) == 1


def test_what_a_killed_conversion_left_is_removed(tiny_file, cache):
    left = cache / "gguf" / ".left.0123456789ab.tmp"
    left.mkdir(parents=True)
    (left / "config.json").write_text("{")
    load_config(tiny_file)
    assert not left.exists()
    (folder,) = (cache / "gguf").iterdir()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}


def test_a_converted_lm_needs_no_gguf_package(tiny_file, monkeypatch):
    qpeft.load_lm(tiny_file)
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    qpeft.load_lm(tiny_file)


def test_an_adapter_knows_its_gguf_file(tmp_path, tiny_file):
    path = shutil.copy(tiny_file, tmp_path / "mine.gguf")
    model = qpeft.get_qpeft_model(qpeft.load_lm(path), qpeft.QPeftConfig(clues="top_k", k=3))
    model.save_pretrained(tmp_path / "adapter")
    pairs = [("a query", "a document of some words")]
    scores = model.score(pairs).query_log_likelihood
    again = qpeft.QPeftModel.from_pretrained(tmp_path / "adapter")
    assert torch.equal(again.score(pairs).query_log_likelihood, scores)
    assert len(again.qpeft_config.base_model["gguf_sha256"]) == 64

    changed = random_lm()
    with torch.no_grad():
        changed.model.norm.weight[0] += 0.5
    write_gguf(path, changed)
    with pytest.raises(
        ValueError, match="was trained on a GGUF file with the SHA-256 .*, this one has .*mine.gguf"
    ) as it:
        qpeft.QPeftModel.from_pretrained(tmp_path / "adapter")
    assert "\n" not in str(it.value)


def test_the_same_lm_from_a_folder_fits_the_adapter(tmp_path, tiny_file):
    model = qpeft.get_qpeft_model(qpeft.load_lm(tiny_file), qpeft.QPeftConfig(clues="top_k", k=3))
    model.save_pretrained(tmp_path / "adapter")
    random_lm().save_pretrained(tmp_path / "lm")
    load_tokenizer(tiny_file).save_pretrained(tmp_path / "lm")
    qpeft.QPeftModel.from_pretrained(tmp_path / "adapter", lm=tmp_path / "lm")
