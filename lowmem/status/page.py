"""Makes the page of `lowmem report`: one HTML file, readable on a phone, in light and dark.

The page fetches nothing and has one small script, which tells how old it is. From receipts alone it says what
was measured; with a `Live` it is the status page of one deployment. All functions are pure.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.resources import files
from itertools import pairwise
from typing import Any

from lowmem.schema import Plan, Receipt
from lowmem.status.metrics import Sample, window
from lowmem.status.plots import Plot, plot, term_colour, term_name
from lowmem.status.status import Look, Quantiles, Status, status
from lowmem.text import span, visible
from lowmem.units import MIB, number

SUMS = ("total", "rest", "peak", "start", "load_growth")
"""Rows of a receipt that are sums of others, or come on top of them: not parts of a bar."""

RECENT_S = 300

AGE_SCRIPT = """
"use strict";
const own = document.currentScript.dataset, at = Number(own.at), every = Number(own.everyS) || 300;
function tell() {
  const age = Date.now() / 1000 - at, old = age > 3 * every + 30;
  document.body.classList.toggle("is-old", old);
  if (!old) return;
  const minutes = Math.round(age / 60);
  const hours = Math.round(minutes / 60), days = Math.round(minutes / 1440);
  document.getElementById("age").textContent =
    minutes < 120 ? minutes + " min" : hours < 48 ? hours + " h" : days + " days";
  document.title = document.title.replace(/^[^:]*:/, "old page:");
}
tell();
setInterval(tell, 10000);
"""
"""Marks a status page that is older than three of its intervals, also one that stays open.

A page of a host that is gone would otherwise go on saying "serving".
"""

KEPT_S = 3600
"""Rates and percentiles of the page are over the last five minutes; looks of the last hour
make its curves.
"""


@dataclass(frozen=True)
class Live:
    """Knowledge of a running deployment.

    `earlier` holds the looks before this one, oldest first. `unread` says why some receipts are left out.
    """

    plan: Plan
    look: Look
    earlier: Sequence[Sample] = ()
    release: str = ""
    place: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    every_s: int = 0
    unread: tuple[str, ...] = ()

    @property
    def samples(self) -> list[Sample]:
        return [*self.earlier, *([self.look.sample] if self.look.sample else [])]


@dataclass(frozen=True)
class Tile:
    """Live figure. `share` is its percent of the limit, for a bar; `curve_says` is the curve in words."""

    name: str
    figure: str
    unit: str
    note: str
    share: float | None = None
    over: bool = False
    curve: Plot | None = None
    curve_says: str = ""


def mib(value: float | None) -> str:
    return "" if value is None else f"{round(value / MIB):,}"


def _planned(plan: Plan) -> dict[str, float]:
    parts: dict[str, float] = {name: value for name, value in plan.per_gpu.items() if name != "total"}
    return parts | {"under load": sum(plan.load_growth.values())}


def _parts(receipt: Receipt) -> tuple[dict[str, float], dict[str, float]]:
    """Return plan and measurement, each as term -> bytes."""
    planned: dict[str, float] = {
        t.name: t.planned_bytes or 0
        for t in receipt.terms
        if t.name not in SUMS and not t.name.startswith("host:")
    }
    rows = {t.name: t for t in receipt.terms}
    measured: dict[str, float] = {
        t.name: t.measured_bytes or 0 for t in receipt.terms if t.name in planned and t.measured_bytes
    }
    if "rest" in rows and rows["rest"].measured_bytes:
        measured["rest"] = rows["rest"].measured_bytes - sum(
            v for n, v in measured.items() if n == "activations"
        )
    if "load_growth" in rows:
        planned["under load"] = rows["load_growth"].planned_bytes or 0
        measured["under load"] = max(0, rows["load_growth"].measured_bytes or 0)
    if not any(measured.values()) and receipt.service_peak_bytes:
        measured = {"all": max(receipt.service_peak_bytes)}
    return planned, measured


def _scaled(rows: Sequence[tuple[str, Mapping[str, float]]], limit_bytes: int) -> list[dict[str, Any]]:
    """Turn each row into a bar: `name`, `total_mib`, and `parts` of (term, MiB, percent).

    Percents are of the longest bar, or of the limit when that is longer.
    """
    scale = max(*(sum(parts.values()) for _, parts in rows), limit_bytes, 1)
    return [
        {
            "name": name,
            "total_mib": sum(parts.values()) / MIB,
            "parts": [(term, value / MIB, 100 * value / scale) for term, value in parts.items() if value > 0],
            "limit_percent": 100 * limit_bytes / scale,
        }
        for name, parts in rows
    ]


def bars(receipt: Receipt) -> list[dict[str, Any]]:
    """Return plan and measurement as two stacked bars, see `_scaled`."""
    planned, measured = _parts(receipt)
    return _scaled([("plan", planned), ("measured", measured)], receipt.plan.limits.memory_bytes)


def live_bars(plan: Plan, memory_bytes: Sequence[int], receipt: Receipt | None) -> list[dict[str, Any]]:
    """Return bars of the plan, of its receipt and of the memory in use now, on one scale."""
    rows: list[tuple[str, Mapping[str, float]]] = [("plan", _planned(plan))]
    if receipt is not None and receipt.plan.per_gpu == plan.per_gpu:
        rows.append(("receipt", _parts(receipt)[1]))
    several = len(memory_bytes) > 1
    rows += [
        (f"GPU {index}" if several else "now", {"in use": used}) for index, used in enumerate(memory_bytes)
    ]
    return _scaled(rows, plan.limits.memory_bytes)


def tiles(live: Live, seen: Status) -> list[Tile]:
    """Return the live figures, most asked for first."""
    samples = live.samples
    curves = _Curves(samples, live.look.at)
    kv = seen.kv_usage or 0
    return [
        Tile(
            "Requests",
            f"{seen.running:,}" if seen.running is not None else "-",
            "running",
            f"{seen.waiting or 0:,} waiting; up to {seen.running_most:,} run at once",
            share=100 * (seen.running or 0) / max(1, seen.running_most),
            curve=curves.of([s.running + s.waiting for s in samples]),
            curve_says=(
                f"running and waiting, at most {max((s.running + s.waiting for s in samples), default=0):,}"
            ),
        ),
        Tile(
            "KV cache",
            f"{100 * kv:,.0f}",
            "% in use",
            f"{round(kv * seen.kv_tokens):,} of {seen.kv_tokens:,} tokens"
            + (f"; {seen.preemptions:,.0f} preemptions" if seen.preemptions else ""),
            share=100 * kv,
            over=seen.preemptions > 0,
            curve=curves.of([100 * s.kv_usage for s in samples], least=1),
            curve_says=f"at most {max((100 * s.kv_usage for s in samples), default=0):,.0f} %",
        ),
        Tile(
            "Throughput",
            number(seen.output_tokens_per_s),
            "tokens/s out",
            f"{number(seen.prompt_tokens_per_s)} tokens/s in; {seen.requests:,.0f} requests finished"
            + (f"; {seen.tokens_per_step:.2f} tokens a step" if seen.tokens_per_step is not None else ""),
            curve=curves.between(lambda w: w.output_tokens_per_s, least=1),
            curve_says=f"tokens/s out, at most {number(curves.most(lambda w: w.output_tokens_per_s))}",
        ),
        _latency_tile(
            "Time per token",
            "TPOT",
            seen.tpot_ms,
            seen.tpot_p99_limit_ms,
            curves,
            lambda w: w.tpot.quantile(0.99),
        ),
        _latency_tile(
            "First token",
            "TTFT",
            seen.ttft_ms,
            seen.ttft_p99_limit_ms,
            curves,
            lambda w: w.ttft.quantile(0.99),
        ),
        _memory_tile(seen, samples, curves),
    ]


def _memory_tile(seen: Status, samples: Sequence[Sample], curves: _Curves) -> Tile:
    used = max(seen.memory_bytes, default=None)
    most_used = max((max(s.memory_bytes) for s in samples if s.memory_bytes), default=None)
    several = len(seen.memory_bytes) > 1
    over = used is not None and used > seen.memory_limit_bytes
    said = f"limit {mib(seen.memory_limit_bytes)}; planned peak {mib(seen.memory_plan_bytes)}"
    if used is not None and over:
        said = f"{mib(used - seen.memory_limit_bytes)} over the limit of{said.removeprefix('limit')}"
    elif used is not None and used >= seen.memory_plan_bytes + MIB:
        said = (
            f"{mib(used - seen.memory_plan_bytes)} over the planned peak of {mib(seen.memory_plan_bytes)};"
            f" limit {mib(seen.memory_limit_bytes)}"
        )
    return Tile(
        "Memory" if not several else "Memory, fullest GPU",
        mib(used) or "-",
        "MiB",
        said if used is not None else seen.memory_source,
        share=100 * used / seen.memory_limit_bytes if used is not None else None,
        over=over,
        curve=curves.of(
            [max(s.memory_bytes) / MIB if s.memory_bytes else None for s in samples],
            limit=seen.memory_limit_bytes / MIB,
        ),
        curve_says=f"MiB, at most {mib(most_used)}; dashed: the limit",
    )


def _latency_tile(name: str, short: str, seen: Quantiles, limit_ms: float, curves: _Curves, p99: Any) -> Tile:
    over = seen.p99 is not None and seen.p99 > limit_ms
    most = curves.most(p99)
    return Tile(
        name,
        number(seen.p99),
        f"ms {short} p99",
        (
            f"p50 {number(seen.p50)}; limit {number(limit_ms)}"
            if seen.count
            else f"no request finished; limit {number(limit_ms)} ms"
        ),
        share=100 * seen.p99 / limit_ms if seen.p99 is not None else None,
        over=over,
        curve=curves.between(lambda w: None if (value := p99(w)) is None else value * 1000),
        curve_says=f"p99 in ms, at most {number(most * 1000)}" if most is not None else "p99: none yet",
    )


class _Curves:
    """Sparklines over one time axis that ends now; a gap of several looks breaks the line."""

    def __init__(self, samples: Sequence[Sample], now: float) -> None:
        self.samples = samples
        self.now = now
        self.windows = [window(b, a) if b.same_server(a) else None for a, b in pairwise(samples)]

    def of(self, values: Sequence[float | None], limit: float | None = None, least: float = 0) -> Plot | None:
        return self._plot([s.at for s in self.samples], values, limit, least)

    def between(self, read: Any, least: float = 0) -> Plot | None:
        return self._plot([s.at for s in self.samples[1:]], self._each(read), None, least)

    def most(self, read: Any) -> float | None:
        return max((value for value in self._each(read) if value is not None), default=None)

    def _each(self, read: Any) -> list[float | None]:
        return [read(w) if w is not None else None for w in self.windows]

    def _plot(
        self, xs: list[float], values: Sequence[float | None], limit: float | None, least: float
    ) -> Plot | None:
        if len(xs) < 2 or not any(value is not None for value in values):
            return None
        return plot(xs, values, [limit] if limit is not None else [], height=40, least=least)


def periods(live: Live, seen: Status, receipt: Receipt | None) -> list[dict[str, Any]]:
    """Return latency and throughput over several times, a row each.

    A row has name, requests and tokens_per_s; its ttft and tpot have p50, p90 and p99 in ms.
    """
    rows: list[dict[str, Any]] = []
    if live.look.sample is not None:
        since_start = status(live.plan, live.look)
        hour = status(live.plan, live.look, live.earlier, KEPT_S)
        told: set[str] = set()
        for known in (seen, hour, since_start):
            name = (
                f"last {span(known.window_s)}"
                if known.window_s and known is not since_start
                else "since it started"
            )
            if name not in told:
                told.add(name)
                rows.append(
                    {
                        "name": name,
                        "requests": f"{known.requests:,.0f}",
                        "ttft": known.ttft_ms,
                        "tpot": known.tpot_ms,
                        "tokens_per_s": known.output_tokens_per_s,
                    }
                )
    for load in receipt.loads if receipt else ():
        rows.append(
            {
                "name": f"receipt, {load.load.clients} clients",
                "requests": f"{load.requests:,}",
                "ttft": load.ttft_ms,
                "tpot": load.tpot_ms,
                "tokens_per_s": load.output_tokens_per_s,
            }
        )
    return rows


def history(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return plots over receipts, oldest first; none for fewer than two receipts.

    A plot has `name`, `plot`, `says` (the same in words) and `last`.
    """
    ordered = sorted(entries, key=lambda entry: str(entry["r"].created_utc))
    if len(ordered) < 2:
        return []
    loads = [entry["at_plan"] for entry in ordered]
    wanted: list[tuple[str, list[float | None], list[float]]] = [
        (
            "Peak memory, MiB",
            [entry["peak"] / MIB if entry["peak"] is not None else None for entry in ordered],
            [entry["r"].plan.limits.memory_bytes / MIB for entry in ordered],
        ),
        (
            "TPOT p99, ms",
            [load.tpot_ms.p99 if load else None for load in loads],
            [entry["r"].plan.limits.tpot_p99_ms for entry in ordered],
        ),
        ("Output tokens/s", [load.output_tokens_per_s if load else None for load in loads], []),
    ]
    found = []
    for name, values, limits in wanted:
        known = [value for value in values if value is not None]
        if known:
            says = f"{name}, oldest first: {', '.join(number(value) for value in values)}" + (
                f"; limit {number(limits[-1])}" if limits else ""
            )
            drawn = plot(list(range(len(values))), values, limits)
            dots = [
                (
                    x,
                    y,
                    ordered[index]["r"].verdict == "passed",
                    f"{ordered[index]['name']}: {number(values[index])}",
                )
                for x, y, index in drawn.dots
            ]
            found.append(
                {
                    "name": name,
                    "plot": drawn,
                    "dots": dots,
                    "says": says,
                    "last": known[-1],
                    "limit": limits[-1] if limits else None,
                }
            )
    return found


def page(receipts: Sequence[tuple[str, Receipt]], made_utc: str, live: Live | None = None) -> str:
    """Return the HTML of named receipts; with `live` they are given oldest first."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "mib": mib,
        "ms": number,
        "span": span,
        "term_colour": term_colour,
        "term_name": term_name,
    }
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
    context: dict[str, Any] = {
        "entries": entries,
        "history": history(entries),
        "made_utc": made_utc,
        "live": None,
    }
    if live is not None:
        seen = status(live.plan, live.look, live.earlier, RECENT_S)
        newest = receipts[-1][1] if receipts else None
        context |= {
            "age_script": Markup(AGE_SCRIPT),  # noqa: S704 - a constant of this file
            "age_hash": f"sha256-{b64encode(sha256(AGE_SCRIPT.encode()).digest()).decode()}",
            "live": live,
            "seen": seen,
            "plan": live.plan,
            "tiles": tiles(live, seen) if live.look.sample else [],
            "last_sign": live.earlier[-1] if live.earlier and not live.look.sample else None,
            "bars": live_bars(live.plan, seen.memory_bytes, newest),
            "periods": periods(live, seen, newest),
            "entries": entries[::-1],
            "newest": newest,
        }
    return visible(template.render(context))
