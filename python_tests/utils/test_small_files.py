"""Small JSON and YAML that a stranger wrote: read within bounds, or one short line; and the streams of a command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpeft_ext.cli import main
from qpeft_ext.compare.plan_file import read_plan
from qpeft_ext.prefixes.files import Damaged, read_contents
from qpeft_ext.training.checkpoints import MANIFEST, why_incomplete
from qpeft_ext.utils.console import Stream
from qpeft_ext.utils.small_files import check_depth, parse_json, read_json, read_yaml
from qpeft_ext.utils.text import one_line, shorten

BOMB = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'lol'] * 9)}]\n" for i in range(10))


@pytest.mark.parametrize(
    "text, value",
    [
        ("{}", {}),
        ("[1, 2.5, null, true]", [1, 2.5, None, True]),
        ("[" * 100 + "]" * 100, None),
        ('{"a": "' + "[" * 500 + '"}', {"a": "[" * 500}),
        ('["' + '\\"[' * 300 + '"]', ['"[' * 300]),
        ('"\\ud83d\\ude00"', "😀"),
    ],
)
def test_json_within_bounds(text, value, tmp_path):
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    assert value is None or read_json(tmp_path / "x.json") == value


@pytest.mark.parametrize(
    "data, message",
    [
        (b"[" * 101 + b"]" * 101, "nested deeper than 100"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "deeper than 100"),
        (b"[" * 10**6, "deeper than 100"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is given twice"),
        (b"[NaN]", "NaN is not a number"),
        (b"[-Infinity]", "-Infinity is not a number"),
        (b"[1e999]", "the number 1e999 is too large"),
        (b"9" * 5000, "limit"),
        (b'"\\ud800"', "half a surrogate"),
        (b"\xff", "got the byte 0xff at position 0"),
        (b"{", "line 1"),
        (b"", "line 1"),
        (b"{}\n{}", "line 2: Extra data"),
    ],
)
def test_json_beyond_bounds(data, message, tmp_path):
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_json(tmp_path / "x.json")
    assert str(caught.value).startswith(f"{tmp_path}/x.json: not valid JSON (") and len(str(caught.value)) < 300


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(exclude_categories=["Cs"])),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=30,
    )
)
def test_json_is_what_python_wrote(value):
    assert parse_json(json.dumps(value).encode()) == value


@settings(max_examples=200, deadline=None)
@given(st.text('[]{}"\\a'), st.integers(0, 5))
def test_depth_is_that_of_the_parser(text, most):
    """What parses at all is refused exactly if it is too deep."""
    try:
        value = json.loads(text)
    except ValueError:
        return

    def depth(value):
        inner = value if isinstance(value, list) else value.values() if isinstance(value, dict) else None
        return 0 if inner is None else 1 + max(map(depth, inner), default=0)

    try:
        check_depth(text, most)
    except ValueError:
        assert depth(value) > most
    else:
        assert depth(value) <= most


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="pipe is a pipe or a device; expected a regular file"):
        read_json(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is a folder"):
        read_json(tmp_path)
    with pytest.raises(OSError, match="symbolic links"):
        read_json(tmp_path / "loop")
    (tmp_path / "big").write_bytes(b"[" + b" " * 100 + b"]")
    with pytest.raises(ValueError, match="more than 100 bytes"):
        read_json(tmp_path / "big", max_bytes=100)


@pytest.mark.parametrize(
    "text, message",
    [
        (BOMB, "line 6: more than 100,000 values"),
        ("a: " + "[" * 3000 + "]" * 3000, "line 1: nested deeper than 100"),
        ("{a: " * 3000 + "1" + "}" * 3000, "line 1: nested deeper"),
        ("a: &a [*a]", "line 1: \\*a stands for nothing"),
        ("- " * 200 + "a", "line 1: nested deeper"),
        ("a: *b", "line 1: \\*b stands for nothing"),
        ("a: 1\nb: 2\na: 3", "line 3: not valid YAML \\(the key 'a' is given twice"),
        ("? [a]\n: 1", "not valid YAML"),
        ("lm: !!python/object/apply:os.system ['true']", "line 1: not valid YAML \\(could not determine a constructor"),
        ("a: 2024-99-99", "not valid YAML"),
        ("a: !!int x", "not valid YAML"),
        ("a: [1, 2", "line 1"),
        ("a: \x07", "not valid YAML"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: !!bool x", "not valid YAML"),
        ("a: !!float x", "not valid YAML"),
        ("a: " + "x" * 300_000, "has more than 262,144 bytes"),
    ],
)
def test_yaml_beyond_bounds(text, message, tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_plan(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 300 + len(str(path))


def test_yaml_within_bounds(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("a: &a {x: 1e-3, y: [1, 2]}\nb: *a\nc:\n  <<: *a\n  x: 2\n")
    shared = {"x": 0.001, "y": [1, 2]}
    assert read_yaml(path) == {"a": shared, "b": shared, "c": shared | {"x": 2}}


@pytest.mark.parametrize(
    "problem",
    [
        "lm: [" + "x, " * 20_000 + "]",
        "lm: x\nmethods: 1\ncollections: 1",
        "lm: x\nmethods: {a: {method: [1, 2]}}",
        "? " + "k" * 1000 + "\n: 1",
        "- " + "x" * 10_000,
        "lm: x\n" + "y" * 900 + ": 1",
        "lm: {a: 1}",
        "lm: x\nseeds: [x]",
    ],
)
def test_a_plan_of_other_types_is_one_short_line(problem, tmp_path, capsys):
    (tmp_path / "plan.yaml").write_text(problem)
    assert main(["compare", str(tmp_path / "plan.yaml"), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and len(error) <= 301 and "plan.yaml" in error


def test_checkpoint_manifests_of_other_types(tmp_path):
    for content in ("[]", '{"files": 1}', '{"files": {"a": []}}', '{"files": {"..": 1}}', "[" * 2000, '{"files": [1]}'):
        (tmp_path / MANIFEST).write_text(content)
        assert why_incomplete(tmp_path)


def test_a_header_of_prefixes_with_wild_values(tmp_path):
    good = {
        "__metadata__": {"format": "qpeft_ext prefixes 1", "checksums": "00000000"},
        "aa": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
    }

    def written(header, length=None):
        data = header if isinstance(header, bytes) else json.dumps(header).encode()
        path = tmp_path / "shard"
        path.write_bytes((length or len(data)).to_bytes(8, "little") + data)
        return path

    assert list(read_contents(written(good)).extents) == ["aa"]
    bad = [
        [],
        1,
        None,
        {},
        {"__metadata__": 1},
        good | {"aa": 3},
        good | {"bb": good["aa"]},
        b"[" * 10_000,
        b"\xff{}",
        *(
            good | {"aa": good["aa"] | {"data_offsets": x}}
            for x in ([0, 10**40], "xx", [0, -1], [0, 0.0], {}, [[], []])
        ),
        good | {"__metadata__": good["__metadata__"] | {"checksums": "f" * 40}},
        good | {"__metadata__": good["__metadata__"] | {"format": "x" * 10**5}},
    ]
    for header in bad:
        with pytest.raises(Damaged) as caught:
            read_contents(written(header))
        assert len(str(caught.value)) < 200
    for length in (2**63, 2**40, 10**9):
        with pytest.raises(Damaged):
            read_contents(written(good, length))


def test_messages_are_short_and_safe():
    assert one_line("a\n  b\x1b[31m\u202e") == "a b\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}"
    cut = one_line("x" * 1000 + "; try this")
    assert len(cut) == 300 and cut.endswith("x; try this")
    nested = []
    for _ in range(10**5):
        nested = [nested]
    assert shorten(nested) == "a list that is too long to show" and "too long" in shorten(10**5000)
    while nested:  # or freeing it would be as deep
        nested = nested[0]


# -- streams ---------------------------------------------------------------------------------------------------------


class Gone:
    def __init__(self, error):
        self.raised, self.error = 0, error

    def write(self, text):
        self.raised += 1
        raise self.error

    flush, encoding = write, "utf-8"

    def fileno(self):
        raise OSError


def test_a_stream_that_fails_once_stays_silent():
    stream = Stream(Gone(BrokenPipeError(32, "Broken pipe")))
    print("a\nb", file=stream, flush=True)
    print("c", file=stream, flush=True)
    assert stream._stream.raised == 1 and isinstance(stream.error, BrokenPipeError) and stream.encoding == "utf-8"


@pytest.mark.parametrize(
    "redirection, code, message",
    [
        (">&-", 0, ""),
        ("> /dev/full", 2, "cannot write to stdout: No space left on device; all else is done"),
        ("| (exec <&-; sleep 0.1)", 141, ""),
        ("2>&1 | (exec <&-; sleep 0.1)", 141, ""),
        (">&- 2>&- <&-", 0, ""),
    ],
)
@pytest.mark.slow
def test_work_is_done_though_nobody_reads(redirection, code, message, tmp_path):
    """``evaluate`` prints its table, then writes it to a file."""
    (tmp_path / "run").write_text("q1 Q0 d1 1 2.0 t\n")
    (tmp_path / "qrels").write_text("q1 0 d1 1\n")
    command = f"evaluate --qrels {tmp_path}/qrels {tmp_path}/run --output {tmp_path}/out.json --measures nDCG@10"
    got = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m qpeft_ext.cli {command} {redirection}"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert got.returncode == code, got.stderr
    assert message in got.stderr and got.stderr.count("\n") == bool(message)
    assert json.loads((tmp_path / "out.json").read_text())
