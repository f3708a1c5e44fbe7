"""The operators. A module has the public function with its checks, its kernels, and its definition, ``reference``."""

from . import _library

_library.load()  # before the modules below: they add their Python parts to the schemas of the library

from . import clue_attention_cpu, clue_attention_cuda  # noqa: E402, F401  (they register themselves)
from .clue_attention import attention_weights, clue_attention  # noqa: E402
from .projected_table import ProjectedTable  # noqa: E402
from .similarity_topk import SimilarityTopK, similarity_topk  # noqa: E402
from .token_log_likelihood import token_log_likelihood  # noqa: E402

__all__ = [
    "ProjectedTable",
    "SimilarityTopK",
    "attention_weights",
    "clue_attention",
    "similarity_topk",
    "token_log_likelihood",
]
