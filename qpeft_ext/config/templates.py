"""Options that a template decides, where it is a known reranker's or a text of the user's."""

from __future__ import annotations

from typing import Any

from ..utils.text_templates import looks_like_file, looks_like_text, parts_of, query_first, read_template
from .rerankers import RERANKERS
from .values import DEFAULT_INSTRUCTION, TEMPLATES, WRITTEN_TEMPLATES


def template_text(template: str) -> str:
    """Return a template as a config keeps it: a file is replaced by its text, so that an adapter has it.

    Args:
        template: a name, a file, or a text.
    Raises: ValueError for a file that is no template.
    """
    if template in TEMPLATES or looks_like_text(template) or not looks_like_file(template):
        return template
    return read_template(template)


def decided_by_template(template: str, instruction: str, score: object) -> tuple[str, dict[str, Any]]:
    """Return the instruction, and the options in which a template leaves no choice.

    Args:
        template: of `template_text`.
        instruction: of the config; its default stands for the template's own, or for none.
        score: of the config; where the template asks for an answer, its default stands for "yes_no".
    Raises: ValueError for a text that is no template.
    """
    known = RERANKERS.get(template)
    if template in WRITTEN_TEMPLATES or (known is None and not looks_like_text(template)):
        return instruction, {}
    if instruction == DEFAULT_INSTRUCTION:
        instruction = "" if known is None else known.instruction
    parts = parts_of(template if known is None else known.template, "")
    first = query_first(parts)
    decided: dict[str, Any] = {"layout": "query_first" if first else "document_first", "clues": "none"}
    if first or isinstance(parts[-1], str):
        decided |= {"score": "yes_no" if score == "likelihood" else score, "ask": None}
    return instruction, decided | ({} if known is None else known.options)
