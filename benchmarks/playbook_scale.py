#!/usr/bin/env python3
"""Measures how the time of `site.yml` grows with the number of hosts, and where it goes.

    benchmarks/playbook_scale.py --hosts 1,4,16,64 [--forks N] [--out FOLDER]

Run it with .lowmem/venv/bin/python, after `make demo`.

Each "host" is this machine over a local connection: its own `lowmem_root`, instance and port, one shared
`lowmem_store`. `site.yml` runs once, then again with nothing to change: as `inventory/cluster` has it
(`lowmem_skip_unchanged`: compared with the record of the first, no more), and whole, every task on every
host. Both are measured: it writes <FOLDER>/playbook_scale.json and .png.

The hosts' own work runs on the cores of the controller here, which is not so in a fleet. So the processor
time is told apart: "hosts" is that of the modules and what they start, "controller" is the rest. `wall_s` has
both.

Stubbed, all else is the product:
- `--skip-tags verify`: no load, no checks of a host, no receipt.
- Building an environment (progress_command with build_env.py): a folder of scripts that takes its packages
  from the demo's environment.
- Fetching and quantizing: the model and the quantized one are copied from the demo, so that these steps find
  them whole. The checkpoint's copy under its content's name is made before the first run.
- The engine: `vllm` answers each request at once with a completion of one token. So the wait until it is
  ready is short.
- `lowmem watch` and `lowmem start-check`: a host runs them beside the play. The rest of `lowmem`, the
  supervisor and its control are real.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
STUBS = Path(__file__).resolve().with_suffix("")
sys.path.insert(0, str(REPOSITORY))

from lowmem.checkpoint.keep import keep  # noqa: E402

MODELS = ("SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct-awq")
# What the issue asks of a run that changes nothing.
LIMIT_S, LIMIT_S_PER_HOST = 60.0, 0.8
LONGEST = 15
STOP_S = 60.0
# Counts the processor time of each module: the shell's own and its children's.
INTERPRETER = '#!/bin/sh\n"{python}" "$@"\nstatus=$?\ntimes >>"{times}"\nexit $status\n'


def store(place: Path, demo: Path) -> None:
    """Make a store with copies of the demo's models, since a hard link would change the demo's own files."""
    (place / "models").mkdir(parents=True)
    for name in MODELS:
        shutil.copytree(demo / "models" / name, place / "models" / name)
        shutil.copy2(demo / "models" / f"{name}.manifest.json", place / "models")
    keep(place / "models" / MODELS[-1])


def inventory(scratch: Path, count: int, port: int) -> Path:
    shared = yaml.safe_load((REPOSITORY / "inventory/demo/group_vars/vllm.yml").read_text())
    interpreter = scratch / "python"
    interpreter.write_text(INTERPRETER.format(python=sys.executable, times=scratch / "times"))
    interpreter.chmod(0o755)
    shared |= {
        "ansible_connection": "local",
        "ansible_python_interpreter": str(interpreter),
        "ansible_remote_tmp": str(scratch / "remote"),
        "lowmem_store": str(scratch / "store"),
        "lowmem_root": f"{scratch}/{{{{ inventory_hostname }}}}",
        "lowmem_instance": "{{ inventory_hostname }}",
        "lowmem_skip_unchanged": True,
    }
    hosts = {f"h{n:03}": {"lowmem_port": port + n} for n in range(count)}
    folder = scratch / "inventory"
    (folder / "group_vars").mkdir(parents=True)
    (folder / "hosts.json").write_text(
        json.dumps({"vllm": {"hosts": hosts}, "gateway": {}, "monitoring": {}}, indent=1)
    )
    # in a file of its own, as in the inventories of the repository: in hosts.json they would give way to
    # playbooks/group_vars
    (folder / "group_vars/vllm.yml").write_text(yaml.safe_dump(shared))
    return folder


def free_ports(count: int) -> int:
    """Return the first of so many free ports in a row."""
    for first in range(20000, 30000, 100):
        with contextlib.suppress(OSError), contextlib.ExitStack() as taken:
            for port in range(first, first + count):
                taken.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
    raise SystemExit(f"no {count} free ports in a row from 20000 on")


def cpu_s(times: Path) -> float:
    """Sum the processor time that the interpreters wrote, in lines such as `0m0.010000s 0m0.020000s`."""
    if not times.exists():
        return 0.0
    parts = (field.rstrip("s").split("m") for field in times.read_text().split())
    return sum(int(minutes) * 60 + float(seconds) for minutes, seconds in parts)


def play(
    scratch: Path, hosts: Path, environment: Path, name: str, forks: int | None, *more: str
) -> dict[str, Any]:
    timeline, log, times = scratch / f"{name}.json", scratch / f"{name}.log", scratch / "times"
    times.unlink(missing_ok=True)
    command = [
        str(Path(sys.executable).with_name("ansible-playbook")),
        "-i",
        str(hosts),
        "site.yml",
        "--skip-tags",
        "verify",
        *more,
    ]
    command += ["--forks", str(forks)] if forks else []
    [packages] = environment.glob("lib/python*/site-packages")
    own = {
        "ANSIBLE_ACTION_PLUGINS": f"{STUBS / 'action'}:{REPOSITORY / 'plugins/action'}",
        "ANSIBLE_CALLBACK_PLUGINS": str(STUBS / "callback"),
        "ANSIBLE_CALLBACKS_ENABLED": "timeline",
        "ANSIBLE_HOME": str(scratch / "ansible"),
        "ANSIBLE_NOCOLOR": "1",
        "PLAYBOOK_SCALE_ENVIRONMENT": str(packages),
        "PLAYBOOK_SCALE_TIMELINE": str(timeline),
        "PYTHONPATH": str(REPOSITORY),
    }
    began = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env={**os.environ, **own}, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            status = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    wall_s = time.monotonic() - began
    if status:
        raise SystemExit(f"{name}: site.yml ended with status {status}\n{log.read_text()[-6000:]}")
    seen: dict[str, Any] = json.loads(timeline.read_text())
    on_hosts = cpu_s(times)
    controller = seen["main_cpu_s"] + seen["children_cpu_s"] - on_hosts
    return {
        "wall_s": round(wall_s, 2),
        "changed": seen["totals"]["changed"],
        "cpu_s": {
            "controller": round(controller, 2),
            "of it the main process": round(seen["main_cpu_s"], 2),
            "hosts": round(on_hosts, 2),
        },
        "tasks_per_host": {
            "ran": round(statistics.mean(host["ran"] for host in seen["hosts"].values()), 1),
            "skipped": round(statistics.mean(host["skipped"] for host in seen["hosts"].values()), 1),
        },
        "roles": shares(seen["tasks"], lambda task: task["role"] or f"(play {task['play']})"),
        "actions": shares(seen["tasks"], lambda task: task["action"]),
        "longest": shares(seen["tasks"], lambda task: f"{task['role']}: {task['name']}")[:LONGEST],
    }


def shares(tasks: list[dict[str, Any]], key: Any) -> list[dict[str, Any]]:
    """Wall seconds and number of tasks by `key`, the longest first."""
    found: dict[str, dict[str, Any]] = {}
    for task in tasks:
        entry = found.setdefault(key(task), {"what": key(task), "wall_s": 0.0, "tasks": 0})
        entry["wall_s"] = round(entry["wall_s"] + task["wall_s"], 3)
        entry["tasks"] += 1
    return sorted(found.values(), key=lambda entry: -entry["wall_s"])


def stop(scratch: Path) -> None:
    """Ends the supervisors that the plays started, by their ids; each ends what it started."""
    running = []
    for file in scratch.glob("h*/run/supervisord.pid"):
        pid = int(file.read_text())
        with contextlib.suppress(OSError):  # gone already
            # an id may be another process's by now
            if Path(f"/proc/{pid}/cwd").readlink() == file.parents[1]:
                os.kill(pid, signal.SIGTERM)
                running.append(pid)
    deadline = time.monotonic() + STOP_S
    while running and time.monotonic() < deadline:
        running = [pid for pid in running if Path(f"/proc/{pid}").exists()]
        time.sleep(0.2)
    if running:
        sys.stderr.write(f"still running after {STOP_S:.0f} s: supervisors {', '.join(map(str, running))}\n")


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="scale.", dir=parent)).resolve()
    try:
        yield folder
    finally:
        stop(folder)
        shutil.rmtree(folder, ignore_errors=True)


def measure(
    count: int, forks: int | None, demo: Path, parent: Path, repeats: int, whole: bool
) -> dict[str, Any]:
    environment = (demo / "current/env").resolve()
    with scratch_folder(parent) as scratch:
        store(scratch / "store", demo)
        hosts = inventory(scratch, count, free_ports(count))
        first = play(scratch, hosts, environment, "first", forks)
        print(f"{count} hosts: first {first['wall_s']} s", flush=True)
        again = [play(scratch, hosts, environment, f"again{n}", forks) for n in range(repeats)]
        best = min(again, key=lambda run: run["wall_s"])
        print(f"{count} hosts: again {best['wall_s']} s, {told(best)}", flush=True)
        result = {
            "hosts": count,
            "first": {"wall_s": first["wall_s"], "cpu_s": first["cpu_s"]},
            "again": best,
        }
        if whole:
            result["whole"] = play(
                scratch, hosts, environment, "whole", forks, "-e", "lowmem_skip_unchanged=false"
            )
            print(f"{count} hosts: whole {result['whole']['wall_s']} s, {told(result['whole'])}", flush=True)
    return result | {"again_wall_s": [run["wall_s"] for run in again]}


def told(run: dict[str, Any]) -> str:
    return f"changed={run['changed']}, {run['cpu_s']}, {run['tasks_per_host']}"


def line(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Fit a line by least squares. Return (seconds a host, seconds of no host)."""
    fit = statistics.linear_regression([count for count, _ in points], [seconds for _, seconds in points])
    return fit.slope, fit.intercept


def draw(results: list[dict[str, Any]], slope: float, start: float, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    counts = [result["hosts"] for result in results]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    whole = [(result["hosts"], result["whole"]["wall_s"]) for result in results if "whole" in result]
    axes.plot(*zip(*whole, strict=True), "^-", color="tab:purple", label="every task on every host")
    axes.plot(
        counts, [result["again"]["wall_s"] for result in results], "o-", label="unchanged hosts left out"
    )
    axes.plot(
        counts,
        [start + slope * count for count in counts],
        "--",
        color="grey",
        label=f"of it, least squares: {slope:.2f} s a host",
    )
    controller = [result["again"]["cpu_s"]["controller"] / (os.cpu_count() or 1) for result in results]
    axes.plot(
        counts, controller, "s:", label=f"of it, the controller's processor time / {os.cpu_count()} cores"
    )
    axes.axhline(LIMIT_S, color="tab:red", linewidth=1, label=f"target at 64 hosts: {LIMIT_S:.0f} s")
    axes.set(
        xlabel="hosts (local connections)",
        ylabel="seconds",
        title="site.yml with nothing to change",
        xlim=(0, None),
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description="Time of site.yml against the number of hosts.")
    parser.add_argument("--hosts", default="1,4,16,64", help="numbers of hosts, with commas")
    parser.add_argument("--forks", type=int, help="instead of ansible.cfg's")
    parser.add_argument(
        "--repeats", type=int, default=1, help="runs with nothing to change; the quickest counts"
    )
    parser.add_argument(
        "--whole-up-to", type=int, default=64, help="hosts up to which every task runs once more"
    )
    parser.add_argument(
        "--demo", type=Path, default=REPOSITORY / ".lowmem/host", help="what `make demo` deployed"
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where the hosts' folders are made, and removed",
    )
    parser.add_argument("--out", type=Path, default=REPOSITORY / ".lowmem/playbook_scale")
    arguments = parser.parse_args()
    # so that an ended benchmark ends its supervisors too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for count in map(int, arguments.hosts.split(",")):
        whole = count <= arguments.whole_up_to
        results.append(
            measure(count, arguments.forks, arguments.demo, arguments.scratch, arguments.repeats, whole)
        )
        written: dict[str, Any] = {
            "cores": os.cpu_count(),
            "forks": arguments.forks or "ansible.cfg",
            "results": results,
        }
        if len(results) > 1:
            slope, start = line([(entry["hosts"], entry["again"]["wall_s"]) for entry in results])
            written |= {
                "slope_s_per_host": round(slope, 3),
                "start_s": round(start, 2),
                "limits": {"wall_s": LIMIT_S, "slope": LIMIT_S_PER_HOST},
            }
            draw(results, slope, start, arguments.out / "playbook_scale.png")
            print(f"least squares: {start:.1f} s + {slope:.2f} s a host", flush=True)
        (arguments.out / "playbook_scale.json").write_text(json.dumps(written, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
