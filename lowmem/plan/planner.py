"""Makes a plan of profile, model card and device.

It is pure: every input is passed in or is a table of this package.
"""

from __future__ import annotations

from lowmem.plan.capacity import would_do
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
    better, enough = nearest(inputs, plan), would_do(inputs)
    reasons = [*plan.reasons, *([enough] if enough else []), *([better[1]] if better else [])]
    return plan.model_copy(update={"nearest": better and better[0], "reasons": tuple(reasons)})
