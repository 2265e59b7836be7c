"""Turns the inventory's few variables into the plan, the one fact that everything downstream reads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.plugins.loader import filter_loader, test_loader

# Ansible reads this file once, in its main process; then it forks a process for each task of each host. Each
# would load all filters and tests for itself, which takes as long as an assert, unless they are there.
filter_loader.get("bool")
test_loader.get("match")

# At the top for the same reason: the import takes longer than a plan.
try:
    from pydantic import ValidationError

    from lowmem.errors import BadInput
    from lowmem.inputs.devices import load_device
    from lowmem.inputs.model_cards import load_card
    from lowmem.inputs.profiles import load_profile
    from lowmem.plan.calibration import read_calibration
    from lowmem.plan.knobs import checked
    from lowmem.plan.planner import make_plan
    from lowmem.plan.render import plan_text
    from lowmem.plan.request import BadPlace, PlanRequest
    from lowmem.schema import Deploy
    from lowmem.text import visible
except ModuleNotFoundError as error:
    missing: ModuleNotFoundError | None = error
else:
    missing = None

DOCUMENTATION = r"""
module: lowmem_plan
short_description: Compute the plan of a deployment and refuse an impossible one
description:
  - Prints its terms and verdict, and returns it as V(plan), which equals the JSON of C(lowmem plan).
  - Runs on the controller, touches nothing on the host, and does the same in check mode.
options:
  profile: {description: Name of a profile in C(profiles/)., type: str, required: true}
  model: {description: "Model card by name, or a directory on the controller; empty is the profile's own.",
    type: str, default: ""}
  device: {description: "Name in the device table, custom:…, or a YAML file on the controller; empty is the
    profile's own.", type: str, default: ""}
  calibration: {description: "File of C(lowmem calibrate) on the controller; empty is none.", type: str,
    default: ""}
  count: {description: Number of devices; 0 is the profile's own., type: int, default: 0}
  overrides: {description: Knobs set for this inventory., type: dict, default: {}}
  deploy: {description: "Where the server listens and finds its model: model_path, served_model_name, host,
      port.", type: dict, required: true}
  members:
    description: >-
      Keys of a server that spans several hosts: nodes (addresses in order), rank (this host's place among
      them), interface, master_port. All but the rank must be the same on each host. A profile of one host
      ignores them.
    type: dict
    default: {}
"""


PLACES = {
    "model_path": "a path without line breaks",
    "served_model_name": "a name without line breaks",
    "host": "an IP address or a host name",
    "port": "a port, 1 to 65535",
}


def one_line(value: Any) -> str:
    """Return a value as a line may show it."""
    text = visible(str(value)).replace("\n", "\\n").replace("\t", "\\t")
    return (text if len(text) <= 60 else f"{text[:60]}…") or "empty"


def of_the_inventory(message: str) -> str:
    """Name the inventory's variables in a message that names the options of the command line."""
    named = re.sub(r"--count\b|\bcount(?==)", "lowmem_device_count", message)
    return named.replace("--device ", "lowmem_device: ")


def calibration_of(path: str) -> Any:
    """Read the constants of the site; none if no file is named."""
    return read_calibration(Path(path)) if path else None


def input_problems(wanted: Mapping[str, Any]) -> list[str]:
    """Say what is wrong with each variable by itself, one line each; `make_plan` ends at the first."""
    found = []

    def attempt(name: str, value: Any, read: Callable[[Any], object]) -> None:
        try:
            read(value)
        except BadInput as error:
            found.append(f"lowmem_{name} is {one_line(value)}: {of_the_inventory(str(error))}")

    attempt("profile", wanted["profile"], load_profile)
    readers = (("device", load_device), ("model", load_card), ("calibration", calibration_of))
    for name, read in readers:
        if wanted[name]:
            attempt(name, wanted[name], read)
    if not 0 <= wanted["count"] <= 64:
        found.append(f"lowmem_device_count is {wanted['count']}: it must be 1 to 64, or 0 for the profile's.")
    for knob, value in wanted["overrides"].items():
        if not isinstance(value, (str, int, float)):
            found.append(f"lowmem_overrides.{knob} is {one_line(value)}: it must be one value; correct it.")
            continue
        attempt(f"overrides.{knob}", value, lambda value, knob=knob: checked(knob, value))
    try:
        Deploy.model_validate(wanted["deploy"])
    except ValidationError as error:
        for part in error.errors():
            name = str(part["loc"][0])
            limit = f"it must be {PLACES[name]}" if name in PLACES else part["msg"]
            found.append(f"lowmem_{name} is {one_line(part['input'])}: {limit}; correct it.")
    return found


class ActionModule(ActionBase):
    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        _, wanted = self.validate_argument_spec(
            {
                "profile": {"type": "str", "required": True},
                "model": {"type": "str", "default": ""},
                "device": {"type": "str", "default": ""},
                "calibration": {"type": "str", "default": ""},
                "count": {"type": "int", "default": 0},
                "overrides": {"type": "dict", "default": {}},
                "deploy": {"type": "dict", "required": True},
                "members": {"type": "dict", "default": {}},
            }
        )
        if missing:
            raise AnsibleActionFail(
                f"{missing}: run `make setup`, then use .lowmem/venv/bin/ansible-playbook"
            ) from missing
        problems = input_problems(wanted)
        if problems:
            raise AnsibleActionFail("\n".join(problems))
        try:
            hosts = load_profile(wanted["profile"]).hosts
            nodes = wanted["members"].get("nodes", [])
            if hosts > 1 and len(nodes) != hosts:
                raise AnsibleActionFail(
                    f"profile {wanted['profile']} is one server on {hosts} hosts, and lowmem_nodes has"
                    f" {len(nodes)} ({', '.join(map(str, nodes)) or 'none'}): give group vllm that many hosts"
                    " (lowmem_nodes is its hosts' addresses, in order), or choose a profile of one host."
                )
            plan = make_plan(
                PlanRequest(
                    wanted["profile"],
                    model=wanted["model"] or None,
                    device=wanted["device"] or None,
                    count=wanted["count"] or None,
                    overrides=wanted["overrides"],
                    deploy={**wanted["deploy"], **(wanted["members"] if hosts > 1 else {})},
                    calibration=calibration_of(wanted["calibration"]),
                    weights="profile",  # role awq_quantize makes what the profile asks for
                )
            )
        except BadPlace as error:
            # what it names is in the inventory under the same name
            raise AnsibleActionFail(f"lowmem_{error}") from None
        except BadInput as error:
            raise AnsibleActionFail(of_the_inventory(str(error))) from None
        self._display.display(plan_text(plan))
        result = {"changed": False, "plan": json.loads(plan.model_dump_json())}
        if plan.verdict != "impossible":
            return result
        # with the plan: preflight looks for the other problems with it
        reasons = "; ".join(plan.reasons)
        return result | {"failed": True, "msg": f"impossible: {reasons}. Nothing on the host was changed."}
