"""API keys on the demo's deployment with the real engine: what is guarded, rotation under a stream, and that
no key is anywhere else.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
engine = pytest.mark.engine
# new ones each time: what a run that was ended left behind is never one of them
ALICE, BOB = f"sk-alice-{uuid.uuid4().hex}", f"sk-bob~{uuid.uuid4().hex}"


def status(
    deployed: Any, key: str | None, path: str = "/v1/models", body: dict[str, Any] | None = None
) -> int:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{deployed.url}{path}", data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture
def rotate(deployed: Any, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """rotate(keys, *arguments): what the play says with these keys, which a file gives; the key of before
    comes back after.
    """
    before = deployed.key

    def play(keys: dict[str, str], *arguments: str) -> str:
        given = tmp_path / "keys.json"
        given.write_text(json.dumps({"vllm_service_api_keys": keys}))
        command = [
            Path(sys.executable).parent / "ansible-playbook",
            "playbooks/rotate_keys.yml",
            "--extra-vars",
            f"@{given}",
            *arguments,
        ]
        done = subprocess.run(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    yield play
    play({"default": before})


@engine
def test_every_route_but_two_asks_for_a_key(deployed: Any) -> None:
    """The routes are what this server says in its log when it starts."""
    log = (deployed.root / "log/vllm.log").read_text(errors="replace")
    routes = set(re.findall(r"Route: (\S+), Methods", log[log.rindex("Route: /openapi.json") :]))
    assert {
        "/v1/completions",
        "/tokenize",
        "/invocations",
        "/inference/v1/generate",
        "/health",
        "/metrics",
    } <= routes
    opened = {route for route in routes if status(deployed, None, route.replace("{response_id}", "x")) != 401}
    assert opened == {"/health", "/metrics"}
    assert status(deployed, "sk-wrong-0123456789abcdef", "/v1/models") == 401
    assert status(deployed, deployed.key, "/v1/models") == 200


@dataclass
class Stream:
    """One streamed completion; `end` is its status where it was refused, else its last line."""

    began: float
    ended: float
    end: str


class Streams(threading.Thread):
    """One stream after another with one key, until it is refused."""

    def __init__(self, deployed: Any) -> None:
        super().__init__()
        self.address, self.key = deployed.url.removeprefix("http://"), deployed.key
        self.model = deployed.plan["deploy"]["served_model_name"]
        self.seen: list[Stream] = []

    def run(self) -> None:
        body = {"model": self.model, "prompt": "Once", "max_tokens": 40, "ignore_eos": True, "stream": True}
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        while not self.seen or self.seen[-1].end == "data: [DONE]":
            began = time.time()
            connection = http.client.HTTPConnection(self.address, timeout=300)
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            answer = connection.getresponse()
            lines = [line.decode().strip() for line in answer if line.strip()]
            self.seen.append(
                Stream(began, time.time(), lines[-1] if answer.status == 200 else str(answer.status))
            )


@engine
def test_keys_come_and_go_under_streams(deployed: Any, rotate: Callable[..., str]) -> None:
    first = deployed.key

    def processes() -> set[int]:
        supervisor = psutil.Process(int((deployed.root / "run/supervisord.pid").read_text()))
        return {process.pid for process in supervisor.children(recursive=True)}

    server = processes()
    clients = [Streams(deployed) for _ in range(3)]
    for client in clients:
        client.start()
    rotate({"default": first, "alice": ALICE})
    assert (status(deployed, first), status(deployed, ALICE), status(deployed, BOB)) == (200, 200, 401)
    rotate({"alice": ALICE, "bob": BOB})
    assert (status(deployed, first), status(deployed, ALICE), status(deployed, BOB)) == (401, 200, 200)
    assert deployed.key == ALICE, "the first is what this host's own programs send"
    rotated = (deployed.root / "etc/vllm.env").stat().st_mtime
    for client in clients:
        client.join()
        assert [stream.end for stream in client.seen if stream.end != "data: [DONE]"] == ["401"]
    over = [
        stream
        for client in clients
        for stream in client.seen
        if stream.began < rotated < stream.ended and stream.end == "data: [DONE]"
    ]
    assert over, "no stream ran over the rotation"
    assert processes() == server


@engine
def test_a_key_is_in_its_file_and_nowhere_else(deployed: Any, rotate: Callable[..., str]) -> None:
    said = rotate({"alice": ALICE, "bob": BOB}, "--diff", "-vvv")
    keys = (ALICE, BOB)
    assert [key for key in keys if key in said] == []
    assert status(deployed, BOB) == 200
    file = deployed.root / "etc/vllm.env"
    assert file.stat().st_mode & 0o777 == 0o600
    folders = ["etc", "log", "run", "releases", "current", "cache", "lib"]
    texts = [path for name in folders for path in (deployed.root / name).rglob("*") if path.is_file()]
    texts += [path for path in (REPOSITORY / ".lowmem/receipts").rglob("*") if path.is_file()]
    holders = {path.resolve() for path in texts for key in keys if key.encode() in path.read_bytes()}
    assert holders == {file.resolve()}
    looked_at = 0
    for process in psutil.process_iter():
        try:
            text = " ".join(process.cmdline()) + str(process.environ())
        except psutil.Error:
            continue
        looked_at += "LOWMEM_API_KEYS" in text
        assert [key for key in (*keys, deployed.key) if key in text] == [], process
    assert looked_at >= 2, "the server's own processes were not looked at"


@engine
@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_another_user_sees_no_key(deployed: Any) -> None:
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    script = "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ \"$1\" 2>/dev/null | tr '\\0' '\\n'"
    seen = subprocess.run(
        [*as_nobody, "bash", "-c", script, "bash", deployed.root / "etc/vllm.env"],
        capture_output=True,
        check=False,
    ).stdout
    assert b"lowmem.api_keys.ApiKeys" in seen, "the server's arguments are there to be seen"
    assert deployed.key.encode() not in seen


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "empty": ({"a": ""}, "vllm_service_api_keys has a: a value must be 16 to 256 letters"),
    "short": ({"a": "sk-0123456789ab"}, "vllm_service_api_keys has a: a value must be 16 to 256 letters"),
    "two words": (
        {"a": "sk-0123456789 abcdefgh"},
        "vllm_service_api_keys has a: a value must be 16 to 256 letters",
    ),
    "with a line break": (
        {"a": f"{ALICE}\nVLLM_API_KEY_x={BOB}"},
        "vllm_service_api_keys has a: a value must be 16 to 256 letters",
    ),
    "with a line's end": (
        {"a": f"{ALICE}\n"},
        "vllm_service_api_keys has a: a value must be 16 to 256 letters",
    ),
    "a number": ({"a": 12345678901234567}, ""),
    "a name of two words": (
        {"a b": ALICE},
        "vllm_service_api_keys has a b: a name must be a letter and then at most 31 letters, digits or _.",
    ),
    "no name": ({"": ALICE}, "a name must be a letter and then"),
    "one key twice": ({"a": ALICE, "b": ALICE}, "two of a, b are the same key"),
    "names alike": ({"a": ALICE, "A": BOB}, "two names are the same but for capital letters"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_keys_are_refused_in_one_line_without_the_key(
    case: str, clean_root: Path, tmp_path: Path
) -> None:
    keys, said = BAD[case]
    given = tmp_path / "keys.json"
    given.write_text(json.dumps({"vllm_service_api_keys": keys, "lowmem_root": str(clean_root)}))
    command = [
        Path(sys.executable).parent / "ansible-playbook",
        "playbooks/rotate_keys.yml",
        "--extra-vars",
        f"@{given}",
    ]
    done = subprocess.run(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 2
    text = " ".join(done.stdout.split())
    if said:
        assert said in text
        assert "changed=0" in text
        assert [key for key in keys.values() if key and str(key) in text] == []
    else:  # as good as any other
        assert "there is no release in lowmem_root" in text


def test_a_name_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vars.yml").write_text(f"vllm_service_api_keys:\n  a: {ALICE}\n  a: {BOB}\n")
    command = [
        Path(sys.executable).parent / "ansible-playbook",
        "playbooks/rotate_keys.yml",
        "--extra-vars",
        f"@{tmp_path / 'vars.yml'}",
    ]
    done = subprocess.run(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode != 0
    assert "duplicate" in done.stdout.lower()
