#!/usr/bin/python
"""Reads what a host says about its NVIDIA cards and driver. Changes nothing; needs only the host's own Python
(3.10 or later).
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

DOCUMENTATION = r"""
module: gpu_report
short_description: What a host says about its NVIDIA cards and driver
description:
  - Reads sysfs, procfs, dpkg, nvidia-smi and the kernel log. It changes nothing, in check mode as well.
  - Needs root to see which processes hold a card and to read the kernel log.
options: {}
author: vllm-lowmem
"""

EXAMPLES = r"""
- name: Read the cards and the driver
  gpu_report:
  register: gpu
"""

RETURN = r"""
report:
  description: >-
    Keys: cards, nvswitches, secure_boot, kernel, module, uvm, nouveau, packages, held, runfile, smi, holders,
    xid, services, compilers.
  type: dict
  returned: always
"""

NVIDIA = "0x10de"
DRIVER_PACKAGE = re.compile(
    r"^(nvidia-|libnvidia|libcuda1|cuda-drivers|firmware-nvidia|xserver-xorg-video-nvidia)"
)


def read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def output(*command: str, timeout_s: int = 60) -> tuple[int, str, str]:
    """Exit status, standard output and error; 127 when there is no such program, 124 when it did not end in
    time.
    """
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            env=dict(os.environ, LC_ALL="C"),
        )
    except FileNotFoundError:
        return 127, "", f"{command[0]}: not installed"
    except subprocess.TimeoutExpired:
        return 124, "", f"{command[0]}: no answer in {timeout_s} s"
    return done.returncode, done.stdout, done.stderr


def pci() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """NVIDIA's display controllers (class 03) and its bridges that are no PCI bridge (class 0680): the
    NVSwitches.
    """
    cards, switches = [], []
    for path in sorted(Path("/sys/bus/pci/devices").glob("*")):
        if read(f"{path}/vendor") != NVIDIA:
            continue
        kind = read(f"{path}/class") or ""
        device = {"address": path.name, "device": read(f"{path}/device") or ""}
        if kind.startswith("0x03"):
            cards.append(device)
        elif kind.startswith("0x0680"):
            switches.append(device)
    return cards, switches


def secure_boot() -> bool | None:
    """The fifth byte of the EFI variable, after four bytes of attributes. None: no EFI, so nothing to verify
    signatures.
    """
    for path in Path("/sys/firmware/efi/efivars").glob("SecureBoot-*"):
        try:
            return path.read_bytes()[4:5] == b"\x01"
        except OSError:
            continue
    return None


def kernels() -> dict[str, object]:
    """Installed kernels are those with an image in /boot; the running one counts whether or not its image is
    there.
    """
    running = platform.release()
    installed = sorted({running} | {p.name.removeprefix("vmlinuz-") for p in Path("/boot").glob("vmlinuz-*")})
    return {
        "running": running,
        "installed": installed,
        "meta_headers": meta_headers(),
        "without_headers": [
            k
            for k in installed
            if not any(Path(p).exists() for p in (f"/usr/src/linux-headers-{k}", f"/lib/modules/{k}/build"))
        ],
    }


# Debian's own packages give the file another name than the module in it has, and an alias that modinfo does
# not follow.
FILE_PREFIXES = ("nvidia", "nvidia-current", "nvidia-current-open")


def module(name: str, kernel: str) -> dict[str, object]:
    loaded = Path("/sys/module", name).is_dir()
    version, licence = None, None
    for prefix in FILE_PREFIXES:
        file = prefix + name.removeprefix("nvidia")
        rc, out, _ = output("modinfo", "-k", kernel, "-F", "version", file)
        if rc == 0:
            version, licence = out.strip() or None, output("modinfo", "-k", kernel, "-F", "license", file)[1]
            break
    return {
        "loaded": loaded,
        "loaded_version": read(f"/sys/module/{name}/version") if loaded else None,
        "installed_version": version,
        # The open modules are "Dual MIT/GPL", the proprietary ones "NVIDIA".
        "flavour": None if licence is None else ("open" if "GPL" in licence else "proprietary"),
    }


def modprobe_says(pattern: str, folder: str) -> bool:
    files = [f for d in ("/usr/lib", "/lib", "/run", "/etc") for f in Path(d, folder).glob("*.conf")]
    return any(re.search(pattern, read(str(f)) or "", re.MULTILINE) for f in files)


def meta_headers() -> list[str]:
    """Header packages that follow the kernel: linux-headers-amd64 where linux-image-amd64 is installed, and
    not there yet.
    """
    _, out, _ = output(
        "dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", "linux-image-*", "linux-headers-*"
    )
    names = {line.split()[0] for line in out.splitlines() if line.endswith(" installed")}
    wanted = {
        n.replace("linux-image-", "linux-headers-", 1)
        for n in names
        if re.match(r"linux-image-[a-z]", n) and not n.endswith("-dbg")
    }
    return sorted(wanted - names)


def packages() -> tuple[dict[str, str], list[str]]:
    rc, out, _ = output(
        "dpkg-query", "-W", "-f", "${Package} ${Version} ${db:Status-Want} ${db:Status-Status}\n"
    )
    rows = [line.split() for line in out.splitlines()] if rc == 0 else []
    rows = [r for r in rows if len(r) == 4 and r[3] == "installed" and DRIVER_PACKAGE.match(r[0])]
    return {r[0]: r[1] for r in rows}, sorted(r[0] for r in rows if r[2] == "hold")


def amount(text: str | None) -> float | None:
    """The number before the unit; None for "N/A", "[Unknown Error]", "GPU is lost" and whatever else is no
    number.
    """
    match = re.match(r"-?\d+(\.\d+)?", text or "")
    return float(match.group()) if match else None


def whole(text: str | None) -> int | None:
    value = amount(text)
    return None if value is None else int(value)


def total(node: ElementTree.Element | None, word: str) -> int | None:
    """Sum of the counters below a node whose name holds a word; None when none of them is a number."""
    values = (
        [whole(child.text) for child in node.iter() if word in child.tag and "threshold" not in child.tag]
        if node is not None
        else []
    )
    numbers = [v for v in values if v is not None]
    return sum(numbers) if numbers else None


def gpu(index: int, node: ElementTree.Element) -> dict[str, object]:
    def text(path: str) -> str | None:
        value = node.findtext(path)
        return value.strip() if value else None

    link = "pci/pci_gpu_link_info"
    # 535 calls them throttle reasons, later drivers event reasons.
    reasons = [*node.iterfind("clocks_event_reasons/*"), *node.iterfind("clocks_throttle_reasons/*")]
    active = [
        c.tag.split("_reason_", 1)[1]
        for c in reasons
        if (c.text or "").strip() == "Active" and "_reason_" in c.tag
    ]
    return {
        "index": index,
        "address": node.get("id", ""),
        "uuid": text("uuid"),
        "name": text("product_name"),
        "memory_total_mib": whole(text("fb_memory_usage/total")),
        "memory_reserved_mib": whole(text("fb_memory_usage/reserved")),
        "memory_used_mib": whole(text("fb_memory_usage/used")),
        "memory_free_mib": whole(text("fb_memory_usage/free")),
        "mig": text("mig_mode/current_mig"),
        "ecc": text("ecc_mode/current_ecc"),
        "ecc_uncorrected_volatile": total(node.find("ecc_errors/volatile"), "uncorrectable"),
        "ecc_uncorrected_aggregate": total(node.find("ecc_errors/aggregate"), "uncorrectable"),
        "remap_pending": text("remapped_rows/remapped_row_pending"),
        "remap_failure": text("remapped_rows/remapped_row_failure"),
        "link_generation": whole(text(f"{link}/pcie_gen/current_link_gen")),
        "link_generation_max": whole(text(f"{link}/pcie_gen/max_link_gen")),
        "link_width": whole(text(f"{link}/link_widths/current_link_width")),
        "link_width_max": whole(text(f"{link}/link_widths/max_link_width")),
        "performance_state": text("performance_state"),
        "temperature_c": whole(text("temperature/gpu_temp")),
        "persistence": text("persistence_mode"),
        "slowed_by": active,
        "processes": [
            {
                "pid": whole(p.findtext("pid")),
                "name": p.findtext("process_name", "").strip(),
                "used_mib": whole(p.findtext("used_memory")),
            }
            for p in node.iterfind("processes/process_info")
        ],
    }


def smi() -> dict[str, object]:
    path = shutil.which("nvidia-smi")
    report: dict[str, object] = {
        "path": path,
        "rc": None,
        "error": None,
        "driver_version": None,
        "cuda_version": None,
        "gpus": [],
    }
    if path is None:
        return report
    rc, out, err = output(path, "-q", "-x")
    report["rc"] = rc
    try:
        root = ElementTree.fromstring(re.sub(r"<!DOCTYPE[^>]*>", "", out))  # noqa: S314 - written by the host's own driver
    except ElementTree.ParseError:
        report["error"] = " ".join((out + " " + err).split())[:400] or f"exit status {rc}, no output"
        return report
    # driver_version is to give way to kmd_version, cuda_version to cuda_umd_version.
    report["driver_version"] = (
        root.findtext("driver_version") or root.findtext("kmd_version") or ""
    ).strip() or None
    report["cuda_version"] = (
        root.findtext("cuda_version") or root.findtext("cuda_umd_version") or ""
    ).strip() or None
    report["gpus"] = [gpu(index, node) for index, node in enumerate(root.iterfind("gpu"))]
    return report


def holders() -> list[dict[str, object]]:
    """Processes that have a card open (/dev/nvidia0 …), NVIDIA's own daemons left out: they let go when the
    driver is replaced.
    """
    own = {"nvidia-persistenced", "nvidia-persiste", "nv-fabricmanager", "nv-fabricmanage", "nvidia-smi"}
    found: dict[int, dict[str, object]] = {}
    for link in descriptors():
        try:
            target = str(link.readlink())
        except OSError:
            continue
        if not re.fullmatch(r"/dev/nvidia\d+", target):
            continue
        pid = int(link.parts[2])
        name = read(f"/proc/{pid}/comm") or "?"
        if name in own:
            continue
        entry = found.setdefault(pid, {"pid": pid, "name": name, "unit": unit(pid), "devices": []})
        devices = entry["devices"]
        if isinstance(devices, list) and target not in devices:
            devices.append(target)
    return [found[pid] for pid in sorted(found)]


def descriptors() -> list[Path]:
    """Every open file of every process; a process that ends meanwhile is left out."""
    found: list[Path] = []
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            found.extend(folder.iterdir())
        except OSError:
            continue
    return found


def unit(pid: int) -> str | None:
    match = re.search(r"/([^/\n]+\.service)(/|$)", read(f"/proc/{pid}/cgroup") or "", re.MULTILINE)
    return match.group(1) if match else None


def xids() -> list[dict[str, object]]:
    """Xid lines of this boot's kernel log, e.g. `NVRM: Xid (PCI:0000:3b:00): 79, pid=…, GPU has fallen off
    the bus.`

    `at`: seconds since the epoch; None where only the kernel's own buffer could be read, whose clock is
    another.
    """
    rc, out, _ = output("journalctl", "--dmesg", "--boot", "--no-pager", "--quiet", "--output=short-unix")
    if rc != 0 or not out.strip():
        rc, out, _ = output("dmesg", "--time-format=raw")
    found = []
    for line in out.splitlines():
        match = re.search(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+), ?(.*)", line)
        if match:
            clock = re.match(r"\d{10}\.\d+(?= )", line)
            found.append(
                {
                    "address": match.group(1),
                    "xid": int(match.group(2)),
                    "text": match.group(3).strip(),
                    "at": float(clock.group()) if clock else None,
                }
            )
    return found[-50:]


def service(name: str) -> dict[str, object]:
    rc, out, _ = output("systemctl", "show", name, "--property=LoadState,ActiveState,UnitFileState")
    fields = dict(line.split("=", 1) for line in out.splitlines() if "=" in line) if rc == 0 else {}
    wanted = {
        "present": ("LoadState", "loaded"),
        "active": ("ActiveState", "active"),
        "enabled": ("UnitFileState", "enabled"),
    }
    return {name: fields.get(field) == value for name, (field, value) in wanted.items()}


def compilers() -> dict[str, object]:
    places = [
        Path("/usr/local/cuda/bin/nvcc"),
        *sorted(Path("/usr/local").glob("cuda-*/bin/nvcc"), reverse=True),
    ]
    nvcc = next((str(p) for p in places if p.exists()), shutil.which("nvcc"))
    version = None
    if nvcc:
        match = re.search(r"release (\d+\.\d+)", output(nvcc, "--version")[1])
        version = match.group(1) if match else None
    return {"cc": shutil.which("cc") or shutil.which("gcc"), "nvcc": nvcc, "nvcc_version": version}


def report() -> dict[str, object]:
    cards, switches = pci()
    kernel = kernels()
    names, held = packages()
    running = str(kernel["running"])
    return {
        "cards": cards,
        "nvswitches": switches,
        "secure_boot": secure_boot(),
        "kernel": kernel,
        "module": module("nvidia", running),
        "uvm": {
            "loaded": Path("/sys/module/nvidia_uvm").is_dir(),
            "at_boot": modprobe_says(r"^\s*nvidia[-_]uvm\s*$", "modules-load.d"),
        },
        "nouveau": {
            "loaded": Path("/sys/module/nouveau").is_dir(),
            "blacklisted": modprobe_says(r"^\s*blacklist\s+nouveau\b", "modprobe.d"),
        },
        "packages": names,
        "held": held,
        "runfile": Path("/usr/bin/nvidia-uninstall").exists(),
        "smi": smi(),
        "holders": holders(),
        "xid": xids(),
        "services": {
            "persistenced": service("nvidia-persistenced.service"),
            "fabric_manager": service("nvidia-fabricmanager.service"),
        },
        "compilers": compilers(),
    }


def main() -> None:
    # Here and not above: role monitoring reads a host by these functions too, where there is no Ansible.
    from ansible.module_utils.basic import AnsibleModule

    arguments = AnsibleModule(argument_spec={}, supports_check_mode=True)
    arguments.exit_json(changed=False, report=report())


if __name__ == "__main__":
    main()
