"""Makes a plan of profile, model card and device.

It is pure: every input is passed in or is a table of this package.
"""

from __future__ import annotations

from lowmem.errors import BadInput
from lowmem.plan import capability
from lowmem.plan.calibration import calibrated
from lowmem.plan.capacity import would_do
from lowmem.plan.compute import compute, engine_of
from lowmem.plan.request import Inputs, PlanRequest, gather
from lowmem.plan.search import nearest
from lowmem.schema import Calibration, Device, Plan


def make_plan(request: PlanRequest) -> Plan:
    """Make the plan of a request.

    A plan that does not fit says so in its verdict and raises nothing. Raises BadInput, one line, for input
    that cannot be planned.
    """
    inputs = gather(request)
    refuse_foreign(request.calibration, inputs.device)
    with calibrated(request.calibration, inputs.device.name):
        plan = explained(compute(inputs), inputs, request.calibration)
        if not request.search or plan.verdict == "fits":
            return plan
        better, enough = nearest(inputs, plan), would_do(inputs)
    reasons = [*plan.reasons, *([enough] if enough else []), *([better[1]] if better else [])]
    return plan.model_copy(update={"nearest": better and better[0], "reasons": tuple(reasons)})


def explained(plan: Plan, inputs: Inputs, calibration: Calibration | None) -> Plan:
    """Add the device's figures, what its capability decides, and the site's constants, with their sources."""
    device = inputs.device
    notes = capability.notes(engine_of(inputs), inputs.card, device)
    if calibration:
        notes.append(
            f"calibration: {len(calibration.constants)} constants measured on {calibration.device}, from"
            f" {len(calibration.receipts)} receipts: {', '.join(sorted(calibration.constants))}"
        )
    said = (f"device: {device.estimate}",) if device.estimate else ()
    return plan.model_copy(
        update={
            "reasons": (*plan.reasons, *said),
            "device_figures": device,
            "device_notes": tuple(notes),
            "calibration": calibration,
        }
    )


def refuse_foreign(calibration: Calibration | None, device: Device) -> None:
    """Raise BadInput for constants that were measured on other cards than those of the plan."""
    if calibration is None:
        return
    measured = calibration.device
    if measured != device.name:
        raise BadInput(
            f"calibration: its constants were measured on {measured}, and the plan is for {device.name}"
            f" ({device.title}); leave the calibration out, or measure a host with these cards"
        )
