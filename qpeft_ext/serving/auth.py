"""Keys of requests."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from .errors import RequestError


class Keys:
    """Keys that a request may carry in ``Authorization``: ``Bearer KEY``, or the bare key.

    Args:
        keys: plain texts; () lets every request in.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

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
        given = (header or "").strip()
        kind, _, rest = given.partition(" ")
        digest = _digest(rest.strip() if kind.lower() == "bearer" else given)
        return bool(sum([hmac.compare_digest(digest, known) for known in self._digests]))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()  # of one length, whatever the key's
