"""Answers `lowmem plan` where the settings are searched: a goal, `--suggest` and `--maximize`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from rich.console import Console

from lowmem.cli.plan import EXIT
from lowmem.plan.calibration import calibrated
from lowmem.plan.capacity import Extreme, maximized, would_do
from lowmem.plan.goals import Choice, Goal, find, goal_of
from lowmem.plan.planner import explained, refuse_foreign
from lowmem.plan.render import command_of, show_choices, show_plan, wanted
from lowmem.plan.request import PlanRequest
from lowmem.plan.search import suggestions
from lowmem.schema import Calibration, Plan
from lowmem.text import terminal, visible_json

SHOWN = 3
"""Runners-up that are shown with their commands."""

UNITS = {
    "requests": ("requests at once", "most requests"),
    "context": ("tokens a request", "longest context"),
    "throughput": ("tokens a second", "highest throughput"),
}


def answer(request: PlanRequest, searched: bool, suggest: bool, maximize: str | None, as_json: bool) -> int:
    """Search, print what was found, and return the exit status."""
    goal = goal_of(request, searched)
    refuse_foreign(request.calibration, goal.device)
    with calibrated(request.calibration, goal.device.name):
        if suggest:
            return _suggest(goal, as_json)
        if maximize is not None:
            return _maximize(goal, maximize, as_json, request.calibration)
        return _find(goal, as_json, request.calibration)


def _find(goal: Goal, as_json: bool, calibration: Calibration | None) -> int:
    """Print the plan that meets the goal, or the nearest one, with the runners-up."""
    found = find(goal)
    plan = explained(found.choice.plan, found.choice.inputs, calibration)
    enough = "" if plan.verdict == "fits" else would_do(found.choice.inputs, goal)
    plan = plan.model_copy(update={"reasons": (*plan.reasons, *found.why, *([enough] if enough else []))})
    _show(plan, as_json, "runners-up:", found.others[:SHOWN], goal)
    return EXIT[plan.verdict]


def _show(plan: Plan, as_json: bool, title: str, others: Sequence[Choice], goal: Goal) -> None:
    if as_json:
        sys.stdout.write(visible_json(plan.model_dump_json(indent=2)) + "\n")
        return

    def beside(out: Console) -> None:
        show_choices(title, others, goal, out)

    show_plan(plan, beside=beside if others else None)


def _suggest(goal: Goal, as_json: bool) -> int:
    """Print every choice that meets the goal, best first."""
    choices = suggestions(goal)
    if as_json:
        rows = [_row(choice, goal) for choice in choices]
        sys.stdout.write(visible_json(json.dumps(rows, indent=2)) + "\n")
    elif choices:
        show_choices(
            f"{goal.card.name} on up to {goal.count} x {goal.device.name}, within {wanted(goal)}: best first"
            " (more bits, then KV cache, fewer cards, faster)",
            choices,
            goal,
        )
    else:
        _say_nothing_fits(goal)
    return 0 if choices else 2


def _row(choice: Choice, goal: Goal) -> dict[str, object]:
    return {
        "weights": f"{choice.bits}-bit",
        "profile": choice.profile or None,
        "knobs": dict(choice.knobs),
        "environment": dict(choice.environment),
        "command": command_of(choice, goal),
        "plan": choice.plan.model_dump(mode="json"),
    }


def _say_nothing_fits(goal: Goal) -> None:
    """Say that nothing meets the goal, why the nearest choice does not, and what would do."""
    out = terminal()
    out.print(f"no setting of {goal.card.name} on {goal.count} x {goal.device.name} meets {wanted(goal)}")
    nearest = find(goal)
    for line in (*nearest.choice.plan.reasons[:1], *nearest.why, would_do(nearest.choice.inputs, goal)):
        if line:
            out.print(f"  {line}", markup=False)


def _maximize(goal: Goal, aim: str, as_json: bool, calibration: Calibration | None) -> int:
    """Print the plan that takes the largest load, and what the other formats and KV types take."""
    found = maximized(goal, aim)
    if not found:
        return _find(goal, as_json, calibration)
    best = found[0]
    said = f"{UNITS[aim][1]}: {_amount(best, aim)}"
    plan = explained(best.choice.plan, best.choice.inputs, calibration)
    plan = plan.model_copy(update={"reasons": (*plan.reasons, said)})
    title = "other settings take " + "; ".join(_amount(e, aim) for e in found[1 : SHOWN + 1])
    _show(plan, as_json, title, [e.choice for e in found[1 : SHOWN + 1]], goal)
    return EXIT[plan.verdict]


def _amount(extreme: Extreme, aim: str) -> str:
    load = extreme.choice.plan.load
    at = "" if aim == "context" else f" of {load.input_tokens:,} + {load.output_tokens:,} tokens"
    clients = "" if aim == "requests" else f" at {load.clients} client{'s' if load.clients > 1 else ''}"
    return f"{extreme.amount:,.0f} {UNITS[aim][0]}{clients}{at}"
