"""TREC runs and the atomic writer: round trips, order, and nothing half written."""

import gzip
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_data import RUN, write_folder, write_lines

from qpeft_ext import formats
from qpeft_ext.formats import trec
from qpeft_ext.utils.files import AtomicWriter, write_text

# -- TREC ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run.trec", "run.trec.gz"])
def test_run_round_trip(tmp_path, name):
    assert formats.write_run(tmp_path / name, RUN, tag="ours") == 9
    back = formats.read_run(tmp_path / name)
    assert {q: [d for d, _ in ranking] for q, ranking in back.items()} == {
        q: [d for d, _ in ranking] for q, ranking in RUN.items()
    }
    assert [file.name for file in tmp_path.iterdir()] == [name]
    text = (gzip.decompress if name.endswith(".gz") else bytes)((tmp_path / name).read_bytes()).decode()
    assert text.splitlines()[0] == "q1 Q0 d4 1 3.0 ours"
    assert [line.split()[3] for line in text.splitlines()] == ["1", "2", "3"] * 3


def test_same_run_same_bytes(tmp_path):
    for name in ("a.gz", "b.gz"):
        formats.write_run(tmp_path / name, RUN)
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.floats(-1e30, 1e30) | st.sampled_from([0.0, -0.0, 1e-45, -1e-45, -300.1, -300.1000001]), min_size=1))
def test_scores_strictly_decrease_as_float32(tmp_path, scores):
    """What trec_eval reads, floats, has the order that was written, whatever the scores and however many are equal."""
    ranking = [(f"d{i}", score) for i, score in enumerate(scores)]
    formats.write_run(tmp_path / "run", {"q": ranking})
    read = [float(np.float32(score)) for _, score in formats.read_run(tmp_path / "run")["q"]]
    assert all(a > b for a, b in zip(read, read[1:], strict=False))
    written = [line.split()[2] for line in (tmp_path / "run").read_text().splitlines()]
    assert written == [d for d, _ in sorted(ranking, key=lambda item: -item[1])]  # equal scores keep their order


def test_ties_in_a_run_go_by_rank_then_id(tmp_path):
    write_lines(tmp_path / "run", ["q Q0 c 3 1.0 t", "q Q0 b 2 1.0 t", "q Q0 a 2 1.0 t", "q Q0 z 9 1.5 t"])
    assert [d for d, _ in formats.read_run(tmp_path / "run")["q"]] == ["z", "a", "b", "c"]


@pytest.mark.parametrize(
    "ranking, message",
    [
        ([("d1", float("nan"))], "query 'q', document 'd1': scores must be finite, got nan"),
        ([("d1", float("inf"))], "must be finite, got inf"),
        ([("d1", 1e39)], "query 'q': the score at rank 1 is 1e\\+39, which is not a finite float32"),
        ([("d1", -3.4028235e38), ("d2", -3.4028235e38)], "rank 2 cannot be lowered"),
        ([("d1", 1.0), ("d2", 1.0), ("d1", 0.5)], "document 'd1' occurs twice for query 'q'"),
        ([("d 1", 1.0)], "doc_id must be text without white space"),
        ([("", 1.0)], "doc_id must be text without white space"),
    ],
)
def test_nothing_half_written(tmp_path, ranking, message):
    (tmp_path / "run").write_text("old")
    with pytest.raises(ValueError, match=message):
        formats.write_run(tmp_path / "run", {"first": [("d1", 1.0)], "q": ranking})
    assert (tmp_path / "run").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_writer_adds_queries_and_appears_at_the_end(tmp_path):
    path = tmp_path / "run.gz"
    with formats.RunWriter(path) as writer:
        assert writer.add("q1", RUN["q1"]) == 3 and writer.add("none", []) == 0
        assert not path.exists()
        with pytest.raises(ValueError, match="query 'q1' is already in the run"):
            writer.add("q1", RUN["q1"])
    assert writer.num_lines == 3 and list(formats.read_run(path)) == ["q1"]
    with pytest.raises(KeyboardInterrupt), formats.RunWriter(tmp_path / "b") as writer:
        writer.add("q1", RUN["q1"])
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == ["run.gz"]


def test_atomic_writer_follows_links_and_refuses_what_is_no_file(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    with pytest.raises(ValueError, match="is a folder"):
        AtomicWriter(tmp_path)
    with pytest.raises(FileNotFoundError, match="the folder .*/no does not exist"):
        AtomicWriter(tmp_path / "no" / "file")
    with pytest.raises(ValueError, match="not a regular file"):
        AtomicWriter("/dev/null")
    assert os.path.exists("/dev/null") and not os.path.isfile("/dev/null")


def test_killed_writer_leaves_the_old_file(tmp_path):
    """SIGKILL in the middle of writing: the name still holds what it held."""
    path = tmp_path / "run"
    path.write_text("old")
    program = f"""
import os, signal
from qpeft_ext.formats import RunWriter
writer = RunWriter({str(path)!r})
writer.add("q", [("d", 1.0)])
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert path.read_text() == "old"


def test_find_line(tmp_path):
    path = write_folder(tmp_path) / "run.trec"
    assert trec.find_line(path, "q2") == 4 and trec.find_line(path, "q2", "d5") == 6
    assert trec.find_line(path, "q9") is None
