"""Joins a measurement and the outcome of the checks, and prints plan and measurement side by side."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from lowmem.errors import BadInput
from lowmem.files import read_text
from lowmem.schema import LoadResult, Receipt
from lowmem.units import MIB


def read_checks(path: Path) -> dict[str, dict[str, Any]]:
    """Read the outcome of each check by name from pytest's JUnit XML.

    Each entry has `outcome` (passed, failed or skipped), `seconds` and perhaps `message`. Raises BadInput for
    another file, or if no check was run.
    """
    try:
        text = read_text(path, called=f"--checks {path}")
        if "<!DOCTYPE" in text:
            raise BadInput(f"--checks {path}: a document type; give pytest's --junitxml file")
        root = ET.fromstring(text)  # noqa: S314 - bounded, and without entities of its own
        for case in root.iter("testcase"):
            float(case.get("time", 0))
    except (ET.ParseError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"--checks {path}: {error}: give pytest's --junitxml file") from None
    checks: dict[str, dict[str, Any]] = {}
    for case in root.iter("testcase"):
        name = next(
            (p.get("value", "") for p in case.iter("property") if p.get("name") == "check"),
            case.get("name", ""),
        )
        bad = next((e for e in case if e.tag in ("failure", "error")), None)
        skipped = case.find("skipped")
        entry: dict[str, Any] = {"outcome": "passed", "seconds": round(float(case.get("time", 0)), 2)}
        if bad is not None:
            entry |= {
                "outcome": "failed",
                "message": bad.get("message", "").splitlines()[0][:300] if bad.get("message") else "failed",
            }
        elif skipped is not None:
            entry |= {"outcome": "skipped", "message": skipped.get("message", "")}
        checks[name] = entry
    if not checks:
        raise BadInput(f"--checks {path}: no check was run")
    return checks


def merge(receipt: Receipt, checks: dict[str, dict[str, Any]]) -> Receipt:
    """Return the receipt with these checks; a failed check becomes a finding."""
    findings = [f for f in receipt.findings if not f.startswith("check ")]
    # The measurement may already name this limit.
    named = {f.split(":")[0] for f in findings}
    findings += [
        f"check {name}: {check['message']}"
        for name, check in checks.items()
        if check["outcome"] == "failed" and name.split(":")[0] not in named
    ]
    return receipt.model_copy(
        update={"checks": checks, "findings": tuple(findings), "verdict": "failed" if findings else "passed"}
    )


def _mib(value: int | None) -> str:
    return "-" if value is None else f"{value / MIB:,.0f}"


def _error(planned: int | None, measured: int | None) -> str:
    """Of the plan, against the measurement; a term of a few MiB has no percentage worth reading."""
    if not planned or not measured or max(planned, measured) < 64 * MIB:
        return ""
    return f"{(planned - measured) / measured * 100:+.1f} %".replace("-0.0", "0.0").replace("+0.0", "0.0")


def show(receipt: Receipt) -> None:
    """Print the receipt for a person."""
    from rich.markup import escape
    from rich.table import Table

    from lowmem.text import say, terminal

    console = terminal()
    plan, colour = receipt.plan, "green" if receipt.verdict == "passed" else "red"
    device = receipt.hardware.get("gpu") or receipt.hardware.get("cpu", "")
    ready = f", ready in {receipt.ready_s:.0f} s" if receipt.ready_s is not None else ""
    console.print(
        f"\n[bold]Receipt[/] {escape(plan.profile)} · {escape(plan.model)} · planned for"
        f" {plan.device_count} x {escape(plan.device)}, measured on {escape(device)}{ready}"
    )

    unit = "per GPU" if plan.device_kind == "cuda" else "the engine's processes"
    memory = Table(title=f"Memory in MiB, {unit}", title_justify="left", box=None, pad_edge=False)
    memory.add_column("term")
    for column in ("plan", "measured", "plan's error"):
        memory.add_column(column, justify="right")
    for term in receipt.terms:
        bold = "bold" if term.name in ("total", "peak") else ""
        memory.add_row(
            escape(term.name),
            _mib(term.planned_bytes),
            _mib(term.measured_bytes),
            _error(term.planned_bytes, term.measured_bytes),
            style=bold,
        )
    worst = max(receipt.service_peak_bytes, default=0)
    limit = plan.limits.memory_bytes
    memory.add_row(
        "limit",
        _mib(limit),
        f"{_mib(limit - worst)} free" if worst <= limit else f"{_mib(worst - limit)} over",
        "",
        style="dim",
    )
    console.print(memory)

    if receipt.loads:
        speed = Table(title="Load (milliseconds)", title_justify="left", box=None, pad_edge=False)
        for column in (
            "clients",
            "reqs",
            "fail",
            "tok/s",
            "TPOT p50",
            "p90",
            "p99",
            "TTFT p50",
            "p90",
            "p99",
            "E2E p50",
        ):
            speed.add_column(column, justify="right")
        for load in receipt.loads:
            speed.add_row(*_cells(load))
        console.print(speed)
        console.print(
            f"[dim]limits at {plan.load.clients} clients: TPOT p99 {plan.limits.tpot_p99_ms:,.0f} ms, TTFT"
            f" p99 {plan.limits.ttft_p99_ms:,.0f} ms. Expected TPOT {plan.latency_ms.decode_expected:,.1f}"
            f" ms, floor {plan.latency_ms.decode_floor:,.2f} ms[/]"
        )
    if receipt.checks:
        outcomes = [c["outcome"] for c in receipt.checks.values()]
        console.print(
            f"Checks: {outcomes.count('passed')} passed, {outcomes.count('failed')} failed,"
            f" {outcomes.count('skipped')} skipped"
        )
    for note in receipt.notes:
        say(console, f"[dim]note: {escape(note)}[/]")
    if receipt.advice:
        say(console, f"[yellow]advice: {escape(receipt.advice)}[/]")
    for finding in receipt.findings:
        say(console, f"[red]✗ {escape(finding)}[/]")
    console.print(f"[bold {colour}]{receipt.verdict}[/]")


def _cells(load: LoadResult) -> list[str]:
    t, f = load.tpot_ms, load.ttft_ms
    figures = (load.output_tokens_per_s, t.p50, t.p90, t.p99, f.p50, f.p90, f.p99, load.e2e_ms.p50)
    return [
        str(load.load.clients),
        str(load.requests),
        str(load.failed),
        *(f"{v:,.1f}" if v < 100 else f"{v:,.0f}" for v in figures),
    ]
