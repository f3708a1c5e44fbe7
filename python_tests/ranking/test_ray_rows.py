"""What goes through Ray: rows of a table and exceptions, and which Ray is taken; without Ray."""

import json
import os
import sys
from types import SimpleNamespace

import pytest

from qpeft_ext.ranking.ray_actors import _Actor, _ranked, _readable, _row
from qpeft_ext.ranking.ray_session import RaySession
from qpeft_ext.ranking.run import RankedBlock


def test_a_block_is_the_same_behind_a_row():
    block = RankedBlock([[(1, -2.5), (0, -3.0)], [], [(0, -1.0)]], 1, 2, 3, long_sentences=4)
    assert _ranked(_row(7, block)) == block


ROW = {"block": 3, "system": "", "query_ids": ["q"], "queries": ["moon"], "doc_ids": [["d"]]}


@pytest.mark.parametrize("when", ["loading", "ranking"])
def test_an_error_of_an_actor_is_part_of_its_row(monkeypatch, tmp_path, when):
    class Systems:
        def __init__(self, *_):
            if when == "loading":
                raise FileNotFoundError("no adapter")

        def __call__(self, block):
            raise json.JSONDecodeError("no JSON", "{", 1)

    monkeypatch.setattr("qpeft_ext.ranking.ray_actors.Systems", Systems)
    monkeypatch.chdir(tmp_path)
    row = _Actor(None, "cpu", str(tmp_path))(ROW)
    assert row["block"] == 3
    with pytest.raises(FileNotFoundError if when == "loading" else ValueError, match="no (adapter|JSON)"):
        _ranked(row)


def test_an_actor_works_in_the_folder_of_the_command(monkeypatch, tmp_path):
    """A relative path of an adapter means the same there as here."""
    monkeypatch.chdir("/")
    folders = []
    monkeypatch.setattr("qpeft_ext.ranking.ray_actors.Systems", lambda *_: folders.append(os.getcwd()))
    _Actor(None, "cpu", str(tmp_path))
    _Actor(None, "cpu", str(tmp_path / "not there"))
    assert folders == [str(tmp_path)] * 2


class TaskError(Exception):
    """Wrap an exception as Ray does with one that an actor raised."""

    __module__ = "ray.exceptions"

    def __init__(self, text, cause=None):
        super().__init__(text)
        self.cause = cause


def errors_of_an_actor():
    for make in (
        lambda: json.loads("{"),
        lambda: b"\xff".decode(),
        lambda: (_ for _ in ()).throw(ValueError()),
        lambda: open("/no/such/file"),
    ):
        try:
            make()
        except Exception as error:
            yield error


@pytest.mark.parametrize("error", list(errors_of_an_actor()), ids=lambda error: type(error).__name__)
def test_the_exception_of_an_actor_comes_through(error):
    """Classes that want more than a text, and one without a text, cannot be made anew of their first line."""
    assert _readable(TaskError("a traceback", TaskError("another", error))) is error


def test_an_error_of_ray_is_one_line():
    found = _readable(TaskError("The actor died.\n  pid 3\nIt was killed.\n"))
    assert isinstance(found, ChildProcessError) and str(found) == "Ray gave up: It was killed."
    assert str(_readable(TaskError(""))) == "Ray gave up: TaskError"


@pytest.mark.parametrize(
    ("runs", "address", "expected"),
    [
        (False, None, [{"num_cpus", "include_dashboard"}]),
        (True, None, [{"num_cpus", "include_dashboard"}, set()]),
        (True, "10.0.0.1:6379", [set()]),
    ],
)
def test_a_ray_that_runs_is_joined(monkeypatch, runs, address, expected):
    """It refuses a number of CPUs: it has its own."""
    asked = []

    def init(logging_level, log_to_driver, **size):
        asked.append(set(size))
        if runs and "num_cpus" in size:
            raise ValueError("When connecting to an existing cluster, num_cpus and num_gpus must not be provided.")

    ray = SimpleNamespace(
        init=init,
        is_initialized=lambda: False,
        cluster_resources=lambda: {"CPU": 4.0},
        nodes=lambda: [{"Alive": True, "Resources": {"CPU": 4.0}}],
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    session = RaySession(["cpu", "cpu"])
    assert (session.kind, session.actors, session.cpus) == ("cpu", 2, 2)
    assert asked == expected
