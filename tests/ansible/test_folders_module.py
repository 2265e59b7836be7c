"""Several folders in one call: each as wanted, again without a change, and nothing in check mode."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MODULE = Path(__file__).resolve().parents[2] / "plugins/modules/folders.py"


def folders(tmp_path: Path, *wanted: tuple[str, str], check: bool = False, **more: Any) -> dict[str, Any]:
    given = [{"path": str(tmp_path / path), "mode": mode, **more} for path, mode in wanted]
    arguments = {"folders": given, "_ansible_check_mode": check, "_ansible_remote_tmp": str(tmp_path / "tmp")}
    done = subprocess.run(
        [sys.executable, MODULE, json.dumps({"ANSIBLE_MODULE_ARGS": arguments})],
        capture_output=True,
        text=True,
        check=False,
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def modes(tmp_path: Path, *paths: str) -> list[str]:
    return [oct((tmp_path / path).stat().st_mode & 0o7777) for path in paths]


def test_each_has_its_mode_whatever_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = os.umask(0o077)
    try:
        said = folders(tmp_path, ("root", "0755"), ("root/run", "0700"), ("root/deep/er", "0750"))
    finally:
        os.umask(old)
    assert said["changed_folders"] == [str(tmp_path / path) for path in ("root", "root/run", "root/deep/er")]
    assert modes(tmp_path, "root", "root/run", "root/deep/er") == ["0o755", "0o700", "0o750"]


def test_again_it_changes_nothing_and_another_mode_is_set_right(tmp_path: Path) -> None:
    folders(tmp_path, ("root", "0755"), ("root/run", "0700"))
    assert folders(tmp_path, ("root", "0755"), ("root/run", "0700"))["changed"] is False
    (tmp_path / "root/run").chmod(0o755)
    assert folders(tmp_path, ("root", "0755"), ("root/run", "0700"))["changed_folders"] == [
        str(tmp_path / "root/run")
    ]
    assert modes(tmp_path, "root/run") == ["0o700"]


def test_check_mode_says_what_would_be_and_leaves_all_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir(mode=0o700)
    said = folders(tmp_path, ("there", "0755"), ("new", "0755"), check=True)
    assert said["changed_folders"] == [str(tmp_path / "there"), str(tmp_path / "new")]
    assert (modes(tmp_path, "there"), (tmp_path / "new").exists()) == (["0o700"], False)


def test_a_link_to_a_folder_is_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    folders(tmp_path, ("link", "0755"))
    assert (tmp_path / "link").is_symlink()
    assert modes(tmp_path, "real") == ["0o755"]


def test_a_file_in_its_place_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert folders(tmp_path, ("file", "0755"))["msg"] == f"{tmp_path / 'file'} is there and is no folder"
    assert (tmp_path / "file").read_text() == "x"


def test_an_unknown_owner_is_an_error(tmp_path: Path) -> None:
    assert folders(tmp_path, ("root", "0755"), owner="nobody-of-that-name")["failed"] is True
