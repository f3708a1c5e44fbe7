"""Fixtures of all tests."""

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request) -> torch.device:
    """Every device that the operators have kernels for; CUDA where there is a GPU and the library has its kernels."""
    if request.param == "cuda":
        from qpeft_ext import _library

        live, why = _library.kernels_live()["cuda"]
        if not live:
            pytest.skip(why)
    return torch.device(request.param)
