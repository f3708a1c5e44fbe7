"""Fixtures of the tests of CUDA primitives; on_cuda.py says how they run."""

import pytest
from on_cuda import OnGPU, OnReplica, build_replica

from qpeft_ext import _library


@pytest.fixture(scope="session")
def replica():
    return build_replica()


@pytest.fixture(params=["replica", pytest.param("gpu", marks=pytest.mark.cuda)])
def run(request):
    """``run(name, *arguments, outputs=())``: results of a primitive, or the arguments that it fills."""
    if request.param == "replica":
        return OnReplica(request.getfixturevalue("replica"))
    live, why = _library.kernels_live()["cuda"]
    return OnGPU() if live else pytest.skip(why)
