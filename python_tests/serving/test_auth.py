"""Keys: what is accepted, whatever bytes a client makes of one, and that an empty one lets nobody in."""

import pytest

from qpeft_ext.cli import main
from qpeft_ext.cli.serve import ServeOptions, _spec
from qpeft_ext.serving.auth import Keys
from qpeft_ext.serving.errors import RequestError


def header(raw):
    """A header as ASGI servers and starlette hand it over: the bytes, as Latin-1."""
    return raw.decode("latin-1")


@pytest.mark.parametrize("given", [[""], ["good", ""], [" "], ["\n"]])
def test_an_empty_key_is_refused(capsys, monkeypatch, given):
    with pytest.raises(ValueError, match="would let everyone in"):
        Keys(given)
    arguments = [part for key in given for part in ("--api-key", key)]
    assert main(["serve", "--model", "nowhere", *arguments]) == 2
    assert "an API key is empty" in capsys.readouterr().err
    if given[-1].strip() == "" and given[-1]:
        monkeypatch.setenv("QPEFT_API_KEY", given[-1])
        with pytest.raises(ValueError, match="would let everyone in"):
            _spec(ServeOptions(model=["a"]))


def test_a_line_break_behind_a_key_does_not_matter():
    """Secrets from files end with one, and no header can hold it."""
    assert Keys(["secret\n"]).accept("Bearer secret")


@pytest.mark.parametrize("key", ["schlüssel", "à", "ключ", "a key"])
def test_keys_are_compared_as_the_bytes_that_clients_send(key):
    keys = Keys([key])
    encodings = ["utf-8", "latin-1"] if key not in ("ключ",) else ["utf-8"]
    for encoding in encodings:
        assert keys.accept(header(b"Bearer " + key.encode(encoding)))
        assert keys.accept(header(key.encode(encoding)))
        assert not keys.accept(header(b"Bearer " + key.encode(encoding)[:-1]))


@pytest.mark.parametrize(
    "sent", [None, "", " ", "Bearer", "Bearer ", "bearer  ", "Basic secret", "????", "Bearer Secret"]
)
def test_what_is_no_key_is_refused(sent):
    for keys in (Keys(["secret"]), Keys(["ключ"])):
        assert not keys.accept(sent)
        with pytest.raises(RequestError):
            keys.check(sent)
    assert Keys(()).accept(sent)
