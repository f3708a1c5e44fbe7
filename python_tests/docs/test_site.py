"""The site of `make docs`: it builds without a warning, has every public name, and loads nothing from elsewhere."""

import importlib.util
import re
from pathlib import Path

import pytest
from test_docstrings import public_objects

pytestmark = pytest.mark.slow

build = pytest.importorskip("mkdocs.commands.build", reason="mkdocs is not installed; the extra [docs] has it")
pytest.importorskip("material", reason="mkdocs-material is not installed; the extra [docs] has it")
pytest.importorskip("mkdocstrings_handlers.python", reason="mkdocstrings is not installed; the extra [docs] has it")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Folder of the site. In strict mode a warning is an error: broken links and anchors, docstrings, references."""
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
        config.plugins.on_startup(command="build", dirty=False)
        build.build(config)
    return folder


def part(name: str):
    """A module of docs/site/."""
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / "docs" / "site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def test_the_reference_has_every_public_name():
    asked = set()
    for page in (ROOT / "docs" / "api").glob("*.md"):
        asked.update(path.rpartition(".")[2] for path in re.findall(r"^::: (\S+)", text_of(page), re.M))
    public = public_objects()
    missing = {
        path for path in public if path.rpartition(".")[0] not in public and path.rpartition(".")[2] not in asked
    }
    assert not missing, "docs/api/ has no line for them"


def test_every_link_leads_somewhere(site):
    """The links of all files lead somewhere, also of those that the hook makes: MkDocs checks Markdown's links only."""
    for page in site.rglob("*.html"):
        if page.name == "404.html":  # its links are those of a server's root
            continue
        for target in re.findall(r'(?:href|src)="([^"#?]+)', text_of(page)):
            if not re.match(r"[a-z]+:", target):
                assert (page.parent / target).resolve().exists(), f"{page.relative_to(site)} links to {target}"


def test_nothing_is_loaded_from_other_hosts(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="((?:https?:)?//[^"]*)', text_of(page))
        assert not loaded, page


def test_every_page_of_the_documentation_is_in_the_navigation(site):
    front = text_of(site / "index.html")
    for page in sorted((ROOT / "docs").rglob("*.md")):
        place = page.relative_to(ROOT / "docs").with_suffix(".html").as_posix()
        assert f'href="{place}"' in front, f"mkdocs.yml has no {place} in its navigation"


def test_the_front_page_is_the_readme(site):
    title = re.search(r"^# (.*)", text_of(ROOT / "README.md"), re.M)[1]
    assert re.search(rf"<h1[^>]*>{re.escape(title)}", text_of(site / "index.html"))


def test_docstrings_get_the_exact_form_of_googles_style():
    written = """Do it.

Args:
    a, b: two of them,
        on two lines.
    c: one.  d: another one.
Returns: float32 [B],
    in nats.
Raises: ValueError for a; TypeError or OSError for b; else nothing.
Source: a paper.
Example: two numbers::
    >>> 1 + 1
    2
"""
    assert (
        part("docstrings").google(written)
        == """Do it.

Args:
    a: two of them,
        on two lines.
    b: two of them,
        on two lines.
    c: one.
    d: another one.

Returns:
    float32 [B],
        in nats.

Raises:
    ValueError: for a
    TypeError or OSError: for b; else nothing.

**Source:** a paper.

Examples:
    Two numbers:

    >>> 1 + 1
    2"""
    )


@pytest.mark.parametrize(
    ("page", "markdown", "site"),
    [
        ("README.md", "[a](docs/scaling.md#x)", "[a](scaling.md#x)"),
        ("docs/scaling.md", "![a](../benchmarks/scaling.py)", "![a](repository/benchmarks/scaling.py.md)"),
        (
            "docs/scaling.md",
            "[a](../README.md) [b](../benchmarks/)",
            "[a](index.md) [b](repository/benchmarks/index.md)",
        ),
        ("README.md", "`[a](docs/scaling.md)` [b](https://example.org/docs)", None),
        ("README.md", "[a](docs/nothing.md)", None),
        ("README.md", "```\n[a](docs/scaling.md)\n```\n", None),
    ],
)
def test_links_to_files_of_the_repository(page, markdown, site):
    hooks = part("hooks")
    assert hooks.replace_links(markdown, page, hooks.site_path) == (site or markdown)
