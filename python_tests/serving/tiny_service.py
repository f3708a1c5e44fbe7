"""The packaged LM and adapter as a server has them."""

from __future__ import annotations

from pathlib import Path

import qpeft_ext
from qpeft_ext.serving.settings import Limits, ServeSpec

DEMO = Path(qpeft_ext.__file__).parent / "demo"
KEY = "a key"
LIMITS = Limits(max_documents=50, max_body_bytes=20_000, body_timeout=60.0, request_timeout=120.0)


def spec(**changes) -> ServeSpec:
    """Return what the tests serve: the packaged adapter, bit-equal scores, a small cache."""
    standard = {
        "models": {"code": str(DEMO / "adapter")},
        "base_model": str(DEMO / "base_lm"),
        "cache_bytes": 32 << 20,
        "lm_options": {"device": "cpu"},
        "reranker_options": {"deterministic": True},
        "limits": LIMITS,
    }
    return ServeSpec(**standard | changes)
