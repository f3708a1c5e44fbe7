"""Counts of queries and documents that a training reads, and its warnings about them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import QPeftConfig
from ..utils.words import counted

logger = logging.getLogger(__name__)


@dataclass
class StepCounts:
    """Counts over the training steps of one process.

    Attributes:
        documents_read, documents_cut: prefixes, and those of documents longer than ``max_document_tokens``.
        queries_read, queries_cut: queries with their documents, and distinct ones longer than ``max_query_tokens``.
        queries_alone: queries without a document to compare their positives with.
    """

    documents_read: int = 0
    documents_cut: int = 0
    queries_read: int = 0
    queries_cut: int = 0
    queries_alone: int = 0

    def add(self, inputs: Mapping[str, Any]) -> None:
        """Take in one batch of `GroupCollator`."""
        if not inputs["queries"]:
            return
        prefixes = inputs["pairs"].documents
        self.documents_read += len(prefixes)
        self.documents_cut += sum(prefix.cut > 0 for prefix in prefixes)
        self.queries_read += inputs["queries"]
        self.queries_cut += inputs["pairs"].cut_queries
        self.queries_alone += inputs["alone"]

    def warn(self, config: QPeftConfig) -> None:
        """Log what was cut, and how many queries taught nothing."""
        if self.documents_cut:
            logger.warning(
                "%d of the %s read in training %s cut to max_document_tokens=%d",
                self.documents_cut,
                counted(self.documents_read, "documents"),
                "was" if self.documents_cut == 1 else "were",
                config.max_document_tokens,
            )
        if self.queries_cut:
            logger.warning(
                "%s cut to max_query_tokens=%d",
                counted(self.queries_cut, "queries read in training were", "query read in training was"),
                config.max_query_tokens,
            )
        if self.queries_alone and config.loss != "pointwise":
            logger.warning(
                "%d of the %s read in training had no negatives, which loss=%r compares with",
                self.queries_alone,
                counted(self.queries_read, "queries"),
                config.loss,
            )
