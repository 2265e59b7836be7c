"""Shows a deployed server in the terminal beside its plan, look after look.

A terminal gets one screen that is drawn anew, a pipe a line for each look, and `--json` one JSON object for
each look.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lowmem.schema import Plan
from lowmem.status.metrics import Sample
from lowmem.status.probe import Host
from lowmem.status.status import Quantiles, Status, status
from lowmem.text import bar, span, sparkline
from lowmem.units import MIB, number

COLOUR = {"serving": "green", "starting": "yellow", "silent": "red", "failing": "red", "down": "red"}

WORDS = {
    "serving": "serving",
    "starting": "starting",
    "silent": "does not answer",
    "failing": "failing",
    "down": "not running",
}


class Watcher:
    """Looks at a server and keeps what a window of `window_s` seconds needs.

    `rates` has the output tokens/s from look to look, newest last.
    """

    def __init__(self, host: Host, window_s: float) -> None:
        self.host = host
        self.window_s = window_s
        self.samples: deque[Sample] = deque()
        self.rates: deque[float] = deque(maxlen=120)

    def look(self) -> tuple[Status, Status]:
        """Look now; return the status over the window and since the server started."""
        look = self.host.look()
        if look.sample is None:
            self.samples.clear()
        seen = status(self.host.plan, look, self.samples, self.window_s)
        if look.sample is not None:
            if self.samples:
                rate = status(self.host.plan, look, [self.samples[-1]], 0).output_tokens_per_s
                self.rates.append(rate or 0)
            self.samples.append(look.sample)
            # one look stays that is older than the window
            while len(self.samples) > 2 and self.samples[1].at <= look.at - self.window_s:
                self.samples.popleft()
        return seen, status(self.host.plan, look)


def screen(plan: Plan, seen: Status, since: Status, rates: Sequence[float], width: int) -> RenderableType:
    """Return the whole view for a terminal of so many columns, from 40 on."""
    narrow = width < 64
    bars = max(8, min(50, width - (28 if narrow else 52)))
    lines: list[RenderableType] = [*_title(plan, seen, width)]
    lines += [Text(line, COLOUR[seen.state]) for line in ([seen.trouble] if seen.trouble else [])]
    lines += [Text(line, "red") for line in seen.findings]
    lines += [Text(line, "yellow") for line in seen.over_plan]
    gauges = Table(box=None, pad_edge=False, show_header=False)
    gauges.add_column(style="bold", no_wrap=True, min_width=12)
    gauges.add_column(justify="right", no_wrap=True, min_width=9)
    gauges.add_column(no_wrap=True)
    gauges.add_column(no_wrap=True, overflow="ellipsis")

    def gauge(name: str, figure: RenderableType, drawn: RenderableType = "", whole: str = "") -> None:
        gauges.add_row(name, figure, drawn, *([] if narrow else [whole]))

    if seen.running is not None and seen.kv_usage is not None:
        gauge(
            "requests",
            f"{seen.running:,} running",
            bar(seen.running, seen.running_most, bars),
            f"of {seen.running_most:,}",
        )
        gauge("", f"{seen.waiting or 0:,} waiting", "", "")
        gauge(
            "KV cache",
            f"{100 * seen.kv_usage:.1f} %",
            bar(seen.kv_usage, 1, bars),
            f"of {seen.kv_tokens:,} tokens",
        )
    for index, used in enumerate(seen.memory_bytes):
        colour = _memory_colour(seen, used)
        gauge(
            f"GPU {index}" if plan.device_kind == "cuda" else "memory",
            Text(f"{used / MIB:,.0f} MiB", "" if colour == "green" else colour),
            Text(bar(used, seen.memory_limit_bytes, bars), colour),
            f"of {seen.memory_limit_bytes / MIB:,.0f}, plan {seen.memory_plan_bytes / MIB:,.0f}",
        )
    if seen.running is not None:
        gauge(
            "tokens/s out",
            number(seen.output_tokens_per_s),
            Text(sparkline(rates, bars), "cyan"),
            "" if rates else "next look",
        )
        gauge("tokens/s in", number(seen.prompt_tokens_per_s), "", "")
        if plan.speculation:
            most = plan.speculation.drafts + 1
            said = f"of {most}, plan {plan.speculation.accepted_tokens:.2f}"
            drawn = bar(seen.tokens_per_step or 0, most, bars)
            gauge("tokens/step", number(seen.tokens_per_step), drawn, said)
    lines += [Text(), gauges]
    if seen.running is not None:
        lines += [Text(), _latencies(seen, since, narrow)]
        over_s = f"last {span(seen.window_s)}" if seen.window_s else "since it started"
        lines.append(
            Text(
                f"{over_s}: {seen.requests:,.0f} requests finished; all: since it started,"
                f" {since.requests:,.0f}",
                "dim",
            )
        )
    lines.append(Text(f"memory: {seen.memory_source}", "dim"))
    return Group(*lines)


def _title(plan: Plan, seen: Status, width: int) -> list[Text]:
    """Say what runs and since when, in two lines if one is too narrow."""
    title = Text()
    title.append(seen.model, "bold")
    title.append(f"  {WORDS[seen.state]}", f"bold {COLOUR[seen.state]}")
    if seen.up_s is not None:
        title.append(f"  up {span(seen.up_s)}")
    more = Text(f"vLLM {plan.vllm_version}, profile {plan.profile}  {seen.at_utc[11:19]} UTC", "dim")
    return [title, more] if title.cell_len + 2 + more.cell_len > width else [title + Text("  ") + more]


def _memory_colour(seen: Status, used: int) -> str:
    if used > seen.memory_limit_bytes:
        return "red"
    return "yellow" if used >= seen.memory_plan_bytes + MIB else "green"


def _latencies(seen: Status, since: Status, narrow: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1 if narrow else 2, 0, 0))
    table.add_column("ms", no_wrap=True, min_width=5)
    for name in ("p50", "p90", "p99", *([] if narrow else ["all p50"]), "all p99", "limit"):
        table.add_column(name, justify="right", no_wrap=True)
    rows: list[tuple[str, Quantiles, Quantiles, float | None]] = [
        ("TPOT", seen.tpot_ms, since.tpot_ms, seen.tpot_p99_limit_ms),
        ("TTFT", seen.ttft_ms, since.ttft_ms, seen.ttft_p99_limit_ms),
        ("ITL", seen.itl_ms, since.itl_ms, None),
    ]
    for name, now, all_, limit in rows:

        def cell(value: float | None, limit: float | None = limit) -> Text:
            return Text(
                number(value), "red" if limit is not None and value is not None and value > limit else ""
            )

        middle = [] if narrow else [number(all_.p50)]
        table.add_row(
            name,
            number(now.p50),
            number(now.p90),
            cell(now.p99),
            *middle,
            cell(all_.p99),
            number(limit) if limit else "",
        )
    return table


def line(seen: Status) -> str:
    """Return one look as a line for a log or a pipe."""
    if seen.running is None:
        return f"{seen.at_utc} {seen.state}: {seen.trouble}"
    memory = "+".join(f"{used / MIB:.0f}" for used in seen.memory_bytes) or "?"
    over = max(seen.memory_bytes, default=0) - seen.memory_plan_bytes
    return (
        f"{seen.at_utc} {seen.state} running={seen.running} waiting={seen.waiting}"
        f" kv={100 * (seen.kv_usage or 0):.1f}% out={_plain(seen.output_tokens_per_s)}/s"
        f" in={_plain(seen.prompt_tokens_per_s)}/s tpot_p99={_plain(seen.tpot_ms.p99)}ms"
        f" ttft_p99={_plain(seen.ttft_ms.p99)}ms memory={memory}MiB"
        f" limit={seen.memory_limit_bytes / MIB:.0f}MiB"
        + (f" tokens_per_step={seen.tokens_per_step:.2f}" if seen.tokens_per_step is not None else "")
        + (f" over_plan={over / MIB:.0f}MiB" if over >= MIB else "")
    )


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
