"""Every ``python`` and ``sh`` block of README.md, CONTRIBUTING.md and docs/ runs, on tiny data and without a network.

How to write one:

- The blocks of a page run in order, in one folder and with one set of Python names, so a block may use what an earlier
  one made. Languages: ``python`` or ``pycon``; ``sh``, ``bash``, or ``console`` (``$ `` before commands, output below).
- The folder has, unless the page itself writes them (``--output NAME``, ``--out NAME``, ``save_pretrained("NAME")``):
  ``LM`` (the packaged LM; so is every Hub id in ``HUB_IDS``), ``RERANKER``, ``my-adapter`` (the packaged adapter),
  ``COLLECTION`` (a BEIR folder of 12 Python functions: test 4 queries, train 8, dev 4), ``bm25.trec``,
  ``examples.jsonl``, ``dev.jsonl``, ``candidates.jsonl`` (RankLLM) and ``my-index``.
- Python has ``query``, ``document``, ``documents``, ``queries``, ``candidates``, ``examples``, ``dev_examples``, and of
  the packaged LM and adapter ``lm``, ``model`` and ``reranker``; a page may define them anew.
- A ``text`` block directly below is what the block prints, and is compared: ``…`` stands for anything, blanks do not
  count, fractions may differ by one in their last digit. A last line that is an expression prints its value. Below a
  shell block: what all its commands print. If it holds "error:", the command must end with exit code 2.
- ``<!-- file: plan.yaml -->`` on the line above a block of any language: it becomes a file of that name.
- ``qpeft`` runs in this process. ``make``, ``pip install`` and ``python benchmarks/…`` are not run: their targets,
  extras, files and options must exist.
- A ``shell`` block starts a server or a container, or asks one: it is not run, but its commands and options must exist.
- ``<!-- needs: module -->`` on the line above a block: it is left out where this module is not installed, and the test
  of the page then says so and counts as skipped.
- ``<!-- not run: reason -->`` on the line above a block: nothing of it runs. Its Python must compile, and the commands
  and options that it names must exist. There may be ``NOT_RUN`` of them in all.
"""

import ast
import importlib.util
import json
import os
import re
import shutil
import textwrap

import pytest
from families.tiny import tiny_lm
from prompts.reranker_tokenizers import qwen_tokenizer
from snippets import (
    PYTHON,
    ROOT,
    SHELL,
    Block,
    Page,
    check_command,
    compare,
    options_of_commands,
    read_blocks,
    read_commands,
)
from tiny_files import DEMO, data_names, model_names, write_files

import qpeft_ext as qpeft

pytestmark = pytest.mark.slow

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
HUB_IDS = ("meta-llama/Llama-2-7b-hf", "Qwen/Qwen2.5-0.5B")
RERANKER = "Qwen/Qwen3-Reranker-0.6B"  # a tiny one takes its place
NOT_RUN = 3


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The folder that every page gets a copy of."""
    folder = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QPEFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        write_files(folder)
    for name in HUB_IDS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(DEMO / "base_lm")
    tokenizer = qwen_tokenizer()
    for part in (tiny_lm("qwen3", vocab_size=len(tokenizer), max_position_embeddings=4096), tokenizer):
        part.save_pretrained(folder / RERANKER)
    return folder


def written_by(text: str) -> set[str]:
    """Names of the files and folders that the code of a page writes."""
    return set(re.findall(r"""(?:--output|--out|save_pretrained\(|output_dir=)\s*["']?([\w.-]+)""", text))


@pytest.mark.parametrize("page", [page for page in PAGES if read_blocks(page)], ids=lambda page: page.name)
def test_the_snippets_of_a_page_run(page, files, tmp_path, monkeypatch):
    blocks = [block for block in read_blocks(page) if not block.not_run]
    lacking = [block for block in blocks if block.needs and not is_installed(block.needs)]
    blocks = [block for block in blocks if block not in lacking]
    folder = tmp_path / "work"
    shutil.copytree(files, folder, symlinks=True)
    text = "\n".join(block.text for block in blocks)
    for name in written_by(text) & {path.name for path in folder.iterdir()}:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    python = "\n".join(block.text for block in blocks if block.language in PYTHON and not block.file)
    names = {"__name__": "__main__"} | data_names() | model_names(set(re.findall(r"\w+", python)))
    run = Page(names)
    for block in blocks:
        run.run(block)
    if lacking:
        pytest.skip(
            "the rest ran; not installed: " + ", ".join(f"{block.needs} (line {block.line})" for block in lacking)
        )


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it
        return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_that_do_not_run_are_right_all_the_same(page):
    for block in read_blocks(page):
        if (block.not_run or block.needs) and block.language in PYTHON:
            ast.parse(textwrap.dedent(block.text), str(block))
        elif block.not_run and block.language in SHELL:
            for command in read_commands(block):
                check_command(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_start_servers_exist(page):
    for text in re.findall(r"^```shell\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        for command in read_commands(Block(page.name, 0, "shell", text)):
            check_command(command)


def test_the_answer_of_a_server_is_the_one_that_its_page_shows():
    """docs/serving.md: the first request and its answer, by the packaged adapter."""
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    request = json.loads(re.search(r"-d '(\{.*\})'", text)[1])
    answer = json.loads(re.search(r"^```json\n(.*?)^```", text, re.M | re.S)[1])
    ranked = model_names({"reranker"})["reranker"].rank(request["query"], request["documents"], threshold=0)
    assert [(row["corpus_id"], round(row["relevance"], 3)) for row in ranked] == [
        (result["index"], result["relevance_score"]) for result in answer["results"]
    ]


def test_few_blocks_do_not_run():
    left_out = [f"{block}: {block.not_run}" for page in PAGES for block in read_blocks(page) if block.not_run]
    assert len(left_out) <= NOT_RUN, "\n".join(left_out)


OPTIONS_OF_LAUNCHERS = {"--nproc-per-node", "--multi_gpu", "--num_processes", "--cpu"}  # torchrun's and accelerate's


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_in_the_text_exists(page):
    """In inline code: `qpeft NAME`, `qpeft NAME --option`, and `--option` of any command or script of ours."""
    commands = options_of_commands()
    text = re.sub(r"^ *(```|~~~).*?^ *\1", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    known = set().union(*commands.values()) | {"--version"} | OPTIONS_OF_LAUNCHERS | options_of_scripts()
    for code in re.findall(r"`([^`\n]+)`", text):
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]+", code):
            assert option in known, f"{page.name}: nothing has the option {option}: `{code}`"
        if found := re.match(r"qpeft ([a-z_]+)\b", code):
            assert found[1] in commands, f"{page.name}: qpeft has no command {found[1]}"
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]+", code):
                assert option in commands[found[1]], f"{page.name}: qpeft {found[1]} has no option {option}"


def options_of_scripts() -> set[str]:
    """Option strings of the scripts in benchmarks/, python_tests/ and .ci/."""
    sources = [path for folder in ("benchmarks", "python_tests", ".ci") for path in (ROOT / folder).rglob("*.py")]
    return {option for path in sources for option in re.findall(r'"(--[a-z][\w-]+)"', path.read_text())}


# The machinery itself


def page_of(tmp_path, text: str):
    path = tmp_path / "page.md"
    path.write_text(textwrap.dedent(text))
    return read_blocks(path)


def test_blocks_are_found_with_their_outputs_and_reasons(tmp_path):
    blocks = page_of(
        tmp_path,
        """\
        ```python
        1 + 1
        ```

        ```text
        2
        ```

        - In a list:

          ```sh
          qpeft info
          ```

        A sentence, so this is no output:

        ```text
        a drawing
        ```
        <!-- not run: needs two GPUs -->
        ```sh
        torchrun --nproc-per-node 2 -m qpeft_ext.cli train --base-model LM
        ```
        """,
    )
    assert [(block.line, block.language, block.text) for block in blocks[:2]] == [
        (2, "python", "1 + 1"),
        (12, "sh", "qpeft info"),
    ]
    assert [block.output for block in blocks] == ["2", None, None]
    assert [block.not_run for block in blocks] == [None, None, "needs two GPUs"]


def test_a_block_that_needs_a_module_is_found(tmp_path):
    first, second = page_of(tmp_path, "<!-- needs: json.nothing -->\n```python\n1\n```\n```python\n2\n```\n")
    assert (first.needs, second.needs, first.not_run) == ("json.nothing", None, None)
    assert [is_installed(name) for name in ("json", "json.decoder", "nothing.at_all", first.needs)] == [
        True,
        True,
        False,
        False,
    ]


def test_python_prints_its_last_expression_and_keeps_its_names(tmp_path):
    blocks = page_of(tmp_path, "```python\nx = 3\nx / 7\n```\n```text\n0.44\n```\n```pycon\n>>> x\n3\n```\n")
    run = Page({})
    with pytest.raises(AssertionError, match=r"page.md:2: .*\nexpected: 0.44\nprinted:  0.42857142857142855"):
        run.run(blocks[0])
    run.run(blocks[1])
    blocks[1].text = ">>> x\n4"
    with pytest.raises(AssertionError, match="Expected:\n    4\nGot:\n    3"):
        run.run(blocks[1])


@pytest.mark.parametrize(
    ("expected", "printed", "equal"),
    [
        ("score 1.25, … done", "score  1.26,\n 3 s, done", True),
        ("score 1.25", "score 1.27", False),
        ("12 documents", "13 documents", False),
        ("1.5e-3", "1.6e-3", True),
        ("…", "", True),
        ("a", "a b", False),
    ],
)
def test_compare(expected, printed, equal):
    if equal:
        return compare(expected, printed)
    with pytest.raises(AssertionError, match="expected"):
        compare(expected, printed)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("qpeft rank --model my-adapter", "qpeft has no command rank"),
        ("qpeft rerank --adapter my-adapter", "qpeft rerank has no option --adapter"),
        ("torchrun --nproc-per-node 2 -m qpeft_ext.cli train --data-root .", "qpeft train has no option --data-root"),
        ("make tests", "the Makefile has no target tests"),
        ("make test TESTS=python_tests/test_nothing.py", "does not exist"),
        ("pip install '.[training]'", "pyproject.toml has no extra training"),
        ("python benchmarks/bench_nothing.py", "does not exist"),
        ("python benchmarks/bench_training.py --fast", "has no option --fast"),
        ("curl x", "does not know the command curl"),
    ],
)
def test_commands_that_do_not_exist_are_found(line, message, tmp_path):
    (block,) = page_of(tmp_path, f"```sh\n{line}\n```\n")
    with pytest.raises(AssertionError, match=re.escape(message)):
        Page({}).run(block)


def test_an_error_that_a_page_shows_must_come(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    console = "```console\n$ qpeft evaluate --qrels nothing nothing.trec\nqpeft evaluate: error: …\n```\n"
    Page({}).run(page_of(tmp_path, console)[0])
    (block,) = page_of(tmp_path, "```sh\nqpeft evaluate --qrels nothing nothing.trec\n```\n")
    with pytest.raises(AssertionError, match="exit code 2"):
        Page({}).run(block)


def test_variables_before_a_command_end_with_it(tmp_path):
    (block,) = page_of(tmp_path, "```sh\nQPEFT_DEBUG=1 qpeft --version\n```\n" + f"```text\n{qpeft.__version__}\n```\n")
    Page({}).run(block)
    assert "QPEFT_DEBUG" not in os.environ
