#!/usr/bin/env python3
"""What `lowmem fleet` says of two replicas behind the router, against two real ones.

    benchmarks/fleet_two_replicas.py [--out FOLDER]        run it with .lowmem/venv/bin/python, after `make demo` and `pytest tests/router`

Two of the demo's engines, each on a core of its own, behind the real vllm-router (least load of two). One alone is measured first
(`lowmem measure`), through the router as well; from its receipt the simulation says what clients of two will see, and then they are driven:
clients that wait for their answers, and requests that arrive by themselves (Poisson). Writes <FOLDER>/one.json (the receipt) and
two_replicas.json, prints the ratios; nothing is asserted.

The load generator has no core of its own here, so it shares the core of the one replica, and both cores of the two: each replica loses the
same to it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.gpu.servers import stop  # noqa: E402
from lowmem import fleet  # noqa: E402
from lowmem.measure import Api, drive, read_environment  # noqa: E402
from lowmem.receipt import read  # noqa: E402
from lowmem.schema import Load, Plan, Receipt  # noqa: E402

START_S = 300
CLOSED_CLIENTS = (4, 8, 16)
# of what two full replicas do
OPEN_SHARES = (0.4, 0.6, 0.8)


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
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            yield process
        finally:
            stop(process)


def replica(demo: Path, plan: Plan, port: int, core: int, scratch: Path) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    argv = list(plan.argv)
    argv[argv.index("--port") + 1] = str(port)
    own = {v.name: v.value for v in plan.environment} | {
        "VLLM_CPU_OMP_THREADS_BIND": str(core),
        "LOWMEM_API_KEYS": str(demo / "etc/vllm.env"),
        "VLLM_CACHE_ROOT": str(scratch / f"cache-{core}"),
    }
    command = ["taskset", "-c", str(core), str(demo / "current/env/bin/vllm"), "serve", *argv]
    return server(command, {**os.environ, **own}, scratch / f"replica-{core}.log")


@contextlib.contextmanager
def router(binary: Path, ports: list[int], scratch: Path) -> Iterator[tuple[str, subprocess.Popen[bytes], Path]]:
    port, metrics = free_ports(2)
    workers = [f"http://127.0.0.1:{worker}" for worker in ports]
    # power_of_two refuses one worker, as role router knows
    policy = "power_of_two" if len(ports) > 1 else "round_robin"
    command = [str(binary), "--worker-urls", *workers, "--host", "127.0.0.1", "--port", str(port), "--policy", policy]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics), "--log-level", "warning"]
    command += ["--worker-startup-timeout-secs", "10", "--request-timeout-secs", "600"]
    log = scratch / f"router-{len(ports)}.log"
    with server(command, dict(os.environ), log) as process:
        yield f"http://127.0.0.1:{port}", process, log


def measure_one(demo: Path, url: str, pid: int, core: int, scratch: Path, out: Path) -> Receipt:
    command = ["taskset", "-c", str(core), str(demo / "current/env/bin/lowmem"), "measure", f"--plan={demo}/etc/plan.json"]
    command += [f"--url={url}", f"--pid={pid}", f"--env-file={demo}/etc/vllm.env", f"--log={scratch}/replica-{core}.log"]
    command += ["--clients=8,4,2,1", "--requests=24", f"--out={out}"]
    # 2: a limit of the plan is missed by half of its cores, which is no matter here
    done = subprocess.run(command, check=False)
    if done.returncode not in (0, 2):
        raise SystemExit(f"lowmem measure ended with status {done.returncode}")
    return read(out)


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


def simulated(seen: fleet.Seen, names: list[str]) -> dict[str, float]:
    return {name: round(getattr(seen, name), 1) for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description="lowmem fleet against two real replicas behind the router.")
    parser.add_argument("--demo", type=Path, default=REPOSITORY / ".lowmem/host", help="what `make demo` deployed")
    parser.add_argument("--requests", type=int, default=64, help="of each load on two replicas")
    parser.add_argument("--out", type=Path, default=REPOSITORY / ".lowmem/fleet_two_replicas")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    out = Console()
    binary = next(iter(sorted(given.demo.glob("envs/vllm-router-*/bin/vllm-router"))), None)
    if not binary:
        raise SystemExit(f"no environment of vllm-router under {given.demo}/envs: `pytest tests/router` makes it")
    plan = Plan.model_validate_json((given.demo / "etc/plan.json").read_text())
    key = next(value for name, value in read_environment(given.demo / "etc/vllm.env").items() if name.startswith("VLLM_API_KEY"))
    os.environ["VLLM_BIN"] = shlex.quote(str(given.demo / "current/env/bin/vllm"))
    cores = sorted(os.sched_getaffinity(0))[:2]
    ports = free_ports(2)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        with contextlib.ExitStack() as running:
            first = running.enter_context(replica(given.demo, plan, ports[0], cores[0], scratch))
            wait(Api(f"http://127.0.0.1:{ports[0]}", key), first, scratch / f"replica-{cores[0]}.log")
            with router(binary, ports[:1], scratch) as (url, process, log):
                wait(Api(url, key), process, log)
                speed = fleet.measured(measure_one(given.demo, url, first.pid, cores[0], scratch, given.out / "one.json"))
            second = running.enter_context(replica(given.demo, plan, ports[1], cores[1], scratch))
            wait(Api(f"http://127.0.0.1:{ports[1]}", key), second, scratch / f"replica-{cores[1]}.log")
            url, process, log = running.enter_context(router(binary, ports, scratch))
            api = Api(url, key)
            wait(api, process, log)
            tokens = plan.load.input_tokens, plan.load.output_tokens
            full = fleet.closed_loop(speed, 2 * speed.max_num_seqs, *tokens, 8 * speed.max_num_seqs, hosts=2)
            loads: list[tuple[str, int, float | None]] = [(f"{clients} clients", clients, None) for clients in CLOSED_CLIENTS]
            rates = [share * full.tokens_per_s / tokens[1] for share in OPEN_SHARES]
            loads += [(f"{rate:.2f} requests/s", 2 * speed.max_num_seqs, rate) for rate in rates]
            for seed, (what, clients, rate) in enumerate(loads, 1000):
                load = plan.load.model_copy(update={"clients": clients})
                out.print(f"driving two replicas: {what}, {given.requests} requests")
                real = asked(api, load, given.requests, seed, rate)
                if rate:
                    del real["tokens_per_s"]  # as many as arrive
                said = (
                    fleet.open_loop(speed, 2, rate, *tokens, requests=1000)
                    if rate
                    else fleet.closed_loop(speed, clients, *tokens, given.requests, hosts=2)
                )
                rows.append({"load": what, "measured": {k: round(v, 1) for k, v in real.items()}, "simulated": simulated(said, list(real))})
                written = {"speed": {"steps_ms": speed.steps_ms, "chunk_extra_ms": speed.chunk_extra_ms}, "rows": rows}
                (given.out / "two_replicas.json").write_text(json.dumps(written, indent=1) + "\n")
    table = Table("load", "", *(Column(name, justify="right") for name in ("measured", "simulated", "ratio")))
    for row in rows:
        for name, real in row["measured"].items():
            said = row["simulated"][name]
            table.add_row(row["load"], name, f"{real:,.1f}", f"{said:,.1f}", f"{said / real:.2f}")
    out.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
