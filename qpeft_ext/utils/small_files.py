"""Read small JSON and YAML files of unknown origin within bounds; every fault in them is one ValueError.

The bounds are on the size of the file, the depth of its nesting (parsers call themselves for each level), and the
number of values that aliases of YAML expand to. A pipe instead of a file is refused: reading it might never end.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import IO, Any

MAX_BYTES = 16 << 20
MAX_YAML_BYTES = 256 << 10  # the parser is written in Python
MAX_DEPTH = 100
MAX_VALUES = 100_000  # of YAML, with every alias written out
_JSON_PARTS = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[{]|[\]}]', re.DOTALL)


def open_regular(path: str | os.PathLike, buffering: int = -1) -> IO[bytes]:
    """Open a regular file for reading. Raises: ValueError for a pipe or a device; OSError if it cannot be opened."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # or opening a pipe waits for a writer
    if not stat.S_ISREG(mode := os.fstat(handle).st_mode):
        os.close(handle)
        what = "is a folder" if stat.S_ISDIR(mode) else "is a pipe or a device"
        raise ValueError(f"{os.fspath(path)} {what}; expected a regular file")
    os.set_blocking(handle, True)
    return os.fdopen(handle, "rb", buffering)


def read_small(path: str | os.PathLike, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a file of at most ``max_bytes``. Raises: ValueError for a larger one; OSError if it cannot be read."""
    with open_regular(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{os.fspath(path)}: has more than {max_bytes:,} bytes")
    return data


def read_json(path: str | os.PathLike, max_bytes: int = MAX_BYTES, nan: bool = False) -> Any:
    """Return the value in a small JSON file.

    Args:
        max_bytes: size of the largest file that is read.
        nan: whether NaN and Infinity are accepted, which Python writes.
    Raises: ValueError that starts with the path; OSError if it cannot be read.
    """
    try:
        return parse_json(read_small(path, max_bytes), nan)
    except NotJSON as error:
        raise ValueError(f"{os.fspath(path)}: not valid JSON ({error})") from None


class NotJSON(ValueError):
    """The text is no JSON, or JSON beyond the bounds."""


def parse_json(data: bytes, nan: bool = False) -> Any:
    """Return the value of a small JSON text in UTF-8. Raises: `NotJSON` with a short message."""
    try:
        text = data.decode("utf-8")
        check_depth(text)
        value = json.loads(
            text,
            object_pairs_hook=_no_key_twice,
            parse_constant=None if nan else _refuse,
            parse_float=None if nan else _finite,
        )
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # half a surrogate pair
    except json.JSONDecodeError as error:
        raise NotJSON(f"line {error.lineno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise NotJSON(f"expected UTF-8, got the byte 0x{data[error.start]:02x} at position {error.start}") from None
    except UnicodeEncodeError:
        raise NotJSON("half a surrogate pair in a text") from None
    except ValueError as error:  # an int of too many digits too
        raise NotJSON(str(error)) from None
    return value


def check_depth(text: str, most: int = MAX_DEPTH) -> None:
    """Raises: `NotJSON` if a JSON text is nested deeper than ``most``."""
    if text.count("[") + text.count("{") <= most:
        return
    depth = 0
    for part in _JSON_PARTS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(part[0][0], 0)
        if depth > most:
            raise NotJSON(f"nested deeper than {most}")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)[:60]!r} is given twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number of JSON")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def read_yaml(path: Path) -> Any:
    """Return the plain values in a small YAML file. Unlike in YAML 1.1, 1e-3 is a number, and a repeated key an error.

    Raises: ValueError that names path and, where it is known, line; OSError if it cannot be read.
    """
    import yaml

    try:
        text = read_small(path, MAX_YAML_BYTES).decode("utf-8")
        _check_events(yaml.parse(text, yaml.SafeLoader))
        return yaml.load(text, _loader())  # noqa: S506 (a SafeLoader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at position {error.start})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', None) or error})") from None
    except _NotYAML as error:
        raise ValueError(f"{path}, {error}") from None
    except (ValueError, IndexError, KeyError, AttributeError, OverflowError) as error:  # "2024-99-99", "0x", …
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: not valid YAML ({error})") from None


class _NotYAML(ValueError):
    """The YAML is beyond the bounds; the message starts with the line."""


def _check_events(events) -> None:
    """Check the depth, and the number of values with every alias written out, before any value is built."""
    import yaml

    sizes: dict[str, int] = {}  # anchor -> values in what it stands for
    open_nodes: list[tuple[str | None, int]] = []  # (anchor, values before it)
    values = 0
    for event in events:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            alias = str(event.anchor)
            if alias not in sizes:
                raise _NotYAML(f"line {line}: *{alias[:60]} stands for nothing that is complete")
            values += sizes[alias]
        elif isinstance(event, yaml.NodeEvent):
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, values))
            elif event.anchor:
                sizes[event.anchor] = 1
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = values - before
        if len(open_nodes) > MAX_DEPTH:
            raise _NotYAML(f"line {line}: nested deeper than {MAX_DEPTH}")
        if values > MAX_VALUES:
            raise _NotYAML(f"line {line}: more than {MAX_VALUES:,} values; do the aliases multiply?")


def _loader() -> type:
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            seen = set()
            for key, _ in node.value:
                if key.tag == "tag:yaml.org,2002:merge":
                    continue
                value = self.construct_object(key, deep=True)
                try:
                    twice = value in seen
                    seen.add(value)
                except TypeError:
                    raise yaml.MarkedYAMLError(
                        problem="a key must be a name or a number", problem_mark=key.start_mark
                    ) from None
                if twice:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {str(value)[:60]!r} is given twice", problem_mark=key.start_mark
                    )
            return super().construct_mapping(node, deep)

    number = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return Loader
