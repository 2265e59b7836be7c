"""Reads and writes files.

A file is written beside its place and then moved into it, so that a reader never sees half of one. A file
that is read may come from anybody: every reader here is bounded, and refuses with one line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from lowmem.errors import BadInput

JSON_LIMIT_BYTES = 8 * 2**20
YAML_LIMIT_BYTES = 2**18

DEPTH_LIMIT = 100

DIGITS_LIMIT = 20
"""The largest integer of 64 bits has as many."""

NODES_LIMIT = 100_000
"""Nodes of a YAML file, each alias counted as what it stands for."""

_QUOTED = ("'", '"', "|", ">")

_YAML_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def tree_digest(root: Path, paths: Iterable[Path]) -> str:
    """Return a SHA-256 over the names below `root` and the contents of these files.

    Their times do not count.
    """
    total = hashlib.sha256()
    for path in sorted(paths):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(root)}\0{content}\n".encode())
    return total.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file whole, with a newline at its end. A missing folder is created.

    OSError names the file where the disk is full or read-only, and leaves what was there. BadInput for a
    device, a FIFO or a folder, which nothing may replace.
    """
    with _named(path), _beside(path) as beside:
        beside.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
        beside.replace(path)


def check_writable(path: Path) -> None:
    """Raise what `write_text` would raise now, before the work whose result it is to hold."""
    with _named(path), _beside(path):
        pass


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yield a new file beside `path`, which is removed unless it was moved into its place.

    It is new and has a name that nobody can guess: in a folder of others a link could wait under any other.
    """
    with contextlib.suppress(FileNotFoundError):
        kind = path.lstat().st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISLNK(kind)):
            raise BadInput(f"{path} is not a regular file; name a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    beside.touch(exist_ok=False)
    try:
        yield beside
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let an OSError name the file that was asked for."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def open_regular(path: Path) -> int:
    """Open a regular file for reading and return its descriptor. A FIFO or a device would never end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:  # a NUL in the name
        raise FileNotFoundError(0, "no such file", str(path)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadInput(f"{path} is not a regular file; name a file")
    return descriptor


def read_text(path: Path, limit_bytes: int = JSON_LIMIT_BYTES, called: str = "") -> str:
    """Return the text of a regular UTF-8 file. BadInput with one line otherwise, which calls it `called`."""
    name = called or str(path)
    try:
        with os.fdopen(open_regular(path), "rb") as stream:
            data = stream.read(limit_bytes + 1)
    except OSError as error:
        raise BadInput(f"{name}: {error.strerror}") from None
    if len(data) > limit_bytes:
        raise BadInput(f"{name} is larger than {limit_bytes} bytes, the limit of such a file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{name} is not UTF-8 at byte {error.start}") from None


def read_json(
    path: Path, limit_bytes: int = JSON_LIMIT_BYTES, called: str = "", infinite_is_none: bool = False
) -> Any:
    """Return the value of a JSON file. BadInput with one line where a bound of this module is passed."""
    return parse_json(read_text(path, limit_bytes, called), called or str(path), infinite_is_none)


def read_json_object(
    path: Path, limit_bytes: int = JSON_LIMIT_BYTES, called: str = "", infinite_is_none: bool = False
) -> dict[str, Any]:
    """Return the object of a JSON file, as `read_json`."""
    value = read_json(path, limit_bytes, called, infinite_is_none)
    if not isinstance(value, dict):
        raise BadInput(f"{called or path} holds no JSON object")
    return value


def parse_json(text: str | bytes, name: str, infinite_is_none: bool = False) -> Any:
    """Return the value of a JSON text that `name` holds, as `read_json`.

    `infinite_is_none` reads Infinity and NaN as None. Published config.json files have them as bounds that
    are not set, and no size may be one.
    """

    def integer(digits: str) -> int:
        if len(digits) > DIGITS_LIMIT:
            raise BadInput(f"{name} holds an integer of {len(digits)} digits; the limit is {DIGITS_LIMIT}")
        return int(digits)

    def constant(word: str) -> None:
        if infinite_is_none:
            return
        raise BadInput(f"{name} holds {word}, which is not a finite number")

    try:
        value = json.loads(text, parse_int=integer, parse_constant=constant)
    except RecursionError:
        raise BadInput(f"{name} is nested deeper than {DEPTH_LIMIT} levels") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{name} is not JSON ({error})") from None
    _refuse_odd_values(value, name)
    return value


def read_yaml(path: Path) -> Any:
    """Return the value of a YAML file. BadInput with one line where a bound of this module is passed."""
    return parse_yaml(read_text(path, YAML_LIMIT_BYTES), str(path))


def parse_yaml(text: str, name: str) -> Any:
    """Return the value of a YAML text that `name` holds, within the bounds of `read_yaml`."""
    try:
        _refuse_bombs(text, name)
        value = yaml.load(text, Loader=_YAML_LOADER)  # noqa: S506 - both are safe loaders
    except BadInput:
        raise
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError, KeyError) as error:
        raise BadInput(f"{name} is not YAML: {' '.join(str(error).split())}") from None
    _refuse_odd_values(value, name)
    return value


def _refuse_bombs(text: str, name: str) -> None:
    """Go through the events of a YAML text, which need no recursion and build nothing."""
    sizes: dict[str, int] = {}  # of each anchor, in nodes
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and nodes before it
    nodes = 0
    for event in yaml.parse(text, Loader=_YAML_LOADER):
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_nodes):
                raise BadInput(f"{name} holds a node that contains itself (*{event.anchor})")
            nodes += sizes.get(event.anchor or "", 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, nodes))
            nodes += 1
            if len(open_nodes) > DEPTH_LIMIT:
                raise BadInput(f"{name} is nested deeper than {DEPTH_LIMIT} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = nodes - before
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
            digits = event.value.replace("_", "").replace(":", "").lstrip("+-")
            if event.style not in _QUOTED and len(digits) > DIGITS_LIMIT and digits.isdigit():
                raise BadInput(
                    f"{name} holds an integer of {len(digits)} digits; the limit is {DIGITS_LIMIT}"
                )
        if nodes > NODES_LIMIT:
            raise BadInput(f"{name} holds more than {NODES_LIMIT} nodes, with its aliases written out")


def _refuse_odd_values(value: Any, name: str) -> None:
    """Refuse depth, numbers that are not finite or too long, and text that no terminal can be sent."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEPTH_LIMIT:
            raise BadInput(f"{name} is nested deeper than {DEPTH_LIMIT} levels")
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below += one.keys()
                below += one.values()
            elif isinstance(one, list | tuple | set):
                below += one
            elif isinstance(one, float) and not math.isfinite(one):
                raise BadInput(f"{name} holds {one}, which is not a finite number")
            elif isinstance(one, int) and abs(one) >= 10**DIGITS_LIMIT:
                raise BadInput(f"{name} holds an integer of more than {DIGITS_LIMIT} digits")
            elif isinstance(one, str) and not one.isascii() and any("\ud800" <= c <= "\udfff" for c in one):
                raise BadInput(f"{name} holds half of a UTF-16 pair, which is not text")
        level = below
