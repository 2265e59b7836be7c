#!/usr/bin/env python3
"""Compares what `lowmem fleet` says of two replicas behind the router with two real ones.

    benchmarks/fleet_two_replicas.py measure FOLDER
    benchmarks/fleet_two_replicas.py compare FOLDER

Run it with .lowmem/venv/bin/python, after `make demo` and `pytest tests/router`.

`measure` starts two replicas behind the real vllm-router (least load of two). It first measures one replica
alone (`lowmem measure`), through the router as well: FOLDER/one.json. Then it drives both, by clients that
wait for their answers and by requests at random times (Poisson): FOLDER/loads.json.

`compare` simulates the same loads from one.json. It starts empty, sends as many requests, and takes the mean
of twenty seeds. It prints the ratios and asserts nothing.

The replicas are two of the demo's engines, each on a core of its own. The load generator then has no core of
its own. It shares the core of the one replica, and both cores of the two, so each replica loses the same to
it.

On a machine with GPUs the replicas are a run that benchmarks/gpu/matrix.py prepared, each on its own cards:
--prepared .carry/runs/low_latency --gpus 2 --gpus 3 --router BINARY.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.gpu.servers import end_on_sigterm, stop  # noqa: E402
from lowmem.artefacts import read_environment  # noqa: E402
from lowmem.measure.load import Api, drive  # noqa: E402
from lowmem.schema import Load, Plan  # noqa: E402

START_S = 300
# the last fills both replicas; the rates of arrivals are shares of what it gave
CLOSED_CLIENTS = (4, 8, 16)
# of what the two did when full
OPEN_SHARES = (0.4, 0.6, 0.8)
SEEDS = 20


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        listeners = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(listener.getsockname()[1]) for listener in listeners]


def wait(api: Api, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(OSError):
            name, _ = api.model()
            api.complete(name, "a", 1)
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"{api.url} does not answer:\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(1)


@contextlib.contextmanager
def server(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=stream,
            stderr=stream,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            stop(process)


@dataclass(frozen=True)
class Replica:
    """Start command of a replica, and the programs that run beside it."""

    command: list[str]
    environment: dict[str, str]
    beside: list[str]
    log: Path

    def server(self) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
        return server(self.command, {**os.environ, **self.environment}, self.log)


@dataclass(frozen=True)
class Deployed:
    plan: Path
    env_file: Path
    lowmem: list[str]
    replicas: list[Replica]


def of_demo(demo: Path, ports: list[int], scratch: Path) -> Deployed:
    plan = Plan.model_validate_json((demo / "etc/plan.json").read_text())
    os.environ["VLLM_BIN"] = shlex.quote(str(demo / "current/env/bin/vllm"))
    replicas = []
    for port, core in zip(ports, sorted(os.sched_getaffinity(0)), strict=False):
        argv = list(plan.argv)
        argv[argv.index("--port") + 1] = str(port)
        own = {v.name: v.value for v in plan.environment} | {
            "VLLM_CPU_OMP_THREADS_BIND": str(core),
            "LOWMEM_API_KEYS": str(demo / "etc/vllm.env"),
            "VLLM_CACHE_ROOT": str(scratch / f"cache-{core}"),
        }
        pinned = ["taskset", "-c", str(core)]
        command = [*pinned, str(demo / "current/env/bin/vllm"), "serve", *argv]
        replicas.append(Replica(command, own, pinned, scratch / f"replica-{port}.log"))
    return Deployed(
        demo / "etc/plan.json", demo / "etc/vllm.env", [str(demo / "current/env/bin/lowmem")], replicas
    )


def of_prepared(run: Path, gpus: list[str], extra: list[str], ports: list[int], scratch: Path) -> Deployed:
    replicas = [
        Replica(
            [str((run / "low_mem.sh").resolve()), f"--port={port}", *extra],
            {"CUDA_VISIBLE_DEVICES": cards, "PYTHONUNBUFFERED": "1"},
            ["env", f"CUDA_VISIBLE_DEVICES={cards}"],
            scratch / f"replica-{port}.log",
        )
        for port, cards in zip(ports, gpus, strict=True)
    ]
    return Deployed(run / "plan.json", run / "vllm.env", [sys.executable, "-m", "lowmem"], replicas)


@contextlib.contextmanager
def router(
    binary: Path, ports: list[int], scratch: Path
) -> Iterator[tuple[str, subprocess.Popen[bytes], Path]]:
    port, metrics = free_ports(2)
    workers = [f"http://127.0.0.1:{worker}" for worker in ports]
    # power_of_two refuses one worker, as role router knows
    policy = "power_of_two" if len(ports) > 1 else "round_robin"
    command = [
        str(binary),
        "--worker-urls",
        *workers,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--policy",
        policy,
    ]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics), "--log-level", "warning"]
    command += ["--worker-startup-timeout-secs", "10", "--request-timeout-secs", "600"]
    log = scratch / f"router-{len(ports)}.log"
    with server(command, dict(os.environ), log) as process:
        yield f"http://127.0.0.1:{port}", process, log


def measure_one(deployed: Deployed, url: str, pid: int, requests: int | None, out: Path) -> None:
    replica = deployed.replicas[0]
    command = [
        *replica.beside,
        *deployed.lowmem,
        "measure",
        f"--plan={deployed.plan}",
        f"--url={url}",
        f"--pid={pid}",
    ]
    command += [
        f"--env-file={deployed.env_file}",
        f"--log={replica.log}",
        "--clients=8,4,2,1",
        f"--out={out}",
    ]
    command += [f"--requests={requests}"] if requests else []
    # 2: a limit of the plan is missed by half of its cores, which is no matter here
    done = subprocess.run(command, cwd=REPOSITORY, check=False)
    if done.returncode not in (0, 2):
        raise SystemExit(f"lowmem measure ended with status {done.returncode}")


def asked(api: Api, load: Load, requests: int, seed: int, per_s: float | None) -> dict[str, float]:
    name, folder = api.model()
    seen = drive(api, name, folder, load, requests, seed, {"HF_HUB_OFFLINE": "1"}, per_s)
    if seen.failed:
        raise SystemExit(f"{seen.failed} of {requests} requests failed")
    return {
        "tokens_per_s": seen.output_tokens_per_s,
        "tpot_p50_ms": seen.tpot_ms.p50, "tpot_p99_ms": seen.tpot_ms.p99,
        "ttft_p50_ms": seen.ttft_ms.p50, "ttft_p99_ms": seen.ttft_ms.p99,
    }  # fmt: skip


def measure(given: argparse.Namespace, out: Console) -> None:
    given.folder.mkdir(parents=True, exist_ok=True)
    binary = given.router or next(iter(sorted(given.demo.glob("envs/vllm-router-*/bin/vllm-router"))), None)
    if not binary:
        raise SystemExit(
            f"no environment of vllm-router under {given.demo}/envs: `pytest tests/router` makes it, or name"
            " one with --router"
        )
    ports = free_ports(2)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        scratch = Path(folder)
        deployed = (
            of_prepared(given.prepared, given.gpus, given.arg, ports, scratch)
            if given.prepared
            else of_demo(given.demo, ports, scratch)
        )
        plan = Plan.model_validate_json(deployed.plan.read_text())
        key = next(
            value
            for name, value in read_environment(deployed.env_file).items()
            if name.startswith("VLLM_API_KEY")
        )

        def start(number: int) -> subprocess.Popen[bytes]:
            return running.enter_context(deployed.replicas[number].server())

        def until_ready(number: int, process: subprocess.Popen[bytes]) -> None:
            wait(Api(f"http://127.0.0.1:{ports[number]}", key), process, deployed.replicas[number].log)

        first = start(0)
        # an engine that waits takes a core of two from the other, and nothing from one on other cards
        second = start(1) if given.prepared else None
        until_ready(0, first)
        with router(binary, ports[:1], scratch) as (url, process, log):
            wait(Api(url, key), process, log)
            measure_one(deployed, url, first.pid, given.alone_requests, given.folder / "one.json")
        second = second or start(1)
        until_ready(1, second)
        url, process, log = running.enter_context(router(binary, ports, scratch))
        api = Api(url, key)
        wait(api, process, log)

        def drive_both(clients: int, per_s: float | None = None) -> None:
            out.print(
                f"driving two replicas: {f'{per_s:.2f} requests/s' if per_s else f'{clients} clients'},"
                f" {given.requests} requests"
            )
            seen = asked(
                api,
                plan.load.model_copy(update={"clients": clients}),
                given.requests,
                1000 + len(rows),
                per_s,
            )
            if per_s:
                del seen["tokens_per_s"]  # as many as arrive
            rows.append(
                {
                    "clients": None if per_s else clients,
                    "per_s": per_s,
                    "requests": given.requests,
                    "measured": seen,
                }
            )
            (given.folder / "loads.json").write_text(json.dumps(rows, indent=1) + "\n")

        for clients in given.clients:
            drive_both(clients)
        full_per_s = rows[-1]["measured"]["tokens_per_s"] / plan.load.output_tokens
        for share in OPEN_SHARES:
            drive_both(given.clients[-1], share * full_per_s)


def compared(folder: Path) -> Iterator[tuple[str, str, float, float]]:
    """Load, figure, measured and simulated, of what `measure` left in FOLDER."""
    from lowmem.artefacts import read
    from lowmem.fleet import (
        simulation,
        speed,  # a machine that only measures has no simpy
    )

    receipt = read(folder / "one.json")
    speed, tokens = speed.measured(receipt), (receipt.plan.load.input_tokens, receipt.plan.load.output_tokens)
    for row in json.loads((folder / "loads.json").read_text()):
        if per_s := row["per_s"]:
            load = f"{per_s:.2f} requests/s"
            said = [
                simulation.open_loop(
                    speed, 2, simulation.Arrivals(per_s, row["requests"], seed), *tokens, left_out=0
                )
                for seed in range(SEEDS)
            ]
        else:
            load = f"{row['clients']} clients"
            said = [simulation.closed_loop(speed, row["clients"], *tokens, row["requests"], hosts=2)]
        for figure, real in row["measured"].items():
            yield load, figure, real, statistics.fmean(getattr(one, figure) for one in said)


def compare(given: argparse.Namespace, out: Console) -> None:
    table = Table("load", "", *(Column(name, justify="right") for name in ("measured", "simulated", "ratio")))
    for load, figure, real, simulated in compared(given.folder):
        table.add_row(load, figure, f"{real:,.1f}", f"{simulated:,.1f}", f"{simulated / real:.2f}")
    out.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="lowmem fleet against two real replicas behind the router.")
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("measure", help="two real replicas, driven")
    first.add_argument("folder", type=Path)
    first.add_argument(
        "--demo", type=Path, default=REPOSITORY / ".lowmem/host", help="what `make demo` deployed"
    )
    first.add_argument(
        "--prepared",
        type=Path,
        help="instead of the demo: a run's folder, as benchmarks/gpu/matrix.py prepares it",
    )
    first.add_argument(
        "--gpus",
        action="append",
        default=[],
        help="with --prepared, once for each of the two: its cards, such as 2 or 2,3",
    )
    first.add_argument(
        "--arg",
        action="append",
        default=[],
        help="with --prepared: one more argument for the engine, repeatable",
    )
    first.add_argument(
        "--router", type=Path, help="the program vllm-router (default: the demo's environment)"
    )
    first.add_argument(
        "--clients",
        type=int,
        nargs="+",
        default=CLOSED_CLIENTS,
        help="that drive both, one load after another (default: 4 8 16)",
    )
    first.add_argument("--requests", type=int, default=64, help="of each load on two replicas")
    first.add_argument(
        "--alone-requests", type=int, help="of each load on one (default: four for each client)"
    )
    first.set_defaults(do=measure)
    second = commands.add_parser("compare", help="the same loads, simulated")
    second.add_argument("folder", type=Path)
    second.set_defaults(do=compare)
    given = parser.parse_args()
    end_on_sigterm()
    given.do(given, Console())


if __name__ == "__main__":
    main()
