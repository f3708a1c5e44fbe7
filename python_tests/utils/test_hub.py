"""A name that must come from the Hub, without a connection: one line, at once. The Hub is a port of this machine."""

import http.server
import logging
import shutil
import socket
import threading
import time

import pytest

import qpeft_ext as qpeft
from qpeft_ext.adapters.files import local_folder
from qpeft_ext.cli import main
from qpeft_ext.lm.loading import BASE_LM, lm_digest, load_config, load_lm, load_tokenizer

NAME = "nobody/no-such-lm"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A function that says where the Hub is; the cache is empty."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def move_to(port: int) -> None:
        place = f"http://127.0.0.1:{port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", place)
        form = f"{place}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", form)

    return move_to


@pytest.fixture
def nowhere(hub):
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        hub(free.getsockname()[1])
        yield


@pytest.fixture
def pauses(monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


@pytest.mark.parametrize(
    "load", [load_lm, load_config, load_tokenizer, lm_digest, local_folder, qpeft.QPeftModel.from_pretrained]
)
def test_without_a_connection(load, nowhere, pauses, caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(OSError, match="cannot be reached") as raised:
        load(NAME)
    message = str(raised.value)
    assert NAME in message and message.endswith("check the name, or connect to the network")
    assert len(message) <= 300 and "\n" not in message
    assert sum(pauses) <= 1 and not caplog.records


def test_what_is_in_the_cache_is_loaded(nowhere, pauses, tmp_path):
    """It asks for a commit, as adapters do; and for a branch, whose commit the cache knows."""
    place = tmp_path / "cache" / "models--nobody--no-such-lm"
    shutil.copytree(BASE_LM, place / "snapshots" / ("c" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("c" * 40)
    expected = load_config(BASE_LM).hidden_size
    for revision in ("c" * 40, "main", None):
        assert load_config(NAME, cache_dir=str(tmp_path / "cache"), revision=revision).hidden_size == expected
    with pytest.raises(OSError, match="cannot be reached"):
        load_config(NAME, cache_dir=str(tmp_path / "cache"), revision="other")


def test_a_hub_that_answers_has_the_last_word(hub):
    """The connection is all that is checked: that there is no such name is for the Hub to say."""
    asked = []

    class Missing(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Missing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub(server.server_port)
        try:
            with pytest.raises(OSError, match="is not a valid model identifier") as raised:
                load_config(NAME)
            with pytest.raises(FileNotFoundError, match="the Hub has no such repository, or not for you"):
                local_folder(NAME)
        finally:
            server.shutdown()
    assert "cannot be reached" not in str(raised.value)
    assert any(NAME in path for path in asked)


def test_the_command_names_the_teacher(nowhere, pauses, tmp_path, capsys):
    command = ["distill", "--teacher", NAME, "--base-model", BASE_LM, "--data", tmp_path, "--output", tmp_path / "new"]
    assert main([str(word) for word in command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"qpeft distill: error: --teacher: cannot load the adapter '{NAME}': there is no such folder"
    )
    assert line.endswith("check the name, or connect to the network")
