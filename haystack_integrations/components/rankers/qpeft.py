"""The place where Haystack looks for components of other packages: it loads saved pipelines of these modules only."""

from qpeft_ext.integrations.haystack import QPeftRanker

__all__ = ["QPeftRanker"]
