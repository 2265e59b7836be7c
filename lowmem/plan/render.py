"""Renders a plan for people, as tables with a bar per term."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lowmem.plan.goals import Choice, Goal, described
from lowmem.plan.request import NO_LIMIT_MS, WEIGHTS
from lowmem.schema import VLLM_VERSION, Node, Pipeline, Plan
from lowmem.text import bar, shell_lines, terminal
from lowmem.units import GIB, MIB, gib, mib

_COLOUR = {"fits": "green", "slow": "yellow", "impossible": "red"}


def plan_text(plan: Plan, width: int = 120) -> str:
    """Return the output of `show_plan` as plain text without colour."""
    page = io.StringIO()
    show_plan(plan, terminal(file=page, width=width, color_system=None))
    return page.getvalue()


def show_plan(
    plan: Plan, console: Console | None = None, beside: Callable[[Console], None] | None = None
) -> None:
    """Print verdict, memory per card, host RAM, latency and the command that starts the engine.

    `beside` prints what comes before that command.
    """
    out = console or terminal()
    q = plan.quantization
    weights = "16-bit" if q.method == "none" else f"{q.method} {q.bits}-bit, group {q.group_size}"
    cards = f"{plan.device_count} x {plan.device}"
    place = f"{plan.hosts} hosts with {cards} each" if plan.hosts > 1 else cards
    out.print(
        f"[bold]{escape(plan.profile)}[/]: {escape(plan.model)} ({weights}, {gib(plan.weight_bytes)})"
        f" on {place}, vLLM {plan.vllm_version}"
    )
    out.print(f"[bold {_COLOUR[plan.verdict]}]{plan.verdict}[/]")
    for reason in plan.reasons:
        out.print(_indented(reason, 2))
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
        f" {speed.decode_floor:,.1f}; limit {_limit(plan.limits.tpot_p99_ms)}"
    )
    out.print(f"prefill {speed.prefill_expected:,.0f} ms a prompt expected, floor {speed.prefill_floor:,.0f}")
    if plan.pipeline:
        show_pipeline(plan, plan.pipeline, out)
    ram = ", ".join(f"{k} {v / GIB:.1f}" for k, v in plan.host_ram.items())
    out.print(f"host RAM {gib(plan.host_ram_bytes)} ({ram})")
    for note in plan.device_notes:
        out.print(note, markup=False)
    out.print()
    if beside:
        beside(out)
        out.print()
    for start in plan.nodes or (plan,):
        if isinstance(start, Node):
            out.print(f"[bold]on {start.address}[/]")
        variables = [f"{variable.name}={variable.value}" for variable in start.environment]
        for line in shell_lines(["vllm", "serve", *start.argv], before=variables):
            out.print(line, markup=False, soft_wrap=True)


def _indented(text: str, columns: int) -> Padding:
    """Indent every line of a text, also those that the terminal's width makes."""
    return Padding(Text(text), (0, 0, 0, columns), expand=False)


def _limit(ms: float) -> str:
    return "none" if ms >= NO_LIMIT_MS else f"{ms:g}"


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


def command_of(choice: Choice, goal: Goal) -> list[str]:
    """Return the command that plans this choice again."""
    load, limits = goal.load, goal.limits
    words = ["lowmem", "plan"]
    words += ["--profile", choice.profile] if choice.profile else []
    known = choice.weights in WEIGHTS
    model, weights = (goal.model or goal.card.name, choice.weights) if known else (choice.weights, "stored")
    words += ["--model", model, "--device", goal.place or goal.device.name]
    words += ["--count", str(choice.plan.device_count), "--weights", weights]
    words += ["--memory-limit", size_word(limits.memory_bytes)]
    words += ["--clients", str(choice.plan.load.clients)]
    words += ["--input-tokens", str(choice.plan.load.input_tokens)]
    words += ["--output-tokens", str(load.output_tokens)]
    words += ["--tpot-ms", f"{limits.tpot_p99_ms:.10g}"]
    if choice.profile or limits.ttft_p99_ms < NO_LIMIT_MS:
        words += ["--ttft-ms", f"{limits.ttft_p99_ms:.10g}"]
    words += ["--vllm-version", goal.vllm_version] if goal.vllm_version != VLLM_VERSION else []
    if choice.profile:
        return words + [w for name, value in goal.overrides.items() for w in ("--set", f"{name}={value}")]
    if choice.plan.speculation and load.accepted_tokens is not None:
        words += ["--accepted-tokens", f"{load.accepted_tokens:g}"]
    knobs = {"kv_cache_dtype": "auto", "cpu_offload_gb": 0, **choice.knobs}
    if knobs.get("kv_cache_memory_bytes") == "auto":  # as a search has it
        del knobs["kv_cache_memory_bytes"]
    words += [w for name, value in knobs.items() for w in ("--set", f"{name}={value}")]
    return words + [w for name, value in choice.environment.items() for w in ("--env", f"{name}={value}")]


def size_word(value: int) -> str:
    """Write bytes as MiB or GiB if they are whole ones."""
    if value % GIB == 0:
        return f"{value // GIB}GiB"
    return f"{value // MIB}MiB" if value % MIB == 0 else str(value)


def show_choices(title: str, choices: Sequence[Choice], goal: Goal, console: Console | None = None) -> None:
    """Print choices, best first, each with the command that plans it again."""
    out = console or terminal()
    out.print(title)
    for number, choice in enumerate(choices, 1):
        plan = choice.plan
        name = f"profile {choice.profile}: " if choice.profile else ""
        out.print(
            f"{number}. {name}{described(choice)}: {mib(plan.peak_bytes)} a card, {plan.max_requests}"
            f" requests, {plan.latency_ms.decode_expected:,.1f} ms a token",
            markup=False,
        )
        if choice.bits < 4:
            out.print(
                _indented(f"warning: {choice.bits}-bit weights answer worse than 4-bit ones; {_MEASURE}", 3)
            )
        for line in shell_lines(command_of(choice, goal), 76):
            out.print("   " + line, markup=False, soft_wrap=True)


_MEASURE = "measure their perplexity before you serve them (docs/quantization.md)"


def wanted(goal: Goal) -> str:
    """Say what a goal asks for."""
    load, limits = goal.load, goal.limits
    parts = [f"{mib(limits.memory_bytes)} a card"]
    parts += [f"{limits.tpot_p99_ms:g} ms a token"] if limits.tpot_p99_ms < NO_LIMIT_MS else []
    parts += [f"{limits.ttft_p99_ms:g} ms to the first token"] if limits.ttft_p99_ms < NO_LIMIT_MS else []
    return (
        f"{' and '.join(parts)} at {load.clients} client{'s' if load.clients > 1 else ''} of"
        f" {load.input_tokens} + {load.output_tokens} tokens"
    )
