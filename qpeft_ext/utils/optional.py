"""Imports of optional packages: with one line where packages are missing, and bm25s without JAX."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType


def import_bm25s(name: str = "bm25s") -> ModuleType:
    """Import and return the module ``name`` of bm25s, without JAX, which is not needed here.

    Where JAX is installed, ``import bm25s`` runs one of its operations, and JAX then takes three quarters of the GPU's
    memory.

    Raises: ImportError if it is not installed.
    """
    missing = object()
    jax = sys.modules.get("jax", missing)
    sys.modules["jax"] = None  # type: ignore[assignment]  # `import jax` fails, as where it is not installed
    try:
        return importlib.import_module(name)
    finally:
        if jax is missing:
            del sys.modules["jax"]
        else:
            sys.modules["jax"] = jax  # type: ignore[assignment]


def expect_packages(user: str, extras: Mapping[str, str]) -> None:
    """Check that optional packages are installed, before work that would end without them.

    Args:
        user: what needs them, the beginning of the error.
        extras: module → our extra that has it.
    Raises: ImportError, one line that names all that are missing and the command that installs them.
    """
    missing = [module for module in extras if importlib.util.find_spec(module) is None]
    if missing:
        names = ",".join(dict.fromkeys(extras[module] for module in missing))
        raise ImportError(
            f"{user} needs the package{'s' if len(missing) > 1 else ''} {', '.join(missing)}: "
            f"pip install 'qpeft_ext[{names}]'"
        )


@contextmanager
def needs(package: str, extra: str) -> Iterator[None]:
    """Import optional packages inside this; if one is missing, the error says what to install.

    Args:
        package: the package, by its name for pip.
        extra: our extra that has it.
    Raises: ImportError in one line.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"this plug-in needs the package {package} ({error}): pip install 'qpeft_ext[{extra}]'"
        ) from None
