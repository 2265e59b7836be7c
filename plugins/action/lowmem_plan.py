"""Turns the inventory's few variables into the plan, the one fact that everything downstream reads."""

from __future__ import annotations

import json
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

DOCUMENTATION = r"""
module: lowmem_plan
short_description: Compute the plan of a deployment and refuse an impossible one
description:
  - Sets the fact C(lowmem_plan), which equals the JSON of C(lowmem plan), and prints its terms and verdict.
  - Runs on the controller, touches nothing on the host, and does the same in check mode.
options:
  profile: {description: Name of a profile in C(profiles/)., type: str, required: true}
  model: {description: "Model card by name, or a directory on the controller.", type: str, required: true}
  device: {description: Name in the device table., type: str, required: true}
  count: {description: Number of devices., type: int, required: true}
  overrides: {description: Knobs set for this inventory., type: dict, default: {}}
  deploy: {description: "Where the server listens and finds its model: model_path, served_model_name, host, port.", type: dict, required: true}
"""


class ActionModule(ActionBase):
    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        _, wanted = self.validate_argument_spec(
            {
                "profile": {"type": "str", "required": True},
                "model": {"type": "str", "required": True},
                "device": {"type": "str", "required": True},
                "count": {"type": "int", "required": True},
                "overrides": {"type": "dict", "default": {}},
                "deploy": {"type": "dict", "required": True},
            }
        )
        try:
            from lowmem.errors import BadInput
            from lowmem.planner import make_plan
            from lowmem.render import plan_text
        except ModuleNotFoundError as error:
            raise AnsibleActionFail(f"{error}: run `make setup`, then use .lowmem/venv/bin/ansible-playbook") from error
        try:
            plan = make_plan(**wanted)
        except BadInput as error:
            raise AnsibleActionFail(str(error)) from error
        self._display.display(plan_text(plan))
        if plan.verdict == "impossible":
            nearest = f"; the nearest that does: {plan.nearest}" if plan.nearest else ""
            raise AnsibleActionFail(f"impossible: {'; '.join(plan.reasons)}{nearest}. Nothing on the host was changed.")
        return {"changed": False, "ansible_facts": {"lowmem_plan": json.loads(plan.model_dump_json())}}
