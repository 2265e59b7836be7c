"""A host that release 0.1.0 deployed is upgraded by this tree, and goes back.

LOWMEM_SLOW=1 runs it: about five minutes on two free cores. It needs the history of the repository.
"""

from __future__ import annotations

import configparser
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import PORT, REPOSITORY, Service
from .ledger import Client

FIRST_RELEASE = "dac217c"
"""The last commit of 0.1.0: one flat package, roles `lowmem` and `as_deployed`."""

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(os.environ.get("LOWMEM_SLOW") != "1", reason="LOWMEM_SLOW=1 runs it"),
]


def play(checkout: Path, root: Path, name: str, *words: str) -> str:
    """Run a playbook of a checkout with the lowmem of that checkout; return what it said and its status."""
    program = Path(sys.executable).parent / "ansible-playbook"
    variables = f"lowmem_root={root} lowmem_port={PORT + 1} vllm_service_settle_s=20 lowmem_verify_kill=false"
    receipts = f"lowmem_verify_requests=4 lowmem_receipts={root.parent}/receipts"
    done = subprocess.run(
        [program, name, "-e", f"{variables} {receipts}", *words],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return f"{' '.join(done.stdout.split())} rc={done.returncode}"


@pytest.fixture(scope="module")
def old(deployed: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A deployment that 0.1.0 made, with the demo's environments and a copy of its checkpoint."""
    checkout = tmp_path_factory.mktemp("old")
    archive = subprocess.run(
        ["git", "archive", FIRST_RELEASE], cwd=REPOSITORY, capture_output=True, check=False
    )
    if archive.returncode:
        pytest.skip(f"this clone has no commit {FIRST_RELEASE}: git fetch --unshallow")
    subprocess.run(["tar", "--extract"], cwd=checkout, input=archive.stdout, check=True)
    root = tmp_path_factory.mktemp("deployment") / "host"
    root.mkdir()
    (root / "envs").symlink_to(deployed.root / "envs")
    shutil.copytree(deployed.root / "models", root / "models")
    said = play(checkout, root, "site.yml", "--skip-tags", "verify")
    assert said.endswith("rc=0"), said
    model = deployed.plan["deploy"]["served_model_name"]
    key = (root / "etc/vllm.env").read_text().partition("VLLM_API_KEY=")[2].split()[0]
    service = Service(root, Client(f"http://127.0.0.1:{PORT + 1}", key, model))
    yield service
    service.control("shutdown")
    deadline = time.monotonic() + 90
    while (root / "run/supervisord.pid").exists() and time.monotonic() < deadline:
        time.sleep(0.5)


def watchdog_command(root: Path) -> list[str]:
    """Read how the service manager of the host starts its watchdog."""
    written = configparser.RawConfigParser()
    written.read(root / "etc/supervisord.conf")
    return shlex.split(written["program:watchdog"]["command"])


def watches(command: list[str]) -> str:
    """Start a watchdog by these words, and return its first line."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        line = process.stdout.readline() if process.stdout else ""
        process.terminate()
    return line


def test_a_host_of_the_first_release_is_upgraded_and_goes_back(old: Service) -> None:
    before = (old.root / "current").readlink()
    words_of_old = watchdog_command(old.root)
    assert old.client.complete(4).end == "answer"

    said = play(REPOSITORY, old.root, "playbooks/upgrade.yml")
    assert said.endswith("rc=0"), said
    upgraded = (old.root / "current").readlink()
    assert upgraded != before
    assert old.client.complete(4).end == "answer"
    # the service manager's file of 0.1.0 names programs by `current`, which are now this tree's
    assert f"watching {old.client.url}" in watches(words_of_old)

    said = play(REPOSITORY, old.root, "playbooks/rollback.yml")
    assert said.endswith("rc=0"), said
    assert f"{before.name} serves on demo, in place of {upgraded.name}" in said
    assert (old.root / "current").readlink() == before
    assert old.client.complete(4).end == "answer"
    # this tree's file of the service manager starts programs of 0.1.0 now
    assert f"watching {old.client.url}" in watches(watchdog_command(old.root))
    assert "RUNNING" in old.control("status", "watchdog")

    said = play(REPOSITORY, old.root, "playbooks/upgrade.yml")
    assert said.endswith("rc=0"), said
    assert (old.root / "current").readlink() == upgraded
