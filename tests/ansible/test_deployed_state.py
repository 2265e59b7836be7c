"""A host that is as the last whole run left it is told from one that is not, and what differs is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from .plugin import load

REPOSITORY = Path(__file__).resolve().parents[2]
MODULE = REPOSITORY / "plugins/modules/deployed_state.py"

Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "etc/deep").mkdir(parents=True)
    (folder / "etc/a.conf").write_text("a = 1\n")
    (folder / "etc/deep/b.conf").write_text("b = 1\n")
    (folder / "models").mkdir()
    (folder / "models/weights").write_bytes(bytes(1000))
    (folder / "current").symlink_to("releases/one")
    return folder


@pytest.fixture
def module(tmp_path: Path, root: Path) -> Ask:
    def ask(state: str, check: bool = False, **more: Any) -> dict[str, Any]:
        arguments = {
            "state": state,
            "record": str(tmp_path / "record.json"),
            "contents": [f"{root}/etc", f"{root}/current"],
            "outlines": [f"{root}", f"{root}/models/*"],
            "ignored": ["receipt.json", "*.seen.json"],
            "intent": {"variable lowmem_port": "0a", "the repository": "0b"},
            "_ansible_check_mode": check,
            "_ansible_remote_tmp": str(tmp_path / "tmp"),
            **more,
        }
        done = subprocess.run(
            [sys.executable, MODULE, json.dumps({"ANSIBLE_MODULE_ARGS": arguments})],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    return ask


def differences(module: Ask, **more: Any) -> list[str]:
    said = module("compared", **more)
    assert said["unchanged"] == (not said["differences"])
    assert said["changed"] is False
    return list(said["differences"])


def test_without_a_record_nothing_is_as_it_was(module: Ask) -> None:
    said = module("compared")
    assert (said["unchanged"], said["recorded_utc"], said["count"]) == (False, "", 0)


def test_what_was_recorded_is_unchanged_and_the_record_is_the_owners(module: Ask, tmp_path: Path) -> None:
    assert module("recorded")["changed"] is False
    assert differences(module) == []
    assert (tmp_path / "record.json").stat().st_mode & 0o777 == 0o600


def test_check_mode_records_nothing(module: Ask, tmp_path: Path) -> None:
    module("recorded", check=True)
    assert not (tmp_path / "record.json").exists()


def test_recording_again_what_is_unchanged_leaves_the_record(module: Ask, tmp_path: Path) -> None:
    module("recorded")
    inode = (tmp_path / "record.json").stat().st_ino
    module("recorded")
    assert (tmp_path / "record.json").stat().st_ino == inode


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda root: (root / "etc/deep/b.conf").write_text("b = 2\n"), ["etc/deep/b.conf"]),
        (lambda root: (root / "etc/a.conf").chmod(0o600), ["etc/a.conf"]),
        (lambda root: (root / "etc/a.conf").unlink(), ["etc/a.conf"]),
        (lambda root: (root / "etc/new.conf").write_text(""), ["etc/new.conf"]),
        (lambda root: (root / "etc/deep").chmod(0o700), ["etc/deep"]),
        (lambda root: root.chmod(0o711), [""]),
        (lambda root: os.truncate(root / "models/weights", 999), ["models/weights"]),
        (lambda root: os.utime(root / "models/weights", ns=(0, 0)), ["models/weights"]),
        (
            lambda root: ((root / "current").unlink(), (root / "current").symlink_to("releases/two")),
            ["current"],
        ),
    ],
)
def test_what_differs_is_named(
    module: Ask, root: Path, change: Callable[[Path], Any], named: list[str]
) -> None:
    module("recorded")
    change(root)
    assert differences(module) == [str(root / name) for name in named]


def test_what_is_written_anew_by_itself_does_not_count(module: Ask, root: Path) -> None:
    (root / "etc/receipt.json").write_text("1")
    (root / "models/m.seen.json").write_text("1")
    module("recorded")
    (root / "etc/receipt.json").write_text("22")
    (root / "models/m.seen.json").write_text("22")
    assert differences(module) == []


def test_another_intent_differs(module: Ask) -> None:
    module("recorded")
    assert differences(module, intent={"variable lowmem_port": "0c", "the repository": "0b"}) == [
        "variable lowmem_port"
    ]
    assert differences(module, intent={"the repository": "0b"}) == ["variable lowmem_port"]


def test_a_record_that_is_damaged_is_none(module: Ask, tmp_path: Path) -> None:
    module("recorded")
    (tmp_path / "record.json").write_text("{")
    assert module("compared")["recorded_utc"] == ""


def test_many_differences_are_counted_and_five_are_named(module: Ask, root: Path) -> None:
    module("recorded")
    for n in range(7):
        (root / f"etc/{n}").touch()
    said = module("compared")
    assert (said["count"], said["differences"]) == (7, [str(root / f"etc/{n}") for n in range(5)])


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    class Health(BaseHTTPRequestHandler):
        status = 200

        def do_GET(self) -> None:
            self.send_response(self.server.answer)  # type: ignore[attr-defined]
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Health) as http:
        http.answer = 200  # type: ignore[attr-defined]
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield http
        http.shutdown()
        thread.join()


def test_a_server_that_does_not_answer_as_it_did_differs(module: Ask, server: HTTPServer) -> None:
    url = f"http://127.0.0.1:{server.server_port}/health"
    module("recorded", answers=[url])
    assert differences(module, answers=[url]) == []
    server.answer = 503  # type: ignore[attr-defined]
    assert differences(module, answers=[url]) == [url]


def play(root: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [
        Path(sys.executable).with_name("ansible-playbook"),
        REPOSITORY / "tests/ansible/files/skip_unchanged.yml",
        "-i",
        "localhost,",
    ]
    command += ["-e", f"skip_unchanged_root={root}", *more]
    done = subprocess.run(
        [str(part) for part in command], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_role_tells_hosts_and_says_why(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("one")
    variables = ("-e", f"lowmem_chat_template={file}", "-e", "lowmem_port=8123")
    assert (
        "no whole run is on record: nothing is left out" in play(root, *variables, "--tags", "compare").stdout
    )
    assert "changed=0" in play(root, *variables).stdout
    assert "left it: the rest of this run is left out" in play(root, *variables, "--tags", "compare").stdout
    assert (
        "left it: variable lowmem_port\n"
        in play(root, *variables, "-e", "lowmem_port=8124", "--tags", "compare").stdout
    )
    # a file on the controller counts by its content
    file.write_text("two")
    assert "left it: variable lowmem_chat_template\n" in play(root, *variables, "--tags", "compare").stdout
    file.write_text("one")
    (root / "etc/a.conf").write_text("a = 2\n")
    told = play(root, *variables, "--tags", "compare").stdout
    assert f"left it: {root}/etc/a.conf\n" in told
    assert "unchanged: False" in told


def test_a_seal_stands_for_all_files_of_an_environment(tmp_path: Path) -> None:
    module = load("modules/deployed_state.py")
    (tmp_path / "a.py").write_text("a")
    (tmp_path / "b.py").write_text("b")
    (tmp_path / ".files.json").write_text('{"a.py": [1, 2], "b.py": [1, 2]}')
    whole = module.sealed(tmp_path / ".files.json")
    assert module.sealed(tmp_path / ".files.json") == whole
    (tmp_path / "other.py").touch()
    assert module.sealed(tmp_path / ".files.json") == whole
    (tmp_path / "a.py").write_text("aa")
    altered = module.sealed(tmp_path / ".files.json")
    (tmp_path / "b.py").unlink()
    assert len({whole, altered, module.sealed(tmp_path / ".files.json")}) == 3
    (tmp_path / ".files.json").write_text("{")
    assert module.sealed(tmp_path / ".files.json") == "unreadable"
