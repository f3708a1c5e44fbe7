"""A griffe extension: our docstrings in the exact form of Google's style, and names in backticks as links.

In the source a section may start on the line of its title (``Returns: float32 [B]``), follow the one before without a
blank line, and describe several arguments together (``w_q, w_k: [D, D]``); ``Name`` in single backticks is a name of
this package.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection
from pathlib import Path

import griffe

SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Source|Example|Examples):(?: +(.*))?$")
NAME = re.compile(r"(?<!`)`(\w+(?:\.\w+)*)(\(\))?`(?!`)")
PAGE = re.compile(r"(?<![\w`/(\[])docs/([\w-]+)\.md")
ADDRESS = re.compile(r"(?<![<(])https?://\S+?(?=[.,;)]*(\s|$))")
REFERENCE = Path(__file__).resolve().parents[1] / "api"


class PlainDocstrings(griffe.Extension):
    """Rewrites the docstrings of the package as soon as it is read."""

    def on_package(self, *, pkg: griffe.Module, **_) -> None:
        objects = list(walk(pkg))
        paths = reference_paths(pkg)
        for object_ in objects:
            if object_.docstring:
                object_.docstring.value = link_names(
                    google(object_.docstring.value, typed_attributes(object_)), object_, paths
                )


def typed_attributes(object_: griffe.Object) -> set[str]:
    if not object_.is_class:
        return set()
    members = {**object_.inherited_members, **object_.members}
    return {name for name, member in members.items() if member.is_attribute and member.annotation is not None}


def reference_paths(package: griffe.Module) -> dict[str, str]:
    """Names of what the pages of the reference have -> its path there: ``Reranker``, ``Reranker.rank``."""
    paths = {}
    for page in sorted(REFERENCE.glob("*.md")):
        for path in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.M):
            object_ = package[path.partition(".")[2]]
            paths[object_.name] = path
            if object_.is_class:
                members = {**object_.inherited_members, **object_.members}  # all of them are on its page
                public = [name for name, member in members.items() if name[0] != "_" and member.is_function]
                paths |= {f"{object_.name}.{name}": f"{path}.{name}" for name in public}
    return paths


def link_names(text: str, object_: griffe.Object, paths: dict[str, str]) -> str:
    """Links in the place of names in backticks, where the reference has them, and of pages; outside of examples."""
    owner = object_ if object_.is_class else object_.parent

    def link(found: re.Match) -> str:
        name = found[1]
        scoped = f"{owner.name}.{name}" if owner is not None else name
        path = paths.get(scoped) or paths.get(name) or paths.get(name.partition(".")[2] or name)
        return f"[{found[0]}][{path}]" if path and path != object_.path else found[0]

    text = ADDRESS.sub(r"<\g<0>>", PAGE.sub(r"[\g<0>](../\1.html)", text))
    lines = text.split("\n")
    return "\n".join(line if line.lstrip().startswith((">>>", "...")) else NAME.sub(link, line) for line in lines)


def walk(object_):
    yield object_
    for member in object_.members.values():
        if not member.is_alias:
            yield from walk(member)


def google(docstring: str, typed: Collection[str] = ()) -> str:
    """Sections with their titles on lines of their own, blank lines between them, one argument an entry.

    typed: names of attributes with an annotation.
    """
    parts: list[tuple[str, list[str]]] = [("", [])]
    for line in docstring.splitlines():
        if found := SECTION.match(line):
            parts.append((found[1], [found[2]] if found[2] else []))
        elif parts[-1][0] and line and not line.startswith(" "):
            parts.append(("", [line]))  # text again
        else:
            parts[-1][1].append(line)
    return "\n\n".join(text for title, lines in parts if (text := section(title, lines, typed)))


def section(title: str, lines: list[str], typed: Collection[str]) -> str:
    """One section; of a title that Google's style does not have, a paragraph."""
    if not title:
        return "\n".join(lines).strip("\n")
    inline = lines and not lines[0].startswith(" ")
    text = textwrap.dedent("\n".join(lines[1:] if inline else lines)).strip("\n")
    if title.startswith("Example"):
        return f"Examples:\n{textwrap.indent(example(lines[0] if inline else '', text), '    ')}"
    if inline:
        text = f"{lines[0]}\n{textwrap.indent(text, '    ')}".rstrip()
    if title == "Source" or title == "Args" and not re.match(r"\**\w+(, \**\w+)*( \([^)]*\))?:", text):
        return f"**{title}:** {text}"  # "Args: as for `clue_attention`" has no entries
    if title == "Raises":
        text = "\n".join(errors(" ".join(text.split())))
    if title in ("Args", "Attributes"):
        text = "\n".join(entries(text))
    if title == "Attributes":  # griffe gives one without a type the type of the one before; here it gets an empty one
        text = re.sub(r"^(\w+):", lambda name: name[0] if name[1] in typed else f"{name[1]} ():", text, flags=re.M)
    return f"{title}:\n{textwrap.indent(text, '    ')}"


def example(introduction: str, text: str) -> str:
    """A sentence before the code is a paragraph of its own."""
    before, prompt, code = text.partition(">>>")
    before = f"{introduction} {before}".strip()
    before = before[:1].upper() + before[1:]
    return f"{before.removesuffix('::') + ':' if before.endswith('::') else before}\n\n{prompt}{code}".strip()


def errors(text: str) -> list[str]:
    """``ValueError for a; TypeError: b`` as an entry each."""
    parts = re.split(r"[;.] +(?=\w+(?:Error|Exception)\b)", text)
    return [re.sub(r"^(\w+(?:, \w+Error)*(?: or \w+Error)?):? ", r"\1: ", part) for part in parts]


def entries(text: str) -> list[str]:
    """``a, b: c`` as an entry for a and one for b."""
    found: list[list[str]] = []
    for line in re.sub(r"(?<=\S)  (?=\w+(, \w+)*: )", "\n", text).splitlines():  # two entries on one line
        if line.startswith(" ") or not found or not re.match(r"\**\w+(, \**\w+)*( \([^)]*\))?:", line):
            (found[-1] if found else found.append([]) or found[-1]).append(line)
        else:
            found.append([line])
    result = []
    for entry in found:
        names, _, rest = entry[0].partition(":")
        for name in names.split(", "):
            result.append("\n".join([f"{name}:{rest}", *entry[1:]]))
    return result
