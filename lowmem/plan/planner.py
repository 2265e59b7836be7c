"""Profile + model card + device -> Plan. Pure: everything it needs is passed in or is a table of this
package.
"""

from __future__ import annotations

from collections.abc import Mapping

from lowmem.plan.compute import compute
from lowmem.plan.request import gather
from lowmem.plan.search import nearest
from lowmem.schema import VLLM_VERSION, Deploy, Device, Link, ModelCard, Plan, Profile, Scalar


def make_plan(
    profile: str | Profile,
    model: str | ModelCard | None = None,
    device: str | Device | None = None,
    count: int | None = None,
    overrides: Mapping[str, Scalar] | None = None,
    deploy: Deploy | Mapping[str, object] | None = None,
    *,
    clients: int | None = None,
    input_tokens: int | None = None,
    output_tokens: int | None = None,
    memory_limit_bytes: int | None = None,
    environment: Mapping[str, str] | None = None,
    vllm_version: str = VLLM_VERSION,
    hosts: int | None = None,
    network: str | Link | None = None,
    search: bool = True,
) -> Plan:
    """The plan of a profile for a model on `count` devices a host; None takes the profile's own. `overrides`:
    knob -> value, as `--set`.

    Never raises for a plan that does not fit (the verdict says so); BadInput, one line, for input that cannot
    be planned. `search=False` leaves `nearest` out.
    """
    inputs = gather(
        profile, model, device, count, overrides, deploy, clients=clients, input_tokens=input_tokens, output_tokens=output_tokens,
        memory_limit_bytes=memory_limit_bytes, environment=environment, vllm_version=vllm_version, hosts=hosts, network=network,
    )  # fmt: skip
    plan = compute(inputs)
    if not search or plan.verdict == "fits":
        return plan
    found = nearest(inputs, plan)
    if found is None:
        return plan
    return plan.model_copy(update={"nearest": found[0], "reasons": (*plan.reasons, found[1])})
