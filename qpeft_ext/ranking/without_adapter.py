"""LMs that rerank without an adapter of ours: rerankers that exist, by their name or by a template."""

from __future__ import annotations

from typing import Any

from ..config import QPeftConfig
from ..config.rerankers import RERANKERS, known_reranker
from ..lm.classifier import names_classifier
from ..utils.inputs import short

_ROOM = 1024  # tokens of an LM's context for the query and for what a template writes
_QUERY = 512


def config_without_adapter(name: str, lm_config: Any, template: str | None = None, **options: Any) -> QPeftConfig:
    """Make the config of an LM that is a reranker itself.

    Texts are as long as its model card's code lets them be, as far as the LM's context allows.

    Args:
        name: of the LM.
        lm_config: its transformers config.
        template: as in `QPeftConfig`; None takes that of the reranker which the name means.
        options: of `QPeftConfig`; those that are None are left out.
    Raises: ValueError for an LM that is no known reranker, without a template.
    """
    found = template or known_reranker(name, lm_config.model_type)
    if found is None:
        classifier = names_classifier(lm_config)
        kind = "a sequence classifier of no known kind" if classifier else "no known reranker"
        plain = "" if classifier else "; an LM that is no reranker ranks by likelihood: `qpeft rerank --upr`"
        raise ValueError(
            f"the LM {short(name)} is {kind}: set template to the one that it was trained with "
            f"({', '.join(RERANKERS)}, or a file of Jinja2){plain}"
        )
    given = _limits(found, lm_config) | {option: value for option, value in options.items() if value is not None}
    return QPeftConfig(clues="none", template=found, **given)


def _limits(template: str, lm_config: Any) -> dict[str, Any]:
    """Return the limits of lengths of a known reranker; none for other templates."""
    known = RERANKERS.get(template)
    if known is None or known.max_tokens is None:
        return {}
    context = getattr(lm_config.get_text_config(), "max_position_embeddings", None) or known.max_tokens + _ROOM
    usual = QPeftConfig(clues="none")
    return {
        "max_document_tokens": max(usual.max_document_tokens, min(known.max_tokens, context - _ROOM)),
        "max_query_tokens": _QUERY if context > 2 * _ROOM else usual.max_query_tokens,
    }


def template_without_adapter(name: str, lm_config: Any, template: str | None = None) -> str | None:
    """Return the template that an LM is scored with where nobody asks for its likelihood: the default for no reranker.

    Args:
        name, lm_config, template: as for `config_without_adapter`.
    Returns: the template; None for a classifier of no known kind, which must be told.
    """
    found = template or known_reranker(name, lm_config.model_type)
    return found if found or names_classifier(lm_config) else "qpeft"
