"""Renders docs/planning.md: the text of scripts/planning.md.in with computed numbers.

`python scripts/planning_page.py` prints it; a test compares.
"""

from __future__ import annotations

import sys
from pathlib import Path
from string import Template

from reference_runs import load_runs, load_session

from lowmem.data import load_yaml
from lowmem.inputs import devices, links, model_cards, profiles
from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest
from lowmem.plan.weights import stored_bytes
from lowmem.schema import Quantization
from lowmem.units import GB, GIB, MIB

DATA = Path(__file__).parent.parent / "tests" / "data"


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _error(planned: float, measured: float | None) -> str:
    return "-" if not measured else f"{(planned - measured) / measured * 100:+.1f} %"


def device_table() -> list[str]:
    """Figures of every card of the device table."""
    lines = [
        "| name | card | capability | MiB | GB/s | FP16 TFLOPS | NVLink | MIG slices |",
        "|---|---|---|---:|---:|---:|---|---|",
    ]
    for name in devices.names():
        d = devices.load_device(name)
        if d.kind == "cpu":
            continue
        parts = ", ".join(s.removeprefix(f"{name}-mig-") for s in devices.slices(name))
        cells = [
            f"`{name}`",
            d.title.removeprefix("NVIDIA "),
            d.capability,
            f"{d.nvml_total_mib:,}",
            f"{d.hbm_gb_per_s:,g}",
            f"{d.fp16_tflops:,g}",
            "yes" if d.nvlink else "no",
            parts or "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def reference_table() -> list[str]:
    """Prediction beside measurement for every reference run."""
    used = set(load_yaml("calibration.yml")["calibrated_on"])
    lines = [
        (
            "| run | vLLM | idle MiB planned | measured | error | KV tokens planned | measured | ms a token"
            " planned | measured | error | outcome |"
        ),
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for r in load_runs(DATA / "gpu_runs.json"):
        p, started = r.plan, r.idle_mib is not None
        idle = _number(r.planned_idle_mib) if started else "-"
        tpot = _number(p.latency_ms.decode_expected, 1) if started else "-"
        if started:
            outcome = "started, as planned" if p.verdict != "impossible" else "started, refused by the plan"
        else:
            said = (
                f"{p.kv_available_bytes / GIB:.2f} GiB for KV planned"
                if r.kv_gib is None
                else f"{p.kv_available_bytes / GIB:.2f} GiB for KV planned, {r.kv_gib:.2f} logged"
            )
            outcome = f"refused as planned: {r.error.split(':')[0] if r.error else ''}; {said}"
        cells = [
            r.name + (" (calibrates)" if f"{r.name}-{r.vllm}" in used else ""),
            r.vllm,
            idle,
            _number(r.idle_mib),
            _error(r.planned_idle_mib, r.idle_mib),
            _number(p.kv_tokens) if started else "-",
            _number(r.kv_tokens),
            tpot,
            _number(r.tpot_ms, 1),
            _error(p.latency_ms.decode_expected, r.tpot_ms),
            outcome,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def session_table() -> list[str]:
    """Prediction beside measurement for our own runs."""
    lines = [
        (
            "| run | loaded MiB planned | seen | at the engine's first reading planned | seen | idle planned"
            " | seen | highest while starting planned | seen | outcome |"
        ),
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for r in load_session(DATA / "gpu_session.json"):
        p = r.plan
        cells = [
            r.name + (" (calibrates)" if r.calibrates else ""),
            _number(p.per_gpu["weights"] / MIB),
            _number(r.loaded_mib),
            _number(r.planned_before_start_mib),
            _number(r.before_start_mib),
            _number(p.per_gpu["total"] / MIB),
            _number(r.idle_mib),
            _number(p.start_peak_bytes / MIB),
            _number(r.start_peak_mib),
            r.outcome,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def profile_table() -> list[str]:
    """Render the plan of each profile as it stands."""
    lines = [
        (
            "| profile | on | verdict | MiB a card under load | limit | KV tokens | requests | ms a token"
            " expected | floor | host RAM GiB |"
        ),
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in profiles.names():
        p = make_plan(PlanRequest(name, search=False))
        cells = [
            name,
            f"{f'{p.hosts} hosts, ' if p.hosts > 1 else ''}{p.device_count} x {p.device}",
            p.verdict,
            f"{p.peak_bytes / MIB:,.0f}",
            f"{p.limit_bytes / MIB:,.0f}",
            f"{p.kv_tokens:,}",
            str(p.max_requests),
            f"{p.latency_ms.decode_expected:,.0f}",
            f"{p.latency_ms.decode_floor:,.1f}",
            f"{p.host_ram_bytes / GIB:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def link_table() -> list[str]:
    """Render the links between hosts, with the source of each figure."""
    lines = [
        "| network | | GB/s, one direction | from | round trip, us | from |",
        "|---|---|---:|---|---:|---|",
    ]
    for name in links.names():
        link = links.load_link(name)
        cells = [
            name,
            link.title,
            f"{link.gb_per_s:g}",
            link.source["gb_per_s"],
            f"{link.round_trip_us:g}",
            link.source["round_trip_us"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def two_hosts_rows() -> list[str]:
    """Render the profile of two hosts over each link of the table."""
    lines = []
    for name in links.names():
        p = make_plan(PlanRequest("two_hosts", network=name, search=False))
        if p.pipeline is None:
            raise RuntimeError("profile two_hosts has no stages")
        cells = [
            name,
            f"{p.peak_bytes / MIB:,.0f}",
            f"{p.latency_ms.decode_expected:,.1f}",
            f"{p.latency_ms.decode_floor:,.1f}",
            f"{p.pipeline.hop_ms:,.2f}",
            f"{p.latency_ms.terms['ttft_all_at_once']:,.0f}",
            f"{p.pipeline.least_gb_per_s:g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def calibration_table() -> list[str]:
    """Render every constant that no formula gives, with its source."""
    lines = ["| constant | value | source |", "|---|---|---|"]
    for section, entries in load_yaml("calibration.yml").items():
        if section == "calibrated_on":
            continue
        for name, entry in entries.items():
            value = entry["value"]
            shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            lines.append(f"| {section}.{name} | {shown} | {entry['source']} |")
    return lines


def page() -> str:
    """Render the whole page."""
    awq = model_cards.quantized(
        model_cards.load_card("llama-2-70b"),
        Quantization(method="awq", bits=4, group_size=128, zero_point=True),
    )
    text = (Path(__file__).parent / "planning.md.in").read_text(encoding="utf-8")
    return Template(text).substitute(
        parameters=f"{awq.parameters:,}",
        linear=f"{sum(g.parameters for g in awq.groups if g.kind == 'linear'):,}",
        ends=f"{sum(g.parameters for g in awq.groups if g.kind in ('embedding', 'lm_head')):,}",
        stored_gb=f"{stored_bytes(awq) / GB:.2f}",
        hop_bytes=f"{2 * awq.hidden_size * 2:,}",
        links="\n".join(link_table()),
        two_hosts="\n".join(two_hosts_rows()),
        profiles="\n".join(profile_table()),
        session="\n".join(session_table()),
        reference="\n".join(reference_table()),
        calibration="\n".join(calibration_table()),
        devices="\n".join(device_table()),
    )


if __name__ == "__main__":
    sys.stdout.write(page())
