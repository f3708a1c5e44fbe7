"""Fixtures of the tests of indexes."""

from __future__ import annotations

import pytest
from jobs.tiny_job import make_job


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path / "cache"))
