"""Counts of queries and documents that a training reads, and its warnings about them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import QPeftConfig

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
                "%d of the %d documents read in training were cut to max_document_tokens=%d",
                self.documents_cut,
                self.documents_read,
                config.max_document_tokens,
            )
        if self.queries_cut:
            logger.warning(
                "%d queries read in training were cut to max_query_tokens=%d", self.queries_cut, config.max_query_tokens
            )
        if self.queries_alone and config.loss != "pointwise":
            logger.warning(
                "%d of the %d queries read in training had no negatives, which loss=%r compares with",
                self.queries_alone,
                self.queries_read,
                config.loss,
            )
