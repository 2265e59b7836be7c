"""One short Molecule scenario from end to end, so that the machinery is tested with every `make test`; all of
them are `make molecule`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from .conftest import ROOT
from .test_testhosts import needs_hosts

MOLECULE = Path(sys.executable).with_name("molecule")


@needs_hosts
@pytest.mark.skipif(
    not MOLECULE.exists(), reason="molecule is not installed beside this Python: run through make"
)
def test_cuda_toolkit(tmp_path):
    environment = os.environ | {
        "PATH": f"{MOLECULE.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "TESTHOSTS_STATE": str(tmp_path / "state"),
        "ANSIBLE_HOME": str(tmp_path / "ansible"),
        "NO_COLOR": "1",
    }
    done = subprocess.run(
        [MOLECULE, "test", "-s", "cuda_toolkit"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    # a step that Molecule finds no playbook for is skipped without failing
    assert "missing=0" in done.stdout + done.stderr
    assert "5 passed" in done.stdout + done.stderr
    assert not any((tmp_path / "state").glob("*/host.json"))


def test_every_scenario_names_its_hosts_after_itself():
    """Two scenarios may run in one go, and what one leaves behind is found by its name."""
    for path in sorted((ROOT / "molecule").glob("*/molecule.yml")):
        names = [platform["name"] for platform in yaml.safe_load(path.read_text())["platforms"]]
        assert all(name.startswith(path.parent.name.replace("_", "-") + "-") for name in names), path


REBOOT = "side_effect ../hosts/reboot.yml"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "molecule").glob("*/molecule.yml")), ids=lambda path: path.parent.name
)
def test_the_order_of_a_scenario(path):
    """What comes in between (forget.yml) or after is its own."""
    steps = yaml.safe_load(path.read_text())["scenario"]["test_sequence"]
    assert (steps[:2], steps[-1]) == (["destroy", "create"], "destroy")
    named = [s for s in steps if s in ("check", "converge", "idempotence", "verify", REBOOT)]
    wanted = ["check", "converge", "idempotence", "verify", REBOOT, "verify"]
    if path.parent.name == "distribution":
        # the role ends in a refusal there, the driver finding no card; converge.yml runs it twice and
        # compares
        wanted.remove("idempotence")
    if path.parent.name in ("cluster", "two_hosts"):
        # what a host is by itself, `service` tests; their faults reboot them
        wanted = ["check", "converge", "idempotence"]
    assert named == wanted
