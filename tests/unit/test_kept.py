"""A checkpoint is kept under its content's name, by hard links, and never with other bytes than its manifest has."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from lowmem import kept, manifest


def make(models: Path, weights: bytes) -> Path:
    folder = models / "m"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    (models / "m.manifest.json").write_text(json.dumps({"schema": 1, "files": manifest.entries(manifest.scan(folder))}))
    return folder


def test_the_old_bytes_stay_when_the_model_is_made_anew(tmp_path: Path) -> None:
    source = make(tmp_path, b"one")
    place, changed = kept.keep(source)
    assert changed
    assert place.name == "m-" + hashlib.sha256((tmp_path / "m.manifest.json").read_bytes()).hexdigest()[:12]
    assert (place / "model.safetensors").samefile(source / "model.safetensors")
    assert kept.keep(source) == (place, False)
    newer, _ = kept.keep(make(tmp_path, b"two"))
    assert newer != place
    assert (place / "model.safetensors").read_bytes() == b"one"
    assert (newer / "model.safetensors").read_bytes() == b"two"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_damaged_copy_is_made_again_and_a_damaged_source_is_refused(tmp_path: Path) -> None:
    source = make(tmp_path, b"one")
    place, _ = kept.keep(source)
    (place / "model.safetensors").write_bytes(b"oxe")  # the same file: both are damaged now
    with pytest.raises(manifest.ManifestError, match=r"m is not as its manifest has it: model\.safetensors: altered"):
        kept.keep(source)
    assert kept.keep(make(tmp_path, b"one")) == (place, True)
    assert (place / "model.safetensors").read_bytes() == b"one"


def test_no_manifest_no_copy(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(manifest.ManifestError, match="no such manifest"):
        kept.keep(tmp_path / "m")
