"""MkDocs' hooks: README.md as the front page, and links to files of the repository that work on the site as well.

A page of the repository links to its files by relative paths, as a forge understands them. Here every file that a page
names becomes part of the site: Markdown as a page, other text as a page that shows it, pictures as they are, a folder
as a list of its files. The links are rewritten to these.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".sh": "sh", ".toml": "toml"}
PICTURES = (".png", ".svg", ".jpg")
MAX_SHOWN = 100_000  # characters of a file that is shown
LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)\s#:]+)(?P<after>(?:#[^)\s]*)?\))")
CODE = re.compile(r"^( *)(```|~~~).*?^\1\2 *$|`[^`\n]+`", re.M | re.S)
NOT_SEARCHED = "---\nsearch:\n  exclude: true\n---\n"


def site_path(path: str) -> str:
    """Where a file or folder of the repository is in the site."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"repository/{path}/index.md"
    return f"repository/{path}" if path.endswith((".md", *PICTURES)) else f"repository/{path}.md"


def replace_links(markdown: str, page: str, replace: Callable[[str], str]) -> str:
    """Apply ``replace`` to the link targets outside of code that are files of the repository (paths from its root)."""

    def link(found: re.Match) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), found["target"]))
        if path.startswith("..") or not (ROOT / path).exists():
            return found[0]  # MkDocs reports it
        return found["before"] + replace(path) + found["after"]

    parts, end = [], 0
    for code in CODE.finditer(markdown):
        parts += [LINK.sub(link, markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, LINK.sub(link, markdown[end:])])


def text_of(path: str) -> str:
    """The page of a file or folder of the repository that is no page of the documentation."""
    place = ROOT / path
    if place.is_dir():
        return f"{NOT_SEARCHED}# {path}\n\n" + "".join(f"- [{name}]({name})\n" for name in files_in(path))
    text = place.read_text(encoding="utf-8", errors="replace")
    if path.endswith(".md"):
        return NOT_SEARCHED + text
    cut = "" if len(text) <= MAX_SHOWN else f"\nThe first {MAX_SHOWN:,} of {len(text):,} characters.\n"
    return f"{NOT_SEARCHED}# {path}\n{cut}\n~~~~{LANGUAGES.get(place.suffix, 'text')}\n{text[:MAX_SHOWN]}\n~~~~\n"


def files_in(folder: str) -> list[str]:
    """Names of its text files and pictures."""
    endings = (".md", *LANGUAGES, *PICTURES)
    return sorted(path.name for path in (ROOT / folder).iterdir() if path.name.endswith(endings) and path.is_file())


def named_by(path: str) -> set[str]:
    """The files and folders of the repository that a page links to."""
    named: set[str] = set()
    if (ROOT / path).is_dir():
        named = {f"{path}/{name}" for name in files_in(path)}
    elif path.endswith(".md"):
        replace_links((ROOT / path).read_text(encoding="utf-8"), path, lambda target: named.add(target) or "")
    return named


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the front page, and every file of the repository that a page names, directly or not."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text(encoding="utf-8")))
    waiting = {"README.md"} | {f"docs/{file.src_uri}" for file in files.documentation_pages() if not file.generated_by}
    done: set[str] = set()
    while waiting:
        path = waiting.pop()
        done.add(path)
        if not path.startswith("docs/") and path != "README.md":
            if path.endswith(PICTURES):
                files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
                continue
            files.append(File.generated(config, site_path(path), content=text_of(path)))
        waiting |= named_by(path) - done
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of the repository as links of the site."""
    uri = page.file.src_uri
    path = uri.removeprefix("repository/") if uri.startswith("repository/") else f"docs/{uri}"
    path = "README.md" if uri == "index.md" else path
    here = posixpath.dirname(uri)
    return replace_links(markdown, path, lambda target: posixpath.relpath(site_path(target), here or "."))
