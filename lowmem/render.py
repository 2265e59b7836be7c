"""The human side of the plan: tables with a bar per term."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from lowmem.schema import Plan
from lowmem.search import Option
from lowmem.units import GIB, MIB, gib, mib

_BAR = 30
_COLOUR = {"fits": "green", "slow": "yellow", "impossible": "red"}


def bar(value: float, whole: float, width: int = _BAR) -> str:
    """A bar of `value` out of `whole`; anything above zero shows at least a sliver."""
    if value <= 0 or whole <= 0:
        return ""
    eighths = max(1, round(min(value / whole, 1.0) * width * 8))
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]


def plan_text(plan: Plan, width: int = 120) -> str:
    """What `show_plan` prints, as plain text without colour."""
    page = io.StringIO()
    show_plan(plan, Console(file=page, width=width, color_system=None, highlight=False))
    return page.getvalue()


def show_plan(plan: Plan, console: Console | None = None) -> None:
    """Verdict, memory per card, host RAM, latency and arguments."""
    out = console or Console(highlight=False)
    q = plan.quantization
    weights = "16-bit" if q.method == "none" else f"{q.method} {q.bits}-bit, group {q.group_size}"
    out.print(
        f"[bold]{plan.profile}[/]: {plan.model} ({weights}, {gib(plan.weight_bytes)}) on {plan.device_count} x {plan.device}, vLLM "
        f"{plan.vllm_version}"
    )
    out.print(f"[bold {_COLOUR[plan.verdict]}]{plan.verdict}[/]")
    for reason in plan.reasons:
        out.print(f"  {reason}", markup=False)
    out.print()
    whole = max(plan.limit_bytes, plan.peak_bytes)
    unit = "per card" if plan.device_kind == "cuda" else "resident set"
    table = Table(box=None, pad_edge=False)
    table.add_column(f"memory {unit}")
    table.add_column("MiB", justify="right")
    table.add_column(f"of {mib(plan.limit_bytes)}")
    for name, value in plan.per_gpu.items():
        if name != "total" and value:
            table.add_row(name, f"{value / MIB:,.0f}", bar(value, whole))
    table.add_row("[bold]total, idle[/]", f"[bold]{plan.per_gpu['total'] / MIB:,.0f}[/]", bar(plan.per_gpu["total"], whole))
    for name, value in plan.load_growth.items():
        table.add_row(f"+ {name} under load", f"{value / MIB:,.0f}", bar(value, whole))
    table.add_row(
        "[bold]peak under load[/]", f"[bold]{plan.peak_bytes / MIB:,.0f}[/]", f"[{_COLOUR[plan.verdict]}]{bar(plan.peak_bytes, whole)}[/]"
    )
    if plan.start_peak_bytes > plan.peak_bytes:
        table.add_row("at most while starting", f"{plan.start_peak_bytes / MIB:,.0f}", "")
    out.print(table)
    out.print()
    out.print(
        f"KV pool {plan.kv_tokens:,} tokens: {plan.max_requests} requests of {plan.load.input_tokens:,} + {plan.load.output_tokens:,} "
        "tokens"
    )
    speed = plan.latency_ms
    out.print(
        f"decode {speed.decode_expected:,.1f} ms a token expected at {plan.load.clients} clients, floor {speed.decode_floor:,.1f}; "
        f"limit {plan.limits.tpot_p99_ms:g}"
    )
    out.print(f"prefill {speed.prefill_expected:,.0f} ms a prompt expected, floor {speed.prefill_floor:,.0f}")
    ram = ", ".join(f"{k} {v / GIB:.1f}" for k, v in plan.host_ram.items())
    out.print(f"host RAM {gib(plan.host_ram_bytes)} ({ram})")
    out.print()
    out.print("vllm serve " + " ".join(plan.argv), markup=False, soft_wrap=True)
    for variable in plan.environment:
        out.print(f"  {variable.name}={variable.value}", markup=False)


def show_suggestions(found: list[Option], plan: Plan, console: Console | None = None) -> None:
    """The options that meet the limits of a plan, best first."""
    out = console or Console(highlight=False)
    wanted = f"{mib(plan.limit_bytes)} a card and {plan.limits.tpot_p99_ms:g} ms a token at {plan.load.clients} clients"
    if not found:
        out.print(
            f"no setting of {plan.model} on {plan.device_count} x {plan.device} meets {wanted}; use more or larger cards, or a higher limit"
        )
        return
    out.print(
        f"{plan.model} on up to {plan.device_count} x {plan.device}, within {wanted}: best first (more bits, then fewer cards, then faster)"
    )
    table = Table(box=None, pad_edge=False)
    for name in ("weights", "cards", "KV type", "offload GiB", "MiB a card", "requests", "ms a token"):
        table.add_column(name, justify="left" if name in ("weights", "KV type") else "right")
    for o in found:
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
