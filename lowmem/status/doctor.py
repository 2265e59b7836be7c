"""Turns the state of a host into one verdict a line, each with what to do.

`triage` is pure. It takes the output of the Ansible modules `gpu_report` and `host_report`, and the plan if
the host has one. `playbooks/doctor.yml` brings the two together; nothing here touches a host.
"""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap
from typing import Any, Literal

from lowmem.schema import Strict
from lowmem.units import GIB, MIB, gib

Grade = Literal["ok", "warn", "bad"]

ENGINE_CUDA_MAJOR = 13
"""torch 2.13's CUDA wheels are built for CUDA 13, which needs a driver of branch 580 or later."""

DISK_FLOOR_BYTES = 20 * GIB
"""Below this a model update has no room to be written beside the old one; a warning, since sizes differ."""

XID: dict[int, tuple[Grade, str, str]] = {
    13: (
        "warn",
        "a kernel failed on the card",
        (
            "look in the engine's log at this time; it is the program's fault unless it comes back on one"
            " card only"
        ),
    ),
    31: (
        "warn",
        "a program read memory that is not its own",
        "look in the engine's log at this time; update the engine if it comes back",
    ),
    43: ("warn", "a program's work was stopped", "look in the engine's log at this time"),
    45: ("ok", "work was cleaned up after a program ended", ""),
    48: (
        "bad",
        "uncorrectable memory error",
        "drain the host and reboot; if it comes back on the same card, have the card replaced",
    ),
    62: (
        "bad",
        "the card's own controller stopped",
        "drain the host and power it off and on; if it comes back, have the card replaced",
    ),
    63: ("warn", "a bad memory row was set aside", "reboot when it suits, so that the spare row is used"),
    64: ("bad", "a bad memory row could not be set aside", "have the card replaced"),
    74: ("bad", "an NVLink failed", "reseat the bridge or the card; if it comes back, have it replaced"),
    79: ("bad", "the card fell off the bus", "docs/runbooks/gpu-fell-off-the-bus.md"),
    92: ("warn", "many correctable memory errors", "watch for Xid 48; have the card replaced if they go on"),
    94: ("warn", "a contained memory error ended one program", "restart the engine; reboot when it suits"),
    95: (
        "bad",
        "an uncontained memory error",
        "drain the host and reboot; if it comes back, have the card replaced",
    ),
    119: (
        "bad",
        "the card's firmware does not answer",
        "drain the host and reboot; if it comes back, update the driver",
    ),
    120: (
        "bad",
        "the card's firmware failed",
        "drain the host and reboot; if it comes back, update the driver",
    ),
    154: ("bad", "the driver asks for a recovery of the card", "drain the host and reboot"),
}
"""Xid -> grade, meaning, what to do; after NVIDIA's catalogue of Xid errors, those that an inference host
meets.
"""

SLOWED: dict[str, tuple[Grade, str]] = {
    "hw_slowdown": ("bad", "see the two reasons below it: heat or power"),
    "hw_thermal_slowdown": ("bad", "check fans, filters and the inlet temperature"),
    "hw_power_brake_slowdown": ("bad", "check power supplies and cables"),
    "sw_thermal_slowdown": ("warn", "check fans, filters and the inlet temperature"),
    "sw_power_cap": ("warn", "under load this is the power limit at work; nvidia-smi -q -d POWER shows it"),
}


class Finding(Strict):
    """Line of the triage."""

    subject: str
    grade: Grade
    says: str
    do: str = ""


def triage(gpu: dict[str, Any], memory: dict[str, Any], plan: dict[str, Any] | None) -> list[Finding]:
    """List all findings, causes before effects.

    `gpu` and `memory` are the return values of the modules `gpu_report` and `host_report`.
    """
    findings: list[Finding] = []
    if plan is None or plan["device_kind"] == "cuda":
        findings += _driver(gpu, plan)
        findings += [f for g in gpu["smi"]["gpus"] for f in _card(g, gpu, plan)]
        findings += _xids(gpu["xid"])
    return findings + list(_memory(memory, plan))


def _line(subject: str, good: bool, says: str, do: str, otherwise: Grade = "bad") -> Finding:
    return Finding(subject=subject, grade="ok" if good else otherwise, says=says, do="" if good else do)


def _driver(gpu: dict[str, Any], plan: dict[str, Any] | None) -> Iterator[Finding]:
    smi, module = gpu["smi"], gpu["module"]
    present, wanted = len(gpu["cards"]), plan["device_count"] if plan else 1
    yield _line(
        "cards",
        present >= wanted,
        f"{present} on the PCI bus, {wanted} needed",
        "power the host off and on; a card that stays away is seated badly, unpowered or dead"
        " (docs/runbooks/gpu-fell-off-the-bus.md)",
    )
    if not present:
        return
    if gpu["nouveau"]["loaded"]:
        yield Finding(
            subject="nouveau",
            grade="bad",
            says="loaded, so NVIDIA's driver cannot be",
            do="run role gpu_driver, then reboot",
        )
    if gpu["secure_boot"]:
        good = bool(module["loaded"])
        yield _line(
            "secure boot",
            good,
            "on" + ("; the driver is signed" if good else ""),
            "enroll DKMS's key with mokutil, or turn it off in the firmware",
        )
    loaded, installed = module["loaded_version"], module["installed_version"]
    yield _line(
        "driver module",
        bool(module["loaded"]) and (installed is None or loaded == installed),
        f"loaded {loaded or 'none'}, installed {installed or 'none'}",
        (
            "reboot: only a restart brings the installed driver into use"
            if loaded and installed
            else "run site.yml, or `modprobe nvidia` and read journalctl -k -g NVRM"
        ),
    )
    yield from _driver_answers(smi, present)
    yield from _driver_services(gpu)


def _driver_answers(smi: dict[str, Any], present: int) -> Iterator[Finding]:
    """Whether nvidia-smi sees every card, and which CUDA the driver runs."""
    answers = smi["rc"] == 0
    yield _line(
        "driver answers",
        answers,
        (
            f"{len(smi['gpus'])} of {present} cards"
            if answers
            else (smi["error"] or "nvidia-smi is not installed")
        ),
        "reboot; if it stays, read journalctl -k -g NVRM",
    )
    if answers and len(smi["gpus"]) < present:
        yield Finding(
            subject="cards that answer",
            grade="bad",
            says=f"{len(smi['gpus'])} of {present}",
            do="docs/runbooks/gpu-fell-off-the-bus.md",
        )
    if smi["cuda_version"]:
        yield _line(
            "CUDA",
            int(smi["cuda_version"].split(".")[0]) >= ENGINE_CUDA_MAJOR,
            f"driver {smi['driver_version']} runs CUDA up to {smi['cuda_version']}, the engine needs"
            f" {ENGINE_CUDA_MAJOR}",
            "upgrade the driver to branch 580 or later (docs/runbooks/driver-upgrade.md)",
        )


def _driver_services(gpu: dict[str, Any]) -> Iterator[Finding]:
    """Check modules, daemons, held packages and headers beside the driver."""
    yield _line(
        "nvidia-uvm",
        gpu["uvm"]["loaded"],
        "loaded" if gpu["uvm"]["loaded"] else "not loaded",
        "modprobe nvidia-uvm, and run site.yml so that it is loaded at boot",
    )
    persistence = gpu["services"]["persistenced"]["active"]
    yield _line(
        "persistence daemon",
        persistence,
        "runs" if persistence else "does not run",
        "systemctl start nvidia-persistenced",
        "warn",
    )
    if gpu["nvswitches"]:
        fabric = gpu["services"]["fabric_manager"]["active"]
        yield _line(
            "fabric manager",
            fabric,
            "runs" if fabric else "does not run",
            "journalctl -u nvidia-fabricmanager; its version must be the driver's",
        )
    if gpu["packages"]:
        yield _line(
            "packages held",
            bool(gpu["held"]),
            f"{len(gpu['held'])} packages",
            "run site.yml: an unattended upgrade would break the running driver",
            "warn",
        )
    if gpu["kernel"]["without_headers"]:
        missing = ", ".join(gpu["kernel"]["without_headers"])
        yield Finding(
            subject="kernel headers",
            grade="warn",
            says=f"none for {missing}",
            do="run site.yml before booting that kernel: its driver cannot be built",
        )


def _card(card: dict[str, Any], gpu: dict[str, Any], plan: dict[str, Any] | None) -> Iterator[Finding]:
    name = f"GPU {card['index']}"
    free, total = card["memory_free_mib"], card["memory_total_mib"]
    # nvidia-smi lists the processes that compute on the card. /proc lists those that have it open, from other
    # namespaces too and with the service's name.
    units = {h["pid"]: h["unit"] for h in gpu["holders"]}
    holders = card["processes"] or [
        h for h in gpu["holders"] if f"/dev/nvidia{card['index']}" in h["devices"]
    ]
    who = ", ".join(
        f"{h['name'].rsplit('/', 1)[-1]} (pid"
        f" {h['pid']}{', ' + units[h['pid']] if units.get(h['pid']) else ''})"
        for h in holders
    )
    need = plan["per_gpu"]["total"] / MIB if plan and card["index"] < plan["device_count"] else 0
    ours = bool(holders) and all((units.get(h["pid"]) or "").startswith("vllm@") for h in holders)
    says = (
        "memory not reported"
        if free is None
        else f"{free:,} of {total:,} MiB free" + (f", held by {who}" if who else "")
    )
    enough = free is not None and (free >= need or ours)
    yield _line(
        f"{name} memory",
        enough,
        says + (f"; the plan needs {need:,.0f} MiB" if need and not enough else ""),
        "stop what holds it, or wait for it to end",
    )
    yield from _card_faults(card, name)
    yield from _card_speed(card, name)


def _card_faults(card: dict[str, Any], name: str) -> Iterator[Finding]:
    """Check whether a card is split, and the errors of its memory."""
    if card["mig"] == "Enabled":
        yield Finding(
            subject=f"{name} MIG",
            grade="bad",
            says="the card is split",
            do=f"drain it, nvidia-smi -i {card['index']} -mig 0, reboot",
        )
    errors, past = card["ecc_uncorrected_volatile"], card["ecc_uncorrected_aggregate"]
    if card["ecc"] == "Enabled":
        yield Finding(
            subject=f"{name} ECC",
            grade="bad" if errors else "warn" if past else "ok",
            says=f"{errors} uncorrected errors since the driver was loaded, {past} ever",
            do=(
                "drain the host and reboot; if they come back, have the card replaced"
                if errors
                else "watch it: they happened before"
                if past
                else ""
            ),
        )
    elif card["ecc"]:
        yield Finding(
            subject=f"{name} ECC",
            grade="warn",
            says="off: a flipped bit goes unseen",
            do=f"nvidia-smi -i {card['index']} -e 1, then reboot",
        )
    if card["remap_failure"] == "Yes":
        yield Finding(
            subject=f"{name} row remapping",
            grade="bad",
            says="failed: no spare row is left",
            do="have the card replaced",
        )
    elif card["remap_pending"] == "Yes":
        yield Finding(
            subject=f"{name} row remapping",
            grade="warn",
            says="pending",
            do="reboot when it suits, so that the spare row is used",
        )


def _card_speed(card: dict[str, Any], name: str) -> Iterator[Finding]:
    """Yield what makes a card slower than it could be: its link and its clocks."""
    generation, best = card["link_generation"], card["link_generation_max"]
    width, widest = card["link_width"], card["link_width_max"]
    if None not in (generation, best, width, widest):
        # An idle card may run its link slowly; at full clocks (P0) it may not.
        slow = width < widest or (generation < best and card["performance_state"] == "P0")
        do = (
            "reseat the card or its riser, and look for the slot's limit in the firmware: offloading is bound"
            " by this link"
        )
        yield _line(
            f"{name} link",
            not slow,
            f"PCIe {generation} x{width}, the card and slot can do {best} x{widest}",
            do,
            "warn",
        )
    heat = f" at {card['temperature_c']} °C" if card["temperature_c"] is not None else ""
    reasons = [r for r in card["slowed_by"] if r in SLOWED]
    for reason in reasons:
        grade, do = SLOWED[reason]
        yield Finding(subject=f"{name} clocks", grade=grade, says=f"held down by {reason}{heat}", do=do)
    if not reasons:
        yield Finding(subject=f"{name} clocks", grade="ok", says=f"not held down{heat}")


def _xids(seen: list[dict[str, Any]]) -> Iterator[Finding]:
    if not seen:
        yield Finding(subject="Xid errors", grade="ok", says="none in the kernel log of this boot")
    groups = {(x["xid"], x["address"]): x["text"] for x in seen}
    for (number, address), text in groups.items():
        count = sum((x["xid"], x["address"]) == (number, address) for x in seen)
        grade, meaning, do = XID.get(number, ("warn", "", "look it up in NVIDIA's catalogue of Xid errors"))
        says = f"{count} x at {address}: {meaning or text}"
        yield Finding(subject=f"Xid {number}", grade=grade, says=says, do=do)


def _memory(memory: dict[str, Any], plan: dict[str, Any] | None) -> Iterator[Finding]:
    ram, free = memory["memory"]["total_bytes"], memory["memory"]["available_bytes"]
    own = sum(p["rss_bytes"] for p in memory["own_processes"])
    need = plan["host_ram_bytes"] if plan else 0
    says = f"{gib(ram)}, {gib(free)} available" + (f"; the plan needs {gib(need)}" if plan else "")
    do = "stop what holds it, add RAM, or choose a profile that offloads less"
    yield _line("RAM", ram >= need and free + own >= need, says, do)
    swap = memory["memory"]["swap_total_bytes"]
    says = f"{gib(swap)}, vm.swappiness {memory['sysctl']['vm.swappiness']}"
    yield _line(
        "swap",
        swap > 0 or ram >= 2 * need,
        says,
        "set host_memory_swap_gib: loading and quantizing have no room to spare",
        "warn",
    )
    maps = memory["sysctl"]["vm.max_map_count"]
    yield _line(
        "vm.max_map_count", maps >= 65530, f"{maps}", "run site.yml (host_memory_max_map_count)", "warn"
    )
    for path, space in memory["disk"].items():
        good = space["free_bytes"] >= DISK_FLOOR_BYTES
        yield _line(
            f"disk {path}",
            good,
            f"{gib(space['free_bytes'])} free of {gib(space['total_bytes'])}",
            "remove old models and environments",
            "warn",
        )


def overall(findings: list[Finding]) -> Grade:
    """Return the worst grade of these findings."""
    grades = {f.grade for f in findings}
    return "bad" if "bad" in grades else "warn" if "warn" in grades else "ok"


def lines(findings: list[Finding], columns: int = 0) -> list[str]:
    """Format the findings as they are shown: grade, subject, state, and what to do.

    With a number of columns, a longer line goes on below its state.
    """
    wide = max((len(f.subject) for f in findings), default=0)
    whole = [
        f"{f.grade:<4}  {f.subject:<{wide}}  {f.says}" + (f" -> {f.do}" if f.do else "") for f in findings
    ]
    if not columns:
        return whole
    below = " " * min(wide + 8, columns // 2)
    return [part for line in whole for part in wrap(line, max(columns, 20), subsequent_indent=below)]
