"""Writes and checks the manifest of a checkpoint folder, so that only the bytes put there are served.

The manifest lies beside the folder, as `<name>.manifest.json`. Hashing 40 GB takes half a minute, so
`<name>.seen.json` remembers a full look. A file with unchanged size, inode, modification time and change time
is not read again. No program can set the change time back. So an altered file is read again even if its
modification time was restored.

The module imports the standard library only, since it is also copied to hosts by itself. It is a command
there: `python manifest.py MANIFEST FOLDER`.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import secrets
import struct
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

SCHEMA = 1
CHUNK_BYTES = 2**22

Trouble = Literal["missing", "truncated", "altered", "extra"]


@dataclass(frozen=True)
class File:
    """File of a folder; `path` is relative to the folder."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Problem:
    """File that differs from the manifest."""

    path: str
    problem: Trouble
    detail: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}, {self.detail}"


class ManifestError(ValueError):
    """Raised for a manifest that cannot be used; the message names it."""


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def scan(folder: Path) -> list[File]:
    """Hash every file below `folder`."""
    paths = files_in(folder)
    with ThreadPoolExecutor(4) as pool:
        hashes = list(pool.map(sha256_of, paths))
    return [
        File(path.relative_to(folder).as_posix(), path.stat().st_size, sha)
        for path, sha in zip(paths, hashes, strict=True)
    ]


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside its place and then move it there, whole or not at all."""
    # a name that nobody can guess: in a folder of another user a link could wait under any other
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with beside.open("x", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=2) + "\n")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read(manifest: Path) -> dict[str, Any]:
    """Read a manifest. Raises ManifestError if the file is missing, is no JSON, or has another schema."""
    try:
        value = json.loads(manifest.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ManifestError(f"{manifest}: no such manifest") from None
    except ValueError as error:
        raise ManifestError(f"{manifest}: not valid JSON ({error})") from None
    if (
        not isinstance(value, dict)
        or value.get("schema") != SCHEMA
        or not isinstance(value.get("files"), list)
    ):
        raise ManifestError(f"{manifest}: not a manifest of schema {SCHEMA}")
    return value


def check(manifest: Path, folder: Path, full: bool = False) -> list[Problem]:
    """List the files of `folder` that differ from the manifest. `full` hashes every file again."""
    wanted = {entry["path"]: File(**entry) for entry in read(manifest)["files"]}
    present = (
        {path.relative_to(folder).as_posix(): path for path in files_in(folder)} if folder.is_dir() else {}
    )
    problems = [
        Problem(path, "missing", f"{folder} does not have it") for path in wanted.keys() - present.keys()
    ]
    problems += [
        Problem(path, "extra", "the manifest does not have it") for path in present.keys() - wanted.keys()
    ]
    to_read: dict[str, list[int]] = {}
    seen_path = manifest.with_name(manifest.name.removesuffix(".manifest.json") + ".seen.json")
    seen = {} if full else _read_seen(seen_path)
    for name in wanted.keys() & present.keys():
        stat = present[name].stat()
        if stat.st_size != wanted[name].size_bytes:
            problems.append(
                Problem(
                    name,
                    "truncated" if stat.st_size < wanted[name].size_bytes else "altered",
                    _sizes(stat.st_size, wanted[name]),
                )
            )
            continue
        mark = [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
        if seen.get(name) != [wanted[name].sha256, *mark]:
            to_read[name] = mark
    with ThreadPoolExecutor(4) as pool:
        hashes = dict(zip(to_read, pool.map(sha256_of, (present[name] for name in to_read)), strict=True))
    for name, sha in hashes.items():
        if sha == wanted[name].sha256:
            seen[name] = [sha, *to_read[name]]
        else:
            seen.pop(name, None)
            problems.append(
                Problem(name, "altered", f"SHA-256 {sha[:12]}…, the manifest has {wanted[name].sha256[:12]}…")
            )
    if hashes:
        _write_seen(seen_path, seen)
    return sorted(problems, key=lambda problem: problem.path)


def safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Read the header of one safetensors file: {dtype, shape, data_offsets} by tensor name.

    Raises ManifestError if its length contradicts its header.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > size - 8:
            raise ManifestError(f"{path}: truncated, {size} bytes do not hold its header")
        try:
            tensors: dict[str, dict[str, Any]] = json.loads(file.read(length))
        except ValueError as error:
            raise ManifestError(f"{path}: its header is not valid JSON ({error})") from None
    tensors.pop("__metadata__", None)
    end = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    if end != size:
        raise ManifestError(
            f"{path}: {'truncated' if size < end else 'altered'}, {size} bytes where its header says {end}"
        )
    return tensors


def entries(files: Iterable[File]) -> list[dict[str, Any]]:
    return [asdict(file) for file in files]


def _sizes(size: int, wanted: File) -> str:
    return f"{size} bytes, the manifest has {wanted.size_bytes}"


def _read_seen(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write_seen(path: Path, seen: dict[str, Any]) -> None:
    try:
        write_json(path, seen)
    except OSError as error:  # the service's user, or its sandbox, may look and need not remember
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise


def main() -> int:
    """Check the folder. Exit 1, with one line on stderr for each file that differs."""
    parser = argparse.ArgumentParser(description="Check a checkpoint folder against its manifest.")
    parser.add_argument("manifest", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--full", action="store_true", help="hash every file, also those seen before")
    parser.add_argument("--recipe", help="the SHA-256 of the recipe that the folder must have been made by")
    arguments = parser.parse_args()
    try:
        if arguments.recipe not in (None, read(arguments.manifest).get("recipe_sha256")):
            raise ManifestError(f"{arguments.manifest}: made by another recipe")
        problems = check(arguments.manifest, arguments.folder, arguments.full)
    except ManifestError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    for problem in problems:
        sys.stderr.write(f"{problem}\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
