"""Fixtures of the tests of operators; on_cuda.py says how CUDA primitives run."""

import pytest
from on_cuda import OnGPU, OnReplica, build_replica

from qpeft_ext.ops import _common, _library, _pairs


@pytest.fixture(scope="session")
def replica():
    return build_replica()


@pytest.fixture(params=["replica", pytest.param("gpu", marks=pytest.mark.cuda)])
def run(request):
    """Return ``run(name, *arguments, outputs=())``, which returns a primitive's results or the arguments it fills."""
    if request.param == "replica":
        return OnReplica(request.getfixturevalue("replica"))
    live, why = _library.kernels_live()["cuda"]
    return OnGPU() if live else pytest.skip(why)


@pytest.fixture
def small_blocks(monkeypatch):
    """Buffers a hundredth of their size: what a call with rows of 50 numbers does is what one with 5,000 does."""
    for module, name in ((_common, "BLOCK_BYTES"), (_pairs, "CONTEXT_BYTES"), (_pairs, "GATHER_BYTES")):
        monkeypatch.setattr(module, name, getattr(module, name) // 100)
