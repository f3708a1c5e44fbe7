"""Relevances in [0, 1] of log-likelihoods."""

from __future__ import annotations

import numpy as np


def relevance(mean_log_likelihood: np.ndarray, query_tokens: np.ndarray) -> np.ndarray:
    """Stand-in until adapters have a calibration."""
    return 1.0 / (1.0 + np.exp(-(mean_log_likelihood + 3.0)))
