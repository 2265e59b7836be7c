"""Renders a plan for people, as tables with a bar per term."""

from __future__ import annotations

import io
import shlex

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowmem.plan.search import Option
from lowmem.schema import Node, Pipeline, Plan
from lowmem.text import bar, terminal
from lowmem.units import GIB, MIB, gib, mib

_COLOUR = {"fits": "green", "slow": "yellow", "impossible": "red"}


def plan_text(plan: Plan, width: int = 120) -> str:
    """Return the output of `show_plan` as plain text without colour."""
    page = io.StringIO()
    show_plan(plan, terminal(file=page, width=width, color_system=None))
    return page.getvalue()


def show_plan(plan: Plan, console: Console | None = None) -> None:
    """Print verdict, memory per card, host RAM, latency and arguments."""
    out = console or terminal()
    q = plan.quantization
    weights = "16-bit" if q.method == "none" else f"{q.method} {q.bits}-bit, group {q.group_size}"
    weights += f", {plan.weights}" if plan.weights not in ("", "as stored") else ""
    cards = f"{plan.device_count} x {plan.device}"
    place = f"{plan.hosts} hosts with {cards} each" if plan.hosts > 1 else cards
    out.print(
        f"[bold]{escape(plan.profile)}[/]: {escape(plan.model)} ({weights}, {gib(plan.weight_bytes)})"
        f" on {place}, vLLM {plan.vllm_version}"
    )
    out.print(f"[bold {_COLOUR[plan.verdict]}]{plan.verdict}[/]")
    for reason in plan.reasons:
        out.print(f"  {reason}", markup=False)
    out.print()
    out.print(_stages_table(plan) if plan.stages else _memory_table(plan))
    out.print()
    out.print(
        f"KV pool {plan.kv_tokens:,} tokens: {plan.max_requests} requests of {plan.load.input_tokens:,} +"
        f" {plan.load.output_tokens:,} tokens"
    )
    speed = plan.latency_ms
    out.print(
        f"decode {speed.decode_expected:,.1f} ms a token expected at {plan.load.clients} clients, floor"
        f" {speed.decode_floor:,.1f}; limit {plan.limits.tpot_p99_ms:g}"
    )
    out.print(f"prefill {speed.prefill_expected:,.0f} ms a prompt expected, floor {speed.prefill_floor:,.0f}")
    if plan.pipeline:
        show_pipeline(plan, plan.pipeline, out)
    ram = ", ".join(f"{k} {v / GIB:.1f}" for k, v in plan.host_ram.items())
    out.print(f"host RAM {gib(plan.host_ram_bytes)} ({ram})")
    for note in plan.device_notes:
        out.print(note, markup=False)
    out.print()
    for start in plan.nodes or (plan,):
        if isinstance(start, Node):
            out.print(f"[bold]on {start.address}[/]")
        out.print("vllm serve " + shlex.join(start.argv), markup=False, soft_wrap=True)
        for variable in start.environment:
            out.print(f"  {variable.name}={variable.value}", markup=False)


def _memory_table(plan: Plan) -> Table:
    """Every term of a card with a bar."""
    whole = max(plan.limit_bytes, plan.peak_bytes)
    unit = "per card" if plan.device_kind == "cuda" else "resident set"
    table = Table(box=None, pad_edge=False)
    table.add_column(f"memory {unit}")
    table.add_column("MiB", justify="right")
    table.add_column(f"of {mib(plan.limit_bytes)}")
    for name, value in plan.per_gpu.items():
        if name != "total" and value:
            table.add_row(name, f"{value / MIB:,.0f}", bar(value, whole))
    table.add_row(
        "[bold]total, idle[/]",
        f"[bold]{plan.per_gpu['total'] / MIB:,.0f}[/]",
        bar(plan.per_gpu["total"], whole),
    )
    for name, value in plan.load_growth.items():
        table.add_row(f"+ {name} under load", f"{value / MIB:,.0f}", bar(value, whole))
    table.add_row(
        "[bold]peak under load[/]",
        f"[bold]{plan.peak_bytes / MIB:,.0f}[/]",
        f"[{_COLOUR[plan.verdict]}]{bar(plan.peak_bytes, whole)}[/]",
    )
    if plan.start_peak_bytes > plan.peak_bytes:
        table.add_row("at most while starting", f"{plan.start_peak_bytes / MIB:,.0f}", "")
    return table


def _stages_table(plan: Plan) -> Table:
    """Every term of a card of each stage, side by side."""
    table = Table(box=None, pad_edge=False)
    table.add_column(f"memory per card, MiB\n(limit {plan.limit_bytes / MIB:,.0f})")
    for n, stage in enumerate(plan.stages):
        place = f", host {stage.node}" if plan.hosts > 1 else ""
        table.add_column(
            f"stage {n}{place}\nlayers {stage.first_layer}-{stage.first_layer + stage.layers - 1}",
            justify="right",
        )

    def row(name: str, values: list[int], style: str = "") -> None:
        if any(values):
            table.add_row(name, *(f"{v / MIB:,.0f}" for v in values), style=style)

    for term in plan.stages[0].per_gpu:
        if term != "total":
            row(term, [s.per_gpu[term] for s in plan.stages])
    row("total, idle", [s.per_gpu["total"] for s in plan.stages], "bold")
    for term in plan.stages[0].load_growth:
        row(f"+ {term} under load", [s.load_growth[term] for s in plan.stages])
    row("peak under load", [s.peak_bytes for s in plan.stages], "bold")
    if plan.start_peak_bytes > plan.peak_bytes:
        row("at most while starting", [s.start_peak_bytes for s in plan.stages])
    return table


def show_pipeline(plan: Plan, pipeline: Pipeline, out: Console) -> None:
    """Print the traffic between the stages, its cost, and the link that it needs."""
    out.print(
        f"between stages {pipeline.bytes_per_token:,} bytes a token: {pipeline.bytes_per_decode_step:,} a"
        f" decode step of {plan.load.clients} clients, {pipeline.bytes_per_prefill_step:,} a step of a prompt"
    )
    if link := pipeline.network:
        least, most = pipeline.least_gb_per_s, pipeline.most_round_trip_us
        out.print(
            f"network {link.title}, {link.gb_per_s:g} GB/s, round trip {link.round_trip_us:g} us:"
            f" {pipeline.hop_ms:.2f} ms a token expected (floor {pipeline.hop_floor_ms:.2f}; not measured)"
        )
        out.print(
            f"the limits need {f'{least:g} GB/s' if least else 'more than any bandwidth'} at this round trip,"
            f" {f'a round trip of at most {most / 1e3:,.3g} ms' if most else 'less than any round trip'} at"
            " this bandwidth"
        )
    out.print(
        f"each card waits for the others {pipeline.idle_share_one_client:.0%} of the time at one client,"
        f" {pipeline.idle_share:.0%} at {plan.load.clients} that decode in one batch"
    )


def show_suggestions(options: list[Option], plan: Plan, console: Console | None = None) -> None:
    """Print the options that meet the limits of a plan, best first."""
    out = console or terminal()
    wanted = (
        f"{mib(plan.limit_bytes)} a card and {plan.limits.tpot_p99_ms:g} ms a token at {plan.load.clients}"
        " clients"
    )
    if not options:
        out.print(
            f"no setting of {plan.model} on {plan.device_count} x {plan.device} meets {wanted}; use more or"
            " larger cards, or a higher limit"
        )
        return
    out.print(
        f"{plan.model} on up to {plan.device_count} x {plan.device}, within {wanted}: best first (more bits,"
        " then fewer cards, then faster)"
    )
    table = Table(box=None, pad_edge=False)
    for name in ("weights", "cards", "KV type", "offload GiB", "MiB a card", "requests", "ms a token"):
        table.add_column(name, justify="left" if name in ("weights", "KV type") else "right")
    for o in options:
        table.add_row(
            o.weights,
            str(o.plan.tensor_parallel_size),
            str(o.knobs.get("kv_cache_dtype", "16-bit")),
            str(o.knobs.get("cpu_offload_gb", "")),
            f"{o.plan.peak_bytes / MIB:,.0f}",
            str(o.plan.max_requests),
            f"{o.plan.latency_ms.decode_expected:,.1f}",
        )
    out.print(table)
