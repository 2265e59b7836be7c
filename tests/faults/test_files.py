"""Faults of disks, links, descriptors and networks against the real programs, in the smallest setting that
has them: a mount, a namespace, a limit of a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lowmem.checkpoint import manifest
from lowmem.errors import BadInput
from lowmem.files import write_text
from lowmem.service.api_keys import ApiKeys

REPOSITORY = Path(__file__).resolve().parents[2]
RECEIPT = REPOSITORY / "docs/measurements/2026-11-26-4xh100/fleet/one.json"
PLAN = REPOSITORY / "tests/ansible/files/plan.json"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts and namespaces need root")


def lowmem(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lowmem", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False, timeout=300)


WRITERS = {
    "report": ("report", RECEIPT, "--out", "{}"),
    "receipt": ("receipt", RECEIPT, "--out", "{}"),
    "measure": ("measure", "--plan", PLAN, "--url", "http://127.0.0.1:9", "--pid", 1, "--out", "{}"),
    "frontier": ("frontier", "--out", "{}"),
    "capacity": ("capacity", "--out", "{}"),
}
"""Every command that writes a file."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own with a file of an earlier run."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=True)
    (folder / "out.svg").write_text("as it was\n")
    yield folder
    subprocess.run(["umount", folder], check=True)


def refused(command: str, disk: Path, says: str) -> None:
    words = [str(disk / "out.svg") if word == "{}" else word for word in WRITERS[command]]
    done = lowmem(*words)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.splitlines()[-1] == f"lowmem: {disk}/out.svg: {says}"
    assert {path.name for path in disk.iterdir()} - {"filler"} == {"out.svg"}
    assert (disk / "out.svg").read_text() == "as it was\n"


@needs_root
@pytest.mark.fault("disk-read-only")
def test_a_read_only_disk(disk: Path, fault: Any) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for command in WRITERS:
        refused(command, disk, "Read-only file system")
    fault.saw(f"{', '.join(WRITERS)}: one line with the file, exit 1; measure says so before it measures")


@needs_root
@pytest.mark.fault("disk-full-results")
def test_a_full_disk(disk: Path, fault: Any) -> None:
    with (disk / "filler").open("wb", 0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(1024))
    for command in ("report", "receipt"):
        refused(command, disk, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        manifest.write_json(disk / "out.svg", ["x" * 1024])
    assert sorted(path.name for path in disk.iterdir()) == ["filler", "out.svg"]
    fault.saw("report, receipt: one line, exit 1; the old file is whole, and no half of a new one is left")


@pytest.mark.fault("links-in-shared-folders")
def test_a_link_that_waits_under_a_temporary_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    """Another user of the folder knows the name and the number of the process that writes."""
    victim = tmp_path / "victim"
    victim.write_text("whole")
    shared = tmp_path / "shared"
    shared.mkdir()
    names = [f".out.json.{os.getpid()}", "out.json.new", ".out.json.new", "out.json.tmp", "out.json"]
    for name in names:
        (shared / name).symlink_to(victim)
    write_text(shared / "out.json", "new")
    manifest.write_json(shared / "out.json", "new")
    assert victim.read_text() == "whole"
    assert json.loads((shared / "out.json").read_text()) == "new"
    assert not (shared / "out.json").is_symlink()
    # even a name that was guessed is not followed
    monkeypatch.setattr("secrets.token_hex", lambda _: "guessed")
    (shared / ".out.json.guessed").symlink_to(victim)
    for write in (write_text, manifest.write_json):
        with pytest.raises(FileExistsError):
            write(shared / "out.json", "worse")
    assert victim.read_text() == "whole"
    fault.saw(f"links under {len(names)} names lead nowhere; a link under the very name stops the write")


@needs_root
@pytest.mark.fault("log-replaced-by-link")
def test_a_log_that_the_services_user_has_replaced_by_a_link(tmp_path: Path, fault: Any) -> None:
    """The role's own tasks, over a folder that an older release gave to the user."""
    victim, log = tmp_path / "shadow", tmp_path / "host/log"
    victim.write_text("root's own")
    victim.chmod(0o640)
    log.mkdir(parents=True)
    shutil.chown(log, "nobody", "nogroup")

    def deploy() -> subprocess.CompletedProcess[str]:
        variables = {
            "vllm_service_root": str(tmp_path / "host"), "__vllm_service_effective_manager": "systemd",
            "__vllm_service_owner": "nobody", "__vllm_service_owner_group": "nogroup",
            "ansible_python_interpreter": sys.executable,
        }  # fmt: skip
        command = [Path(sys.executable).with_name("ansible-playbook"), "-i", "localhost,", "-c", "local"]
        command += ["tests/ansible/files/log.yml", "-e", json.dumps(variables)]
        return subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, check=False,
            env=os.environ | {"ANSIBLE_NOCOLOR": "1"},
        )  # fmt: skip

    for kind in (os.symlink, os.link):
        kind(victim, log / "vllm.log")
        said = deploy()
        assert said.returncode == 2, said.stdout
        assert f"{log}/vllm.log is no file of its own but a link" in " ".join(said.stdout.split())
        status = victim.stat()
        assert (status.st_uid, status.st_mode & 0o777, victim.read_text()) == (0, 0o640, "root's own")
        (log / "vllm.log").unlink()
    assert deploy().returncode == 0
    status = log.stat()
    assert (log.owner(), log.group(), status.st_mode & 0o777) == ("root", "nogroup", 0o750)
    assert ((log / "vllm.log").owner(), (log / "vllm.log").stat().st_mode & 0o777) == ("nobody", 0o600)
    # what was possible: the user of the service names the file that root opens next
    planted = subprocess.run(
        ["ln", "-sf", victim, log / "vllm.log"], user="nobody", group="nogroup", extra_groups=[],
        capture_output=True, check=False,
    )  # fmt: skip
    assert planted.returncode == 1
    fault.saw(
        "the play refuses the link in one line, root's file is as it was; afterwards the user can plant none"
    )


@pytest.mark.parametrize("name", ["playbooks/group_vars/all.yml", "playbooks/reset.yml"])
def test_root_keeps_its_tasks_in_no_folder_of_others(name: str) -> None:
    found = re.findall(r"ansible_async_dir: (.+)", (REPOSITORY / name).read_text())
    assert found in (['"{{ lowmem_root }}/lib/async"'], ["~/.ansible_async"])


@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_nothing_but_a_file_is_replaced(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "out"
    os.mkfifo(place) if kind == "fifo" else place.mkdir()
    with pytest.raises(BadInput, match="is not a regular file; name a file to write"):
        write_text(place, "text")


async def _app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


@pytest.mark.fault("few-descriptors")
def test_a_key_revoked_while_the_server_has_no_descriptor_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    file = tmp_path / "vllm.env"
    file.write_text("VLLM_API_KEY=sk-old-0123456789\n")
    monkeypatch.setenv("LOWMEM_API_KEYS", str(file))
    guard = ApiKeys(_app)

    def status(key: str) -> int:
        sent: list[dict[str, Any]] = []

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"authorization", f"Bearer {key}".encode())]
        scope = {"type": "http", "path": "/v1/models", "headers": headers, "method": "GET"}
        with asyncio.Runner() as runner:
            loop = runner.get_loop()  # has its descriptors before the limit falls
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit or soft, hard))
            try:
                loop.run_until_complete(guard(scope, None, send))  # type: ignore[arg-type]
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return int(sent[0]["status"])

    limit = 0
    assert status("sk-old-0123456789") == 200
    (tmp_path / "new").write_text("VLLM_API_KEY=sk-new-0123456789\n")
    (tmp_path / "new").replace(file)
    limit = 1
    assert status("sk-old-0123456789") == 200  # the file cannot be opened
    limit = 0
    assert status("sk-old-0123456789") == 401
    assert status("sk-new-0123456789") == 200
    fault.saw("the keys known before stay while no file can be opened; the first request after it gets 401")


ONLY_IPV6 = """
import http.server, json, socket, sys, threading
from pathlib import Path
from typer.testing import CliRunner
from lowmem.cli.main import app

class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        metrics = Path("tests/data/metrics/vllm_0.32_cpu_probes.txt").read_bytes()
        self.answer(metrics if self.path == "/metrics" else b"")
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(b'{"usage": {"completion_tokens": 1}}')
    def answer(self, text):
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    def log_message(self, *_):
        pass

server = Server(("::1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
plan = json.loads(Path("tests/ansible/files/plan.json").read_text())
plan["deploy"] |= {"host": sys.argv[2], "port": server.server_port}
folder = Path(sys.argv[1])
(folder / "plan.json").write_text(json.dumps(plan))
(folder / "vllm.env").write_text("VLLM_API_KEY=sk-0123456789abcdef\\n")
try:
    socket.create_connection(("127.0.0.1", server.server_port))
except OSError as error:
    print("IPv4:", error.strerror)
common = ["--plan", str(folder / "plan.json")]
for words in (["ready", *common, "--env-file", str(folder / "vllm.env"), "--timeout-s", "5"],
              ["top", *common, "--once", "--json", "--every-s", "0.2"],
              ["report", "--live", *common, "--out", str(folder / "page.html")]):
    done = CliRunner().invoke(app, words)
    print(words[0], done.exit_code, *done.stderr.splitlines())
"""


@needs_root
@pytest.mark.fault("ipv6-only")
@pytest.mark.parametrize("host", ["::1", "::"])
def test_a_host_without_ipv4(host: str, tmp_path: Path, fault: Any) -> None:
    inside = 'ip link set lo up && ip -4 address flush dev lo && exec "$@"'
    words = ["unshare", "--net", "sh", "-c", inside, "_", sys.executable, "-c", ONLY_IPV6, tmp_path, host]
    done = subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY, check=False, timeout=300)
    assert done.stdout.splitlines() == [
        "IPv4: Network is unreachable", "ready 0", "top 0", "report 0",
    ], done.stdout + done.stderr  # fmt: skip
    assert "serving" in (tmp_path / "page.html").read_text()
    fault.saw("ready, top and report reach a server on ::1 and ::, without any address of IPv4")


ROTATED = """
import os, sys, time
out = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
for n in range(20_000):
    os.write(out, b"line %d of the engine's log\\n" % n)
    if n % 10 == 0:
        time.sleep(0.01)
"""

LOGROTATE = shutil.which("logrotate", path=f"{os.environ['PATH']}:/usr/sbin")


@pytest.mark.skipif(LOGROTATE is None, reason="logrotate is not installed: apt-get install logrotate")
@pytest.mark.fault("log-rotation")
def test_a_log_that_is_rotated_while_it_is_written(tmp_path: Path, fault: Any) -> None:
    """As the role configures it, but for the folder, the size, the number and the user."""
    log = tmp_path / "vllm.log"
    settings = (REPOSITORY / "tests/ansible/golden/vllm.logrotate").read_text()
    for old, new in (
        ("/srv/vllm-lowmem/log/vllm.log", str(log)), ("20M", "100k"),
        ("rotate 5", "rotate 1000"),
    ):  # fmt: skip
        assert old in settings
        settings = settings.replace(old, new)
    (tmp_path / "settings").write_text(settings)
    with subprocess.Popen([sys.executable, "-c", ROTATED, log]) as writer:
        while writer.poll() is None:
            subprocess.run([str(LOGROTATE), "--state", tmp_path / "state", tmp_path / "settings"], check=True)
    assert writer.returncode == 0
    files = sorted(tmp_path.glob("vllm.log*"))
    whole = re.compile(rb"line (\d+) of the engine's log")
    lines = [line for path in files for line in path.read_bytes().splitlines()]
    numbers = [int(match[1]) for line in lines if (match := whole.fullmatch(line))]
    assert len(files) >= 3
    assert len(numbers) == len(set(numbers))
    assert 19_999 in numbers
    # a writer that does not append would leave a hole where the file was cut
    assert b"\0" not in log.read_bytes()
    lost = 20_000 - len(numbers)
    fault.saw(
        f"{len(files) - 1} rotations in 20,000 lines at about 1,000 a second: none twice, {lost:,} lost"
        " between copy and truncation"
    )
