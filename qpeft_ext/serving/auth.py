"""Keys of requests."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from .errors import RequestError


class Keys:
    """Keys that a request may carry in ``Authorization``: ``Bearer KEY``, or the bare key.

    Args:
        keys: plain texts; () lets every request in. White space around one is dropped, as HTTP does around a header.
    Raises: ValueError for a key without a character, which a request without a header would have.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        if not all(key.strip() for key in keys):
            raise ValueError("an API key is empty, which would let everyone in; give one, or leave the option out")
        self._digests = [_digest(sent) for key in keys for sent in _as_sent(key.strip())]

    def __bool__(self) -> bool:
        """Tell whether a key is needed."""
        return bool(self._digests)

    def check(self, header: str | None) -> None:
        """Compare a header with every key, in a time that does not tell how much of it is right.

        Raises: RequestError if none is equal.
        """
        if not self.accept(header):
            raise RequestError("unauthorized", "expected the server's key in the header Authorization: Bearer KEY")

    def accept(self, header: str | None) -> bool:
        """Tell whether `check` raises nothing."""
        if not self._digests:
            return True
        given = (header or "").encode("latin-1", "replace").strip()  # the bytes that came
        kind, _, rest = given.partition(b" ")
        digest = _digest(rest.strip() if kind.lower() == b"bearer" else given)
        return bool(sum([hmac.compare_digest(digest, known) for known in self._digests]))


def _as_sent(key: str) -> set[bytes]:
    """Return the bytes of a key: curl sends UTF-8, Python's clients send Latin-1 where it has the characters."""
    sent = {key.encode("utf-8", "surrogateescape")}
    try:
        return sent | {key.encode("latin-1")}
    except UnicodeEncodeError:
        return sent


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()  # of one length, whatever the key's
