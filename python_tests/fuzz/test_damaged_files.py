"""Valid files of every format, damaged at random: they parse, or give one line that names the file. Nothing else."""

import gzip
import json

import pytest
from formats.format_readers import READERS, VALID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_data import write_folder, write_lines

from qpeft_ext.cli import main
from qpeft_ext.formats import open_collection

pytestmark = pytest.mark.slow

CASES = [(name, i) for name, contents in VALID.items() for i in range(len(contents))]
FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
# pieces that mean something in one format or another
PIECES = st.sampled_from(
    [
        b"\n",
        b"\r\n",
        b"\t",
        b" ",
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\\",
        b"\x00",
        b"\xff",
        b"\xef\xbb\xbf",
        b"nan",
        b"NaN",
        b"1e999",
        b"-Infinity",
        b"-1",
        b"0.5",
        b"null",
        b"true",
        b'""',
        b"[]",
        b"{}",
        b"9" * 5000,
        b"[" * 2000,
        b'"\\ud800"',
        b"\\u0000",
        b"\xe2\x80\xa8",
        b"\x1c",
        b"query-id\tcorpus-id\tscore\n",
        b"id\ttext\ttitle\n",
        b'{"_id": "d1", "text": "x"}\n',
        b'"has_answer": 2, ',
        b'"ctxs": [{}], ',
        b'"text": 3, ',
        b'"qid": {}, ',
    ]
) | st.binary(min_size=1, max_size=4)
VALUES = st.sampled_from(
    [None, True, 3, -0.5, float("nan"), 10**400, "", "x", "\ud800", [], {}, [None], [[]], ["x"], {"a": 1}, "gone"]
)
BYTES = st.tuples(
    st.sampled_from(["insert", "delete", "flip", "line out", "line twice", "line in", "cut", "column"]),
    st.floats(0, 1),
    PIECES,
)
# (kind, where: a share of the file, of its lines or of the values in a JSON text, what)
CHANGES = st.lists(BYTES | st.tuples(st.just("value"), st.floats(0, 1), VALUES), min_size=1, max_size=4)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def damaged(content: bytes, changes) -> bytes:
    for kind, where, piece in changes:
        rows = content.split(b"\n")
        row = round(where * (len(rows) - 1))
        if kind == "value":
            content = with_value(content, where, piece)
        elif kind == "column":
            columns = rows[row].split(b"\t")
            columns[len(piece) % len(columns)] = piece
            content = b"\n".join([*rows[:row], b"\t".join(columns), *rows[row + 1 :]])
        elif kind.startswith("line"):
            rows[row : row + 1] = {"line out": [], "line twice": [rows[row]] * 2, "line in": [piece, rows[row]]}[kind]
            content = b"\n".join(rows)
        else:
            i = round(where * len(content))
            flipped = bytes(a ^ 1 << b % 8 for a, b in zip(content[i:], piece, strict=False))
            content = (
                content[:i]
                + {
                    "insert": piece + content[i:],
                    "delete": content[i + len(piece) :],
                    "cut": b"",
                    "flip": flipped + content[i + len(piece) :],
                }[kind]
            )
    return content


def with_value(content: bytes, where: float, value) -> bytes:
    """One value anywhere in a JSON text, or in JSON lines, is another one; "gone": its key or place goes too."""
    try:
        whole = [json.loads(content)]
    except (ValueError, RecursionError):
        try:
            whole = [json.loads(row) for row in content.splitlines()]
        except (ValueError, RecursionError):
            return content
    places = [(whole, i) for i in range(len(whole))]
    for parent, key in places:  # it grows as it is walked through
        child = parent[key]
        if isinstance(child, (list, dict)):
            places += [(child, key) for key in (child if isinstance(child, dict) else range(len(child)))]
    if not places:
        return content
    parent, key = places[round(where * (len(places) - 1))]
    if value == "gone":
        del parent[key]
    else:
        parent[key] = value
    return "".join(f"{json.dumps(record)}\n" for record in whole).encode()


def write_damaged(path, content, changes, compressed):
    """``changes`` of the text or, with ``compressed`` 2, of the gzip stream."""
    if compressed != 2:
        content = damaged(content, changes)
    if compressed:
        path, content = path.with_name(f"{path.name}.gz"), gzip.compress(content, mtime=0)
    path.write_bytes(damaged(content, changes) if compressed == 2 else content)
    return path


def assert_one_line(error, path):
    message = str(error)
    assert str(path) in message or isinstance(error, OSError) and str(path) == error.filename, message
    assert "\n" not in message and len(message) < 1200 + 2 * len(str(path)), message


@pytest.mark.parametrize("name, i", CASES)
def test_the_undamaged_file_is_read(tmp_path, name, i):
    """Otherwise the damage below would hit nothing; also as .gz, with other line ends, and with a byte order mark."""
    content = VALID[name][i]
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b.gz").write_bytes(gzip.compress(content))
    (tmp_path / "c").write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    expected = READERS[name](tmp_path / "a")
    assert expected and READERS[name](tmp_path / "b.gz") == expected == READERS[name](tmp_path / "c")


@pytest.mark.parametrize("name", VALID)
@settings(FUZZ, max_examples=120)
@given(which=st.integers(0, 50), changes=CHANGES, compressed=st.sampled_from([0, 0, 1, 2]))
def test_any_damage_gives_a_result_or_one_line(tmp_path, name, which, changes, compressed):
    path = write_damaged(tmp_path / "file", VALID[name][which % len(VALID[name])], changes, compressed)
    try:
        READERS[name](path)
    except (ValueError, OSError) as error:
        assert_one_line(error, path)
    assert not list((tmp_path / "cache").glob("*.tmp"))
    path.unlink()


@pytest.mark.parametrize("name", [name for name in VALID if name != "any"])
def test_every_cut_of_a_gzip_file(tmp_path, name):
    """A download that broke off: never the first part of the data as if it were all."""
    content = gzip.compress(VALID[name][0], mtime=0)
    path = tmp_path / "file.gz"
    for size in range(0, len(content), 3):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError) as caught:
            READERS[name](path)
        assert_one_line(caught.value, path)
        assert size == 0 or "not a whole gzip file" in str(caught.value)


@pytest.mark.parametrize("name", [name for name in VALID if name != "any"])
def test_a_byte_that_is_no_utf_8(tmp_path, name):
    """In every line in turn: the error names the line, or the record where lines are none."""
    content = VALID[name][0]
    rows = content.split(b"\n")[:-1]
    for number, row in enumerate(rows, start=1):
        rest = [*rows[: number - 1], row[: len(row) // 2] + b"\xff" + row[len(row) // 2 :], *rows[number:]]
        (tmp_path / "file").write_bytes(b"\n".join(rest))
        with pytest.raises(ValueError, match=f"file, line {number}[,:] ?.*expected UTF-8, got the byte 0xff"):
            READERS[name](tmp_path / "file")


# -- folders: several files that belong together -------------------------------------------------------------------


def msmarco_folder(folder):
    write_lines(folder / "collection.tsv", ["1\tthe sea", "2\t", "3\tmoon"])
    write_lines(folder / "queries.dev.tsv", ["1\twhy tides", "2\twho"])
    write_lines(folder / "qrels.dev.tsv", ["1\t0\t1\t1", "2\t0\t3\t1"])
    write_lines(folder / "top1000.dev", ["1\t2\twhy tides\t", "1\t1\twhy tides\tthe sea"])
    write_lines(folder / "triples.dev.tsv", ["why\tsea\tmoon"])
    return folder


def dpr_folder(folder):
    write_lines(folder / "psgs_w100.tsv", ["id\ttext\ttitle", "1\tthe sea\tTides", "2\tmoon\tMoon"])
    write_lines(folder / "webq.qa.csv", ["what\t['moon']"])
    (folder / "nq-test.json").write_text(
        json.dumps([{"question": "why", "answers": ["sea"], "ctxs": [{"id": 1, "score": 2}, {"id": 2, "score": 1}]}])
    )
    (folder / "nq-train.json").write_bytes(VALID["dpr training"][0])
    return folder


FOLDERS = {"beir": lambda folder: write_folder(folder), "msmarco": msmarco_folder, "dpr": dpr_folder}


@pytest.mark.parametrize("name", FOLDERS)
@settings(FUZZ, max_examples=80)
@given(which=st.integers(0, 50), changes=CHANGES)
def test_a_damaged_file_in_a_folder(tmp_path_factory, name, which, changes):
    """The error names that file, or another one that does not belong to it any more."""
    folder = FOLDERS[name](tmp_path_factory.mktemp("data") / "folder")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "run.trec")
    file = files[which % len(files)]
    file.write_bytes(damaged(file.read_bytes(), changes))
    try:
        READERS["any"](folder)
    except (ValueError, OSError) as error:
        assert_one_line(error, folder)


# -- at the command line -------------------------------------------------------------------------------------------


@settings(FUZZ, max_examples=60)
@given(
    which=st.integers(0, 50),
    changes=CHANGES,
    target=st.sampled_from(["beir", "msmarco", "trec", "upr", "rankllm", "dpr", "jsonl"]),
)
def test_converting_a_damaged_file(tmp_path_factory, which, changes, target):
    """Whatever still parses is converted and read again, or refused in one line; nothing half-written is left."""
    folder = tmp_path_factory.mktemp("convert")
    (folder / "file").write_bytes(damaged(VALID["any"][which % len(VALID["any"])], changes))
    code = main(["convert", str(folder / "file"), str(folder / "out"), "--to", target])
    left = {path.name for path in folder.iterdir()}
    if code:
        assert code == 2 and left == {"file"}
    else:
        assert left == {"file", "out"}
        if target not in ("trec", "jsonl"):
            READERS["any"](folder / "out")


def test_the_command_shows_one_line(tmp_path, capsys):
    folder = write_folder(tmp_path / "data")
    (folder / "corpus.jsonl").write_bytes(b'{"_id": "d1", "text": "x"}\n{"_id": 3.5, "text": "x"}\n')
    assert main(["retrieve", "--data", str(folder), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "corpus.jsonl, line 2: " in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
    assert open_collection(folder).parts
