"""Reads the host that this program runs on, as playbooks/doctor.yml reads a host from outside."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import lowmem
from lowmem.artefacts import read_plan
from lowmem.errors import BadInput


def readers() -> Path:
    """Find the folder of the readers: the repository's modules, or the copy inside an installed package."""
    package = Path(lowmem.__file__).parent
    beside = package.parent / "plugins" / "modules"
    return beside if beside.is_dir() else package / "readers"


def _reader(name: str) -> Any:
    path = readers() / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise BadInput(f"{path} is not there: install lowmem again, or give a report of playbooks/doctor.yml")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def this_host(plan: Path) -> dict[str, Any]:
    """Read the cards, the driver, memory and disk of this host, and the plan that is deployed on it.

    The keys are those of the report of playbooks/doctor.yml. A host without a plan has None for it.
    """
    root = plan.parent.parent  # lowmem_root, of etc/plan.json
    deployed = read_plan(plan).model_dump(mode="json") if plan.exists() else None
    return {
        "gpu": _reader("gpu_report").report(),
        "memory": _reader("host_report").report(str(root), [str(root)]),
        "plan": deployed,
    }
