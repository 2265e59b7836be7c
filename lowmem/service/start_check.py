"""Checks whether the host still has what the plan was made for.

The service manager runs it before each start (ExecStartPre, or run_under_supervisor.sh). It runs in the
engine's own sandbox, with the same user, limits and devices. So what it cannot open, the engine could not
open. It prints one line for each obstacle, and then exits with 1.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import resource
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from lowmem.checkpoint import manifest
from lowmem.inputs.devices import load_device
from lowmem.probes import Card, cards
from lowmem.schema import Plan
from lowmem.units import MIB, gib, mib

LAST_CORE = 8191
"""No Linux kernel is built for more than 8192 cores."""

SMALLER_CARD = 0.98
"""A card counts as smaller than planned below this share of its size. Drivers before 510 print 40,536 MiB for
a card that later ones call 40,960 MiB.
"""


@dataclass(frozen=True)
class Passing:
    """State of the host that changes by itself.

    Examples are memory that a killed engine still holds for a moment, and a port that is being freed.
    """

    cards: tuple[Card, ...]
    cards_trouble: str
    ram_available_bytes: int
    port_taken: bool
    meeting_port_taken: bool = False
    address_missing: bool = False


@dataclass(frozen=True)
class Lasting:
    """State of the host that stays until somebody changes it."""

    vllm_version: str
    memlock_unlimited: bool
    cores: frozenset[int]
    checkpoint: tuple[str, ...]


def lasting_refusals(plan: Plan, seen: Lasting) -> Iterator[str]:
    """Yield each obstacle that stays until somebody removes it."""
    if plan.verdict == "impossible":
        yield f"the plan of profile {plan.profile} is impossible: {'; '.join(plan.reasons)}"
    if seen.vllm_version.split("+")[0] != plan.vllm_version:
        yield (
            f"the environment has {f'vLLM {seen.vllm_version}' if seen.vllm_version else 'no vLLM'}, the plan"
            f" is for {plan.vllm_version}: run site.yml again"
        )
    if plan.service.memlock == "infinity" and not seen.memlock_unlimited:
        yield (
            "the plan pins memory, and this service may lock too little: set LimitMEMLOCK=infinity (the unit"
            " has it)"
        )
    bound = {v.name: v.value for v in plan.environment}.get("VLLM_CPU_OMP_THREADS_BIND", "")
    missing = sorted(cores_of(bound) - seen.cores)
    if missing:
        named = ", ".join(map(str, missing[:16])) + (" and more" if missing[16:] else "")
        yield (
            f"VLLM_CPU_OMP_THREADS_BIND is {bound}, and this service may not run on core {named}: set it in"
            " vllm_service_extra_environment to cores of this host"
        )
    for line in seen.checkpoint:
        yield f"{line}; it is not served: run site.yml again, which makes the checkpoint anew"


def passing_refusals(plan: Plan, seen: Passing) -> Iterator[str]:
    """Yield each obstacle that may pass by itself."""
    if plan.device_kind == "cuda":
        yield from _card_refusals(plan, seen)
    if seen.ram_available_bytes < plan.host_ram_bytes:
        yield (
            f"{gib(seen.ram_available_bytes)} of RAM available, the plan needs {gib(plan.host_ram_bytes)}: "
            "stop what holds it, or choose a profile that offloads less"
        )
    if seen.port_taken and plan.deploy:
        yield (
            f"port {plan.deploy.port} of {plan.deploy.host} is taken: "
            f"`ss -ltnp sport = :{plan.deploy.port}` says by whom; stop it, or choose another lowmem_port"
        )
    if seen.meeting_port_taken and plan.deploy:
        yield (
            f"rendezvous port {plan.deploy.master_port} is taken: `ss -ltnp sport ="
            f" :{plan.deploy.master_port}` says by whom; stop it, or choose another lowmem_master_port"
        )
    if seen.address_missing and plan.deploy:
        yield (
            f"{plan.deploy.nodes[plan.deploy.rank]} is not an address of this host, so the other hosts cannot"
            " reach it: `ip address` lists its addresses; correct lowmem_nodes, or bring the interface up"
        )


def _card_refusals(plan: Plan, seen: Passing) -> Iterator[str]:
    if seen.cards_trouble:
        yield f"{seen.cards_trouble}: look at nvidia-smi, and run playbooks/doctor.yml"
        return
    if len(seen.cards) < plan.device_count:
        yield (
            f"{len(seen.cards)} GPU{'' if len(seen.cards) == 1 else 's'} may be opened here, the plan is for"
            f" {plan.device_count}: look at vllm_service_cards and at nvidia-smi"
        )
        return
    planned = plan.device_figures or load_device(plan.device)  # a plan of an older release names it only
    for card in seen.cards[: plan.device_count]:
        if (
            card.capability != planned.capability
            or card.total_bytes < SMALLER_CARD * planned.nvml_total_mib * MIB
        ):
            yield (
                f"GPU {card.index} is {card.name} ({mib(card.total_bytes)}, compute capability"
                f" {card.capability}), the plan is for {planned.title} ({mib(planned.nvml_total_mib * MIB)},"
                f" {planned.capability}): set lowmem_device and run site.yml again"
            )
        elif card.free_bytes < plan.peak_bytes:
            held = f", held by {', '.join(card.holders)}" if card.holders else ""
            yield (
                f"GPU {card.index} has {mib(card.free_bytes)} free{held}; the plan needs"
                f" {mib(plan.peak_bytes)}: stop what holds it, or wait for it to end"
            )


def _core(digits: str) -> int:
    return min(int(digits), LAST_CORE) if len(digits) <= len(str(LAST_CORE)) else LAST_CORE


def cores_of(bound: str) -> frozenset[int]:
    """Return the cores that VLLM_CPU_OMP_THREADS_BIND names, as in 0-1|4,6; none for words such as auto."""
    cores: set[int] = set()
    for part in bound.replace("|", ",").split(","):
        first, _, last = part.strip().partition("-")
        if first.isdecimal() and (not last or last.isdecimal()):
            cores |= set(range(_core(first), _core(last or first) + 1))
    return frozenset(cores)


def look_at_lasting(plan: Plan) -> Lasting:
    """Read the state that stays until somebody changes it."""
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Lasting(
        version,
        soft == resource.RLIM_INFINITY,
        frozenset(os.sched_getaffinity(0)),
        tuple(checkpoint_troubles(plan)),
    )


def checkpoint_troubles(plan: Plan) -> list[str]:
    """List how the checkpoint differs from its manifest, whose bytes alone are served.

    A file that was read once and has not changed since is not read again.
    """
    if plan.deploy is None:
        return []
    folder = Path(plan.deploy.model_path)
    listed = folder.with_name(f"{folder.name}.manifest.json")
    if not folder.is_dir():
        return [f"{folder}: this checkpoint does not exist, or may not be read"]
    if not listed.exists():  # the site supplied this checkpoint itself
        return []
    try:
        return [f"{folder}: {problem}" for problem in manifest.check(listed, folder)]
    except (manifest.ManifestError, OSError) as error:
        return [str(error)]


def look_at_passing(plan: Plan) -> Passing:
    """Read the state that changes by itself."""
    trouble = ""
    opened: list[Card] = []
    if plan.device_kind == "cuda":
        try:
            opened = cards()
        except RuntimeError as error:
            trouble = str(error)
    place = plan.deploy
    several = place is not None and len(place.nodes) > 1
    first = place is not None and not place.rank  # only the first host listens at known ports
    return Passing(
        tuple(opened),
        trouble,
        psutil.virtual_memory().available,
        port_taken=place is not None and first and taken(place.host, place.port),
        meeting_port_taken=place is not None and several and first and taken("0.0.0.0", place.master_port),  # noqa: S104 - as torch binds it
        address_missing=place is not None
        and several
        and why_not_bound(place.nodes[place.rank], 0) == errno.EADDRNOTAVAIL,
    )


def taken(host: str, port: int) -> bool:
    """Tell whether another process listens at this address and port."""
    return why_not_bound(host, port) == errno.EADDRINUSE


def why_not_bound(host: str, port: int) -> int | None:
    """Return the error number of binding this address and port; None if it can be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # the server sets this too, so closing connections do not matter
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.errno
    return None
