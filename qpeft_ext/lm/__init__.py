"""One loaded language model: loading it, its head, and what a pass sets on it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .loading import load_lm as load_lm
else:
    from ..utils.faces import lazy_names

    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        load_lm="loading",
    )
