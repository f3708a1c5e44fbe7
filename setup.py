"""A shim: setuptools asks for the two libraries, CMake builds them. CMakeLists.txt is the only build description."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent.resolve()


NO_COMPILER = (
    "It needs torch, Python's headers and a compiler for C++20 (Debian, Ubuntu: apt install g++ python3-dev; "
    "CXX=/path/to/g++ names another compiler)."
)
NO_MEMORY = "Where memory is short, MAX_JOBS=1 compiles one file at a time."


def run(command, hint):
    """Run a step of the build; if it fails, one line follows its own words, and no traceback of this file."""
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError:
        sys.exit("qpeft_ext was not built: cmake was not found. Run: pip install 'cmake>=3.25' ninja")
    except subprocess.CalledProcessError:
        step = " ".join(map(str, command[:2])).removesuffix(" -S")
        sys.exit(f"qpeft_ext was not built: `{step}` failed; the reason stands above. {hint}")


class CMakeBuild(build_ext):
    """Configure, build and install once into the folder where setuptools expects qpeft_ext._C and qpeft_ext._host."""

    def get_ext_filename(self, name):
        # _C is loaded with torch.ops.load_library and uses no Python: one file for every Python version
        *folders, last = name.split(".")
        return os.path.join(*folders, "_C.so") if last == "_C" else super().get_ext_filename(name)

    def build_extensions(self):
        isolated = "build-env-" in sys.prefix + os.environ.get(
            "PATH", ""
        )  # its tools vanish: keep no cache that names them
        build = Path(self.build_temp) if isolated else HERE / "build" / f"cmake-{sys.implementation.cache_tag}"
        package = (Path(self.get_ext_fullpath("qpeft_ext._C"))).parent.resolve()
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        configure = ["cmake", "-S", HERE, "-B", build, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
        configure.append(f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja') or 'ninja'}")  # not an earlier environment's
        for old in [*package.glob("_host.cpython-*.so"), *(HERE / "qpeft_ext").glob("_host.cpython-*.so")]:
            old.unlink()  # left by an earlier release; Python would prefer it to _host.abi3.so
        run(configure, NO_COMPILER)
        run(["cmake", "--build", build, "--parallel", jobs], NO_MEMORY)
        run(["cmake", "--install", build, "--prefix", package], "Is the disk full?")


libraries = ["_C", "_host"] if sys.platform == "linux" else ["_host"]
setup(
    ext_modules=[Extension(f"qpeft_ext.{name}", sources=[], py_limited_api=True) for name in libraries],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},  # one wheel for every Python version
    cmdclass={"build_ext": CMakeBuild},
)
