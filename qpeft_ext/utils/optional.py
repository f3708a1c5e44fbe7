"""Import bm25s without JAX, which is not needed here.

Where JAX is installed, ``import bm25s`` runs one of its operations, and JAX then takes three quarters of the GPU's
memory.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType


def import_bm25s(name: str = "bm25s") -> ModuleType:
    """Import and return the module ``name`` of bm25s. Raises: ImportError if it is not installed."""
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
