"""What the tests share: the record of faults, the demo's deployment, the repository's own ansible-playbook,
run as an operator runs it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lowmem.files import write_text

REPOSITORY = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Run:
    """One run of ansible-playbook. `text`: stdout and stderr together, as a terminal shows them, folded to
    single spaces in `flat`.
    """

    rc: int
    text: str

    @property
    def flat(self) -> str:
        return " ".join(self.text.split())

    @property
    def changed(self) -> int:
        return sum(int(count) for count in re.findall(r"changed=(\d+)", self.text))


Playbook = Callable[..., Run]


def run_playbook(
    *arguments: str, variables: dict[str, Any] | None = None, environment: dict[str, str] | None = None
) -> Run:
    command = [str(BIN / "ansible-playbook"), *arguments]
    if variables:
        command += ["--extra-vars", json.dumps(variables)]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "ANSIBLE_NOCOLOR": "1", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return Run(done.returncode, COLOUR.sub("", done.stdout))


@pytest.fixture(autouse=True)
def _blocking_stdin() -> None:
    """Ansible refuses a stdin that does not block; a program of an earlier test may have left it so, since a
    worker and the programs that it runs share one.
    """
    with contextlib.suppress(OSError):
        os.set_blocking(0, True)


@pytest.fixture(scope="session")
def playbook() -> Playbook:
    return run_playbook


@pytest.fixture
def clean_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A lowmem_root that does not exist, nor after the test; short, as a root must be, where tmp_path takes
    the test's name.
    """
    root = tmp_path_factory.mktemp("root") / "host"
    yield root
    assert not root.exists(), "the host was changed"


@pytest.fixture(scope="session")
def demo_root() -> Path:
    return REPOSITORY / ".lowmem" / "host"


@dataclass(frozen=True)
class Deployed:
    """The demo's deployment, answering."""

    root: Path
    plan: dict[str, Any]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.plan['deploy']['port']}"

    @property
    def variables(self) -> dict[str, Any]:
        return {"lowmem_port": self.plan["deploy"]["port"]}

    @property
    def key(self) -> str:
        return next(
            line.split("=", 1)[1]
            for line in (self.root / "etc/vllm.env").read_text().splitlines()
            if line.startswith("VLLM_API_KEY=")
        )


@pytest.fixture(scope="session")
def deployed(demo_root: Path) -> Deployed:
    """Brings the demo up as it was last deployed, or for the first time."""
    plan = demo_root / "etc/plan.json"
    variables = {"lowmem_port": json.loads(plan.read_text())["deploy"]["port"]} if plan.is_file() else {}
    done = run_playbook("site.yml", "--skip-tags", "verify", variables=variables)
    assert done.rc == 0, done.text
    return Deployed(demo_root, json.loads(plan.read_text()))


class Fault:
    """What one fault of the catalogue did, written down when its test has passed; docs/reliability.md is made
    of these records.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: list[str] = []
        self.recovery_s: float | None = None

    def saw(self, what: str) -> None:
        self.seen.append(what)

    def write(self) -> None:
        folder = Path(os.environ.get("LOWMEM_FAULTS", REPOSITORY / ".lowmem/faults"))
        record = {
            "fault": self.name,
            "seen": self.seen,
            "recovery_s": self.recovery_s,
            # a recovery is to be read beside what else the machine did
            "load": round(os.getloadavg()[0], 1),
            "taken": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d"),
        }
        write_text(folder / f"{self.name}.json", json.dumps(record, indent=2))


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Iterator[Fault]:
    """The fault that the test's `fault` marker names."""
    [name] = request.node.get_closest_marker("fault").args
    record = Fault(name)
    failed = request.session.testsfailed
    yield record
    if record.seen and request.session.testsfailed == failed:
        record.write()
