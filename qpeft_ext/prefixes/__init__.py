"""Keys and values of document prefixes: in memory, on disk, and as an index."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cache import DocumentCache as DocumentCache
    from .index import PrefixIndex as PrefixIndex
else:
    from ..utils.faces import lazy_names

    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        DocumentCache="cache",
        PrefixIndex="index",
    )
