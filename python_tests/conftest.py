"""Fixtures of all tests."""

import contextlib

import pytest
import torch

from qpeft_ext.without_jax import import_bm25s

with contextlib.suppress(ImportError):
    import_bm25s()  # before a test does it, and JAX with it


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request) -> torch.device:
    """Every device that the operators have kernels for; CUDA where there is a GPU and the library has its kernels."""
    if request.param == "cuda":
        from qpeft_ext import _library

        live, why = _library.kernels_live()["cuda"]
        if not live:
            pytest.skip(why)
    return torch.device(request.param)


@pytest.fixture(scope="module")
def one_thread():
    """As in the processes that a module starts, whose files are compared byte by byte with those made here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
