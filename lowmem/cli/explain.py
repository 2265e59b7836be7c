"""Defines the command `lowmem explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowmem.plan.explain import effects, measured_effects
from lowmem.plan.knobs import flag_of, parse_assignments
from lowmem.plan.request import PlanRequest, gather


def explain(
    profile: Annotated[str, typer.Argument(help="name in profiles/, or a YAML file")],
    model: Annotated[
        str | None,
        typer.Option(help="built-in name, checkpoint directory or Hugging Face id; default: the profile's"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="name in the device table, or auto; default: the profile's")
    ] = None,
    count: Annotated[int | None, typer.Option(help="cards on the host; default: the profile's")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="knob=value, as often as needed")] = None,
    measurements: Annotated[Path, typer.Option(help="folder with ablations.yml")] = Path("docs/measurements"),
) -> None:
    """Print each flag of a profile with its reason and cost.

    Costs are bytes and milliseconds for this model and device.
    """
    from rich.markup import escape

    from lowmem.plan.compute import compute
    from lowmem.plan.render import step_text
    from lowmem.text import say, terminal

    inputs = gather(PlanRequest(profile, model, device, count, parse_assignments(set_ or [])))
    out = terminal()
    out.print(f"[bold]{escape(inputs.profile.name)}[/]: {escape(inputs.profile.summary)}")
    each = (
        f"{inputs.hosts} hosts with {inputs.count} x {inputs.device.title} each"
        if inputs.hosts > 1
        else f"{inputs.count} x {inputs.device.title}"
    )
    out.print(
        f"{escape(inputs.card.name)} on {each}; differences are against the engine's default, computed\n"
    )
    plan = compute(inputs)
    if plan.decode_step:
        out.print(step_text(plan, plan.decode_step) + "\n")
    measured = measured_effects(measurements, inputs.profile.name)

    def quote(sentence: str) -> None:
        if sentence:
            say(out, f"[green]measured: {escape(sentence)}[/]", 4)

    for e in effects(inputs, measured):
        out.print(f"[bold cyan]{flag_of(e.name)}[/] {escape(e.value)}")
        say(out, f"{escape(e.why)}", 4)
        if (
            e.peak_mib is not None
            and e.kv_tokens is not None
            and e.decode_ms is not None
            and e.prefill_ms is not None
        ):
            shown = [
                f"{value:+,.{digits}f} {unit}"
                for value, digits, unit in (
                    (e.peak_mib, 0, "MiB a card under load"),
                    (e.kv_tokens, 0, "KV tokens"),
                    (e.decode_ms, 1, "ms a token"),
                    (e.prefill_ms, 0, "ms a prompt"),
                )
                if abs(value) >= 0.5 * 10**-digits
            ]
            say(out, f"[dim]{', '.join(shown) or 'the same as the default in memory and time'}[/]", 4)
        quote(e.measured)
        if e.remark:
            say(out, f"[yellow]{escape(e.remark)}[/]", 4)
    for name, knob in inputs.environment.items():
        out.print(f"[bold cyan]{name}[/]={escape(str(knob.value))}")
        say(out, f"{escape(knob.why)}", 4)
        quote(measured.get(name, ""))
    if left := [name for name in measured if name not in inputs.knobs and name not in inputs.environment]:
        out.print("left as the engine has them:")
    for name in left:
        out.print(f"[bold cyan]{flag_of(name)}[/]")
        quote(measured[name])
    for note in inputs.profile.notes:
        say(out, f"note: {escape(note)}")
