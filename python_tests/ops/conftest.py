"""Fixtures of the tests of operators; on_cuda.py says how CUDA primitives run."""

import pytest
from on_cuda import OnGPU, OnReplica, build_replica

from qpeft_ext.ops import _library


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


@pytest.fixture
def fresh_graphs():
    """torch.compile without its cache, where a graph of an earlier build fits whatever the operators return by now."""
    from torch._inductor import config

    with config.patch(force_disable_caches=True):
        yield
