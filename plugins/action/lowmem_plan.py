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
    from lowmem.inputs.host_checkpoint import card_from_report
    from lowmem.inputs.model_cards import is_builtin, load_card, served_files
    from lowmem.inputs.model_figures import figures
    from lowmem.inputs.options import folded
    from lowmem.inputs.profiles import load_profile
    from lowmem.plan.calibration import read_calibration
    from lowmem.plan.knobs import checked
    from lowmem.plan.planner import make_plan
    from lowmem.plan.render import plan_text
    from lowmem.plan.request import BadPlace, PlanRequest, gather
    from lowmem.schema import Deploy, ModelCard, Plan
    from lowmem.text import visible
    from lowmem.units import parse_bytes
    from lowmem.values.kinds import refusal
except ModuleNotFoundError as error:
    missing: ModuleNotFoundError | None = error
else:
    missing = None

DOCUMENTATION = r"""
module: lowmem_plan
short_description: Compute the plan of a deployment and refuse an impossible one
description:
  - Prints its terms and verdict, and returns it as V(plan), which equals the JSON of C(lowmem plan).
  - Returns V(files) too, the JSON files of the checkpoint that will be served, such as config.json.
  - Runs on the controller, touches nothing on the host, and does the same in check mode.
options:
  profile: {description: Name of a profile in C(profiles/)., type: str, required: true}
  model: {description: "Model by name, by Hugging Face id, or a folder on the host or the controller; empty is
    the profile's own.", type: str, default: ""}
  checkpoint: {description: "What M(checkpoint_report) found in the folder of the host: present, files.",
    type: dict, default: {}}
  quantize: {description: Whether the host quantizes the model as the profile says., type: bool,
    default: true}
  memory_limit: {description: "Size with its unit; empty is the profile's own limit.", type: str, default: ""}
  latency_limits: {description: "ttft_ms, tpot_ms; what is left out is the profile's.", type: dict,
    default: {}}
  load: {description: "clients, input_tokens, output_tokens; what is left out is the profile's.", type: dict,
    default: {}}
  device: {description: "Name in the device table, custom:…, or a YAML file on the controller; empty is the
    profile's own.", type: str, default: ""}
  calibration: {description: "File of C(lowmem calibrate) on the controller; empty is none.", type: str,
    default: ""}
  count: {description: Number of devices; 0 is the profile's own., type: int, default: 0}
  overrides: {description: Knobs set for this inventory., type: dict, default: {}}
  arguments: {description: Any options of vllm serve., type: dict, default: {}}
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


GOALS = {
    "memory_limit": "empty or size",
    "latency_limits": "latency_name to milliseconds",
    "load": "load_name to count",
}
"""Kind of each variable that changes what the plan is held to; the same as in lowmem/data/variables.yml."""


def read_model(wanted: Mapping[str, Any]) -> ModelCard:
    """Return the card of the model to plan. Raises BadInput if there is none.

    A folder is the host's, where it has one, and else the controller's.
    """
    model = str(wanted["model"]) or load_profile(wanted["profile"]).model
    if model.startswith("/"):
        if wanted["checkpoint"].get("present"):
            return card_from_report(model, wanted["checkpoint"]["files"])
        if not (Path(model) / "config.json").exists():
            raise BadInput(
                "neither the host nor the controller has a checkpoint there (config.json and *.safetensors"
                " are needed); correct the path, or mount the folder"
            )
    return load_card(model)


def wanted_weights(wanted: Mapping[str, Any], card: ModelCard) -> str:
    """Tell whether the checkpoint is planned as it is stored, or as the profile has it quantized.

    A built-in card has no checkpoint: one that is quantized already is as the profile says, too. Raises
    BadInput for a quantized model that is to be quantized.
    """
    named = wanted["model"] or load_profile(wanted["profile"]).model
    if wanted["quantize"] and card.quantization.method != "none":
        raise BadInput(
            f"lowmem_quantize is true, and {named} is quantized already ({card.quantization.method},"
            f" {card.quantization.bits} bits): set lowmem_quantize: false, or name a model in 16 bits."
        )
    return "profile" if wanted["quantize"] or is_builtin(named) else "stored"


def goals(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return the limits and the load of the inventory as a plan's request has them."""
    given: dict[str, Any] = {name: int(value) for name, value in wanted["load"].items()}
    given |= {
        f"{name.removesuffix('_ms')}_p99_ms": float(value) for name, value in wanted["latency_limits"].items()
    }
    if wanted["memory_limit"]:
        given["memory_limit_bytes"] = parse_bytes(wanted["memory_limit"])
    return given


def option_name(name: str) -> str:
    """Return the name of an option in snake_case; the fields of a JSON option stay as they are."""
    head, dot, field = name.partition(".")
    return head.replace("-", "_") + dot + field


def argument_problems(arguments: Mapping[str, Any], overrides: Mapping[str, Any]) -> list[str]:
    """Say what is wrong with each option of lowmem_arguments, one line each."""
    found = []
    for given, value in arguments.items():
        name = option_name(str(given))
        head = name.partition(".")[0]
        if head in overrides:
            found.append(f"lowmem_arguments.{given} is in lowmem_overrides too: give it in one of them.")
        if head == "trust_remote_code":
            found.append(
                f"lowmem_arguments.{given} is {one_line(value)}: it runs the checkpoint's Python on the host;"
                " use a model type that vLLM knows by itself."
            )
            continue
        try:
            for key, one in folded({name: value}).items():
                checked(key, one)
        except BadInput as error:
            found.append(f"lowmem_arguments.{given} is {one_line(value)}: {error}")
    return found


def input_problems(wanted: Mapping[str, Any]) -> list[str]:
    """Say what is wrong with each variable by itself, one line each; `make_plan` ends at the first."""
    found = []

    def attempt(name: str, value: Any, read: Callable[[Any], object]) -> None:
        try:
            read(value)
        except BadInput as error:
            found.append(f"lowmem_{name} is {one_line(value)}: {of_the_inventory(str(error))}")

    attempt("profile", wanted["profile"], load_profile)
    for name, read in (("device", load_device), ("calibration", calibration_of)):
        if wanted[name]:
            attempt(name, wanted[name], read)
    for name, kind in GOALS.items():
        found += filter(None, [refusal(f"lowmem_{name}", kind, wanted[name])])
    if not 0 <= wanted["count"] <= 64:
        found.append(f"lowmem_device_count is {wanted['count']}: it must be 1 to 64, or 0 for the profile's.")
    for knob, value in wanted["overrides"].items():
        if not isinstance(value, (str, int, float)):
            found.append(f"lowmem_overrides.{knob} is {one_line(value)}: it must be one value; correct it.")
            continue
        attempt(f"overrides.{knob}", value, lambda value, knob=knob: checked(knob, value))
    found += argument_problems(wanted["arguments"], wanted["overrides"])
    try:
        Deploy.model_validate(wanted["deploy"])
    except ValidationError as error:
        for part in error.errors():
            name = str(part["loc"][0])
            limit = f"it must be {PLACES[name]}" if name in PLACES else part["msg"]
            found.append(f"lowmem_{name} is {one_line(part['input'])}: {limit}; correct it.")
    return found


def compute(wanted: Mapping[str, Any]) -> tuple[Plan, dict[str, Any], dict[str, Any]]:
    """Return the plan, the figures of the model that is to be fetched, and the JSON files of the one served.

    Raises BadInput with a line for each problem.
    """
    problems = input_problems(wanted)
    try:
        card = read_model(wanted)
    except BadInput as error:
        if wanted["model"]:
            problems.append(f"lowmem_model is {one_line(wanted['model'])}: {error}")
        raise BadInput("\n".join(problems) or str(error)) from None
    if problems:
        raise BadInput("\n".join(problems))
    weights = wanted_weights(wanted, card)
    hosts = load_profile(wanted["profile"]).hosts
    nodes = wanted["members"].get("nodes", [])
    if hosts > 1 and len(nodes) != hosts:
        raise BadInput(
            f"profile {wanted['profile']} is one server on {hosts} hosts, and lowmem_nodes has"
            f" {len(nodes)} ({', '.join(map(str, nodes)) or 'none'}): give group vllm that many hosts"
            " (lowmem_nodes is its hosts' addresses, in order), or choose a profile of one host."
        )
    arguments = folded({option_name(str(name)): value for name, value in wanted["arguments"].items()})
    request = PlanRequest(
        wanted["profile"],
        model=card,
        device=wanted["device"] or None,
        count=wanted["count"] or None,
        overrides={**wanted["overrides"], **arguments},
        deploy={**wanted["deploy"], **(wanted["members"] if hosts > 1 else {})},
        weights=weights,
        calibration=calibration_of(wanted["calibration"]),
        **goals(wanted),
    )
    plan = make_plan(request)
    # what is fetched is the model before its quantization, where the host quantizes it
    fetched = figures(card, card.quantization if wanted["quantize"] else plan.quantization)
    return plan, fetched, served_files(gather(request).card)


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
                "checkpoint": {"type": "dict", "default": {}},
                "quantize": {"type": "bool", "default": True},
                "memory_limit": {"type": "str", "default": ""},
                "latency_limits": {"type": "dict", "default": {}},
                "load": {"type": "dict", "default": {}},
                "arguments": {"type": "dict", "default": {}},
                "deploy": {"type": "dict", "required": True},
                "members": {"type": "dict", "default": {}},
            }
        )
        if missing:
            raise AnsibleActionFail(
                f"{missing}: run `make setup`, then use .lowmem/venv/bin/ansible-playbook"
            ) from missing
        try:
            plan, fetched, served = compute(wanted)
        except BadPlace as error:
            # what it names is in the inventory under the same name
            raise AnsibleActionFail(f"lowmem_{error}") from None
        except BadInput as error:
            raise AnsibleActionFail(of_the_inventory(str(error))) from None
        self._display.display(plan_text(plan))
        result = {"changed": False, "plan": json.loads(plan.model_dump_json())}
        result |= {"model": fetched, "files": served}
        if plan.verdict != "impossible":
            return result
        # with the plan: preflight looks for the other problems with it
        reasons = "; ".join(plan.reasons)
        return result | {"failed": True, "msg": f"impossible: {reasons}. Nothing on the host was changed."}
