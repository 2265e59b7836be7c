"""Holds a measurement against its plan: terms side by side, limits, and physics. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from lowmem.measure.engine_log import EngineLog
from lowmem.schema import LoadResult, Plan, Term

MIB = 2**20

ROOFLINE_TOLERANCE = 0.02

LITTLE_HIGH = 1.03

LITTLE_LOW = 0.75

OFFLOAD_UNDONE = 1.1

_MEASURED_TERMS = {
    "weights": ("weights", "Model loading took"),
    "kv_cache": ("kv_cache", "KV cache memory"),
    "cuda_graphs": ("graphs", "Graph capturing finished"),
    "offload_buffers": ("prefetch_buffers", "[PrefetchOffloader] Static buffer pool"),
}


def terms(
    plan: Plan,
    log: EngineLog,
    service_idle_bytes: int | None,
    service_load_bytes: int | None,
    service_start_bytes: int | None = None,
) -> tuple[Term, ...]:
    """Every planned per-GPU term beside its measurement.

    What the engine does not report alone (context, NCCL, activations, lazily loaded kernels) is compared as
    one sum, `rest`: idle memory above base less the terms that the engine reports. `activations` is also
    listed alone where the engine says it. `start` is the highest sample before the service was ready, which
    may pass everything that follows.
    """
    rows: list[Term] = []
    reported_bytes = 0
    planned_rest = plan.per_gpu.get("total", 0)
    for name, (key, line) in _MEASURED_TERMS.items():
        planned = plan.per_gpu.get(name)
        measured = log.last(key) if name == "cuda_graphs" else log.largest(key)
        if planned is None and measured is None:
            continue
        rows.append(
            Term(name=name, planned_bytes=planned, measured_bytes=measured, source=f"engine log: {line}")
        )
        if measured is not None:
            reported_bytes += measured
            planned_rest -= planned or 0
    rest = [n for n in plan.per_gpu if n not in _MEASURED_TERMS and n != "total"]
    for name in rest:
        measured = log.last("activations") if name == "activations" else None
        source = "engine log: peak activation" if measured is not None else "in `rest`"
        rows.append(Term(name=name, planned_bytes=plan.per_gpu[name], measured_bytes=measured, source=source))
    if service_idle_bytes is not None:
        source = "idle memory less the terms above that the engine reports"
        rows.append(
            Term(
                name="rest",
                planned_bytes=planned_rest,
                measured_bytes=service_idle_bytes - reported_bytes,
                source=source,
            )
        )
    rows.append(
        Term(
            name="total",
            planned_bytes=plan.per_gpu.get("total"),
            measured_bytes=service_idle_bytes,
            source="idle sample",
        )
    )
    growth = (
        None
        if service_idle_bytes is None or service_load_bytes is None
        else service_load_bytes - service_idle_bytes
    )
    rows.append(
        Term(
            name="load_growth",
            planned_bytes=sum(plan.load_growth.values()),
            measured_bytes=growth,
            source="load less idle",
        )
    )
    rows.append(
        Term(
            name="peak",
            planned_bytes=plan.peak_bytes or None,
            measured_bytes=service_load_bytes,
            source="highest under load",
        )
    )
    if service_start_bytes is not None:
        rows.append(
            Term(
                name="start",
                planned_bytes=None,
                measured_bytes=service_start_bytes,
                source="highest before it was ready",
            )
        )
    offloaded = log.values.get("cpu_offload") or log.values.get("prefetch_offload")
    planned_pinned = next(
        (plan.host_ram[n] for n in ("pinned_offload", "offload") if n in plan.host_ram), None
    )
    if offloaded or planned_pinned:
        rows.append(
            Term(
                name="host: offloaded weights",
                planned_bytes=planned_pinned,
                measured_bytes=round(sum(offloaded)) if offloaded else None,
                source="engine log: Total CPU offloaded parameters / Total GPU memory saved, all workers",
            )
        )
    return tuple(rows)


def offload_findings(plan: Plan, log: EngineLog) -> list[str]:
    """Offload that did not happen, or was undone: some kernels bring the offloaded weights back to the card
    without a word.
    """
    if not plan.host_ram.get("pinned_offload"):
        return []
    if not log.values.get("cpu_offload") and not log.values.get("prefetch_offload"):
        return [
            "offload: the engine's log has neither 'Total CPU offloaded parameters' nor '[PrefetchOffloader]"
            " Initialized'"
        ]
    planned, loaded = plan.per_gpu.get("weights"), log.largest("weights")
    if planned and loaded and loaded > planned * OFFLOAD_UNDONE:
        return [
            f"offload: {loaded / MIB:,.0f} MiB of weights lie on the card, {planned / MIB:,.0f} MiB planned:"
            " the rest was brought back"
        ]
    return []


def limit_findings(plan: Plan, service_peak_bytes: Sequence[int], loads: Sequence[LoadResult]) -> list[str]:
    """Limits of the plan that were missed, each with its term, value and limit. The peak is that of the ready
    service, idle or loaded.
    """
    findings = []
    limit = plan.limits.memory_bytes
    for index, used in enumerate(service_peak_bytes):
        if used > limit:
            where = f"GPU {index}" if plan.device_kind == "cuda" else "the engine"
            findings.append(
                f"memory: {where} used {used / MIB:,.0f} MiB at its peak,"
                f" limit {limit / MIB:,.0f} MiB, {(used - limit) / MIB:,.0f} MiB over"
            )
    for load in loads:
        if load.failed:
            findings.append(
                f"requests: {load.failed} of {load.requests} failed at {load.load.clients} clients, limit 0"
            )
        if load.load != plan.load:
            continue
        for name, measured, allowed in (
            ("TPOT p99", load.tpot_ms.p99, plan.limits.tpot_p99_ms),
            ("TTFT p99", load.ttft_ms.p99, plan.limits.ttft_p99_ms),
        ):
            if measured > allowed:
                findings.append(
                    f"latency: {name} {measured:,.1f} ms at {load.load.clients} clients, limit"
                    f" {allowed:,.1f} ms"
                )
    return findings


def physics_findings(plan: Plan, loads: Sequence[LoadResult], same_device: bool) -> list[str]:
    """Results that cannot be: faster than the plan's floors (only on the device they are for), or against
    Little's law.

    Little's law in a closed loop: clients = throughput x mean E2E. A client is idle only once no request is
    left to begin, which is at most the longest request before the end: so much lower a product may be (a
    single wave says nothing). A higher one, or one lower still, means that the clock or the count is wrong.
    """
    findings = []
    for load in loads:
        clients = load.load.clients
        if load.requests == load.failed:
            continue
        floor = (
            plan.latency_ms.decode_floor
            if load.load == plan.load
            else plan.latency_ms.terms.get("hbm_weights")
        )
        if same_device and floor and load.tpot_ms.p50 < floor * (1 - ROOFLINE_TOLERANCE):
            findings.append(
                f"roofline: TPOT p50 {load.tpot_ms.p50:.2f} ms at {clients} clients is below the floor of"
                f" {floor:.2f} ms: no {plan.device} can do this"
            )
        done = load.requests - load.failed
        busy = load.request_throughput_per_s * load.e2e_ms.mean / 1000
        usable = min(clients, done)
        filled = max(0.0, 1 - load.e2e_ms.p99 / 1000 / load.duration_s)
        if not usable * filled * LITTLE_LOW <= busy <= usable * LITTLE_HIGH:
            findings.append(
                f"Little's law: {load.request_throughput_per_s:.3f} requests/s x"
                f" {load.e2e_ms.mean / 1000:.2f} s = {busy:.2f} requests in flight, with {clients} clients"
            )
    return findings
