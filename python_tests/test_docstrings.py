"""Docstrings: public ones describe every argument and their examples run; all are in words that a newcomer knows.

``python python_tests/test_docstrings.py [FOLDER]`` lists what is wrong, folder by folder.
"""

import ast
import doctest
import importlib
import inspect
import io
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qpeft_ext"

FACES = (  # modules whose public names are for users
    "qpeft_ext",
    "qpeft_ext.ops",
    "qpeft_ext.training.losses",
    "qpeft_ext.adapters",
    "qpeft_ext.evaluation",
    "qpeft_ext.formats",
    "qpeft_ext.lm",
    "qpeft_ext.prefixes",
    "qpeft_ext.ranking",
    "qpeft_ext.training",
)
WITH_EXAMPLE = {  # the names that are used most
    "qpeft_ext.Reranker.rank",
    "qpeft_ext.QPeftModel.from_pretrained",
    "qpeft_ext.get_qpeft_model",
    "qpeft_ext.QPeftConfig",
    "qpeft_ext.QPeftTrainer",
    "qpeft_ext.DocumentCache",
    "qpeft_ext.load_lm",
    "qpeft_ext.evaluation.evaluate",
    "qpeft_ext.ops.clue_attention",
    "qpeft_ext.ops.token_log_likelihood",
}
OPENERS = re.compile(r"(Of|As|What|Whether)\b")
RETIRED = re.compile(
    r"\bhang(s|ing)?\s+on\b|\bhung\s+on\b|\b(go|goes|going|gone|went)\s+on\s+with\b|\bcom(e|es|ing)\s+along\b|"
    r"\bdear(er|est)?\b",
    re.I,
)


def public_names(face) -> list[str]:
    """``__all__`` of a module, or the public functions and classes that it defines."""
    if hasattr(face, "__all__"):
        return [name for name in face.__all__ if not name.startswith("_")]
    return [
        name
        for name, value in vars(face).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == face.__name__ and callable(value)
    ]


def public_objects() -> dict[str, object]:
    """Dotted path -> every public class, function and method, each once, under the first face that has it."""
    found: dict[str, object] = {}
    seen: set[int] = set()
    for face_name in FACES:
        face = importlib.import_module(face_name)
        for name in public_names(face):
            value = getattr(face, name)
            if id(value) in seen or not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            seen.add(id(value))
            found[f"{face_name}.{name}"] = value
            if inspect.isclass(value):
                methods = {key: method for key, method in public_methods(value).items() if id(method) not in seen}
                seen.update(map(id, methods.values()))
                found |= {f"{face_name}.{name}.{key}": method for key, method in methods.items()}
    return found


def public_methods(cls: type) -> dict[str, object]:
    """Methods that a class of ours adds to those of others; what it overrides is documented where it comes from."""
    methods = {}
    for base in cls.__mro__:
        if not base.__module__.startswith("qpeft_ext"):
            continue
        for name, value in vars(base).items():
            function = getattr(value, "__func__", value)
            if name.startswith("_") or not inspect.isfunction(function):
                continue
            foreign = [b for b in cls.__mro__ if not b.__module__.startswith("qpeft_ext") and name in vars(b)]
            if not foreign or name == "forward":
                methods.setdefault(name, function)
    return methods


def file_of(value) -> Path:
    """Where a public object is defined, below its decorators."""
    return Path(inspect.getsourcefile(inspect.unwrap(value)))


def parameters(value) -> list[str]:
    """Names that a caller gives; those of a class are its constructor's."""
    if inspect.isclass(value) and not any(
        base.__module__.startswith("qpeft_ext") and "__init__" in vars(base) for base in value.__mro__
    ):
        return []
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    given = inspect.signature(value).parameters.values()
    return [p.name for p in given if p.kind not in kinds and p.name not in ("self", "cls") and p.name[0] != "_"]


def documented(docstring: str) -> set[str]:
    """Names that the sections Args and Attributes describe: ``name: ...`` or ``name, name: ...``."""
    names: set[str] = set()
    inside = indent = None
    for line in docstring.splitlines():
        depth = len(line) - len(line.lstrip())
        if re.match(r"\s*(Args|Attributes):", line):
            inside, indent = depth, None
            line = line.partition(":")[2]
            names.update(_names_before_colon(line))
        elif inside is not None and line.strip():
            if depth <= inside:
                inside = None
            else:
                indent = depth if indent is None else indent
                if depth == indent:
                    names.update(_names_before_colon(line))
    return names


def _names_before_colon(line: str) -> list[str]:
    head = re.match(r"\s*\**(\w+(?:\s*\([^)]*\))?(?:, \**\w+)*):", line)
    return re.findall(r"\w+", re.sub(r"\([^)]*\)", "", head[1])) if head else []


def wrong_with(path: str, value) -> list[str]:
    """What the docstring of a public object lacks."""
    docstring = inspect.getdoc(value) if inspect.isclass(value) else value.__doc__
    if not docstring:
        return [f"{path}: has no docstring"]
    if inspect.isclass(value):
        docstring += "\n\n" + inspect.cleandoc(getattr(value.__init__, "__doc__", None) or "")
    names = parameters(value)
    if other := re.search(r"Args: as for `([\w.]+)`", docstring):  # whose arguments it shares
        found = [like for path, like in OBJECTS.items() if path.endswith("." + other[1])]
        docstring += "".join(f"\n\n{inspect.getdoc(like)}" for like in found)
    if missing := [name for name in names if name not in documented(docstring)]:
        return [f"{path}: Args lacks {', '.join(missing)}"]
    return []


def words_of(path: Path) -> list[str]:
    """What the words of one file are wrong in: openers of docstrings, and retired words anywhere."""
    text, wrong = path.read_text(encoding="utf-8"), []
    place = path.relative_to(ROOT)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node) or ""
            if OPENERS.match(docstring):
                line = node.body[0].lineno
                wrong.append(f"{place}:{line}: a docstring opens with {docstring.split()[0]!r}: {docstring[:60]!r}")
    for found in RETIRED.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        wrong.append(f"{place}:{line}: {' '.join(found[0].split())!r} is a retired word")
    return wrong


FOLDERS = sorted({path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")})
OBJECTS = public_objects()


@pytest.mark.parametrize("folder", FOLDERS)
def test_words(folder):
    place = PACKAGE / folder
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place]
    assert not [line for file in files for line in words_of(file)]


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_words_of_pages(page):
    found = RETIRED.search(page.read_text(encoding="utf-8"))
    assert not found, f"{page.name}: {found[0]!r} is a retired word"


@pytest.mark.parametrize("path", OBJECTS)
def test_public_docstrings_describe_every_argument(path):
    assert not wrong_with(path, OBJECTS[path])


def example_of(path: str) -> doctest.DocTest | None:
    value = OBJECTS[path]
    docstring = value.__doc__ or ""
    if ">>>" not in docstring:
        return None
    return doctest.DocTestParser().get_doctest(docstring, {}, path, inspect.getsourcefile(value), 0)


@pytest.mark.parametrize("path", [path for path in OBJECTS if example_of(path)])
def test_examples_print_what_they_show(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path / "cache"))
    report = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False)
    runner.run(example_of(path), out=report.write)
    assert not runner.failures, report.getvalue()


@pytest.mark.parametrize("path", sorted(WITH_EXAMPLE))
def test_the_most_used_names_have_an_example(path):
    assert path in OBJECTS
    assert example_of(path)


def test_documented_finds_names_in_every_form():
    docstring = """Do it.

    Args:
        a: the first,
            b: not an argument, but a continuation.
        c, d: two.
        e (int): with a type.
    Returns: f: nothing.
    """
    assert documented(docstring) == {"a", "c", "d", "e"}


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('"""Of what."""', 1),
        ('"""Office hours."""', 0),
        ('def f():\n    """Whether it is."""', 1),
        ("x = 'results hang\\\n on'", 0),
        ("# scores hang on the padding", 1),
    ],
)
def test_words_are_found(source, count, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "file.py").write_text(source)
    assert len(words_of(tmp_path / "file.py")) == count


def report(only: str = "") -> None:
    """Print all that is wrong, and counts by folder."""
    for folder in FOLDERS:
        if not folder.startswith(only):
            continue
        place = PACKAGE / folder
        files = sorted(place.rglob("*.py")) if place.is_dir() else [place]
        wrong = [line for file in files for line in words_of(file)]
        for path, value in OBJECTS.items():
            file = file_of(value)
            if place in (file, *file.parents):
                wrong += wrong_with(path, value)
                if path in WITH_EXAMPLE and not example_of(path):
                    wrong.append(f"{path}: has no example")
        print(f"## {folder}: {len(wrong)}", *wrong, sep="\n")


if __name__ == "__main__":
    report(*sys.argv[1:2])
