"""Imports go down only: a room of docs/architecture.md imports from floors below its own; nothing goes in circles.

Functions and files stay short enough to be read at once.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qpeft_ext"
FLOORS = (  # from the ground; rooms of one floor do not import each other
    {"utils"},
    {"config", "ops", "formats"},
    {"lm", "prompts", "evaluation"},
    {"prefixes", "adapters"},
    {"engine", "official"},
    {"model"},
    {"training", "ranking"},
    {"compare", "demo", "integrations", "serving", "synthesis"},
    {"cli"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS, start=1) for room in rooms}
COMPILED = ("_C", "_host")  # of csrc/, which imports nothing of ours


def modules(package: Path) -> dict[str, Path]:
    """Return the file of each module, by its name below the package; a folder's name means its ``__init__.py``."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(package: Path) -> dict[str, set[str]]:
    """Return for each module those of the package that it imports: at the top, in functions and for types alike."""
    known = modules(package)
    arrows: dict[str, set[str]] = {}
    for name, path in known.items():
        folder = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        if name == "":
            folder = []
        arrows[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for target, names in _imported(node, folder, package.name):
                for imported in names:
                    whole = f"{target}.{imported}".strip(".")
                    if whole.split(".")[0] in COMPILED:
                        continue
                    arrows[name].add(whole if whole in known else target)
        arrows[name].discard(name)
    return arrows


def _imported(node: ast.AST, folder: list[str], package: str) -> Iterator[tuple[str, list[str]]]:
    if isinstance(node, ast.ImportFrom):
        names = [alias.name for alias in node.names]
        if node.level:
            base = folder[: len(folder) - node.level + 1]
            yield ".".join([*base, *(node.module or "").split(".")]).strip("."), names
        elif (node.module or "").split(".")[0] == package:
            yield node.module[len(package) :].strip("."), names
    elif isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.split(".")[0] == package:
                yield alias.name[len(package) :].strip("."), [""]


def room(module: str) -> str:
    return module.split(".")[0]


def upward(arrows: dict[str, set[str]]) -> list[str]:
    """Return the imports that go up, or to a neighbour on the same floor."""
    wrong = []
    for module, targets in arrows.items():
        if not module:  # the face of the package names what is public
            continue
        for target in targets:
            here, there = room(module), room(target)
            if here != there and (not target or FLOOR[there] >= FLOOR[here]):
                wrong.append(f"{module} -> {target or 'the face of the package'}")
    return sorted(wrong)


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Return groups of modules that import each other, found by removing those that import none of the rest."""
    left = {module: {target for target in targets if target in arrows} for module, targets in arrows.items()}
    for _ in range(2):  # first from below, then from above
        while free := [module for module, targets in left.items() if not targets & left.keys()]:
            for module in free:
                del left[module]
        left = {module: {other for other, targets in left.items() if module in targets} for module in left}
    return [sorted(left)] if left else []


def test_every_room_has_a_floor():
    rooms = {room(name) for name in modules(PACKAGE)} - {""}
    assert rooms == FLOOR.keys()
    assert len(FLOORS) <= 9


def test_imports_go_down_only():
    assert upward(imports(PACKAGE)) == []


def test_nothing_goes_in_circles():
    assert circles(imports(PACKAGE)) == []


@pytest.mark.parametrize(("files", "wrong", "circle"), [
    ({"utils/files.py": "from ..config import A", "config.py": ""}, ["utils.files -> config"], []),
    ({"cli/app.py": "def f():\n    from .. import VERSION"}, ["cli.app -> the face of the package"], []),
    ({"training/x.py": "import qpeft_ext.ranking.y", "ranking/y.py": ""}, ["training.x -> ranking.y"], []),
    ({"lm/a.py": "from . import b", "lm/b.py": "from .a import c"}, [], [["lm.a", "lm.b"]]),
    ({"lm/a.py": "from ..utils import files", "utils/files.py": "", "utils/__init__.py": ""}, [], []),
])  # fmt: skip
def test_what_is_wrong_is_found(tmp_path, files, wrong, circle):
    for name, text in {"__init__.py": "", **files}.items():
        path = tmp_path / "qpeft_ext" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    arrows = imports(tmp_path / "qpeft_ext")
    assert upward(arrows) == wrong
    assert circles(arrows) == circle


# ---- sizes -----------------------------------------------------------------------------------------------------------

FUNCTION_LINES, FILE_LINES = 60, 350  # those of a function are counted without its docstring
REASON = f"Longer than {FILE_LINES} lines because "  # to be said in the first ten lines of a longer file
SOURCES = ("qpeft_ext", "benchmarks", "python_tests", "csrc", "_build", ".ci")


def sources(root: Path) -> Iterator[tuple[str, str]]:
    """Yield every source file in the folders of `SOURCES`: its path from ``root``, and its text."""
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in {".py", ".cpp", ".cu", ".cuh", ".h"}:
                yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")


def long_files(root: Path) -> list[str]:
    """Return the files that are too long and do not say why."""
    lines = {name: text.splitlines() for name, text in sources(root)}
    return [
        name for name, of_file in lines.items() if len(of_file) > FILE_LINES and REASON not in " ".join(of_file[:10])
    ]


def long_functions(root: Path) -> list[str]:
    """Return the functions that are too long, as ``file: name``."""
    found = []
    for name, text in sources(root):
        for node in ast.walk(ast.parse(text) if name.endswith(".py") else ast.Module([], [])):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _lines(node) > FUNCTION_LINES:
                found.append(f"{name}: {node.name}")
    return found


def _lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[0]
    docstring = first.end_lineno - first.lineno + 1 if ast.get_docstring(function) is not None else 0
    return function.end_lineno - function.lineno + 1 - docstring


def test_files_are_short_or_say_why_not():
    assert long_files(ROOT) == []


def test_functions_are_short():
    assert long_functions(ROOT) == []


def test_what_is_too_long_is_found(tmp_path):
    body, docstring = "    x = 1\n", "A long docstring.\n" * 200
    texts = {
        "qpeft_ext/short.py": f'def f():\n    """{docstring}    """\n' + body * (FUNCTION_LINES - 1),
        "python_tests/function.py": "class A:\n    def f():\n" + f"    {body}" * FUNCTION_LINES,
        "benchmarks/file.py": "x = 1\n" * (FILE_LINES + 1),
        "csrc/cuda/kernel.cu": "\n" * (FILE_LINES + 1),
        "csrc/reason.h": f"// {REASON}it is a table.\n" + "\n" * FILE_LINES,
        "csrc/just.h": "\n" * FILE_LINES,
    }
    for name, text in texts.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert long_files(tmp_path) == ["benchmarks/file.py", "csrc/cuda/kernel.cu"]
    assert long_functions(tmp_path) == ["python_tests/function.py: f"]


def test_test_files_have_names_of_their_own():
    """Two of one name cannot be collected in one run of pytest."""
    names = [path.name for path in (ROOT / "python_tests").glob("*/test_*.py")]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []
