"""The hold itself: nothing of the held task has happened, and all of it does after the release."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .hold import Hold


def play(folder: Path, hold: Hold) -> subprocess.Popen[str]:
    touch = {name: {"ansible.builtin.command": {"argv": ["touch", str(folder / name)]}} for name in "ab"}
    tasks = [{"name": "Make a", **touch["a"]}, {"name": "Make b", **touch["b"]}]
    (folder / "play.yml").write_text(
        json.dumps([{"hosts": "localhost", "connection": "local", "gather_facts": False, "tasks": tasks}])
    )
    program = Path(sys.executable).with_name("ansible-playbook")
    return subprocess.Popen(
        [program, folder / "play.yml"], env=os.environ | hold.environment, text=True, start_new_session=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip


def made(folder: Path) -> list[str]:
    return [name for name in "ab" if (folder / name).exists()]


def test_a_play_is_held_before_a_task(tmp_path: Path) -> None:
    (tmp_path / "hold").mkdir()
    hold = Hold("Make b", tmp_path / "hold")
    with play(tmp_path, hold) as process:
        hold.wait(process)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        assert made(tmp_path) == ["a"]
        hold.release()
        assert process.wait() == 0
    assert made(tmp_path) == ["a", "b"]


def test_a_play_that_is_killed_while_it_is_held_did_nothing_more(tmp_path: Path) -> None:
    (tmp_path / "hold").mkdir()
    hold = Hold("Make b", tmp_path / "hold")
    with play(tmp_path, hold) as process:
        hold.wait(process)
        os.killpg(process.pid, signal.SIGKILL)
    assert made(tmp_path) == ["a"]


def test_a_name_that_no_task_has_fails(tmp_path: Path) -> None:
    (tmp_path / "hold").mkdir()
    hold = Hold("Make c", tmp_path / "hold")
    with (
        play(tmp_path, hold) as process,
        pytest.raises(AssertionError, match="the play ended before 'Make c'"),
    ):
        hold.wait(process)
