"""Writes what README.md and the pages of docs/measurements say of the receipts, and draws
docs/measurements/*/plan-and-measured.png.

    python scripts/measurements_doc.py

Only the text between the markers is written; a test compares it with the receipts.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from reference_runs import Received, load_receipts

from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest
from lowmem.schema import Scalar
from lowmem.status.page import bars
from lowmem.status.plots import TERM_COLOURS, palette, term_name
from lowmem.units import MIB

TOP = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP))
from benchmarks.fleet_two_replicas import compared  # noqa: E402 - run from a checkout that is not installed

MEASUREMENTS = TOP / "docs" / "measurements"
# Oldest first: where two hold a run of the same name, README.md has the newer one.
SESSIONS = (
    "2026-11-23-2xh200",
    "2026-11-23-1xh100",
    "2026-11-24-1xh100",
    "2026-11-25-2xh100",
    "2026-11-26-4xh200",
    "2026-11-26-4xh100",
)
ON_THE_FRONT_PAGE = "2026-11-23-2xh200"  # its tables are in docs/measurements/README.md
BEGIN, END = "<!-- written by scripts/measurements_doc.py -->", "<!-- end -->"
# pages with two real replicas beside the simulation, and where their loads are
FLEETS = {"2026-11-26-two-replicas-cpu": "", "2026-11-26-4xh200": "fleet", "2026-11-26-4xh100": "fleet"}
FLEET_BEGIN, FLEET_END = "<!-- fleet, written by scripts/measurements_doc.py -->", "<!-- end of fleet -->"


@dataclass(frozen=True)
class Row:
    """Line of README.md: its subject, and the plan for an A100-40G beside it.

    The plan is absent if no profile has these settings.
    """

    what: str
    profile: str | None = None
    knobs: dict[str, Scalar] = field(default_factory=dict)
    clients: int | None = None


ROWS = {
    "low_mem": Row("`low_mem`, two cards", "low_mem"),
    "low_mem-int8": Row(
        "`low_mem` with 8-bit keys and values", "low_mem", {"kv_cache_dtype": "int8_per_token_head"}
    ),
    "low_mem-int4": Row(
        "`low_mem` with 4-bit keys and values", "low_mem", {"kv_cache_dtype": "int4_per_token_head"}
    ),
    "plain": Row("the same model and cards with the engine's defaults", "benchmarks/gpu/plain.yml"),
    "low_latency": Row("`low_latency`, one card (H100)", "low_latency"),
    "long_context": Row("`long_context`, two cards, requests of 4,096 tokens (H100)", "long_context"),
    "extreme": Row("`extreme`, one card, 2 bits, 6 clients", "extreme"),
    "extreme-8-batched-256": Row(
        "`extreme` with 8 clients and steps of 256 tokens", "extreme", {"max_num_batched_tokens": 256}, 8
    ),
    "offload": Row("`offload`, one card, prefetch, 46 of 80 layers (H100)", "offload"),
    "offload_uva": Row("the same by UVA, 45 layers"),
}


def headline(runs: dict[str, Received]) -> str:
    """Render the table of README.md."""
    lines = [
        (
            "| run | limit, MiB a card | peak under load | planned | TPOT p50, p99 | tokens/s | on an"
            " A100-40G, planned |"
        ),
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in ROWS.items():
        run = runs[name]
        load, limit = run.receipt.loads[0], run.receipt.plan.limits.memory_bytes / MIB
        over = f" (**{run.peak_mib - limit:,.0f} over**)" if run.peak_mib > limit else ""
        a100 = (
            make_plan(
                PlanRequest(row.profile, overrides=row.knobs, clients=row.clients, search=False)
            ).latency_ms
            if row.profile
            else None
        )
        cells = [
            row.what,
            f"{limit:,.0f}",
            f"{run.peak_mib:,.0f}{over}",
            f"{run.plan.peak_bytes / MIB:,.0f}",
            f"{load.tpot_ms.p50:,.1f}, {load.tpot_ms.p99:,.1f} ms",
            f"{load.output_tokens_per_s:,.0f}",
            f"{a100.decode_expected:,.0f} ms" if a100 else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def details(runs: dict[str, Received]) -> str:
    """Render the tables of docs/measurements/README.md: today's plan against each receipt, and every load."""
    lines = [
        (
            "| run | idle, MiB a card | planned | error | peak under load | planned | error | highest before"
            " ready | mean TPOT, ms | planned | error |"
        ),
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, run in runs.items():
        idle, peak, tpot = (
            run.plan.per_gpu["total"] / MIB,
            run.plan.peak_bytes / MIB,
            run.plan.latency_ms.decode_expected,
        )
        start = next(t.measured_bytes or 0 for t in run.receipt.terms if t.name == "start") / MIB
        lines.append(
            f"| `{name}` | {run.idle_mib:,.0f} | {idle:,.0f} | {idle / run.idle_mib - 1:+.1%} |"
            f" {run.peak_mib:,.0f} | {peak:,.0f} | {peak / run.peak_mib - 1:+.1%} | {start:,.0f} |"
            f" {run.tpot_ms:,.1f} | {tpot:,.1f} | {tpot / run.tpot_ms - 1:+.1%} |"
        )
    lines += [
        "",
        (
            "| run | clients | in, out | tokens/s | TPOT p50 | p99 | one decode step (ITL p50) | TTFT p50 |"
            " p99 | HBM floor of a step |"
        ),
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, run in runs.items():
        terms = run.plan.latency_ms.terms
        floor = max(terms["hbm_weights"] + terms["hbm_kv"], terms["link_offload"])
        for load in run.receipt.loads:
            lines.append(
                f"| `{name}` | {load.load.clients} | {load.load.input_tokens}, {load.load.output_tokens} |"
                f" {load.output_tokens_per_s:,.1f} | {load.tpot_ms.p50:,.1f} | {load.tpot_ms.p99:,.1f} |"
                f" {load.itl_ms.p50:,.1f} | {load.ttft_ms.p50:,.0f} | {load.ttft_ms.p99:,.0f} |"
                f" {floor:,.1f} |"
            )
    return "\n".join(lines)


def replicas(folder: Path) -> str:
    """Render a table of what two replicas did and what `lowmem fleet` says that they do."""
    lines = ["| load | | measured | simulated | ratio |", "|---|---|--:|--:|--:|"]
    for load, figure, real, simulated in compared(folder):
        digits = 0 if figure.startswith("ttft") else 1
        words = (
            figure.replace("_", " ").replace("tpot", "TPOT").replace("ttft", "TTFT").replace(" ms", ", ms")
        )
        lines.append(
            f"| {load} | {words} | {real:,.{digits}f} | {simulated:,.{digits}f} | {simulated / real:.2f} |"
        )
    return "\n".join(lines)


def written(page: str, block: str, begin: str = BEGIN, end: str = END) -> str:
    """Return the page with the block between its markers."""
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{block}\n{end}{after}"


def sessions() -> dict[str, dict[str, Received]]:
    return {name: {run.name: run for run in load_receipts(MEASUREMENTS / name)} for name in SESSIONS}


def pages() -> dict[Path, str]:
    found = sessions()
    blocks = {
        TOP / "README.md": headline({name: run for runs in found.values() for name, run in runs.items()})
    }
    for name, runs in found.items():
        blocks[(MEASUREMENTS if name == ON_THE_FRONT_PAGE else MEASUREMENTS / name) / "README.md"] = details(
            runs
        )
    texts = {path: written(path.read_text(encoding="utf-8"), block) for path, block in blocks.items()}
    for name, folder in FLEETS.items():
        path = MEASUREMENTS / name / "README.md"
        text = texts.get(path) or path.read_text(encoding="utf-8")
        texts[path] = written(text, replicas(MEASUREMENTS / name / folder), FLEET_BEGIN, FLEET_END)
    return texts


def draw(runs: list[Received], file: Path) -> None:
    """Planned and measured memory of each run as stacked bars, the limit as a line."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 6.2), layout="constrained")
    ground = palette()
    colours: dict[str, str] = {}
    for row, run in enumerate(runs):
        fresh = run.receipt.model_copy(
            update={
                "terms": tuple(
                    (
                        t.model_copy(
                            update={
                                "planned_bytes": run.plan.per_gpu.get(
                                    t.name, sum(run.plan.load_growth.values())
                                )
                            }
                        )
                        if t.name in run.plan.per_gpu or t.name == "load_growth"
                        else t
                    )
                    for t in run.receipt.terms
                )
            }
        )
        limit = run.receipt.plan.limits.memory_bytes / 2**30
        for offset, bar in zip((-0.2, 0.2), bars(fresh), strict=True):
            left = 0.0
            for term, size, _ in bar["parts"]:
                colour = colours.setdefault(term, ground[TERM_COLOURS[term]])
                axes.barh(
                    row + offset, size / 1024, 0.36, left=left, color=colour, edgecolor="white", linewidth=0.4
                )
                left += size / 1024
            axes.text(
                max(left, limit) + 0.2,
                row + offset,
                f"{bar['name']} {left * 1024:,.0f}",
                va="center",
                fontsize=8,
            )
        axes.plot([limit, limit], [row - 0.42, row + 0.42], color="black", linewidth=1.5)
    axes.set_yticks(range(len(runs)), [run.name for run in runs])
    axes.invert_yaxis()
    axes.set_xlim(0, 46)
    axes.set_xlabel("GiB of a card (figures: MiB); the black line is the profile's limit")
    axes.set_title(
        "Memory of a card under load: planned by today's constants, and measured on"
        f" {runs[0].plan.device.upper()}",
        loc="left",
        fontsize=11,
    )
    axes.grid(visible=True, axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    squares = [plt.Rectangle((0, 0), 1, 1, color=c) for c in colours.values()]
    figure.legend(
        squares,
        [term_name(term) for term in colours],
        loc="outside lower center",
        fontsize=8,
        ncols=5,
        frameon=False,
    )
    figure.savefig(file, dpi=110, metadata={"Software": None})


def main() -> None:
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    for name, runs in sessions().items():
        draw(list(runs.values()), MEASUREMENTS / name / "plan-and-measured.png")


if __name__ == "__main__":
    main()
