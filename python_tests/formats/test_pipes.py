"""What is read once may be a pipe (``<(command)``); what is read twice may not, since its beginning would be gone."""

import bz2
import contextlib
import lzma
import os
import threading

import pytest
from small_data import write_folder

from qpeft_ext import formats
from qpeft_ext.cli import main
from qpeft_ext.formats.upr import RetrieverFile

ROWS = {f"q{i}": {f"d{j}": j % 3 for j in range(2000)} for i in range(3)}  # more than any buffer holds
TABLES = {
    "trec": "".join(f"{q} 0 {d} {grade}\n" for q, judged in ROWS.items() for d, grade in judged.items()),
    "beir": "query-id\tcorpus-id\tscore\n"
    + "".join(f"{q}\t{d}\t{grade}\n" for q, judged in ROWS.items() for d, grade in judged.items()),
}
RUN = "".join(f"{q} Q0 {d} {j + 1} {-j}.0 tag\n" for q, judged in ROWS.items() for j, d in enumerate(judged))


@contextlib.contextmanager
def pipe(text: str):
    """Give the name of a pipe that a thread writes a text into, as a shell gives it for ``<(command)``."""
    reading, writing = os.pipe()

    def feed() -> None:
        with contextlib.suppress(BrokenPipeError), open(writing, "w", encoding="utf-8") as file:
            file.write(text)

    thread = threading.Thread(target=feed, daemon=True)
    thread.start()
    try:
        yield f"/dev/fd/{reading}"
    finally:
        os.close(reading)
        thread.join()


@pytest.mark.parametrize("table", TABLES)
def test_qrels_from_a_pipe_are_whole(table):
    with pipe(TABLES[table]) as path:
        assert formats.read_qrels(path) == ROWS
    with pipe(TABLES[table]) as path:
        assert formats.read_judgements(path, None, []) == ROWS


def test_a_run_from_a_pipe_is_whole():
    with pipe(RUN) as path:
        assert formats.read_run(path) == {q: [(d, -float(j)) for j, d in enumerate(ROWS[q])] for q in ROWS}


@pytest.mark.parametrize("read", [formats.open_collection, formats.Corpus, lambda path: RetrieverFile(path).qrels()])
def test_a_data_set_is_no_pipe(read):
    example = '{"query": "q", "positives": ["d"]}\n'
    with pipe(example * 50_000) as path, pytest.raises(ValueError, match="read only once.*write it into a file"):
        read(path)


def test_an_unknown_document_of_a_run_from_a_pipe(tmp_path, capsys):
    data = write_folder(tmp_path / "data")
    with pipe("q1 Q0 nowhere 1 1.0 tag\n") as path:
        command = ["rerank", "--upr", "--base-model", "LM", "--data", data, "--output", tmp_path / "out", "--run", path]
        assert main([str(word) for word in command]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"qpeft rerank: error: {path}: document 'nowhere' of query 'q1' is not in the corpus")


def test_a_gzip_file_of_another_name(tmp_path):
    """The first byte of gzip that is no UTF-8 says nothing to people."""
    formats.write_run(tmp_path / "run.gz", {"q": [("d", 1.0)]})
    (tmp_path / "run.gz").rename(tmp_path / "run")
    with pytest.raises(ValueError, match=r"run: expected text, got a gzip file; let its name end in \.gz"):
        formats.read_run(tmp_path / "run")


@pytest.mark.parametrize(
    "data, kind",
    [
        (bz2.compress(b"q Q0 d 1 1.0 tag\n"), "a bzip2"),
        (lzma.compress(b"q Q0 d 1 1.0 tag\n"), "an xz"),
        (bytes.fromhex("28b52ffd2411890000"), "a zstd"),
        (b"PK\x03\x04\x14\x00\x00\x00\x08\x00\xff\n", "a zip"),
    ],
)
def test_files_of_other_compressors(tmp_path, data, kind):
    (tmp_path / "run").write_bytes(data)
    with pytest.raises(ValueError, match=f"run: expected text, got {kind} file; decompress it, or compress it with gz"):
        formats.read_run(tmp_path / "run")
