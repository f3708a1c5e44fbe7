"""Damage to a file, drawn at random: of its bytes, of its lines, of the values in it, or of what lies in its place."""

from __future__ import annotations

import copy
import gzip
import json
import os
import random
import struct
from pathlib import Path

VALUES = [None, True, False, 0, -1, 3, 2**31, 2**63, 10**30, -0.5, 1e-300, 1e39, float("nan"), float("inf"), "", " ",
          "x", "0", "\ud800", "\x1b[31m", "x" * 5000, "../../etc/passwd", "/dev/zero", "http://a/b", [], {}, [None],
          [[]], ["x"], {"a": 1}, [0] * 1000]  # fmt: skip
PIECES = [b"\n", b"\r\n", b"\t", b" ", b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\x00", b"\xff",
          b"\xef\xbb\xbf", b"nan", b"inf", b"1e999", b"-1", b"0", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"null",
          b'""', b"\\ud800", b"\x1b[2J", b"&a", b"*a", b"- ", b"x" * 20_000]  # fmt: skip
PLACES = ("fifo", "folder", "loop", "dangling", "missing", "device", "empty")


def damaged(content: bytes, draw: random.Random, name: str) -> bytes | str:
    """The content changed in one to three ways, or one of `PLACES`, what stands where the file was."""
    kind = draw.random()
    if kind < 0.06:
        return draw.choice(PLACES)
    if name.endswith(".gz") and draw.random() < 0.5:
        return gzip.compress(_changed(gzip.decompress(content), draw, name), mtime=0)
    if kind < 0.09:
        return gzip.compress(content, mtime=0)  # a compression that its name does not say, or twice
    return _changed(content, draw, name)


def _changed(content: bytes, draw: random.Random, name: str) -> bytes:
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        content = draw.choice(_WAYS)(content, draw, name)
    return content


def _flip(content: bytes, draw: random.Random, name: str) -> bytes:
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 4, 50))):
        if content:
            content[_place(content, draw)] ^= 1 << draw.randrange(8)
    return bytes(content)


def _place(content: bytes, draw: random.Random) -> int:
    """Anywhere, or among the first bytes, where headers are."""
    return draw.randrange(min(len(content), draw.choice((64, 2048, len(content)))))


def _span(content: bytes, draw: random.Random) -> tuple[int, int]:
    start = draw.randint(0, len(content))
    return start, min(len(content), start + draw.choice((1, 4, 30, 500, 10_000)))


def _cut(content: bytes, draw: random.Random, name: str) -> bytes:
    return content[: draw.randint(0, len(content))]


def _delete(content: bytes, draw: random.Random, name: str) -> bytes:
    start, end = _span(content, draw)
    return content[:start] + content[end:]


def _repeat(content: bytes, draw: random.Random, name: str) -> bytes:
    start, end = _span(content, draw)
    return content[:end] + content[start:end] * draw.choice((1, 1, 5)) + content[end:]


def _insert(content: bytes, draw: random.Random, name: str) -> bytes:
    place = draw.choice((0, len(content), draw.randint(0, len(content))))
    return content[:place] + draw.choice(PIECES) + content[place:]


def _line(content: bytes, draw: random.Random, name: str) -> bytes:
    """A line removed, doubled, moved, or with another word."""
    lines = content.split(b"\n")
    row = draw.randrange(len(lines))
    way = draw.randrange(4)
    if way == 0:
        del lines[row]
    elif way == 1:
        lines.insert(row, lines[row])
    elif way == 2:
        lines.insert(draw.randrange(len(lines)), lines.pop(row))
    else:
        separator = b"\t" if b"\t" in lines[row] else b" "
        words = lines[row].split(separator)
        words[draw.randrange(len(words))] = draw.choice(PIECES)
        lines[row] = separator.join(words)
    return b"\n".join(lines)


def _value(content: bytes, draw: random.Random, name: str) -> bytes:
    """A value in JSON, JSON lines or the header of a safetensors file replaced, removed, renamed or nested."""
    head, tail = b"", b""
    if name.endswith(".safetensors") and len(content) > 8:
        length = int.from_bytes(content[:8], "little")
        content, tail = content[8 : 8 + length], content[8 + length :]
    try:
        values = [json.loads(content)]
    except (ValueError, RecursionError):
        try:
            values = [json.loads(line) for line in content.splitlines()]
        except (ValueError, RecursionError):
            return _flip(head + content + tail, draw, name)
    places = [(values, i) for i in range(len(values))]
    for parent, key in places:  # it grows as it is walked through
        child = parent[key]
        if isinstance(child, (list, dict)) and len(places) < 20_000:
            places += [(child, key) for key in (child if isinstance(child, dict) else range(len(child)))]
    if not places:
        return b"null"
    parent, key = draw.choice(places)
    way = draw.randrange(5)
    if way == 0:
        del parent[key]
    elif way == 1 and isinstance(parent, dict):
        parent[draw.choice(("x", "", key.upper(), key + " "))] = parent.pop(key)
    elif way == 2 and isinstance(parent[key], (int, float)):
        parent[key] = draw.choice((-parent[key], parent[key] * 10, parent[key] + 1, str(parent[key])))
    elif way == 3:
        parent[key] = [copy.copy(parent[key])] * draw.choice((1, 2, 300))
    else:
        parent[key] = draw.choice(VALUES)
    text = "\n".join(map(json.dumps, values)).encode()
    return struct.pack("<Q", len(text)) + text + tail if name.endswith(".safetensors") else text


_WAYS = (_flip, _cut, _delete, _repeat, _insert, _line, _value, _value, _value)


def put(path: Path, what: bytes | str) -> None:
    """Put changed content, or one of `PLACES`, where the file is."""
    path.unlink()
    if what == "fifo":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "dangling":
        path.symlink_to("nothing")
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what != "missing":
        path.write_bytes(b"" if what == "empty" else what)
