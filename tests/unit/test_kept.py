"""A checkpoint is kept under its content's name, by hard links, and never with other bytes than its manifest
has.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem.checkpoint import keep, manifest


def make(models: Path, weights: bytes) -> Path:
    folder = models / "m"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    (models / "m.manifest.json").write_text(
        json.dumps({"schema": 1, "files": manifest.entries(manifest.scan(folder))})
    )
    return folder


def test_the_old_bytes_stay_when_the_model_is_made_anew(tmp_path: Path) -> None:
    source = make(tmp_path, b"one")
    place, changed = keep.keep(source)
    assert changed
    assert place.name == "m-" + hashlib.sha256((tmp_path / "m.manifest.json").read_bytes()).hexdigest()[:12]
    assert (place / "model.safetensors").samefile(source / "model.safetensors")
    assert keep.keep(source) == (place, False)
    newer, _ = keep.keep(make(tmp_path, b"two"))
    assert newer != place
    assert (place / "model.safetensors").read_bytes() == b"one"
    assert (newer / "model.safetensors").read_bytes() == b"two"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_damaged_copy_is_made_again_and_a_damaged_source_is_refused(tmp_path: Path) -> None:
    source = make(tmp_path, b"one")
    place, _ = keep.keep(source)
    (place / "model.safetensors").write_bytes(b"oxe")  # the same file: both are damaged now
    with pytest.raises(
        manifest.ManifestError, match=r"m is not as its manifest has it: model\.safetensors: altered"
    ):
        keep.keep(source)
    assert keep.keep(make(tmp_path, b"one")) == (place, True)
    assert (place / "model.safetensors").read_bytes() == b"one"


def test_no_manifest_no_copy(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(manifest.ManifestError, match="no such manifest"):
        keep.keep(tmp_path / "m")


def test_of_several_that_keep_it_at_once_one_makes_it(tmp_path: Path) -> None:
    """As instances of a host that share a store do, each in a process of its own; sixty-four files make the
    copy take a while.
    """
    source = make(tmp_path, b"weights")
    for number in range(64):
        (source / f"part-{number}").write_bytes(bytes([number]))
    (tmp_path / "m.manifest.json").write_text(
        json.dumps({"schema": 1, "files": manifest.entries(manifest.scan(source))})
    )
    command = [sys.executable, "-m", "lowmem.checkpoint.keep", str(source)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [json.loads(process.communicate()[0]) for process in running]
    assert [process.returncode for process in running] == [0] * 4
    assert sorted(answer["changed"] for answer in said) == [False, False, False, True]
    assert not manifest.check(tmp_path / f"{Path(said[0]['path']).name}.manifest.json", Path(said[0]["path"]))
