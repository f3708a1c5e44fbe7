"""The build: packing of lists, build info, messages about a missing library, symbols that it must not need."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qpeft_ext import _host
from qpeft_ext.ops import _library

ARM = "aarch64-linux-gnu-g++"
CSRC = Path(__file__).parents[1] / "csrc"
PORTABLE = [
    path
    for path in sorted([CSRC / "ops.cpp", *CSRC.glob("cpu/*.cpp")])
    if not path.stem.endswith(("_avx512bf16", "_avx512vnni", "_amx"))
]
needs_library = pytest.mark.skipif(not _library.LIBRARY.is_file(), reason="qpeft_ext._C is not built")


@pytest.fixture
def fresh(monkeypatch):
    """A function that loads ``_library.py`` once more, as a module of its own that has loaded no operators."""
    monkeypatch.delenv("QPEFT_REFERENCE", raising=False)

    def load():
        spec = importlib.util.spec_from_file_location("fresh_library", _library.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize(
    ("lists", "values", "offsets"),
    [
        ([], [], [0]),
        ([[]], [], [0, 0]),
        ([[5, 3], [], (7,)], [5, 3, 7], [0, 2, 2, 3]),
        (([-1, 2**63 - 1], [-(2**63)]), [-1, 2**63 - 1, -(2**63)], [0, 2, 3]),
        ([np.array([4, 5]), torch.tensor([6]).numpy()], [4, 5, 6], [0, 2, 3]),
    ],
)
def test_pack_ragged(lists, values, offsets):
    packed, bounds = _host.pack_ragged(lists)
    assert packed.dtype == bounds.dtype == np.int64
    assert packed.tolist() == values
    assert bounds.tolist() == offsets


@given(st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5), max_size=5))
def test_pack_ragged_round_trip(lists):
    values, offsets = _host.pack_ragged(lists)
    assert [values[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True)] == lists


@pytest.mark.parametrize(
    ("lists", "error", "message"),
    [
        (7, TypeError, "pack_ragged: lists must be a list of int lists, got int"),
        ("ids", TypeError, "pack_ragged: lists must be a list of int lists, got str"),
        ([[1], 2], TypeError, "pack_ragged: lists[1] must be a list of int, got int"),
        ([b"12"], TypeError, "pack_ragged: lists[0] must be a list of int, got bytes"),
        ([[1], [2, 3.0]], TypeError, "pack_ragged: lists[1][1] must be an int, got float"),
        ([[True]], TypeError, "pack_ragged: lists[0][0] must be an int, got bool"),
        ([[None]], TypeError, "pack_ragged: lists[0][0] must be an int, got NoneType"),
        ([[2**63]], ValueError, "pack_ragged: lists[0][0] must fit in 64 bits, got 9223372036854775808"),
    ],
)
def test_pack_ragged_rejects(lists, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        _host.pack_ragged(lists)


def test_build_info_tells_how_and_why():
    info = _library.build_info()
    assert info["torch"] == torch.__version__
    assert info["compiler"] and info["cxx_flags"] and info["torch_at_build"] and info["cuda_reason"]
    assert isinstance(info["cuda"], bool)
    assert bool(info["cuda_architectures"]) == bool(info["nvcc"]) == info["cuda"]


@needs_library
def test_kernels_live_gives_a_reason_for_each_device():
    live = _library.kernels_live()
    assert {"cpu", "cuda"} <= set(live)
    assert all(reason for _, reason in live.values())
    assert live["cpu"][0] or _library.REFERENCE
    if not torch.cuda.is_available():
        assert not live["cuda"][0]


def test_missing_library_says_what_to_run(fresh):
    library = fresh()
    library.LIBRARY = Path("/nowhere/_C.so")
    with pytest.raises(ImportError) as raised:
        library.load()
    assert str(raised.value) == (
        "qpeft_ext._C is not built (/nowhere/_C.so does not exist). "
        "Run `pip install -e .`, or set QPEFT_REFERENCE=1 to use the PyTorch definitions."
    )


def test_unloadable_library_says_why(fresh, tmp_path):
    library = fresh()
    library.LIBRARY = tmp_path / "_C.so"
    library.LIBRARY.write_bytes(b"not a library")
    with pytest.raises(ImportError) as raised:
        library.load()
    message = str(raised.value)
    assert "file too short" in message or "invalid ELF header" in message  # the loader's own words
    assert "It was built against torch" in message and f"this is torch {torch.__version__}" in message
    assert "QPEFT_REFERENCE=1" in message and "\n" not in message


def test_old_torch_is_named(fresh, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    message = "^qpeft_ext needs torch 2.10 or newer, got 2.9.1. Run `pip install -U torch`"
    with pytest.raises(ImportError, match=message):
        fresh().load()


def test_reference_mode_loads_nothing(fresh, monkeypatch):
    monkeypatch.setenv("QPEFT_REFERENCE", "1")
    library = fresh()
    library.LIBRARY = Path("/nowhere/_C.so")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # whoever set it knows
        library.load()
        assert library.uses_reference(torch.device("cpu"))
    assert library.kernels_live()["cpu"] == (False, "QPEFT_REFERENCE is set")


@pytest.mark.parametrize(
    ("without", "last_line"),
    [
        ("a compiler", "qpeft_ext was not built: `cmake` failed; the reason stands above. It needs torch, Python's .*"),
        ("cmake", r"qpeft_ext was not built: cmake was not found\. Run: pip install 'cmake>=3\.25' ninja"),
    ],
)
def test_a_build_that_fails_ends_with_a_line_and_no_traceback(without, last_line, tmp_path):
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "_build"):
        path = CSRC.parent / name
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / name)
    environment = os.environ | {"CXX": "/nowhere/g++"} | ({"PATH": str(tmp_path)} if without == "cmake" else {})
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.fullmatch(last_line, done.stderr.splitlines()[-1])


@pytest.mark.parametrize("system", ["Darwin", "Windows"])
def test_other_systems_run_the_definitions_with_one_notice(fresh, monkeypatch, system):
    library = fresh()
    monkeypatch.setattr(library.platform, "system", lambda: system)
    with warnings.catch_warnings(record=True) as noticed:
        warnings.simplefilter("always")
        library.load()
        assert [library.uses_reference(torch.device("cpu")) for _ in range(3)] == [True, True, True]
    said = [str(warning.message) for warning in noticed]
    assert len(said) == 1 and "the PyTorch definitions run, since the kernels are built on Linux only" in said[0]


@pytest.mark.parametrize(
    ("architectures", "capability", "covered"),
    [
        ("80-real 90a-real 100-real 120", (7, 5), False),
        ("80-real 90a-real 100-real 120", (8, 0), True),
        ("80-real 90a-real 100-real 120", (8, 9), True),  # machine code of 8.0 runs on later 8.x
        ("80-real 90a-real 100-real 120", (9, 0), True),
        ("90a-real", (9, 1), False),  # an "a" variant runs on its own version only
        ("80-real 90a-real 100-real 120", (10, 3), True),
        ("80-real 90a-real 100-real 120", (11, 0), False),
        ("80-real 90a-real 100-real 120", (13, 0), True),  # through the PTX of 120
    ],
)
def test_architectures_that_cover_a_gpu(architectures, capability, covered):
    assert _library.covers(architectures.split(), capability) is covered


@pytest.fixture
def find_gpus(monkeypatch):
    """The module ``_build/find_gpus.py``; the test is skipped where there are no sources beside the tests."""
    folder = Path(__file__).parents[1] / "_build"
    if not folder.is_dir():
        pytest.skip("needs the sources")
    monkeypatch.syspath_prepend(str(folder))
    import find_gpus

    return find_gpus


@pytest.mark.parametrize(
    ("shown", "codes", "architectures", "reason"),
    [
        ("9.0\n9.0\n", "80 90 100", "90a-real", "for the GPUs of this machine"),
        ("8.9\n12.0\n", "80 86 89 90 120", "120-real 89-real", "for the GPUs of this machine"),
        ("10.3\n", "90 100 120", "100-real", "for the GPUs of this machine"),  # this nvcc does not know 10.3
        ("13.0\n", "80 90 100 120", None, "for every GPU, since the GPUs of this machine (13.0) are"),
        ("8.0\n7.5\n", "75 80", "80-real", "for the GPUs of this machine"),
        ("7.5\n", "75 80", None, "for every GPU, since the GPUs of this machine (7.5) are older than 8.0"),
        ("No devices were found\n", "80", None, "for every GPU, since nvidia-smi shows no GPU"),
        (None, "80", None, "for every GPU, since nvidia-smi was not found"),
        ("exit 9", "80", None, "for every GPU, since nvidia-smi cannot be used here"),
    ],
)
def test_kernels_are_compiled_for_the_gpus_that_are_there(
    find_gpus, tmp_path, monkeypatch, shown, codes, architectures, reason
):
    def command(name, script):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)

    def prints(text):
        return f"cat <<'END'\n{text}END"

    if shown is not None:
        command("nvidia-smi", shown if shown.startswith("exit") else prints(shown))
    command("nvcc", prints("".join(f"sm_{code}\n" for code in codes.split())))
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "cat").symlink_to("/bin/cat")
    found, why = find_gpus.choose("", str(tmp_path / "nvcc"))
    assert found == (architectures or find_gpus.ALL) and why.startswith(reason)


@pytest.mark.parametrize(
    ("wish", "architectures"),
    [("all", "80-real 90a-real 100-real 120"), ("90a-real, 120", "90a-real 120"), ("80;90", "80 90")],
)
def test_architectures_can_be_named(find_gpus, wish, architectures):
    assert find_gpus.choose(wish)[0] == architectures


@needs_library
@pytest.mark.skipif(not shutil.which("nm"), reason="nm is missing")
def test_library_needs_only_the_stable_abi():
    """It needs no symbol of c10::, at:: or Python, which the next torch or Python may change."""
    command = ["nm", "-D", "--undefined-only", _library.LIBRARY]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    symbols = [line.split()[-1] for line in lines]
    assert [name for name in symbols if re.match(r"_ZN?K?(3c10|2at|5torch)|_?Py[A-Z_]", name)] == []


@needs_library
@pytest.mark.skipif(not shutil.which("nm"), reason="nm is missing")
def test_library_exports_nothing():
    """Exported parts of a statically linked libstdc++ would do harm: see csrc/no_exports.map."""
    assert subprocess.run(["nm", "-D", "--defined-only", _library.LIBRARY], capture_output=True, text=True).stdout == ""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(ARM), reason=f"{ARM} is missing")
@pytest.mark.parametrize("source", PORTABLE, ids=lambda path: path.name)
def test_sources_compile_for_arm(source):
    """What is left out there is left out whole. The headers of torch are the same for every processor."""
    include = Path(torch.__file__).parent / "include"
    folders = ["-iquote", CSRC, "-isystem", include, "-isystem", include / "torch/csrc/api/include"]
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"]
    subprocess.run([ARM, "-fsyntax-only", *flags, *folders, source], check=True)


def test_package_is_typed_and_holds_no_pickles():
    package = Path(_library.__file__).parents[1]
    assert (package / "py.typed").is_file()
    assert not [path for path in package.rglob("*") if path.suffix in {".pkl", ".pt", ".pth"}]
