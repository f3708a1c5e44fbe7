"""Measures, comparisons with tests of significance, fusion, and reports."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .comparison import compare_table as compare_table
    from .fusion import fuse as fuse
    from .measures import evaluate as evaluate
else:
    from ..utils.faces import lazy_names

    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        compare_table="comparison",
        evaluate="measures",
        fuse="fusion",
    )
