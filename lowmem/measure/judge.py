"""Holds a measurement against its plan: terms side by side, limits, and physics. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from lowmem.measure.engine_log import EngineLog
from lowmem.measure.facts import same_device
from lowmem.measure.observation import Observation, highest
from lowmem.schema import LoadResult, Plan, Receipt, Term
from lowmem.units import MIB

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
    """List every planned per-GPU term beside its measurement.

    The engine does not report some terms alone: context, NCCL, activations and lazily loaded kernels. They
    are compared as one sum, `rest`: idle memory above base less the terms that the engine reports.
    `activations` also has a row of its own if the engine reports it. `start` is the highest sample before the
    service was ready. It may exceed everything that follows.
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
    """Find offload that did not happen, or was undone.

    Some kernels silently bring the offloaded weights back to the card.
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
            " a kernel brought the rest back"
        ]
    return []


def limit_findings(plan: Plan, service_peak_bytes: Sequence[int], loads: Sequence[LoadResult]) -> list[str]:
    """List the limits of the plan that were missed, each with its term, value and limit.

    The peak is that of the ready service, idle or loaded.
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
    """List results that cannot be.

    Such a result is faster than the plan's floors, or it breaks Little's law. The floors count only on the
    device that they are for.

    Little's law in a closed loop says: clients = throughput x mean E2E. A client is idle only once no request
    is left to begin. That is at most the longest request before the end, and the product may be lower by as
    much. A single wave proves nothing. A product that is higher, or still lower, means that the clock or the
    count is wrong.
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


def receipt(plan: Plan, seen: Observation) -> Receipt:
    """Turn what a session observed into a receipt: terms, limits, physics and the verdict."""
    alike = same_device(plan, seen.hardware)
    loaded = [phase for phase in seen.measured_phases if phase.startswith("load:")] or ["none"]
    starting = seen.peak("loading", "start")
    findings = [*seen.findings, *service_findings(plan, seen, alike)]
    cause = seen.log.error if not seen.ready or any("died" in f for f in findings) else None
    if cause:
        findings.append(f"engine: {cause}")
    return Receipt(
        created_utc=seen.created_utc,
        plan=plan,
        mode="attach" if seen.attached else "start",
        versions=seen.versions,
        hardware=seen.hardware,
        argv=seen.argv,
        environment=seen.environment,
        terms=terms(
            plan,
            seen.log,
            seen.above_before(seen.idle),
            seen.above_before(seen.peak(*loaded)),
            seen.above_before(starting),
        ),
        memory_source=seen.memory_source,
        memory_before_bytes=seen.before,
        memory_idle_bytes=seen.idle,
        memory_peak_bytes=seen.peak(*seen.measured_phases) or seen.before,
        memory_peak_start_bytes=starting,
        memory_phases_bytes={phase: readings[seen.source] for phase, readings in seen.peaks.items()},
        host_memory_bytes={
            name: max(highest(seen.peaks, probe, *seen.measured_phases), default=0)
            for name, probe in (("process_tree", "host"), ("taken_from_machine", "taken"))
        },
        sample_interval_ms=seen.interval_s * 1000,
        ready_s=seen.ready_s,
        loads=tuple(seen.loads),
        engine_values=seen.log.values,
        engine_words=seen.log.words,
        engine_log=seen.log.lines,
        error=cause,
        advice=seen.log.advice if cause else None,
        findings=tuple(findings),
        notes=(*seen.notes, *reader_notes(plan, seen, alike)),
        verdict="failed" if findings else "passed",
    )


def service_findings(plan: Plan, seen: Observation, alike: bool) -> list[str]:
    """Hold a service that became ready against its limits and against physics.

    The memory limit is for the service that answers; what passes it for seconds while loading is a note.
    """
    if not seen.ready:
        return []
    phases = [phase for phase in seen.measured_phases if phase not in ("loading", "start")] or ["none"]
    on_top = [peak - base for peak, base in zip(seen.peak(*phases) or seen.before, seen.before, strict=True)]
    return [
        *limit_findings(plan, on_top, seen.loads),
        *offload_findings(plan, seen.log),
        *physics_findings(plan, seen.loads, alike),
    ]


def reader_notes(plan: Plan, seen: Observation, alike: bool) -> list[str]:
    """Say what a reader must know and what is no failure."""
    notes = []
    if not alike:
        notes.append(
            f"planned for {plan.device}, measured on {seen.hardware.get('gpu')}: the plan's floors are not"
            " this card's and were not compared"
        )
    if seen.loads and not any(result.load == plan.load for result in seen.loads):
        notes.append("none of the loads is the plan's: latency limits were not compared")
    most = seen.above_before(seen.peak("loading", "start"))
    if seen.ready and most is not None and most > plan.limits.memory_bytes:
        notes.append(
            f"memory: up to {most / MIB:,.0f} MiB while starting, over the limit of"
            f" {plan.limits.memory_bytes / MIB:,.0f} MiB"
        )
    if seen.longest_gap_s > max(0.2, 2 * seen.interval_s):
        notes.append(f"longest gap between two memory samples: {seen.longest_gap_s * 1000:.0f} ms")
    if seen.source == "host":
        notes.append(f"memory: {seen.memory_source}")
    return notes
