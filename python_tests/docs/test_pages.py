"""Every option of `QPeftConfig`, of the main classes and of every command is on a page of docs/, and pages name files
that exist.
"""

import dataclasses
import inspect
import json
import re
import tomllib

import pytest
from snippets import ROOT, options_of_commands

import qpeft_ext as qpeft
from qpeft_ext.compare import methods, plan

PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))}
# command -> the pages that explain it
COMMANDS = {
    "calibrate": ("reranking.md",),
    "compare": ("compare.md",),
    "convert": ("formats.md",),
    "demo": ("quality.md",),
    "distill": ("rerankers.md", "training.md"),
    "evaluate": ("reranking.md",),
    "fuse": ("reranking.md",),
    "index": ("prefix-cache.md",),
    "info": ("how-it-works.md",),
    "rerank": ("reranking.md",),
    "retrieve": ("reranking.md",),
    "serve": ("serving.md",),
    "synthesize": ("training.md",),
    "train": ("training.md",),
}


def test_training_explains_every_option_of_the_config():
    for field in dataclasses.fields(qpeft.QPeftConfig):
        assert f"`{field.name}`" in PAGES["training.md"], f"docs/training.md says nothing about {field.name}"


def test_training_states_the_defaults_of_the_config():
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", PAGES["training.md"], re.M))
    for field in dataclasses.fields(qpeft.QPeftConfig):
        if field.name in rows:
            assert rows[field.name].strip("`") in _as_shown(field.name, field.default), field.name


def _as_shown(name: str, value: object) -> tuple[str, ...]:
    """What a table may have in the column of defaults."""
    if isinstance(value, bool):
        return ("on" if value else "off",)
    if name == "suffix_micro_batch":
        return ("all",)
    if name == "target_modules":
        return ("q_proj`, `v_proj",)
    return ("none",) if value in (None, ()) else (str(value), f"{value:g}" if isinstance(value, float) else str(value))


@pytest.mark.parametrize(
    ("kind", "page"),
    [(qpeft.Reranker, "reranking.md"), (qpeft.DocumentCache, "prefix-cache.md"), (qpeft.QPeftTrainer, "training.md")],
)
def test_every_argument_of_a_class_is_on_its_page(kind, page):
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD and name != "model":
            assert f"`{name}`" in PAGES[page], f"docs/{page} says nothing about {name} of {kind.__name__}"


def test_every_key_of_a_plan_is_explained():
    for kind in (plan.Plan, plan.Collection, plan.Source, plan.Training, plan.Method):
        for field in dataclasses.fields(kind):
            if field.name not in ("path", "name", "varied", "all_collections"):  # no keys of the file
                assert f"`{field.name}`" in PAGES["compare.md"], f"docs/compare.md: nothing about {field.name}"


def test_every_method_that_can_be_compared_is_explained():
    for name in set(methods.PRESETS) - {methods.FIRST_STAGE}:
        assert f"`{name}`" in PAGES["compare.md"], f"docs/compare.md: nothing about the method {name}"


def test_every_extra_is_listed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in project["optional-dependencies"]:
        assert f"`{extra}`" in PAGES["versions.md"], f"docs/versions.md says nothing about the extra {extra}"


def test_every_command_is_listed():
    assert sorted(options_of_commands()) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_is_explained(command):
    pages = "\n".join(PAGES[name] for name in COMMANDS[command])
    assert f"qpeft {command}" in pages or command in ("demo", "info", "rerank"), command
    missing = [
        option
        for option in sorted(options_of_commands()[command])
        if option.startswith("--") and option != "--help" and not re.search(rf"{option}(?![\w-])", pages)
    ]
    assert not missing, f"{', '.join(COMMANDS[command])}: nothing about {', '.join(missing)} of qpeft {command}"


NAMED = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{name}" for name in PAGES))


@pytest.mark.parametrize("page", NAMED)
def test_files_that_a_page_names_exist(page):
    """In inline code, from the root of the repository; ``x`` in a name stands for any operator."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    for path in re.findall(r"`((?:benchmarks|python_tests|qpeft_ext|csrc|docs|\.ci)/[\w./-]+)`", text):
        if not re.search(r"(?:/|_)x(?:_kernel)?\.", path):
            assert (ROOT / path).exists(), f"{page}: {path} does not exist"


def test_shares_of_the_bound_are_those_of_the_results():
    page = PAGES["benchmarks.md"]
    cold, warm, place, ceiling = re.search(
        r"take (\d+) % \(cold\) and (\d+) % \(warm\).*?\[its results\]\((.*?)\)\); (\d+) % \(cold\)", page
    ).groups()
    rows = {row["work"]: row for row in json.loads((ROOT / "docs" / place).read_text())["rows"]}
    expected = [rows["rerank_cold"]["gemm_share"]["ours"], rows["rerank_warm"]["gemm_share"]["ours"]]
    expected.append(rows["rerank_cold"]["ceiling"])
    assert [int(cold), int(warm), int(ceiling)] == [round(100 * share) for share in expected]
    assert rows["rerank_warm"]["ceiling"] > 1  # as the page says
