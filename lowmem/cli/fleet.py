"""Defines the command `lowmem fleet`, which says how many hosts of which profile meet a load."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from lowmem.errors import BadInput
from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest
from lowmem.schema import Plan
from lowmem.text import say, terminal, visible_json

PROFILES = ("low_mem", "low_latency", "extreme")


def fleet(
    qps: Annotated[float, typer.Option(help="requests a second, at random times")],
    p99_tpot: Annotated[float, typer.Option(help="limit of the 99th percentile, ms a token")] = 200.0,
    p99_ttft: Annotated[
        float, typer.Option(help="limit of the 99th percentile, ms to the first token")
    ] = 10_000.0,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            help="name in profiles/, or a YAML file, as often as needed; default: low_mem, low_latency and"
            " extreme"
        ),
    ] = None,
    receipt: Annotated[
        list[Path] | None,
        typer.Option(
            help="receipt of a measured host (--clients 8,1), as often as needed; beside the profiles given"
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="name in the device table, or auto; default: the profile's")
    ] = None,
    input_tokens: Annotated[int, typer.Option(help="tokens of a prompt")] = 1024,
    output_tokens: Annotated[int, typer.Option(help="tokens of an answer")] = 256,
    at_most: Annotated[int, typer.Option(help="most hosts to try")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="a JSON list on stdout")] = False,
) -> None:
    """Compute how many hosts of each profile a load needs.

    It simulates the engine's scheduler with the speed that a receipt measured or a plan expects.
    """
    for name, value, low, high in (
        ("--qps", qps, 0.001, 10_000), ("--p99-tpot", p99_tpot, 0.1, 1e6), ("--p99-ttft", p99_ttft, 0.1, 1e7),
        ("--input-tokens", input_tokens, 1, 100_000), ("--output-tokens", output_tokens, 2, 100_000),
        ("--at-most", at_most, 1, 1024),
    ):  # fmt: skip
        if not low <= value <= high:
            raise BadInput(f"{name} {value:g} is not from {low:g} to {high:,.0f}; correct it")
    if importlib.util.find_spec("simpy") is None:
        raise BadInput(
            "simpy is not installed here: run `lowmem fleet` in the controller's environment (.lowmem/venv)"
        )
    from lowmem.fleet import simulation, speed

    speeds: list[tuple[str, Plan, speed.Speed]] = []
    for path in receipt or []:
        from lowmem.artefacts import read

        measured = read(path)
        speeds.append(
            (
                f"{path.stem}, measured, {measured.hardware.get('gpu', measured.plan.device)}",
                measured.plan,
                speed.measured(measured),
            )
        )
    for name in profile or (() if receipt else PROFILES):
        plan = make_plan(
            PlanRequest(
                name, device=device, search=False, input_tokens=input_tokens, output_tokens=output_tokens
            )
        )
        if plan.verdict == "impossible":
            raise BadInput(f"profile {name} is impossible with this load: {plan.reasons[0]}")
        speeds.append((f"{name}, planned, {plan.device}", plan, speed.planned(plan)))
    rows: list[dict[str, Any]] = []
    for title, plan, host_speed in speeds:
        answer = simulation.hosts_needed(
            host_speed, qps, input_tokens, output_tokens, p99_tpot, p99_ttft, at_most
        )
        row: dict[str, Any] = {"host": title, "cards_per_host": plan.device_count}
        row |= (
            {"reason": answer}
            if isinstance(answer, str)
            else {"hosts": answer[0], "cards": answer[0] * plan.device_count, **asdict(answer[1])}
        )
        rows.append(row)
    if as_json:
        typer.echo(visible_json(json.dumps(rows, indent=1)))
    else:
        show(rows, qps, p99_tpot, p99_ttft, input_tokens, output_tokens)
    if not any("hosts" in row for row in rows):
        raise typer.Exit(2)


def show(
    rows: list[dict[str, Any]],
    qps: float,
    p99_tpot: float,
    p99_ttft: float,
    input_tokens: int,
    output_tokens: int,
) -> None:
    out = terminal()
    out.print(
        f"{qps:g} requests/s of {input_tokens} in, {output_tokens} out; p99 TPOT {p99_tpot:g} ms, p99 TTFT"
        f" {p99_ttft:g} ms"
    )
    table = Table(
        "host",
        *(
            Column(name, justify="right")
            for name in ("hosts", "cards", "TPOT p50, p99", "TTFT p50, p99", "load")
        ),
    )
    for row in rows:
        if "hosts" in row:
            table.add_row(
                escape(row["host"]), str(row["hosts"]), str(row["cards"]),
                f"{row['tpot_p50_ms']:,.1f}, {row['tpot_p99_ms']:,.1f} ms",
                f"{row['ttft_p50_ms']:,.0f}, {row['ttft_p99_ms']:,.0f} ms", f"{row['full_share']:.0%}",
            )  # fmt: skip
    if table.row_count:
        out.print(table)
    for row in rows:
        if "reason" in row:
            say(out, escape(f"{row['host']}: {row['reason']}"))
