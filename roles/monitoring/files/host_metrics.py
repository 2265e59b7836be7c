#!/usr/bin/python3
"""What no exporter says of this host, for node exporter's textfile collector: what NVIDIA's driver reports of
its cards, the ends that the watchdog made, the memory of vLLM's units, and how long certificates hold.

Standard library only, for the host's own Python (3.10 or later); `gpu_report.py` of this repository lies
beside it and reads the cards. What cannot be read is left out and said on stderr; the file is replaced whole.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import secrets
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_report

Sample = tuple[str, dict[str, str], float]

HELP = {
    "lowmem_gpu_cards": "NVIDIA cards by where they are seen: on_bus (PCI), answering (nvidia-smi).",
    "lowmem_gpu_ecc_uncorrected_errors": (
        "Uncorrected memory errors: volatile since the driver was loaded, aggregate ever."
    ),
    "lowmem_gpu_row_remap": "1 where the card's row remapping is pending or has failed.",
    "lowmem_gpu_slowed": "1 for each reason that holds the card's clocks down now.",
    "lowmem_gpu_xid_errors": "Xid errors in the kernel log of this boot, the last 50 lines of them.",
    "lowmem_gpu_xid_last_timestamp_seconds": "When the last of them was logged.",
    "lowmem_watchdog_ends": "Engines that the watchdog ended since boot.",
    "lowmem_watchdog_last_end_timestamp_seconds": "When it ended the last one.",
    "lowmem_service_memory_bytes": (
        "Memory of the unit's control group: anon, file_mapped and shmem as in memory.stat, swap."
    ),
    "lowmem_certificate_readable": "0 where the certificate cannot be read.",
    "lowmem_certificate_not_after_timestamp_seconds": "When the certificate ends.",
}


def run(*command: str) -> str:
    """Standard output; empty where the program fails or is not there, which is said."""
    code, out, error = gpu_report.output(*command)
    if code != 0:
        sys.stderr.write(
            f"{' '.join(command[:3])}: {' '.join(error.split())[:300] or f'exit status {code}'}\n"
        )
        return ""
    return out


def cards() -> Iterator[Sample]:
    on_bus, _ = gpu_report.pci()
    smi: dict[str, Any] = gpu_report.smi()
    if not on_bus and smi["path"] is None:
        return
    yield "lowmem_gpu_cards", {"state": "on_bus"}, len(on_bus)
    yield "lowmem_gpu_cards", {"state": "answering"}, len(smi["gpus"])
    if smi["error"]:
        sys.stderr.write(f"nvidia-smi: {smi['error']}\n")
    for card in smi["gpus"]:
        gpu = {"gpu": str(card["index"])}
        for counter in ("volatile", "aggregate"):
            errors = card[f"ecc_uncorrected_{counter}"]
            if errors is not None:
                yield "lowmem_gpu_ecc_uncorrected_errors", {**gpu, "counter": counter}, errors
        for state in ("pending", "failure"):
            if card[f"remap_{state}"] is not None:
                yield "lowmem_gpu_row_remap", {**gpu, "state": state}, card[f"remap_{state}"] == "Yes"
        for reason in card["slowed_by"]:
            yield "lowmem_gpu_slowed", {**gpu, "reason": reason}, 1
    seen: dict[tuple[str, str], list[float | None]] = {}
    for xid in gpu_report.xids():
        seen.setdefault((xid["address"], str(xid["xid"])), []).append(xid["at"])
    for (address, number), times in seen.items():
        labels = {"address": address, "xid": number}
        yield "lowmem_gpu_xid_errors", labels, len(times)
        known = [at for at in times if at is not None]
        if known:
            yield "lowmem_gpu_xid_last_timestamp_seconds", labels, max(known)


def watchdog() -> Iterator[Sample]:
    """`watchdog: no sign of the engine for 180 s: ended 12 (VLLM::EngineCor), …`, as
    lowmem.watchdog says it.
    """
    words = (
        "journalctl",
        "--unit=vllm-watchdog@*.service",
        "--boot",
        "--no-pager",
        "--quiet",
        "--output=json",
    )
    ends: dict[str, list[float]] = {}
    for line in run(*words, "--output-fields=_SYSTEMD_UNIT,MESSAGE").splitlines():
        entry = json.loads(line)
        if re.search(r"watchdog: .*: ended \d", str(entry.get("MESSAGE"))):
            ends.setdefault(entry["_SYSTEMD_UNIT"], []).append(int(entry["__REALTIME_TIMESTAMP"]) / 1e6)
    for unit, times in ends.items():
        yield "lowmem_watchdog_ends", {"unit": unit}, len(times)
        yield "lowmem_watchdog_last_end_timestamp_seconds", {"unit": unit}, max(times)


def service_memory(groups: Path = Path("/sys/fs/cgroup")) -> Iterator[Sample]:
    for block in (
        run("systemctl", "show", "--property=Id,ControlGroup", "vllm@*.service").strip().split("\n\n")
    ):
        unit = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        if not unit.get("ControlGroup"):  # it does not run
            continue
        folder = groups / unit["ControlGroup"].lstrip("/")
        try:
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            kinds = {kind: int(stat[kind]) for kind in ("anon", "file_mapped", "shmem")}
        except (OSError, KeyError):  # the kernel counts no memory for this group
            continue
        with contextlib.suppress(OSError):  # no swap is counted
            kinds["swap"] = int((folder / "memory.swap.current").read_text())
        for kind, size in kinds.items():
            yield "lowmem_service_memory_bytes", {"unit": unit["Id"], "kind": kind}, size


def certificates(paths: list[str]) -> Iterator[Sample]:
    for path in paths:
        said = run("openssl", "x509", "-noout", "-enddate", "-in", path)
        yield "lowmem_certificate_readable", {"path": path}, said.startswith("notAfter=")
        if said.startswith("notAfter="):
            yield (
                "lowmem_certificate_not_after_timestamp_seconds",
                {"path": path},
                ssl.cert_time_to_seconds(said.strip().split("=", 1)[1]),
            )


def text(samples: list[Sample]) -> str:
    """Prometheus' text format, the samples of a name together, as it wants them."""
    lines = []
    for name, meaning in HELP.items():
        of_name = [(labels, value) for sample, labels, value in samples if sample == name]
        if of_name:
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} gauge"]
        for labels, value in of_name:
            quoted = ",".join(f"{key}={json.dumps(word)}" for key, word in labels.items())
            # repr of a float is exact; a timestamp's milliseconds are kept
            lines.append(f"{name}{{{quoted}}} {float(value)!r}")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="the file, *.prom in the textfile collector's folder"
    )
    parser.add_argument(
        "--certificate", action="append", default=[], help="a certificate in PEM; may be given again"
    )
    options = parser.parse_args()
    samples = [*cards(), *watchdog(), *service_memory(), *certificates(options.certificate)]
    # new, under a name that nobody can guess: the collector's folder may be another user's
    beside = options.out.with_name(f"{options.out.name}.{secrets.token_hex(8)}")
    try:
        with beside.open("x", encoding="utf-8") as file:
            file.write(text(samples))
        # the exporter has a user of its own
        beside.chmod(0o644)
        beside.replace(options.out)
    finally:
        beside.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
