"""A search collection out of the Python environment this runs in, without network.

    query     the first sentence of a function's or class's docstring
    document  its source without docstrings; the title is the qualified name

Files are parsed, never imported or executed. The order is sorted everywhere, so the same environment gives the same
collection. Why the title may be shown: the source names the definition anyway (``def shortest_path(``); the title adds
the module and, for a method, its class, as every search in code does.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.machinery
import importlib.metadata
import inspect
import json
import platform
import random
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..utils.files import write_text
from ..utils.progress import progress_bar

STANDARD_LIBRARY = "stdlib"  # stands for all of sys.stdlib_module_names
TRAIN_PACKAGES = (
    STANDARD_LIBRARY, "torch", "transformers", "numpy", "scipy", "sympy", "peft", "setuptools", "pip", "fontTools",
    "jinja2", "markdown_it", "fsspec", "filelock", "packaging", "click", "typer", "dateutil", "PIL",
    "safetensors", "tokenizers", "regex", "contourpy", "psutil", "httpx", "anyio",
)  # fmt: skip
DEV_PACKAGES = ("mpmath", "huggingface_hub", "pygments", "pyparsing")  # for choosing; nothing is trained on them
TEST_PACKAGES = ("networkx", "matplotlib", "mpl_toolkits", "accelerate", "rich", "tqdm", "bm25s", "ir_measures")
TEST_QUERIES, DEV_QUERIES = 100, 100

# Tests, and copies of other packages (pip vendors rich, which is a test package).
SKIPPED_FOLDERS = {"test", "tests", "testing", "_vendor", "vendor", "vendored", "extern", "externals", "site-packages",
                   "__pycache__", "idlelib", "lib2to3", "turtledemo", "qpeft_ext"}  # fmt: skip
LEAST_QUERY_WORDS, MOST_QUERY_WORDS = 5, 30
MOST_DOCUMENT_CHARACTERS = 4000  # a class can be a whole file; its methods are documents of their own
BOILERPLATE = re.compile(
    r"^(see |deprecated|alias |same as |todo|fixme|note|warning|usage|args?:|parameters?:|returns?:|examples?:|"
    r"internal|copied from|adapted from|base class|helper|test |overrid|inherit|"
    r"this (class|function|method) (is|was|has))",
    re.IGNORECASE,
)


@dataclass
class Collection:
    """A search collection: ``documents`` id → {"id", "title", "text"}, ``queries`` id → text, ``qrels`` query id →
    {document id: 1}, ``versions`` package → version, and ``counts`` of what was read, kept and dropped."""

    documents: dict[str, dict[str, str]]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    versions: dict[str, str]
    counts: dict[str, int]


@dataclass
class DemoCollection:
    """``train``, ``dev`` and ``test``: each its own packages, documents and queries."""

    train: Collection
    dev: Collection
    test: Collection


@dataclass(frozen=True)
class Definition:
    """A function or class: qualified ``name``, ``source`` without any docstring, ``docstring`` (may be empty) and
    the ``digest`` of its normalised syntax tree."""

    name: str
    source: str
    docstring: str
    digest: bytes


def harvest(
    packages: Sequence[str], search_path: Sequence[str] | None = None, show_progress_bar: bool | None = None
) -> Collection:
    """The collection of all documented definitions in ``packages``.

    Args:
        packages: top-level names; ``"stdlib"`` is the whole standard library. One that is not installed is counted.
        search_path: folders to look in instead of ``sys.path``.
        show_progress_bar: none shows it when the output is a terminal.
    """
    counts: Counter[str] = Counter()
    definitions = iter_definitions(packages, counts, search_path, show_progress_bar)
    return collect(definitions, package_versions(packages, search_path), counts)


def demo_collection(
    seed: int = 0, test_queries: int = TEST_QUERIES, show_progress_bar: bool | None = None
) -> DemoCollection:
    """The demo's fixed split by package, with `DEV_QUERIES` and ``test_queries`` queries sampled by ``seed``.

    A definition that the test or dev packages contain too is no training document.
    """
    held_out: set[bytes] = set()
    sides = []
    for packages, wanted in ((TEST_PACKAGES, test_queries), (DEV_PACKAGES, DEV_QUERIES), (TRAIN_PACKAGES, None)):
        counts: Counter[str] = Counter()
        definitions = list(iter_definitions(packages, counts, None, show_progress_bar))
        own = [definition for definition in definitions if definition.digest not in held_out]
        counts["also_in_held_out_packages"] = len(definitions) - len(own)
        held_out.update(definition.digest for definition in definitions)
        sides.append(_sample(collect(own, package_versions(packages), counts), wanted, seed))
    test, dev, train = sides
    return DemoCollection(train, dev, test)


def collect(definitions: Iterable[Definition], versions: dict[str, str], counts: Counter[str]) -> Collection:
    """Deduplicate documents by syntax tree, then drop the queries that occur more than once (their documents stay)."""
    documents, sentences, seen = {}, {}, set()
    for definition in definitions:
        if definition.digest in seen or definition.name in documents:
            counts["duplicate_documents"] += 1
            continue
        seen.add(definition.digest)
        documents[definition.name] = {"id": definition.name, "title": definition.name, "text": definition.source}
        sentence = first_sentence(definition.docstring)
        if sentence is None:
            counts["unusable_docstrings"] += 1
        else:
            sentences[definition.name] = sentence
    times = Counter(sentence.lower() for sentence in sentences.values())
    queries, qrels = {}, {}
    for name, sentence in sentences.items():
        if times[sentence.lower()] == 1:
            queries[name] = sentence  # a query's id is its document's: readable, and stable when packages are added
            qrels[name] = {name: 1}
    counts["repeated_queries"] = len(sentences) - len(queries)
    counts["documents"], counts["queries"] = len(documents), len(queries)
    return Collection(documents, queries, qrels, versions, dict(counts))


def iter_definitions(
    packages: Sequence[str],
    counts: Counter[str],
    search_path: Sequence[str] | None = None,
    show_progress_bar: bool | None = None,
    documented: bool = True,
) -> Iterator[Definition]:
    """Every function and class with a body (and, if ``documented``, a docstring), by package, file and line.
    Unreadable files are counted and skipped."""
    files = []
    for package in packages:
        found = list(_package_files(package, search_path))
        counts["packages" if found else "packages_not_installed"] += 1
        files += found
    for module, path in progress_bar(files, desc="Reading Python files", unit="file", show=show_progress_bar):
        counts["files"] += 1
        try:
            found = _read(path, module, documented)
        except (OSError, UnicodeDecodeError, SyntaxError, ValueError, RecursionError, MemoryError):
            counts["unreadable_files"] += 1
            continue
        yield from found


def first_sentence(docstring: str) -> str | None:
    """The cleaned first sentence, or None if it is too short, too long or says nothing."""
    return next(iter(sentences(docstring, 1)), None)


def sentences(docstring: str, most: int) -> list[str]:
    """Up to ``most`` cleaned sentences from the start of a docstring; stops at the first that is no usable query."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", inspect.cleandoc(docstring)) if part.strip()]
    if paragraphs and re.match(r"^[\w.]+\(.*\)(\s*->.*)?$", paragraphs[0]):
        paragraphs = paragraphs[1:]  # numpy and torch put the signature first
    kept = []
    for paragraph in paragraphs:
        text = _without_markup(paragraph)
        # "e.g. Foo" and "i.e. Foo" do not end a sentence
        for sentence in re.split(r"(?<!e\.g\.)(?<!i\.e\.)(?<=[.!?:])\s+(?=[A-Z])", text):
            sentence = sentence.strip().rstrip(".:;,! ")
            words = re.findall(r"[A-Za-z]{2,}", sentence)
            long_enough = LEAST_QUERY_WORDS <= len(words) and len(sentence.split()) <= MOST_QUERY_WORDS
            if not long_enough or len(sentence) > 8 * MOST_QUERY_WORDS or BOILERPLATE.match(sentence):
                return kept
            if re.search(r">>>|[{}<>|=\\]|https?:|---|\.\. ", sentence) or sum(map(len, words)) < 0.6 * len(sentence):
                return kept
            kept.append(sentence)
            if len(kept) == most:
                return kept
    return kept


def write_beir(collection: Collection, folder: str | Path) -> Path:
    """Write ``corpus.jsonl``, ``queries.jsonl``, ``qrels/test.tsv`` and ``versions.json``; returns the folder."""
    folder = Path(folder)
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    corpus = ({"_id": id, "title": d["title"], "text": d["text"]} for id, d in collection.documents.items())
    queries = ({"_id": id, "text": text} for id, text in collection.queries.items())
    rows = [f"{query}\t{id}\t{grade}" for query, judged in collection.qrels.items() for id, grade in judged.items()]
    recorded = {"versions": collection.versions, "counts": collection.counts}
    for name, lines in (
        ("corpus.jsonl", (json.dumps(row) for row in corpus)),
        ("queries.jsonl", (json.dumps(row) for row in queries)),
        ("qrels/test.tsv", ["query-id\tcorpus-id\tscore", *rows]),
        ("versions.json", [json.dumps(recorded, indent=1)]),
    ):
        write_text(folder / name, "".join(f"{line}\n" for line in lines), follow=False)
    return folder


def package_versions(packages: Sequence[str], search_path: Sequence[str] | None = None) -> dict[str, str]:
    """Versions of the installed ones among ``packages`` ("?" for a package without metadata)."""
    distributions = importlib.metadata.packages_distributions() if search_path is None else {}
    versions = {}
    for package in packages:
        if package == STANDARD_LIBRARY:
            versions[package] = platform.python_version()
        elif _locations(package, search_path):
            names = distributions.get(package, ())
            versions[package] = importlib.metadata.version(names[0]) if names else "?"
    return versions


def _sample(collection: Collection, wanted: int | None, seed: int) -> Collection:
    if wanted is None or wanted >= len(collection.queries):
        return collection
    chosen = sorted(random.Random(seed).sample(sorted(collection.queries), wanted))
    queries = {id: collection.queries[id] for id in chosen}
    qrels = {id: collection.qrels[id] for id in chosen}
    counts = collection.counts | {"sampled_queries": wanted}
    return Collection(collection.documents, queries, qrels, collection.versions, counts)


# -- finding files -----------------------------------------------------------------------------------------------------


def _package_files(package: str, search_path: Sequence[str] | None) -> Iterator[tuple[str, Path]]:
    """(module name, file) pairs, sorted by module name."""
    names = sorted(sys.stdlib_module_names) if package == STANDARD_LIBRARY else [package]
    folders = [sysconfig.get_paths()["stdlib"]] if package == STANDARD_LIBRARY else search_path
    for name in names:
        if name in SKIPPED_FOLDERS:
            continue
        found = []
        for location in _locations(name, folders):
            if location.is_file():
                found.append((name, location))
                continue
            for path in location.rglob("*.py"):
                parts = path.relative_to(location).with_suffix("").parts
                if SKIPPED_FOLDERS.isdisjoint(parts) and not parts[-1].startswith(("test_", "conftest")):
                    found.append((".".join((name, *parts)).removesuffix(".__init__"), path))
        yield from sorted(found)


def _locations(name: str, folders: Sequence[str] | None) -> list[Path]:
    """Where a top-level module lives: its folders, or its file. PathFinder looks, it does not import."""
    spec = importlib.machinery.PathFinder.find_spec(name, None if folders is None else [str(f) for f in folders])
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return sorted(Path(location) for location in spec.submodule_search_locations)
    return [Path(spec.origin)] if spec.origin and spec.origin.endswith(".py") else []


# -- reading one file --------------------------------------------------------------------------------------------------

_NOT_IN_DIGEST = {"annotation", "returns", "decorator_list", "type_params", "ctx", "type_comment", "kind"}
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _read(path: Path, module: str, documented: bool) -> list[Definition]:
    text = path.read_text(encoding="utf-8")
    collecting = gc.isenabled()
    gc.disable()  # a tree is a million small objects without cycles; collecting among them takes longer than parsing
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's files
            tree = ast.parse(text)
        return list(_definitions(tree, text, module, documented))
    finally:
        if collecting:
            gc.enable()


def _definitions(tree: ast.Module, text: str, module: str, documented: bool) -> Iterator[Definition]:
    lines = _without_docstrings(tree, text.splitlines(keepends=True))
    seen: set[str] = set()

    def visit(parent: ast.AST, prefix: str) -> Iterator[Definition]:
        for node in parent.body:
            if isinstance(node, ast.If | ast.Try):
                yield from visit(node, prefix)
            elif isinstance(node, _Definition):
                name = f"{prefix}.{node.name}"
                docstring = _docstring_node(node)
                if name not in seen and not _is_stub(node) and (docstring or not documented):
                    seen.add(name)  # property setters and overloads come again under the same name
                    text = docstring.value.value if docstring else ""
                    yield Definition(name, _source(node, lines), text, _digest(node))
                if isinstance(node, ast.ClassDef):
                    yield from visit(node, name)

    yield from visit(tree, module)


def _without_docstrings(tree: ast.Module, lines: list[str]) -> list[str]:
    """The file's lines with every docstring blanked: a class must not contain the queries of its methods."""
    lines = list(lines)
    for node in _statements(tree):
        text = _docstring_node(node)
        if text is not None:
            if text.lineno > node.lineno:
                lines[text.lineno - 1 : text.end_lineno] = [""] * (text.end_lineno - text.lineno + 1)
            else:  # def f(): "docstring"
                lines[text.lineno - 1] = lines[text.lineno - 1][: text.col_offset] + "\n"
    return lines


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """All statements under a node; unlike ``ast.walk`` it skips expressions, which are most of a tree."""
    for key in ("body", "orelse", "handlers", "finalbody", "cases"):
        inner = getattr(node, key, None)
        for statement in inner if isinstance(inner, list) else ():
            yield statement
            yield from _statements(statement)


def _docstring_node(node: ast.AST) -> ast.Expr | None:
    if not isinstance(node, _Definition) or not node.body or not isinstance(node.body[0], ast.Expr):
        return None
    value = node.body[0].value
    return node.body[0] if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


def _is_stub(node: _Definition) -> bool:
    """Whether nothing is left without the docstring: ``pass``, ``...``, or ``raise NotImplementedError``."""
    body = node.body[1:] if _docstring_node(node) else node.body
    return all(
        isinstance(line, ast.Pass | ast.Raise) or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
        for line in body
    )


def _source(node: _Definition, lines: list[str]) -> str:
    source = _dedent(lines[node.lineno - 1 : node.end_lineno])
    if len(source) > MOST_DOCUMENT_CHARACTERS:
        source = source[:MOST_DOCUMENT_CHARACTERS].rpartition("\n")[0]
    return source.rstrip()


def _dedent(lines: list[str]) -> str:
    margin = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    return "".join(line.removeprefix(margin) for line in lines)


def _digest(definition: _Definition) -> bytes:
    """Fingerprint of the syntax tree without what copies change: docstrings, annotations, decorators, the own name,
    the names of arguments and local variables, and the first word of the class name (LlamaMLP, MistralMLP)."""
    stem = re.match(r"[A-Z][a-z0-9]*|", definition.name)[0] if isinstance(definition, ast.ClassDef) else ""
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
        is_local = kind is ast.arg or (kind is ast.Name and type(node.ctx) is ast.Store)
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


def _without_markup(text: str) -> str:
    """Plain words out of reStructuredText and Markdown: roles, links, literals, emphasis."""
    role = r":[\w:+-]+:`[~!]?([^`<]*?)\s*(<[^`]*>)?`"
    text = re.sub(role, lambda match: match[1].rpartition(".")[2] or match[1], text)
    text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`+([^`<]*?)\s*(<[^`]*>)?`+_*", r"\1", text)
    return re.sub(r"\*\*?(\w[^*]*)\*\*?", r"\1", text)
