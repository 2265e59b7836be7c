"""Makes a plan of profile, model card and device.

It is pure: every input is passed in or is a table of this package.
"""

from __future__ import annotations

from lowmem.plan.compute import compute
from lowmem.plan.request import PlanRequest, gather
from lowmem.plan.search import nearest
from lowmem.schema import Plan


def make_plan(request: PlanRequest) -> Plan:
    """Make the plan of a request.

    A plan that does not fit says so in its verdict and raises nothing. Raises BadInput, one line, for input
    that cannot be planned.
    """
    inputs = gather(request)
    plan = compute(inputs)
    if not request.search or plan.verdict == "fits":
        return plan
    better = nearest(inputs, plan)
    if better is None:
        return plan
    return plan.model_copy(update={"nearest": better[0], "reasons": (*plan.reasons, better[1])})
