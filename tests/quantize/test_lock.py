"""One run works on a folder while others wait."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lowmem.checkpoint import lock

HOLD = """
import sys
from pathlib import Path
from lowmem.checkpoint import lock
with lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_run_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / ".model.lock"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "held\n"
        with lock.held(path, waiting=other.stdin.close):
            assert other.wait() == 0


def test_a_folder_behind_a_link_is_held_and_a_file_behind_one_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "models").symlink_to("store")
    with lock.held(tmp_path / "models"):
        pass
    (tmp_path / ".model.lock").symlink_to("stolen")
    with pytest.raises(OSError, match="symbolic link"), lock.held(tmp_path / ".model.lock"):
        pass
    assert not (tmp_path / "stolen").exists()
