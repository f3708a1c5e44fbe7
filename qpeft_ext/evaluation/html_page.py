"""HTML pages of results, from Jinja2 templates. A page needs no script and no other file."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment


def render_page(template: Path, **values: object) -> str:
    """Fill a template with values, in which HTML is escaped; only `markupsafe.Markup` is taken as HTML.

    Args:
        template: a file that extends ``page.html``, which gives a page its style and shows ``title`` and ``lead``.
        values: what the template names.

    Returns: the page; equal values give equal bytes.
    """
    return _environment(template.parent).get_template(template.name).render(values)


@cache
def _environment(folder: Path) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
