"""The action plugin `progress_command`, run by ansible-playbook."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .support import play, start


def task(tmp_path: Path, code: str, **more: Any) -> list[dict[str, Any]]:
    step = {
        "progress_command": {"argv": [sys.executable, "-c", code], "log": str(tmp_path / "work"), **more},
        "register": "done",
    }
    return [
        step,
        {"ansible.builtin.debug": {"msg": "rc={{ done.rc }} lines={{ done.stdout_lines | length }}"}},
    ]


def variables(tmp_path: Path) -> dict[str, Any]:
    return {"ansible_async_dir": str(tmp_path / "async")}


def test_lines_of_stdout_are_shown_and_both_streams_kept(tmp_path: Path) -> None:
    done = play(
        task(tmp_path, "import sys; print('half way'); print('there'); print('noise', file=sys.stderr)"),
        tmp_path,
        variables(tmp_path),
    )
    assert done.returncode == 0, done.stdout
    assert "localhost | half way\n" in done.stdout
    assert "localhost | there\n" in done.stdout
    assert "noise" not in done.stdout
    assert "rc=0 lines=2" in done.stdout
    assert (tmp_path / "work.progress").read_text(encoding="utf-8") == "half way\nthere\n"
    assert (tmp_path / "work.log").read_text(encoding="utf-8") == "noise\n"
    # nothing of the job is left behind
    assert list((tmp_path / "async").iterdir()) == []


def test_lines_come_while_the_command_runs(tmp_path: Path) -> None:
    # the command ends only after its first line was shown
    code = (
        "import sys, time, pathlib; print('begun', flush=True); [time.sleep(0.1) for _ in"
        " iter(pathlib.Path(sys.argv[1]).exists, True)]"
    )
    marker = tmp_path / "shown"
    steps = task(tmp_path, code)
    steps[0]["progress_command"]["argv"].append(str(marker))
    (tmp_path / "play").mkdir()
    with start(steps, tmp_path / "play", variables(tmp_path)) as process:
        for line in process.stdout or ():
            if "localhost | begun" in line:
                marker.touch()
    assert process.returncode == 0
    assert marker.exists()


def test_what_a_host_says_does_not_steer_the_terminal(tmp_path: Path) -> None:
    code = "import sys; print('\\x1b[2Jhalf\\u202e'); print('\\x9b31mno\\x07', file=sys.stderr); sys.exit(3)"
    done = play(task(tmp_path, code), tmp_path, variables(tmp_path))
    assert done.returncode == 2
    assert r"localhost | \x1b[2Jhalf\u202e" in done.stdout
    assert r"localhost | \x9b31mno\x07" in done.stdout
    assert set("\x1b\x9b\x07\u202e") & set(done.stdout) == set()


def test_a_failure_shows_the_last_lines_of_the_log(tmp_path: Path) -> None:
    code = "import sys; [print(f'line {i}', file=sys.stderr) for i in range(50)]; sys.exit(3)"
    done = play(task(tmp_path, code), tmp_path, variables(tmp_path))
    assert done.returncode == 2
    assert "localhost | line 49\n" in done.stdout
    assert "localhost | line 30\n" in done.stdout
    assert "localhost | line 29\n" not in done.stdout
    assert f"line 49 (full log on the host: {tmp_path}/work.log)" in " ".join(done.stdout.split())


def test_a_command_over_its_time_is_ended(tmp_path: Path) -> None:
    done = play(task(tmp_path, "import time; time.sleep(600)", timeout_s=2), tmp_path, variables(tmp_path))
    assert done.returncode == 2
    assert "no end after 2 s" in done.stdout


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    steps = [{"progress_command": {"argv": ["/nowhere/program"], "log": str(tmp_path / "work")}}]
    done = play(steps, tmp_path, variables(tmp_path))
    assert done.returncode == 2
    assert "/nowhere/program: not found" in done.stdout


def test_check_mode_runs_nothing_and_says_so(tmp_path: Path) -> None:
    done = play(
        task(tmp_path, f"open({str(tmp_path / 'ran')!r}, 'w')"), tmp_path, variables(tmp_path), "--check"
    )
    assert done.returncode == 0, done.stdout
    assert "changed=1" in done.stdout
    assert not (tmp_path / "ran").exists()


def test_stdin_reaches_the_command_and_is_not_shown(tmp_path: Path) -> None:
    code = "import sys; print(len(sys.stdin.readline().strip()))"
    done = play(task(tmp_path, code, stdin="secret-token"), tmp_path, variables(tmp_path), "-vvv")
    assert done.returncode == 0, done.stdout
    assert "localhost | 12\n" in done.stdout
    assert "secret-token" not in "".join(line for line in done.stdout.splitlines() if "EXEC" in line)


def test_arguments_are_checked(tmp_path: Path) -> None:
    done = play([{"progress_command": {"argv": ["true"]}}], tmp_path, variables(tmp_path))
    assert done.returncode == 2
    assert "missing required arguments: log" in done.stdout
