"""Names that a folder's ``__init__.py`` exports and imports on first use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any


def lazy_names(package: str, **places: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` of a package whose public names are imported on first use.

    Importing a module of the package also runs its ``__init__.py``, so importing the names there at once would be slow
    and would go in circles. Type checkers read the same imports below ``if TYPE_CHECKING``.

    Args:
        package: ``__name__`` of the package.
        places: public name → module below the package that defines it; a module of that very name is itself exported.
    """

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        place = places[name]
        module = importlib.import_module(f".{place}", package)
        return module if place.rpartition(".")[2] == name else getattr(module, name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *places})

    return get, names, list(places)
