"""``dtype="auto"``: the faster format, measured once."""

import json

import pytest
import torch

import qpeft_ext as qpeft
from qpeft_ext.lm import compute_dtype
from qpeft_ext.lm.loading import BASE_LM


@pytest.fixture
def measured(monkeypatch):
    """The dtypes that are timed; bfloat16 is the faster one as long as ``seconds`` says so."""
    timed = []
    seconds = {torch.bfloat16: 0.1, torch.float32: 0.3}
    monkeypatch.setattr(compute_dtype, "_seconds", lambda dtype: timed.append(dtype) or seconds[dtype])
    return timed, seconds


def test_the_faster_dtype_is_measured_once(measured, cache):
    timed, seconds = measured
    assert qpeft.load_lm(BASE_LM, dtype="auto").dtype == torch.bfloat16
    seconds[torch.bfloat16] = 0.5
    assert compute_dtype.fastest_dtype() == torch.bfloat16  # as it was measured
    assert len(timed) == 2
    (cache / "compute_dtype.json").write_text("{")  # damaged: measured again
    assert compute_dtype.fastest_dtype("cpu") == torch.float32
    assert list(json.loads((cache / "compute_dtype.json").read_text()).values()) == ["float32"]


def test_without_a_cache_folder_it_is_measured_each_time(measured, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path / "file" / "cache"))
    assert [compute_dtype.fastest_dtype() for _ in range(2)] == [torch.bfloat16] * 2
    assert len(measured[0]) == 4


def test_another_number_of_threads_is_measured_anew(measured, monkeypatch):
    compute_dtype.fastest_dtype()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    compute_dtype.fastest_dtype()
    assert len(measured[0]) == 4


@pytest.mark.slow
def test_this_machine_is_measured():
    assert compute_dtype.resolve_dtype("auto") in (torch.bfloat16, torch.float32)


def test_other_names():
    assert compute_dtype.resolve_dtype(None) is None
    assert compute_dtype.resolve_dtype("float16") == compute_dtype.resolve_dtype(torch.float16) == torch.float16
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16, float16, int8 or auto, got 'fast'"):
        qpeft.load_lm(BASE_LM, dtype="fast")
