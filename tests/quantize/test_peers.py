"""N hosts and one download: local "hosts" with a root each on loopback addresses of their own, the hub a stub
that counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowmem.checkpoint import manifest

from .stub_hub import COMMIT, FILES, StubHub
from .support import HOST, PYTHON, REPOSITORY
from .test_model_source import PATTERNS, SCRIPTS, command, contents, fetch, from_hub

SHARE = (SCRIPTS / "share_model.py").read_text()


class Giver:
    """A host that has the model and gives it."""

    def __init__(self, models: Path, recipe: str, idle_s: float = 30) -> None:
        folder = models / "m"
        folder.mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_bytes(FILES[name])
        files = manifest.entries(manifest.scan(folder))
        manifest.write_json(
            models / "m.manifest.json", {"schema": 1, "name": "m", "files": files, "recipe_sha256": recipe}
        )
        (folder / "secret").write_text("not of the manifest")
        done = self.start(models, "127.0.0.1", idle_s)
        assert done.returncode == 0, done.stderr
        self.said = json.loads(done.stdout)
        self.url = f"http://127.0.0.1:{self.said['port']}"
        self.peer = {"url": self.url, "manifest_sha256": self.said["manifest_sha256"]}

    @staticmethod
    def start(models: Path, address: str, idle_s: float = 30) -> subprocess.CompletedProcess[str]:
        arguments = [str(models / "m.manifest.json"), str(models / "m"), address, "0", "600", str(idle_s)]
        return subprocess.run(
            [sys.executable, "-", *arguments], input=SHARE, capture_output=True, text=True, check=False
        )

    def ask(
        self, path: str, token: str | None = None, method: str = "GET", **headers: str
    ) -> tuple[int, bytes]:
        request = urllib.request.Request(
            f"{self.url}/{path}",
            method=method,
            headers={"Authorization": f"Bearer {token or self.said['token']}", **headers},
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, b""


@pytest.fixture
def giver(tmp_path: Path) -> Iterator[Giver]:
    host = Giver(tmp_path / "giver", from_hub(tmp_path)["recipe_sha256"])
    yield host
    with contextlib.suppress(OSError):
        host.ask("", method="DELETE")


def test_it_gives_what_the_manifest_names_to_who_has_the_token(giver: Giver) -> None:
    assert giver.ask("config.json") == (200, FILES["config.json"])
    assert giver.ask("model.safetensors", Range="bytes=39999990-")[1] == FILES["model.safetensors"][39999990:]
    for path in ("secret", "../m.manifest.json", "%2e%2e/m.manifest.json", "m"):
        assert giver.ask(path)[0] == 404
    for token in ("", "wrong", giver.said["token"][:-1]):
        assert giver.ask("config.json", token or " ")[0] == 401
    assert giver.ask("", token="wrong", method="DELETE")[0] == 401
    assert giver.ask("config.json")[0] == 200


def test_it_listens_on_the_named_address_only_and_ends_when_told(giver: Giver, tmp_path: Path) -> None:
    listening = subprocess.run(
        ["ss", "-Hltn", f"sport = :{giver.said['port']}"], capture_output=True, text=True, check=True
    ).stdout
    assert listening.split()[3] == f"127.0.0.1:{giver.said['port']}"
    assert len(listening.strip().splitlines()) == 1
    assert giver.ask("", method="DELETE")[0] == 200
    for _ in range(200):
        if not subprocess.run(
            ["ss", "-Hltn", f"sport = :{giver.said['port']}"], capture_output=True, text=True, check=True
        ).stdout:
            break
    else:
        pytest.fail("it still listens")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("0.0.0.0", "is every address of this host"),
        ("::", "is every address"),
        ("192.0.2.1", "cannot be listened on"),
    ],
)
def test_an_address_that_is_not_this_hosts_is_refused(tmp_path: Path, address: str, said: str) -> None:
    manifest.write_json(tmp_path / "m.manifest.json", {"schema": 1, "files": []})
    done = Giver.start(tmp_path, address)
    assert done.returncode == 1
    assert f"model_source_peer_address {address}" in done.stderr
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.engine
def test_a_peers_bytes_are_taken_and_the_source_is_not_asked(
    downloader: Path, giver: Giver, hub: StubHub, tmp_path: Path
) -> None:
    models = tmp_path / "taker"
    done = fetch(downloader, {**from_hub(models), "peer": giver.peer}, hub, f"\n{giver.said['token']}\n")
    assert done.returncode == 0, done.stderr
    assert f"taking 2 files, 38 MiB, from {giver.url}" in done.stdout
    assert contents(models) == [".m.lock", "m", "m.manifest.json"]
    assert manifest.check(models / "m.manifest.json", models / "m", full=True) == []
    assert hub.ranges == []


@pytest.mark.engine
def test_a_transfer_that_was_cut_off_goes_on_where_it_stopped(
    downloader: Path, giver: Giver, hub: StubHub, tmp_path: Path
) -> None:
    models = tmp_path / "taker"
    what = {**from_hub(models), "peer": giver.peer}
    partial = models / f".m.{what['recipe_sha256'][:12]}.partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors.part").write_bytes(FILES["model.safetensors"][:30_000_000])
    done = fetch(downloader, what, hub, f"\n{giver.said['token']}\n")
    assert done.returncode == 0, done.stderr
    assert "29 MiB are here" in done.stdout
    assert (models / "m/model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert hub.ranges == []


@pytest.mark.engine
@pytest.mark.parametrize("broken", ["altered", "gone", "token", "manifest"])
def test_what_a_peer_cannot_give_comes_from_the_source(
    downloader: Path, giver: Giver, hub: StubHub, tmp_path: Path, broken: str
) -> None:
    models, token, peer = tmp_path / "taker", giver.said["token"], dict(giver.peer)
    if broken == "altered":
        path = tmp_path / "giver/m/model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
    elif broken == "gone":
        peer["url"] = "http://127.0.0.1:9"
    elif broken == "token":
        token = "wrong"
    else:
        peer["manifest_sha256"] = "0" * 64
    done = fetch(downloader, {**from_hub(models), "peer": peer}, hub, f"\n{token}\n")
    assert done.returncode == 0, done.stderr
    assert "the peer failed" in done.stdout
    assert "going to the source" in done.stdout
    assert manifest.check(models / "m.manifest.json", models / "m", full=True) == []
    assert {name for name, _ in hub.ranges} >= {"model.safetensors"}
    assert (models / "m/model.safetensors").read_bytes() == FILES["model.safetensors"]


@pytest.mark.engine
def test_a_killed_taker_goes_on_with_the_peer(
    downloader: Path, giver: Giver, hub: StubHub, tmp_path: Path
) -> None:
    models = tmp_path / "taker"
    what = {**from_hub(models), "peer": giver.peer}
    with subprocess.Popen(
        **command(downloader, what, hub), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"\n{giver.said['token']}\n")
        process.stdin.close()
        assert process.stdout.readline().startswith("taking 2 files")
        process.send_signal(signal.SIGKILL)
    assert not (models / "m").exists()
    assert fetch(downloader, what, hub, f"\n{giver.said['token']}\n").returncode == 0
    assert manifest.check(models / "m.manifest.json", models / "m", full=True) == []
    assert hub.ranges == []


def run_hosts(folder: Path, hub: StubHub, *arguments: str, peers: list[str] | None = None) -> str:
    """The role on local hosts a, b and c, each with a root and a loopback address of its own."""
    hosts = {}
    for n, name in enumerate(("a", "b", "c"), start=1):
        root = folder / name
        root.mkdir(exist_ok=True)
        if not (root / "envs").exists():
            (root / "envs").symlink_to(HOST / "envs")
        hosts[name] = {
            "model_source_root": str(root),
            "model_source_peer_address": f"127.0.0.{n}",
            "ansible_async_dir": str(root / "async"),
        }
    shared = {
        "ansible_connection": "local",
        "ansible_python_interpreter": sys.executable,
        "model_source_type": "huggingface",
        "model_source_name": "m",
        "model_source_repository": "owner/name",
        "model_source_revision": COMMIT,
        "model_source_endpoint": hub.endpoint,
        "model_source_patterns": PATTERNS,
        "model_source_python": PYTHON,
        "model_source_peers": ["a", "b", "c"] if peers is None else peers,
    }
    (folder / "hosts.json").write_text(json.dumps({"all": {"hosts": hosts, "vars": shared}}))
    (folder / "play.json").write_text(
        json.dumps(
            [
                {
                    "hosts": "all",
                    "gather_facts": False,
                    "any_errors_fatal": True,
                    "roles": [{"role": "model_source"}],
                }
            ]
        )
    )
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "ansible-playbook"),
            "-i",
            str(folder / "hosts.json"),
            str(folder / "play.json"),
            *arguments,
        ],
        cwd=REPOSITORY,
        env={**os.environ, "ANSIBLE_NOCOLOR": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def downloads(hub: StubHub) -> int:
    return sum(name == "model.safetensors" and first == 0 for name, first in hub.ranges)


@pytest.mark.engine
def test_three_hosts_one_download(downloader: Path, hub: StubHub, tmp_path: Path) -> None:
    said = run_hosts(tmp_path, hub, "-vvv")
    assert "a gives m to b, c" in said
    assert downloads(hub) == 1
    token = "Bearer "
    assert token not in said
    for host in ("a", "b", "c"):
        assert (
            manifest.check(
                tmp_path / host / "models/m.manifest.json", tmp_path / host / "models/m", full=True
            )
            == []
        )
        kept = manifest.read(tmp_path / host / "models/m.manifest.json")
        assert kept["source"]["revision"] == COMMIT
    # one that is added later, or lost all it had, takes it from a host that is not part of the run
    shutil.rmtree(tmp_path / "c")
    said = run_hosts(tmp_path, hub, "--limit", "c")
    assert "a gives m to c" in said
    assert "taking 2 files, 38 MiB, from http://127.0.0.1:" in said
    assert downloads(hub) == 1
    assert manifest.check(tmp_path / "c/models/m.manifest.json", tmp_path / "c/models/m", full=True) == []
