#!/usr/bin/env python3
"""Writes the Grafana dashboards of role monitoring. `--print NAME` shows one and writes nothing.

Every panel names series that role monitoring scrapes or records; a test holds the two together. For Grafana
11 and later.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as shapes
from grafana_foundation_sdk.models import dashboard as models

TARGET = Path(__file__).resolve().parents[1] / "roles/monitoring/files/dashboards"
SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")

RED, AMBER, GREEN, GREY = "red", "orange", "green", "text"


@dataclass(frozen=True)
class Graph:
    """Panel over time.

    `series` maps each legend to its expression. A legend that starts with "limit" or "plan" is drawn as a
    dashed line.
    """

    title: str
    unit: str
    series: dict[str, str]
    about: str = ""
    span: int = 12
    stack: bool = False
    most: float | None = None


@dataclass(frozen=True)
class Figure:
    """Panel of one number: green below the first of `steps`, amber below the second, red above.

    `words` maps a value to its word and colour.
    """

    title: str
    unit: str
    expression: str
    steps: tuple[float, float] | None = None
    about: str = ""
    words: dict[str, tuple[str, str]] = field(default_factory=dict)
    span: int = 4


Row = tuple[str, list[Graph | Figure]]
D = 'deployment="$deployment"'

SERVICE: list[Row] = [
    (
        "Against the plan",
        [
            Figure(
                "Engine",
                "none",
                f'min(up{{job="vllm",{D}}})',
                words={"0": ("down", RED), "1": ("up", GREEN)},
                about="Whether its /metrics answers. A hung engine still does: see the alerts.",
            ),
            Figure(
                "Alerts that fire", "none", 'count(ALERTS{alertstate="firing"}) or vector(0)', steps=(1, 2)
            ),
            Figure(
                "p99 TPOT of its limit",
                "percentunit",
                f"lowmem:tpot_seconds:p99{{{D}}} / lowmem:limit_tpot_p99_seconds{{{D}}}",
                steps=(0.8, 1),
                about="Time per output token, over the last 10 minutes.",
            ),
            Figure(
                "p99 TTFT of its limit",
                "percentunit",
                f"lowmem:ttft_seconds:p99{{{D}}} / lowmem:limit_ttft_p99_seconds{{{D}}}",
                steps=(0.8, 1),
                about="Time to first token, over the last 10 minutes.",
            ),
            Figure(
                "Memory of its limit",
                "percentunit",
                f"max(lowmem:memory_used_bytes{{{D}}}) / max(lowmem:limit_memory_bytes{{{D}}})",
                steps=(0.999, 1),
                about=(
                    "The fullest card; on a CPU the service's own memory. A plan that fits may use nearly all"
                    " of it."
                ),
            ),
            Figure(
                "KV cache in use", "percentunit", f"max(vllm:kv_cache_usage_perc{{{D}}})", steps=(0.9, 0.95)
            ),
        ],
    ),
    (
        "Latency",
        [
            Graph(
                "Time per output token (TPOT)",
                "s",
                {
                    "p50": f"lowmem:tpot_seconds:p50{{{D}}}",
                    "p90": f"lowmem:tpot_seconds:p90{{{D}}}",
                    "p99": f"lowmem:tpot_seconds:p99{{{D}}}",
                    "limit p99": f"lowmem:limit_tpot_p99_seconds{{{D}}}",
                    "plan expects": f"lowmem:planned_tpot_seconds{{{D}}}",
                },
                about=(
                    "Per request, (end to end - first token) / (tokens - 1); over 10 minutes, and guessed"
                    " between two buckets."
                ),
            ),
            Graph(
                "Time to first token (TTFT)",
                "s",
                {
                    "p50": f"lowmem:ttft_seconds:p50{{{D}}}",
                    "p90": f"lowmem:ttft_seconds:p90{{{D}}}",
                    "p99": f"lowmem:ttft_seconds:p99{{{D}}}",
                    "limit p99": f"lowmem:limit_ttft_p99_seconds{{{D}}}",
                },
            ),
            Graph(
                "Where a request's time goes, mean",
                "s",
                {
                    part: f"sum(rate({name}_sum{{{D}}}[5m])) / sum(rate({name}_count{{{D}}}[5m]))"
                    for part, name in {
                        "waiting": "vllm:request_queue_time_seconds",
                        "prefill": "vllm:request_prefill_time_seconds",
                        "decode": "vllm:request_decode_time_seconds",
                    }.items()
                },
                stack=True,
            ),
            Graph(
                "End to end",
                "s",
                {
                    name: (
                        f"histogram_quantile({quantile}, sum by (le)"
                        f" (rate(vllm:e2e_request_latency_seconds_bucket{{{D}}}[10m])))"
                    )
                    for name, quantile in {"p50": 0.5, "p90": 0.9, "p99": 0.99}.items()
                },
            ),
        ],
    ),
    (
        "Work",
        [
            Graph(
                "Tokens a second",
                "none",
                {
                    "generated": f"lowmem:generated_tokens:rate1m{{{D}}}",
                    "prompts": f"lowmem:prompt_tokens:rate1m{{{D}}}",
                },
                about="Prompt tokens count when their request has its first token.",
            ),
            Graph(
                "Requests",
                "none",
                {
                    "running": f"sum(vllm:num_requests_running{{{D}}})",
                    "waiting": f"sum(vllm:num_requests_waiting{{{D}}})"
                    f" + (sum(lowmem:requests_waiting{{{D}}}) or vector(0))",
                    "plan's clients": f"lowmem:planned_clients{{{D}}}",
                },
                about="The plan's limits hold for as many clients as it names.",
            ),
            Graph(
                "Requests that ended, a minute",
                "none",
                {
                    "{{finished_reason}}": (
                        f"sum by (finished_reason) (rate(vllm:request_success_total{{{D}}}[5m])) * 60"
                    )
                },
                stack=True,
            ),
            Graph(
                "Prompt tokens found in the prefix cache",
                "percentunit",
                {
                    "found": (
                        f"sum(rate(vllm:prefix_cache_hits_total{{{D}}}[5m])) /"
                        f" sum(rate(vllm:prefix_cache_queries_total{{{D}}}[5m]))"
                    )
                },
                most=1,
            ),
        ],
    ),
    (
        "Memory",
        [
            Graph(
                "Memory against the plan",
                "bytes",
                {
                    "used {{index}}": f"lowmem:memory_used_bytes{{{D}}}",
                    "limit": f"lowmem:limit_memory_bytes{{{D}}}",
                    "plan expects": f"lowmem:planned_memory_bytes{{{D}}}",
                },
                about="Per card, as NVML has it; on a CPU the anonymous and mapped memory of the unit.",
            ),
            Graph(
                "KV cache in use",
                "percentunit",
                {"engine {{engine}}": f"vllm:kv_cache_usage_perc{{{D}}}"},
                most=1,
            ),
            Graph(
                "Preemptions, in 10 minutes",
                "none",
                {"preempted": f"sum(increase(vllm:num_preemptions_total{{{D}}}[10m]))"},
                about="Requests that lost their place in the KV cache and are computed again.",
            ),
            Graph(
                "Memory of the unit",
                "bytes",
                {"{{kind}}": 'lowmem_service_memory_bytes{unit="vllm@$deployment.service"}'},
                about="Of its control group: anonymous, mapped files, shared memory, swap.",
            ),
        ],
    ),
]

HOST: list[Row] = [
    (
        "Units",
        [
            Graph(
                "Units that run",
                "none",
                {"{{name}}": 'node_systemd_unit_state{name=~"vllm.+service|nginx.service",state="active"}'},
                about="1: active. vllm-host-metrics runs for a moment only.",
                most=1,
            ),
            Graph(
                "Restarts since they were started",
                "none",
                {"{{name}}": 'node_systemd_service_restart_total{name=~"vllm.+"}'},
            ),
            Graph("Ends by the watchdog since boot", "none", {"{{unit}}": "lowmem_watchdog_ends"}),
            Graph(
                "Days until a certificate ends",
                "d",
                {"{{path}}": "(lowmem_certificate_not_after_timestamp_seconds - time()) / 86400"},
            ),
        ],
    ),
    (
        "Cards",
        [
            Graph(
                "Memory",
                "bytes",
                {
                    "GPU {{index}}": "gpu_memory_used_MiB * 1048576",
                    "limit {{deployment}}": "lowmem:limit_memory_bytes",
                },
            ),
            Graph("Utilization", "percent", {"GPU {{index}}": "gpu_utilization_Percentage"}, most=100),
            Graph("Temperature", "celsius", {"GPU {{index}}": "gpu_temperature_C"}, span=8),
            Graph(
                "Power",
                "watt",
                {"GPU {{index}}": "gpu_power_usage_W", "limit {{index}}": "gpu_power_limit_W"},
                span=8,
            ),
            Graph("Clock of the multiprocessors", "none", {"GPU {{index}} MHz": "gpu_clock_sm_MHz"}, span=8),
            Graph(
                "PCIe",
                "MiBs",
                {
                    "GPU {{index}} to": "gpu_pcie_rx_throughput_MiBps",
                    "GPU {{index}} from": "gpu_pcie_tx_throughput_MiBps",
                },
                about="What an offloaded model waits for.",
                span=8,
            ),
            Graph(
                "Held down by",
                "none",
                {"GPU {{gpu}} {{reason}}": 'lowmem_gpu_slowed{reason!="gpu_idle"}'},
                about="sw_power_cap under load is the power limit at work.",
                span=8,
            ),
            Graph(
                "Errors",
                "none",
                {
                    "Xid {{xid}} at {{address}}": "lowmem_gpu_xid_errors",
                    "GPU {{gpu}} ECC": 'lowmem_gpu_ecc_uncorrected_errors{counter="volatile"}',
                    "GPU {{gpu}} rows, {{state}}": "lowmem_gpu_row_remap",
                },
                span=8,
            ),
        ],
    ),
    (
        "Host",
        [
            Graph(
                "Memory",
                "bytes",
                {
                    "available": "node_memory_MemAvailable_bytes",
                    "limit: all there is": "node_memory_MemTotal_bytes",
                },
            ),
            Graph(
                "Swap",
                "bytes",
                {
                    "in use": "node_memory_SwapTotal_bytes - node_memory_SwapFree_bytes",
                    "back from it, a second": "rate(node_vmstat_pswpin[5m]) * 4096",
                },
                about="Pages of 4 KiB. What lies there costs nothing; what comes back makes somebody wait.",
            ),
            Graph(
                "Processor",
                "percentunit",
                {"busy": '1 - avg(rate(node_cpu_seconds_total{mode="idle"}[5m]))'},
                most=1,
            ),
            Graph(
                "Free on disk",
                "percentunit",
                {
                    "{{mountpoint}}": (
                        'node_filesystem_avail_bytes{fstype!~"tmpfs|ramfs"} / node_filesystem_size_bytes'
                    )
                },
                most=1,
            ),
        ],
    ),
]


def query(legend: str, expression: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(expression).legend_format(legend).datasource(SOURCE)


def graph(spec: Graph) -> timeseries.Panel:
    panel = (
        timeseries.Panel()
        .title(spec.title)
        .unit(spec.unit)
        .min(0)
        .span(spec.span)
        .height(8)
        .datasource(SOURCE)
    )
    panel = (
        panel.line_width(1.5).fill_opacity(30 if spec.stack else 8).show_points(shapes.VisibilityMode.NEVER)
    )
    panel = panel.tooltip(common.VizTooltipOptions().mode(shapes.TooltipDisplayMode.MULTI))
    panel = panel.legend(
        common.VizLegendOptions()
        .display_mode(shapes.LegendDisplayMode.LIST)
        .placement(shapes.LegendPlacement.BOTTOM)
    )
    if spec.about:
        panel = panel.description(spec.about)
    if spec.stack:
        panel = panel.stacking(common.StackingConfig().mode(shapes.StackingMode.NORMAL))
    if spec.most is not None:
        panel = panel.max(spec.most)
    for letter, (legend, expression) in zip("ABCDEFG", spec.series.items(), strict=False):
        panel = panel.with_target(query(legend, expression).ref_id(letter))
    for pattern, colour in (("/^limit/", RED), ("/^plan/", GREY)):
        if any(legend.startswith(pattern[2:-1]) for legend in spec.series):
            line = {"fill": "dash", "dash": [8, 6]}
            panel = panel.override_by_regexp(
                pattern,
                [
                    models.DynamicConfigValue(id_val="custom.lineStyle", value=line),
                    models.DynamicConfigValue(id_val="custom.fillOpacity", value=0),
                    models.DynamicConfigValue(id_val="color", value={"mode": "fixed", "fixedColor": colour}),
                ],
            )
    return panel


def figure(spec: Figure) -> stat.Panel:
    panel = stat.Panel().title(spec.title).unit(spec.unit).span(spec.span).height(4).datasource(SOURCE)
    panel = panel.with_target(query(spec.title, spec.expression).ref_id("A")).graph_mode(
        shapes.BigValueGraphMode.NONE
    )
    panel = panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False)).no_value(
        "-"
    )
    if spec.about:
        panel = panel.description(spec.about)
    if spec.steps:
        first, second = spec.steps
        steps = [models.Threshold(None, GREEN), models.Threshold(first, AMBER), models.Threshold(second, RED)]
        panel = panel.thresholds(
            dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)
        )
    if spec.words:
        options = {
            value: models.ValueMappingResult(text=word, color=colour)
            for value, (word, colour) in spec.words.items()
        }
        panel = panel.mappings([models.ValueMap(options=options)])
    return panel


def board(uid: str, title: str, about: str, rows: list[Row]) -> dashboard.Dashboard:
    made = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(about)
        .tags(["vllm-lowmem"])
        .refresh("30s")
        .time("now-3h", "now")
        .timezone("browser")
    )
    made = made.tooltip(models.DashboardCursorSync.CROSSHAIR)
    made = made.with_variable(
        dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
    )
    if any("$deployment" in str(panel) for _, panels in rows for panel in panels):
        made = made.with_variable(
            dashboard.QueryVariable("deployment")
            .label("Deployment")
            .query("label_values(lowmem:limit_memory_bytes, deployment)")
            .datasource(SOURCE)
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(models.VariableSort.ALPHABETICAL_ASC)
        )
    for name, panels in rows:
        made = made.with_row(dashboard.Row(name))
        for panel in panels:
            made = made.with_panel(graph(panel) if isinstance(panel, Graph) else figure(panel))
    return made


BOARDS = {
    "vllm": board(
        "lowmem-vllm", "vLLM against its plan", "What the engine does, beside what its plan says.", SERVICE
    ),
    "host": board("lowmem-host", "vLLM host", "The host's units, cards, memory and disks.", HOST),
}


def text(name: str) -> str:
    return JSONEncoder(sort_keys=True, indent=1).encode(BOARDS[name].build()) + "\n"


if __name__ == "__main__":
    if "--print" in sys.argv:
        sys.stdout.write(text(sys.argv[-1]))
    else:
        for name in BOARDS:
            (TARGET / f"{name}.json").write_text(text(name))
