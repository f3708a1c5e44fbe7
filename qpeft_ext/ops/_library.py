"""Load the compiled operators, and say how they were built and on which devices they run."""

import os
import platform
import re
import warnings
from pathlib import Path

import torch

LIBRARY = Path(__file__).parents[1] / "_C.so"
OLDEST_TORCH = (2, 10)  # TORCH_TARGET_VERSION in CMakeLists.txt: the stable ABI that the library asks for
REFERENCE = os.environ.get("QPEFT_REFERENCE", "") not in ("", "0")
WHAT_TO_DO = "Run `pip install -e .`, or set QPEFT_REFERENCE=1 to use the PyTorch definitions."

_live: set[str] = set()  # device types whose tensors go to the compiled kernels; filled by load()
_noticed: set[str] = set()


def load() -> None:
    """Load ``qpeft_ext/_C.so``, which registers ``torch.ops.qpeft_ext.*``; under ``QPEFT_REFERENCE=1`` do nothing.

    Raises: ImportError that says why and what to run, if the library is missing, unloadable, or torch is too old.
    """
    if REFERENCE or platform.system() != "Linux":
        return
    if _version(torch.__version__) < OLDEST_TORCH:
        raise ImportError(
            f"qpeft_ext needs torch 2.10 or newer, got {torch.__version__}. Run `pip install -U torch`, "
            "or set QPEFT_REFERENCE=1 to use the PyTorch definitions."
        )
    if not LIBRARY.is_file():
        raise ImportError(f"qpeft_ext._C is not built ({LIBRARY} does not exist). {WHAT_TO_DO}")
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        built = _host_info().get("torch_at_build", "an unknown version")
        raise ImportError(
            f"qpeft_ext._C cannot be loaded: {error.__cause__ or error}. It was built against torch {built}, "
            f"this is torch {torch.__version__}. {WHAT_TO_DO}"
        ) from error
    _live.update({"cpu", "meta"})
    if _why_no_cuda() is None:
        _live.add("cuda")


def uses_reference(device: torch.device) -> bool:
    """Return whether operators on this device run their PyTorch definition, and warn once why they do."""
    if device.type in _live:
        return False
    if not torch.compiler.is_compiling() and device.type not in _noticed:
        _noticed.add(device.type)
        if not REFERENCE:  # whoever set QPEFT_REFERENCE knows it
            reason = _why_not(device.type)
            warnings.warn(f"qpeft_ext: on {device.type} the PyTorch definitions run, since {reason}", stacklevel=3)
    return True


def build_info() -> dict[str, str | bool]:
    """Return how the library was built (compiler, flags, CUDA or why not, torch) and what it runs with now."""
    info: dict[str, str | bool] = dict(_host_info())
    info["cuda"] = info.get("cuda") == "ON"
    info["built"] = LIBRARY.is_file()
    info["torch"] = torch.__version__
    info["torch_cuda"] = torch.version.cuda or ("rocm" if torch.version.hip else "")
    info["python"] = platform.python_version()
    info["platform"] = f"{platform.system()} {platform.machine()}"
    return info


def kernels_live() -> dict[str, tuple[bool, str]]:
    """Return for each device type whether the compiled kernels run there, and the reason."""
    if not _live:
        try:
            load()
        except ImportError as error:
            return {device: (False, str(error)) for device in ("cpu", "cuda")}
    on_cpu = "cpu" in _live
    live = {
        "cpu": (on_cpu, f"loaded from {LIBRARY}; {_bfloat16_words()}; {_int8_words()}" if on_cpu else _why_not("cpu"))
    }
    reason = _why_not("cuda") if "cuda" not in _live else _why_no_gpu()
    live["cuda"] = (reason is None, reason or f"compiled for {_host_info()['cuda_architectures']}")
    return live


def _bfloat16_words() -> str:
    how = (
        "in float32, without AMX or AMD's AVX512-BF16",
        "as they are, by AVX512-BF16",
        "as they are, by AMX, and bf16 attention is by AMX too",
    )
    return f"bf16 LM heads are multiplied {how[torch.ops.qpeft_ext.bfloat16_instructions()]}"


def _int8_words() -> str:
    if not registered("int8_linear"):
        return f"int8 LMs run the PyTorch definitions, slowly: the library is of an earlier build. {WHAT_TO_DO}"
    how = ("slowly, without AVX512-VNNI", "by AVX512-VNNI", "by AMX")
    return f"int8 LMs are multiplied {how[torch.ops.qpeft_ext.int8_instructions()]}"


def _why_not(device_type: str) -> str:
    if REFERENCE:
        return "QPEFT_REFERENCE is set"
    if platform.system() != "Linux":
        return f"the kernels are built on Linux only, this is {platform.system()}"
    if device_type == "cuda":
        return _why_no_cuda() or "the library is not loaded"
    return f"there are kernels for cpu and cuda only, not for {device_type}"


def _why_no_cuda() -> str | None:
    """Return why this library with this torch cannot take CUDA tensors, or None if it can; CUDA is not started."""
    info = _host_info()
    if torch.version.hip:
        return "torch is a ROCm build"
    if info.get("cuda") != "ON":
        return f"the library was built without CUDA kernels: {info.get('cuda_reason', 'it is not built')}"
    if not torch.version.cuda:
        return f"torch {torch.__version__} is a CPU build (the library has kernels for {info['cuda_architectures']})"
    return None


def _why_no_gpu() -> str | None:
    """Return why no GPU of this machine can run the kernels, or None. It starts CUDA, so it is for information only."""
    if not torch.cuda.is_available():
        return "torch sees no GPU on this machine"
    capability = torch.cuda.get_device_capability()
    architectures = _host_info()["cuda_architectures"]
    if not covers(architectures.split(), capability):
        number = "{}{}".format(*capability)
        return (
            f"{torch.cuda.get_device_name()} (sm_{number}) is not among the architectures built, {architectures}. "
            f"Rebuild with QPEFT_CUDA_ARCHS={number}"
        )
    return None


def covers(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Return whether kernels for CMake's architectures (``80-real``, ``90a-real``, ``120``) run on this capability.

    Machine code runs on later minor versions of the same major one, ``a`` variants on their own version only;
    a name without ``-real`` also carries PTX, which the driver compiles for any later GPU.
    """
    for name in architectures:
        parts = re.fullmatch(r"(\d+)([af]?)(-real|-virtual)?", name)
        if parts is None:
            continue
        digits, exact, kind = parts.groups()
        built = (int(digits[:-1]), int(digits[-1]))
        machine_code = kind != "-virtual" and built[0] == capability[0] and built[1] <= capability[1]
        ptx = kind != "-real" and built <= capability
        if built == capability or (not exact and (machine_code or ptx)):
            return True
    return False


def _host_info() -> dict[str, str]:
    try:
        from qpeft_ext import _host
    except ImportError as error:
        return {"cuda_reason": f"qpeft_ext._host cannot be imported ({error})"}
    return _host.build_info()


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def registered(name: str = "document_rows_distinct") -> bool:
    """Return whether the library, and with it the schemas of csrc/ops.cpp, is loaded.

    name: an operator; a library that was built before its source was changed may not have it.
    """
    return hasattr(torch.ops.qpeft_ext, name)
