"""Takes many measurements in one go on a machine with GPUs: `prepare` writes plans and launchers, `run`
measures them.

`prepare` needs this repository's environment and no GPU. `run` needs the engine's environment and the folder
that `prepare` made.

    python benchmarks/gpu/matrix.py prepare benchmarks/gpu/runs.yml .carry/runs
    python benchmarks/gpu/matrix.py warm .carry/runs --out "$OUT" --only NAME,…
    python benchmarks/gpu/matrix.py run .carry/runs --out "$OUT" --deadline-s 560 [--only NAME,…]

Runs on different cards (`gpus`) go side by side. Each starts as soon as its cards are free, in the order of
the file. A run that could not end before the deadline is not begun. No run begins after one whose engine
lacked a module, since the next would lack it too.

A ballast (ballast.py) emulates the card of the plan on a larger one: it holds all but `card_mib`. `args` and
`env` are what this needs and no more; they stand in the receipt.

A run with a `command` is another script of this folder, with `env` in its environment and "{out}" for the
folder of results. Its output goes to NAME.out there.

`warm` measures nothing. It starts the named services side by side on the whole card until each has answered.
So code that is compiled at first use is in the caches.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from servers import stop

HERE = Path(__file__).resolve().parent
TOP = HERE.parent.parent
GUESS_S = 150
KEY = "benchmark"  # guards nothing: the machine is ours alone


def words(options: dict[str, Any]) -> list[str]:
    """Return the options as a command line; None values are left out."""
    return [str(word) for pair in options.items() if pair[1] is not None for word in pair]


def prepare(spec: dict[str, Any], folder: Path) -> None:
    """Writes FOLDER/NAME/{plan.json,low_mem.sh,engine.env,vllm.env} for every run, and FOLDER/runs.yml with
    the defaults filled in.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from lowmem.schema import Plan

    templates = Environment(
        loader=FileSystemLoader(TOP / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    # Ansible's own filters, as far as the launcher uses them
    templates.filters |= {
        "quote": lambda v: shlex.quote(str(v)),
        "regex_replace": lambda v, pattern, by: re.sub(pattern, by, v),
    }
    runs = [{**spec.get("defaults", {}), **run} for run in spec["runs"]]
    for run in (r for r in runs if "command" not in r):
        options = {
            "--profile": run["profile"], "--device": run["device"], "--count": run["count"],
            "--model": run["card"],
            "--model-path": run["model_path"], "--served-model-name": "m", "--port": 8000,
        }  # fmt: skip
        command = [sys.executable, "-m", "lowmem", "plan", "--json", *words(options)]
        command += [
            word for knob, value in run.get("set", {}).items() for word in ("--set", f"{knob}={value}")
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=TOP)
        if not done.stdout.startswith("{"):
            raise SystemExit(f"{run['name']}: {done.stderr.strip()}")
        plan = Plan.model_validate_json(done.stdout)
        where = folder / run["name"]
        where.mkdir(parents=True, exist_ok=True)
        (where / "plan.json").write_text(plan.model_dump_json(indent=1))
        launcher = templates.get_template("low_mem.sh.j2").render(
            ansible_managed="Rendered by benchmarks/gpu/matrix.py",
            lowmem_plan=json.loads(plan.model_dump_json()),
            __vllm_service_environment_path="/usr/local",
            __vllm_service_checkpoint_id="dummy weights",
        )
        (where / "low_mem.sh").write_text(launcher)
        (where / "low_mem.sh").chmod(0o755)
        environment = {
            v.name: v.value for v in plan.environment if v.name not in run.get("drop_env", [])
        } | run.get("env", {})
        # as the role writes them: what the launcher sources, and the file of keys that the server and `lowmem
        # measure` read
        lines = [f"{k}={shlex.quote(str(v))}\n" for k, v in environment.items()]
        (where / "engine.env").write_text("".join([*lines, 'LOWMEM_API_KEYS="$release/vllm.env"\n']))
        (where / "vllm.env").write_text(f"VLLM_API_KEY={KEY}\n")
        total = plan.per_gpu["total"] / 2**20
        limit = plan.limit_bytes / 2**20
        print(
            f"{run['name']:26} {plan.verdict:10} {total:9,.0f} MiB of {limit:,.0f}; {plan.kv_tokens} KV"
            f" tokens; {plan.reasons[:1]}"
        )
    (folder / "runs.yml").write_text(yaml.safe_dump({"runs": runs}, sort_keys=False))


@contextlib.contextmanager
def ballast(card_mib: int | None, gpus: Iterable[str]) -> Iterator[None]:
    """Holds all but card_mib of each of these GPUs."""
    if not card_mib:
        yield
        return
    command = [
        sys.executable,
        str(HERE / "ballast.py"),
        "--leave-mib",
        str(card_mib),
        "--gpus",
        ",".join(sorted(gpus)),
    ]
    held = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert held.stdout is not None
    for line in held.stdout:
        print(f"ballast: {line.strip()}", flush=True)
        if line.startswith("ready"):
            break
    try:
        yield
    finally:
        held.terminate()
        held.wait(30)


def dump_stacks(pid: int, file: Path) -> None:
    """Print the stack of every Python process under `pid`, if py-spy is installed."""
    import psutil

    try:
        processes = psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return
    with file.open("a") as stream:
        for process in processes:
            stream.write(f"--- {process.pid} after {time.monotonic():.0f} s\n")
            stream.flush()
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                command = [os.environ.get("PY_SPY", "py-spy"), "dump", "--pid", str(process.pid)]
                subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, timeout=20)


def watch_stalls(pid: int, log: Path, done: threading.Event, stall_s: float = 40, dumps: int = 2) -> None:
    """Writes LOG's stacks beside it when the engine has said nothing for a while before it is ready."""
    while dumps and not done.wait(5):
        said = log.read_bytes() if log.exists() else b""
        if b"startup complete" in said:
            return
        if said and time.time() - log.stat().st_mtime > stall_s:
            dump_stacks(pid, log.with_suffix(".stacks.txt"))
            dumps -= 1
            done.wait(stall_s)


def run_one(run: dict[str, Any], folder: Path, out: Path, gpus: str, port: int, until: float) -> None:
    where, receipt = folder / run["name"], out / f"{run['name']}.json"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus, "PYTHONUNBUFFERED": "1"}
    options = {
        "--plan": where / "plan.json", "--start": where / "low_mem.sh", "--out": receipt,
        "--clients": ",".join(map(str, run["clients"])), "--start-timeout-s": run.get("start_timeout_s", 300),
        "--requests": run.get("requests"), "--output-tokens": run.get("output_tokens"),
    }  # fmt: skip
    command = [sys.executable, "-m", "lowmem", "measure", *words(options), f"--arg=--port={port}"]
    command += [f"--arg={a}" for a in run.get("args", [])]
    began = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, cwd=TOP, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    done = threading.Event()
    threading.Thread(
        target=watch_stalls, args=(process.pid, receipt.with_suffix(".log"), done), daemon=True
    ).start()
    try:
        said, _ = process.communicate(timeout=max(30, until - began))
    except subprocess.TimeoutExpired:
        process.terminate()  # `lowmem measure` then stops its engine and still writes the receipt
        said, _ = process.communicate()
    done.set()
    lines = [
        f"=== {run['name']} on GPU {gpus}: exit {process.returncode} after {time.monotonic() - began:.0f} s",
        *said.splitlines()[-14:],
    ]
    print("\n".join(lines), flush=True)


def run_command(run: dict[str, Any], out: Path, gpus: str, until: float) -> None:
    """Ended with all that it started when its time is over."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus, "PYTHONUNBUFFERED": "1", **run.get("env", {})}
    text = run["command"]
    for word, value in {"out": out, "name": run["name"], **run.get("with", {})}.items():
        text = text.replace(f"{{{word}}}", str(value))
    command, began, file = shlex.split(text), time.monotonic(), out / f"{run['name']}.out"
    with file.open("w") as said:
        process = subprocess.Popen(
            command, env=environment, cwd=TOP, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - began))
        stop(process)
    lines = [
        f"=== {run['name']} on GPU {gpus}: exit {process.returncode} after {time.monotonic() - began:.0f} s"
    ]
    print("\n".join([*lines, *file.read_text(errors="replace").splitlines()[-6:]]), flush=True)


def answered(port: int) -> bool:
    """Tell whether the service completes a prompt of several steps."""
    body = {"model": "m", "prompt": list(range(300, 1000)), "max_tokens": 4, "ignore_eos": True}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), headers
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return bool(json.load(answer)["choices"])
    except OSError:
        return False


def warm(runs: list[dict[str, Any]], folder: Path, out: Path, until: float) -> None:
    """Starts them all at once; each is ended when it has answered."""
    began, services = time.monotonic(), {}
    for port, run in enumerate(runs, 8100):
        command = [
            str((folder / run["name"] / "low_mem.sh").resolve()),
            f"--port={port}",
            *run.get("args", []),
        ]
        with (out / f"warm-{run['name']}.log").open("w") as log:
            services[port] = (
                run["name"],
                subprocess.Popen(command, cwd=TOP, stdout=log, stderr=log, start_new_session=True),
            )
    try:
        while services and time.monotonic() < until:
            for port, (name, process) in list(services.items()):
                if process.poll() is not None or answered(port):
                    print(
                        f"warm {name}: exit {process.poll()} (None: answered) after"
                        f" {time.monotonic() - began:.0f} s",
                        flush=True,
                    )
                    stop(process)
                    del services[port]
            time.sleep(1)
    finally:
        for name, process in services.values():
            print(f"warm {name}: no answer", flush=True)
            stop(process)


def ready(receipt: Path) -> bool:
    """Tell whether that run's service came up."""
    return receipt.exists() and json.loads(receipt.read_text())["ready_s"] is not None


def within(receipt: Path) -> bool:
    """Tell whether that run's service came up and kept to its memory limit."""
    return ready(receipt) and not any(
        f.startswith("memory:") for f in json.loads(receipt.read_text()).get("findings", [])
    )


def lacks_module(receipt: Path) -> bool:
    """Tell whether that run's engine died because a package is missing."""
    return receipt.exists() and any(
        "ModuleNotFoundError" in finding for finding in json.loads(receipt.read_text()).get("findings", [])
    )


def skipped(run: dict[str, Any], out: Path) -> bool:
    """Tell whether the result of another run makes this one needless."""
    if (other := run.get("unless_ready")) and ready(out / f"{other}.json"):
        return True
    if (other := run.get("if_within")) and not within(out / f"{other}.json"):
        return True
    return bool((other := run.get("unless_within")) and within(out / f"{other}.json"))


def cards_of(run: dict[str, Any]) -> str:
    """Numbers of the cards that a run has, comma-separated: the first ones where it names none."""
    return str(run["gpus"]) if "gpus" in run else ",".join(map(str, range(run["count"])))


def run_all(runs: list[dict[str, Any]], folder: Path, out: Path, until: float) -> None:
    """Side by side where their cards allow it; one that waits for a card keeps those after it from taking
    that card.
    """
    waiting, running, lacking = list(runs), dict[str, threading.Thread](), list[str]()

    def go(run: dict[str, Any], gpus: str) -> None:
        with ballast(run.get("card_mib"), gpus.split(",")):
            if "command" in run:
                run_command(run, out, gpus, until)
            else:
                run_one(run, folder, out, gpus, 8000 + int(gpus.split(",")[0]), until)
        if lacks_module(out / f"{run['name']}.json"):
            lacking.append(run["name"])

    while waiting or running:
        running = {gpus: thread for gpus, thread in running.items() if thread.is_alive()}
        taken = set(",".join(running).split(","))
        for run in list(waiting):
            gpus = cards_of(run)
            cards = set(gpus.split(","))
            if taken & cards:
                taken |= cards
                continue
            waiting.remove(run)
            if lacking:
                print(
                    f"=== {run['name']}: not begun, the engine of {lacking[0]} lacked a module, see its"
                    " findings",
                    flush=True,
                )
            elif time.monotonic() + run.get("guess_s", GUESS_S) > until:
                print(f"=== {run['name']}: not begun, the deadline is near", flush=True)
            elif not skipped(run, out):
                running[gpus] = threading.Thread(target=go, args=(run, gpus))
                running[gpus].start()
                taken |= cards
        time.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare")
    first.add_argument("spec", type=Path)
    first.add_argument("folder", type=Path)
    for command in ("warm", "run"):
        second = commands.add_parser(command)
        second.add_argument("folder", type=Path)
        second.add_argument("--only", help="names, comma-separated (default: all)")
        second.add_argument("--out", type=Path, required=True)
        second.add_argument("--deadline-s", type=float, default=560)
    args = parser.parse_args()
    if args.command == "prepare":
        prepare(yaml.safe_load(args.spec.read_text()), args.folder)
        return
    until = time.monotonic() + args.deadline_s
    runs = {run["name"]: run for run in yaml.safe_load((args.folder / "runs.yml").read_text())["runs"]}
    wanted = [runs[name] for name in (args.only.split(",") if args.only else runs)]
    args.out.mkdir(parents=True, exist_ok=True)
    if args.command == "warm":
        warm(wanted, args.folder, args.out, until)
        return
    run_all(wanted, args.folder, args.out, until)


if __name__ == "__main__":
    main()
