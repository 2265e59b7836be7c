"""Turns the inventory's few variables into the plan, the one fact that everything downstream reads."""

from __future__ import annotations

import json
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
    from lowmem.errors import BadInput
    from lowmem.inputs.profiles import load_profile
    from lowmem.plan.planner import make_plan
    from lowmem.plan.render import plan_text
    from lowmem.plan.request import BadPlace, PlanRequest
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
  device: {description: Name in the device table; empty is the profile's own., type: str, default: ""}
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
                    weights="profile",  # role awq_quantize makes what the profile asks for
                )
            )
        except BadPlace as error:
            # what it names is in the inventory under the same name
            raise AnsibleActionFail(f"lowmem_{error}") from error
        except BadInput as error:
            raise AnsibleActionFail(str(error)) from error
        self._display.display(plan_text(plan))
        if plan.verdict == "impossible":
            raise AnsibleActionFail(
                f"impossible: {'; '.join(plan.reasons)}. Nothing on the host was changed."
            )
        return {"changed": False, "plan": json.loads(plan.model_dump_json())}
