"""Functions and classes of installed packages, read from their source files without importing them."""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.machinery
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..utils.progress import progress_bar

STANDARD_LIBRARY = "stdlib"  # stands for all of sys.stdlib_module_names
# Folders of tests, and of copies of other packages: pip has a copy of rich, which is a test package.
SKIPPED_FOLDERS = {"test", "tests", "testing", "_vendor", "vendor", "vendored", "extern", "externals", "site-packages",
                   "__pycache__", "idlelib", "lib2to3", "turtledemo", "qpeft_ext"}  # fmt: skip
MOST_DOCUMENT_CHARACTERS = 4000  # a class can be a whole file; its methods are documents of their own


@dataclass(frozen=True)
class Definition:
    """A function or class.

    Attributes:
        name: qualified name.
        source: source without any docstring.
        docstring: its docstring; may be empty.
        digest: fingerprint of its syntax tree, which copies share.
    """

    name: str
    source: str
    docstring: str
    digest: bytes


def iter_definitions(
    packages: Sequence[str],
    counts: Counter[str],
    search_path: Sequence[str] | None = None,
    show_progress_bar: bool | None = None,
    documented: bool = True,
) -> Iterator[Definition]:
    """Yield every function and class with a body, by package, file and line.

    Args:
        packages: top-level names; ``"stdlib"`` is the whole standard library.
        counts: counts packages and files; unreadable files are counted and skipped.
        search_path: folders to look in instead of ``sys.path``.
        show_progress_bar: None shows it when the output is a terminal.
        documented: only those that have a docstring.
    """
    files: list[tuple[str, Path]] = []
    for package in packages:
        of_package = list(_package_files(package, search_path))
        counts["packages" if of_package else "packages_not_installed"] += 1
        files += of_package
    for module, path in progress_bar(files, desc="Reading Python files", unit="file", show=show_progress_bar):
        counts["files"] += 1
        try:
            found = _read(path, module, documented)
        except (OSError, UnicodeDecodeError, SyntaxError, ValueError, RecursionError, MemoryError):
            counts["unreadable_files"] += 1
            continue
        yield from found


def _package_files(package: str, search_path: Sequence[str] | None) -> Iterator[tuple[str, Path]]:
    """Yield (module name, file) pairs, sorted by module name."""
    names = sorted(sys.stdlib_module_names) if package == STANDARD_LIBRARY else [package]
    folders = [sysconfig.get_paths()["stdlib"]] if package == STANDARD_LIBRARY else search_path
    for name in names:
        if name in SKIPPED_FOLDERS:
            continue
        found = []
        for location in locations(name, folders):
            if location.is_file():
                found.append((name, location))
                continue
            for path in location.rglob("*.py"):
                parts = path.relative_to(location).with_suffix("").parts
                if SKIPPED_FOLDERS.isdisjoint(parts) and not parts[-1].startswith(("test_", "conftest")):
                    found.append((".".join((name, *parts)).removesuffix(".__init__"), path))
        yield from sorted(found)


def locations(name: str, folders: Sequence[str] | None) -> list[Path]:
    """Find the folders or the file of a top-level module, without importing it; empty if it is not installed."""
    spec = importlib.machinery.PathFinder.find_spec(name, None if folders is None else [str(f) for f in folders])
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return sorted(Path(location) for location in spec.submodule_search_locations)
    return [Path(spec.origin)] if spec.origin and spec.origin.endswith(".py") else []


_NOT_IN_DIGEST = {"annotation", "returns", "decorator_list", "type_params", "ctx", "type_comment", "kind"}
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_Scope = ast.Module | ast.If | ast.Try | ast.ClassDef


def _read(path: Path, module: str, documented: bool) -> list[Definition]:
    """Return the definitions in a file."""
    text = path.read_text(encoding="utf-8")
    collecting = gc.isenabled()
    gc.disable()  # a tree has a million small objects without cycles; to look for some takes longer than parsing
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's files
            tree = ast.parse(text)
        return list(_definitions(tree, text, module, documented))
    finally:
        if collecting:
            gc.enable()


def _definitions(tree: ast.Module, text: str, module: str, documented: bool) -> Iterator[Definition]:
    """Yield the definitions of a module, those in classes included and those in functions not."""
    lines = _without_docstrings(tree, text.splitlines(keepends=True))
    seen: set[str] = set()

    def visit(parent: _Scope, prefix: str) -> Iterator[Definition]:
        for node in parent.body:
            if isinstance(node, ast.If | ast.Try):
                yield from visit(node, prefix)
            elif isinstance(node, _Definition):
                name = f"{prefix}.{node.name}"
                docstring = ast.get_docstring(node, clean=False)
                if name not in seen and not _is_stub(node) and (docstring is not None or not documented):
                    seen.add(name)  # setters of properties and overloads have the same name again
                    yield Definition(name, _source(node, lines), docstring or "", _digest(node))
                if isinstance(node, ast.ClassDef):
                    yield from visit(node, name)

    yield from visit(tree, module)


def _without_docstrings(tree: ast.Module, lines: list[str]) -> list[str]:
    """Return the lines of a file with every docstring blanked: a class must not contain the queries of its methods."""
    lines = list(lines)
    for node in _statements(tree):
        if isinstance(node, _Definition) and (docstring := _docstring_node(node)) is not None:
            first, last = docstring.lineno, docstring.end_lineno or docstring.lineno
            if first > node.lineno:
                lines[first - 1 : last] = [""] * (last - first + 1)
            else:  # def f(): "docstring"
                lines[first - 1] = lines[first - 1][: docstring.col_offset] + "\n"
    return lines


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all statements below a node; unlike ``ast.walk`` it skips expressions, which are most of a tree."""
    for key in ("body", "orelse", "handlers", "finalbody", "cases"):
        inner = getattr(node, key, None)
        for statement in inner if isinstance(inner, list) else ():
            yield statement
            yield from _statements(statement)


def _docstring_node(node: ast.AST) -> ast.Expr | None:
    """Return the statement that is the docstring of a definition; None for other nodes."""
    if not isinstance(node, _Definition) or not node.body or not isinstance(node.body[0], ast.Expr):
        return None
    value = node.body[0].value
    return node.body[0] if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


def _is_stub(node: _Definition) -> bool:
    """Return whether a definition does nothing: ``pass``, ``...``, or ``raise NotImplementedError``."""
    body = node.body[1:] if _docstring_node(node) else node.body
    return all(
        isinstance(line, ast.Pass | ast.Raise) or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
        for line in body
    )


def _source(node: _Definition, lines: list[str]) -> str:
    """Return the source of a definition, cut at the end of a line if it is too long."""
    source = _dedent(lines[node.lineno - 1 : node.end_lineno])
    if len(source) > MOST_DOCUMENT_CHARACTERS:
        source = source[:MOST_DOCUMENT_CHARACTERS].rpartition("\n")[0]
    return source.rstrip()


def _dedent(lines: list[str]) -> str:
    margin = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    return "".join(line.removeprefix(margin) for line in lines)


def _digest(definition: _Definition) -> bytes:
    """Compute the fingerprint of a definition without what copies change.

    That is docstrings, annotations, decorators, its own name, the names of arguments and local variables, and the first
    word of the name of a class (LlamaMLP, MistralMLP).
    """
    first_word = re.match(r"[A-Z][a-z0-9]*", definition.name) if isinstance(definition, ast.ClassDef) else None
    stem = first_word[0] if first_word else ""
    renamed = {definition.name: "0"}
    parts: list[str] = []

    def name(text: str, is_local: bool = False) -> str:
        if is_local and text not in renamed:
            renamed[text] = str(len(renamed))
        if stem and text not in renamed and text.startswith(stem):
            return "*" + text[len(stem) :]
        return renamed.get(text, text)

    def walk(node: ast.AST) -> None:
        kind = type(node)
        parts.append(kind.__name__)
        docstring = _docstring_node(node)
        is_local = isinstance(node, ast.arg) or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
        for key in node._fields:
            if key in _NOT_IN_DIGEST:
                continue
            value = getattr(node, key)
            if isinstance(value, ast.AST):
                walk(value)
            elif isinstance(value, list):
                for item in value:
                    if not isinstance(item, ast.AST):
                        parts.append(str(item))
                    elif item is not docstring:
                        walk(item)
                parts.append(")")
            elif isinstance(value, str) and kind is not ast.Constant:
                parts.append(name(value, is_local))
            else:
                parts.append(repr(value))

    walk(definition)
    return hashlib.sha256("\0".join(parts).encode("utf-8", "replace")).digest()
