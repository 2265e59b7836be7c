"""Shows how the time of a decode step divides among kernels, by torch's profiler around steps of eight
clients.

    python benchmarks/gpu/profile_step.py LAUNCHER OUT.json [--arg=…]

It starts the launcher with the profiler configured and keeps eight clients decoding. It profiles two seconds
of that and sums the GPU time by kernel. The profiler slows the host and not the kernels. Sums of kernels are
real, and gaps between them are not.
"""

from __future__ import annotations

import argparse
import gzip
import http.client
import json
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import peers


def post(port: int, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("POST", path)
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"{path}: status {answer.status}: {answer.read(300)!r}")


def kernels(trace: Path) -> dict[str, Any]:
    """Microseconds and calls of every kernel in a Chrome trace, and the time from the first to the last."""
    read = gzip.open if trace.suffix == ".gz" else open
    with read(trace, "rt") as stream:
        events = [
            e
            for e in json.load(stream)["traceEvents"]
            if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
        ]
    took, calls = Counter[str](), Counter[str]()
    for event in events:
        took[event["name"]] += event["dur"]
        calls[event["name"]] += 1
    span = max(e["ts"] + e["dur"] for e in events) - min(e["ts"] for e in events)
    rows = [
        {"kernel": name[:200], "us": round(us, 1), "calls": calls[name]} for name, us in took.most_common(40)
    ]
    return {"span_us": span, "busy_us": sum(took.values()), "kernels": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("launcher", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--port", type=int, default=8090)
    parser.add_argument("--model", default="m")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--traces", type=Path, default=Path("/tmp/traces"))
    parser.add_argument("--arg", action="append", default=[])
    options = parser.parse_args()
    configured = {"profiler": "torch", "torch_profiler_dir": str(options.traces), "ignore_frontend": True}
    configured |= {"torch_profiler_with_stack": False}
    command = [
        str(options.launcher),
        f"--port={options.port}",
        "--profiler-config",
        json.dumps(configured),
        *options.arg,
    ]
    with options.out.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        until = time.monotonic() + 240
        while True:
            try:
                peers.stream(options.port, options.model, [500, 501], 4)
                break
            except (OSError, RuntimeError, http.client.HTTPException):
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"the service did not answer; exit {process.poll()}") from None
                time.sleep(0.5)
        prompts = [[*[400] * 64, 500 + i] for i in range(options.clients)]
        clients = [
            threading.Thread(target=peers.stream, args=(options.port, options.model, prompt, 1200))
            for prompt in prompts
        ]
        for client in clients:
            client.start()
        time.sleep(3)
        post(options.port, "/start_profile")
        time.sleep(2)
        post(options.port, "/stop_profile")
        for client in clients:
            client.join()
    finally:
        process.terminate()
        process.wait(60)
    traces = sorted(options.traces.rglob("*.json*"), key=lambda path: path.stat().st_size)
    options.out.write_text(
        json.dumps({"clients": options.clients, "trace": traces[-1].name, **kernels(traces[-1])}, indent=1)
        + "\n"
    )
    print(options.out.read_text()[:3000])


if __name__ == "__main__":
    main()
