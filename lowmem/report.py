"""`lowmem report`: one HTML page from receipts, readable on a phone, in light and dark, with no script and nothing to fetch."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from lowmem.errors import BadInput
from lowmem.files import write_text
from lowmem.receipt import read
from lowmem.schema import Receipt
from lowmem.units import MIB

SUMS = ("total", "rest", "peak", "start", "load_growth")
"""Rows of a receipt that are sums of others, or come on top of them: not parts of a bar."""


def bars(receipt: Receipt) -> list[dict[str, Any]]:
    """Plan and measurement as two stacked bars: `name`, `total_mib`, and `parts` of (term, MiB, percent of the longer bar or the limit)."""
    planned = {t.name: t.planned_bytes or 0 for t in receipt.terms if t.name not in SUMS and not t.name.startswith("host:")}
    rows = {t.name: t for t in receipt.terms}
    measured = {t.name: t.measured_bytes or 0 for t in receipt.terms if t.name in planned and t.measured_bytes}
    if "rest" in rows and rows["rest"].measured_bytes:
        measured["rest"] = rows["rest"].measured_bytes - sum(v for n, v in measured.items() if n == "activations")
    if "load_growth" in rows:
        planned["under load"] = rows["load_growth"].planned_bytes or 0
        measured["under load"] = max(0, rows["load_growth"].measured_bytes or 0)
    if not any(measured.values()) and receipt.service_peak_bytes:
        measured = {"all": max(receipt.service_peak_bytes)}
    scale = max(sum(planned.values()), sum(measured.values()), receipt.plan.limits.memory_bytes, 1)
    return [
        {
            "name": name,
            "total_mib": sum(parts.values()) / MIB,
            "parts": [(term, value / MIB, 100 * value / scale) for term, value in parts.items() if value > 0],
            "limit_percent": 100 * receipt.plan.limits.memory_bytes / scale,
        }
        for name, parts in (("plan", planned), ("measured", measured))
    ]


def page(receipts: Sequence[tuple[str, Receipt]], made_utc: str) -> str:
    """HTML of the report; each receipt with the name it is told under."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["mib"] = lambda value: "" if value is None else f"{round(value / MIB):,}"
    environment.filters["ms"] = lambda value: f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
    template = environment.from_string((files("lowmem") / "data" / "report.html.j2").read_text())
    entries = [
        {
            "name": name,
            "r": receipt,
            "bars": bars(receipt),
            "device": receipt.hardware.get("gpu") or receipt.hardware.get("cpu", "unknown"),
            "peak": max(receipt.service_peak_bytes, default=None),
            "at_plan": next((load for load in receipt.loads if load.load == receipt.plan.load), None),
            "failed_checks": {n: c for n, c in receipt.checks.items() if c["outcome"] == "failed"},
        }
        for name, receipt in receipts
    ]
    return template.render(entries=entries, made_utc=made_utc)


def report(
    receipts: Annotated[list[Path], typer.Argument(help="receipts, or folders of them")],
    out: Annotated[Path, typer.Option(help="page to write")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page: plan against measurement, latencies, limits and checks of each receipt."""
    paths = [p for given in receipts for p in (sorted(given.glob("*.json")) if given.is_dir() else [given])]
    if not paths:
        raise BadInput(f"no receipt in {', '.join(map(str, receipts))}: a folder with *.json files, or files, are wanted")
    made = dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC")
    write_text(out, page([(path.stem, read(path)) for path in paths], made))
    typer.echo(out)
