"""Fixtures of all tests, and how many run at a time."""

from __future__ import annotations

import contextlib
import gc
import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
# or torch.compile compiles programs for 20 s to see whether the compiler knows this CPU's instructions
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
WORKER_BYTES = 3 * 2**30  # of a worker and of the processes that a test starts; measured 1.5 GiB


def pytest_configure(config):
    """Prepares torch, but not in the process that only hands tests to workers, which wait for it."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    import torch

    from qpeft_ext.utils.optional import import_bm25s

    with contextlib.suppress(ImportError):
        import_bm25s()  # before a test does it, and JAX with it
    if WORKERS > 1:  # they and the processes that their tests start share the cores
        torch.set_num_threads(max(1, CORES // WORKERS))
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))


def pytest_xdist_auto_num_workers(config) -> int:
    """``-n auto``: a worker for each core, as far as there is memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(CORES, memory // WORKER_BYTES))


def pytest_collection_modifyitems(items):
    """Puts files with slow tests first, so that no worker ends alone with a long one."""
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)


def pytest_collection_finish():
    freeze_objects()


@pytest.fixture(scope="module", autouse=True)
def collected():
    """Leave out of later garbage collections what a module of tests leaves behind."""
    yield
    freeze_objects()


def freeze_objects() -> None:
    """Collect garbage once, and leave all that remains out of later collections.

    Each training collects garbage, which otherwise takes 0.3 s.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def whole_job(tmp_path_factory):
    """A folder with a small LM, an adapter and data, which no test changes."""
    from jobs.tiny_job import make_job

    return make_job(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def job(whole_job, tmp_path, monkeypatch):
    """A copy of `whole_job` for one test, with a cache folder of its own."""
    from jobs.tiny_job import copy_job

    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path / "cache"))
    return copy_job(whole_job, tmp_path / "job")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request) -> torch.device:
    """Every device that the operators have kernels for; CUDA where there is a GPU and the library has its kernels."""
    import torch

    if request.param == "cuda":
        from qpeft_ext.ops import _library

        live, why = _library.kernels_live()["cuda"]
        if not live:
            pytest.skip(why)
    return torch.device(request.param)


@pytest.fixture(scope="module")
def one_thread():
    """As in the processes that a module starts, whose files are compared byte by byte with those made here."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
