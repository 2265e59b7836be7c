"""The role's templates as it renders them, for a CPU's plan and for two cards'."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
GOLDEN = HERE / "golden"
DASHBOARDS = REPOSITORY / "roles/monitoring/files/dashboards"

CARDS = {
    "profile": "low_mem",
    "device": "a100-40g",
    "device_kind": "cuda",
    "device_count": 2,
    "limits": {"memory_bytes": 20 * 2**30, "tpot_p99_ms": 200.0, "ttft_p99_ms": 2000.0},
    "peak_bytes": 20452 * 2**20,
    "speculation": {"break_even_tokens": 1.5},
}
"""What a plan for two cards says otherwise."""


@pytest.fixture(scope="session")
def plans() -> dict[str, dict[str, Any]]:
    plan = json.loads((REPOSITORY / "tests/ansible/files/plan.json").read_text())
    return {"cpu": plan, "cuda": plan | CARDS}


@pytest.fixture(scope="session")
def rendered(
    playbook: Any, plans: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Kind of device -> folder. A certificate for the CPU; another address, an Alertmanager and labels for
    the cards.
    """
    cases = [
        {
            "name": "cpu",
            "plan": plans["cpu"],
            "gateway_port": 9444,
            "certificates": ["/etc/vllm-lowmem/tls/server.pem"],
        },
        {
            "name": "cuda",
            "plan": plans["cuda"],
            "bind": "::1",
            "alertmanager": "https://alerts.example.org:9093/team",
            "labels": {"site": "north"},
        },
    ]
    folder = tmp_path_factory.mktemp("rendered")
    done = playbook(str(HERE / "render.yml"), variables={"destination": str(folder), "cases": cases})
    assert done.rc == 0, done.text
    folders = {}
    for kind in plans:
        folders[kind] = folder / kind
        folders[kind].mkdir()
        for name, text in json.loads((folder / f"{kind}.json").read_text()).items():
            (folders[kind] / name).write_text(text)
        if os.environ.get("LOWMEM_GOLDEN") == "write":
            shutil.copytree(folders[kind], GOLDEN / kind, dirs_exist_ok=True)
    return folders


@pytest.fixture(scope="session")
def promtool() -> Any:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")

    def run(*arguments: str | Path) -> str:
        """What it said; fails the test where promtool does."""
        done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run
