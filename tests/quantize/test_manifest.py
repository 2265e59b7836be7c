"""lowmem.manifest: which bytes are served, and how an altered file is found."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem.checkpoint import manifest


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, Path]:
    """A folder of two files and its manifest, looked at once."""
    folder = tmp_path / "m"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "sub/weights").write_bytes(b"abc")
    path = tmp_path / "m.manifest.json"
    manifest.write_json(
        path, {"schema": 1, "files": manifest.entries(manifest.scan(folder)), "recipe_sha256": "r"}
    )
    assert manifest.check(path, folder) == []
    return path, folder


def problems(path: Path, folder: Path) -> list[tuple[str, str]]:
    return [(problem.path, problem.problem) for problem in manifest.check(path, folder)]


def test_scan_gives_path_size_and_hash(model: tuple[Path, Path]) -> None:
    # echo -n abc | sha256sum
    sha = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert manifest.scan(model[1])[1] == manifest.File("sub/weights", 3, sha)


def test_a_truncated_file_is_named(model: tuple[Path, Path]) -> None:
    (model[1] / "sub/weights").write_bytes(b"ab")
    assert problems(*model) == [("sub/weights", "truncated")]
    assert str(manifest.check(*model)[0]) == "sub/weights: truncated, 2 bytes, the manifest has 3"


def test_an_altered_file_is_found_even_with_its_old_modification_time(model: tuple[Path, Path]) -> None:
    path = model[1] / "sub/weights"
    stat = path.stat()
    path.write_bytes(b"abd")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert problems(*model) == [("sub/weights", "altered")]


def test_missing_and_extra_files_are_named(model: tuple[Path, Path]) -> None:
    (model[1] / "config.json").rename(model[1] / "other.json")
    assert problems(*model) == [("config.json", "missing"), ("other.json", "extra")]


def test_a_folder_that_is_gone_misses_every_file(model: tuple[Path, Path], tmp_path: Path) -> None:
    assert problems(model[0], tmp_path / "nowhere") == [
        ("config.json", "missing"),
        ("sub/weights", "missing"),
    ]


def test_a_file_is_read_once_only(model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    hash_it = manifest.sha256_of
    monkeypatch.setattr(manifest, "sha256_of", lambda path: (read.append(path.name), hash_it(path))[1])
    assert manifest.check(*model) == []
    assert read == []
    assert manifest.check(*model, full=True) == []
    assert sorted(read) == ["config.json", "weights"]


def test_an_altered_file_stays_altered_at_the_next_look(model: tuple[Path, Path]) -> None:
    (model[1] / "sub/weights").write_bytes(b"abd")
    assert problems(*model) == problems(*model) == [("sub/weights", "altered")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a manifest of schema 1"),
        ('{"schema": 2, "files": []}', "not a manifest of schema 1"),
    ],
)
def test_a_broken_manifest_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "m.manifest.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(manifest.ManifestError, match=said):
        manifest.check(path, tmp_path)


def test_as_a_command_on_a_host(model: tuple[Path, Path]) -> None:
    def ask(*more: str) -> tuple[int, str]:
        source = Path(manifest.__file__).read_text(encoding="utf-8")
        command = [sys.executable, "-I", "-S", "-", *map(str, model), *more]
        done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    assert ask() == (0, "")
    assert ask("--recipe", "r") == (0, "")
    assert ask("--recipe", "s") == (1, f"{model[0]}: made by another recipe\n")
    (model[1] / "config.json").write_text("", encoding="utf-8")
    assert ask() == (1, "config.json: truncated, 0 bytes, the manifest has 2\n")


def test_write_json_leaves_nothing_beside(tmp_path: Path) -> None:
    manifest.write_json(tmp_path / "x.json", {"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"a": 1}


def test_digest_does_not_depend_on_the_order_of_keys() -> None:
    # printf '{"a":1,"b":2}' | sha256sum
    expected = "43258cff783fe7036d8a43033f830adfc60ec037382473548ac742b888292777"
    assert manifest.digest_of({"b": 2, "a": 1}) == manifest.digest_of({"a": 1, "b": 2}) == expected


def safetensors(path: Path, data: bytes, end: int) -> Path:
    header = json.dumps(
        {"__metadata__": {}, "w": {"dtype": "F16", "shape": [end // 2], "data_offsets": [0, end]}}
    ).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def test_a_safetensors_file_of_the_wrong_length_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    assert list(manifest.safetensors_header(safetensors(path, b"1234", 4))) == ["w"]
    with pytest.raises(manifest.ManifestError, match="truncated"):
        manifest.safetensors_header(safetensors(path, b"123", 4))
    with pytest.raises(manifest.ManifestError, match="altered"):
        manifest.safetensors_header(safetensors(path, b"12345", 4))
    path.write_bytes(b"\x00")
    with pytest.raises(manifest.ManifestError, match="truncated, 1 bytes"):
        manifest.safetensors_header(path)
