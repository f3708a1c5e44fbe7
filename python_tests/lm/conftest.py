"""A GGUF file, and a cache folder of its own for every test."""

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache folder."""
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory):
    """A GGUF file that holds `random_lm()`."""
    pytest.importorskip("gguf", reason="GGUF files need the package gguf")
    pytest.importorskip("accelerate", reason="GGUF files need the package accelerate")
    from lm.tiny_gguf import random_lm, write_gguf

    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", random_lm())
