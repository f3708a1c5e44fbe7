"""LMs that rerank without an adapter of ours: rerankers that exist, by their name or by a template."""

from __future__ import annotations

from typing import Any

from ..config import QPeftConfig
from ..config.rerankers import RERANKERS, known_reranker
from ..lm.classifier import names_classifier
from ..utils.inputs import short


def config_without_adapter(name: str, lm_config: Any, template: str | None = None, **options: Any) -> QPeftConfig:
    """Make the config of an LM that is a reranker itself.

    Args:
        name: of the LM.
        lm_config: its transformers config.
        template: as in `QPeftConfig`; None takes that of the reranker which the name means.
        options: of `QPeftConfig`; those that are None are left out.
    Raises: ValueError for an LM that is no known reranker, without a template.
    """
    found = template or known_reranker(name, lm_config.model_type)
    if found is None:
        kind = "a sequence classifier of no known kind" if names_classifier(lm_config) else "no known reranker"
        raise ValueError(
            f"the LM {short(name)} is {kind}: set template to the one that it was trained with "
            f"({', '.join(RERANKERS)}, or a file of Jinja2)"
        )
    given = {option: value for option, value in options.items() if value is not None}
    return QPeftConfig(clues="none", template=found, **given)


def template_without_adapter(name: str, lm_config: Any, template: str | None = None) -> str | None:
    """Return the template that an LM is scored with where nobody asks for its likelihood: the default for no reranker.

    Args:
        name, lm_config, template: as for `config_without_adapter`.
    Returns: the template; None for a classifier of no known kind, which must be told.
    """
    found = template or known_reranker(name, lm_config.model_type)
    return found if found or names_classifier(lm_config) else "qpeft"
