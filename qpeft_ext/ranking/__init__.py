"""`Reranker`, runs over many queries, their workers, and the first stage."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .reranker import Reranker as Reranker
    from .teacher import with_teacher_scores as with_teacher_scores
else:
    from ..utils.faces import lazy_names

    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        Reranker="reranker",
        with_teacher_scores="teacher",
    )
