"""Runs the whole chain on this machine: site.yml, a second run, a killed engine, an upgrade and its rollback.

    python3 benchmarks/gpu/chain.py /tmp/chain [--parts /tmp/lab] [--deadline-s 900]

Every step has a limit of its own and a log, OUT/NN-STEP.log. OUT/chain.json holds what each step took and
said. It is written after each one, so a run that is cut off leaves what it has. A step that needs the service
is left out if the service did not come up. The exit status is the number of steps that did not pass. Standard
library only.

`--parts` unpacks what `rig.py pack` made into `--lab` first, and lets its Python be this machine's own.
`--inventory inventory/demo --root .lowmem/host --controller .lowmem/venv` rehearses the steps without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parent.parent.parent
# What a service sees under the supervisor (templates/supervise.sh.j2), and what the chain runs with.
CLEAN_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
RECAP = re.compile(r"^\S+\s+: ok=(\d+)\s+changed=(\d+)\s+unreachable=(\d+)\s+failed=(\d+)", re.MULTILINE)
DRIVER_FOLDERS = ("/usr/local/nvidia/lib64", "/usr/local/nvidia/lib")
ANSWER_S = 300
"""How long a killed engine may take to answer again."""

ABOUT_THE_MACHINE = (
    "date -u; nvidia-smi; id; nproc; free -g; df -h / /tmp; cat /etc/os-release; uname -a; cat /proc/1/comm;"
    " command -v gcc nvcc zstd nginx systemctl; ls /usr/include/python3*/Python.h; ls /sys/bus/pci/devices;"
    " ldconfig -p | grep -E 'libcuda|libnvidia-ml'; env | grep -E 'PATH|CUDA|NVIDIA|PYTHON|LD_' | sort"
)


Step = Callable[[Path, float], str]
"""Takes its log and its limit in seconds, and returns one line. Raises Failed."""


class Failed(RuntimeError):
    """A step did not do what it is for; the message is one line."""


class Chain:
    """The steps of one run and what each of them left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out: Path = options.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.root: Path = options.root.absolute()
        self.until = time.monotonic() + options.deadline_s
        self.steps: list[dict[str, Any]] = []
        self.serves = False
        controller = options.controller.absolute()
        kept = ("HOME", "USER", "LANG", "TERM")
        self.environment = {k: v for k, v in os.environ.items() if k in kept} | {
            "PATH": f"{controller}/bin:{CLEAN_PATH}",
            "LANG": "C.UTF-8",
            "PYTHONUNBUFFERED": "1",
            "ANSIBLE_CALLBACKS_ENABLED": "ansible.posix.profile_tasks",
            "ANSIBLE_NOCOLOR": "1",
        }

    def step(self, name: str, limit_s: float, do: Step, *, needs: bool = False) -> None:
        """Run one step and record it. A step that `needs` the service is left out without one."""
        log = self.out / f"{len(self.steps):02}-{name}.log"
        limit_s = min(limit_s, self.until - time.monotonic())
        began = time.monotonic()
        result: dict[str, Any] = {"step": name, "began_utc": time.strftime("%H:%M:%S", time.gmtime())}
        if needs and not self.serves:
            result |= {"verdict": "left out", "said": "the service did not come up"}
        elif limit_s < 5:
            result |= {"verdict": "left out", "said": "no time was left before the deadline"}
        else:
            try:
                result |= {"verdict": "passed", "said": do(log, limit_s)}
            except Failed as error:
                result |= {"verdict": "failed", "said": str(error)}
            except Exception as error:  # the next steps still run
                result |= {
                    "verdict": "failed",
                    "said": f"{type(error).__name__}: {' '.join(str(error).split())}",
                }
        result["seconds"] = round(time.monotonic() - began, 1)
        self.steps.append(result)
        (self.out / "chain.json").write_text(json.dumps(self.steps, indent=1) + "\n")
        print(f"{result['verdict']:8} {result['seconds']:6.1f} s  {name}: {result['said']}", flush=True)

    def run(self, command: list[str], log: Path, limit_s: float) -> str:
        """Run a command with its output in the log. Return that output. Raises Failed, at its limit too."""
        with log.open("a") as stream:
            stream.write(f"$ {' '.join(command)}\n")
            stream.flush()
            process = subprocess.Popen(
                command,
                cwd=TOP,
                env=self.environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                status = None
                os.killpg(process.pid, signal.SIGTERM)
                time.sleep(2)
                os.killpg(process.pid, signal.SIGKILL)
        said = log.read_text(errors="replace")
        if status is None:
            raise Failed(f"no end within {limit_s:.0f} s; see {log.name}")
        if status:
            raise Failed(f"status {status}: {reason(said)}; see {log.name}")
        return said

    def play(self, playbook: str, *arguments: str, changed: int | None = None) -> Step:
        """Make a step that runs a playbook; `changed` is how many tasks have to change something."""

        def do(log: Path, limit_s: float) -> str:
            given = [word for pair in self.options.set for word in ("-e", pair)]
            command = ["ansible-playbook", "-i", self.options.inventory, playbook, *given, *arguments]
            ok, found, unreachable, failed = self.recap(self.run(command, log, limit_s))
            if unreachable or failed or (changed is not None and found != changed):
                raise Failed(
                    f"ok={ok} changed={found} failed={failed} unreachable={unreachable}; see {log.name}"
                )
            return f"ok={ok} changed={found}"

        return do

    @staticmethod
    def recap(said: str) -> tuple[int, int, int, int]:
        rows = [tuple(map(int, row)) for row in RECAP.findall(said)]
        if not rows:
            raise Failed("the play left no recap")
        ok, changed, unreachable, failed = (sum(column) for column in zip(*rows, strict=True))
        return ok, changed, unreachable, failed

    def machine(self, log: Path, limit_s: float) -> str:
        subprocess.run(
            ["sh", "-c", ABOUT_THE_MACHINE], stdout=log.open("w"), stderr=subprocess.STDOUT, timeout=limit_s
        )
        return " ".join(sorted(set(re.findall(r"NVIDIA [A-Z]+\d+\w*|Driver Version: \S+", log.read_text()))))

    def unpack(self, log: Path, limit_s: float) -> str:
        """Unpack the parts, and let the packed environments run with this machine's Python."""
        lab: Path = self.options.lab
        command = [
            sys.executable,
            str(TOP / "benchmarks/gpu/rig.py"),
            "unpack",
            str(self.options.parts),
            str(lab),
        ]
        with log.open("a") as stream:
            done = subprocess.run(
                command, stdout=stream, stderr=subprocess.STDOUT, timeout=limit_s, check=False
            )
        if done.returncode:
            raise Failed(f"the parts in {self.options.parts} did not unpack; see {log.name}")
        python = machine_python()
        told = f"Python is the machine's own, {python}"
        if python is None:
            # where it was built to lie: its libraries are found by that path
            prefix = Path((lab / "python/prefix").read_text().strip())
            prefix.parent.mkdir(parents=True, exist_ok=True)
            if not prefix.exists():
                prefix.symlink_to(lab / "python")
            python = str(prefix / "bin/python3.12")
            told = "Python is the carried one: the machine's has no venv, or no Python.h"
        link = lab / "bin/python3.12"
        link.unlink(missing_ok=True)
        link.symlink_to(python)
        return f"{told}; {self.driver_on_the_clean_path()}"

    def driver_on_the_clean_path(self) -> str:
        """Let programs with a clean environment find the driver, as on a host where packages installed it."""
        told = []
        folders = [folder for folder in DRIVER_FOLDERS if Path(folder, "libcuda.so.1").exists()]
        cached = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
        if folders and "libcuda.so.1" not in cached:
            Path("/etc/ld.so.conf.d/lab-nvidia.conf").write_text("\n".join(folders) + "\n")
            subprocess.run(["ldconfig"], check=True)
            told.append(f"ldconfig now knows {folders[0]}")
        smi = shutil.which("nvidia-smi")
        if smi and not shutil.which("nvidia-smi", path=CLEAN_PATH):
            Path("/usr/local/bin/nvidia-smi").symlink_to(smi)
            told.append(f"/usr/local/bin/nvidia-smi is {smi}")
        return "; ".join(told) or "the driver is where programs look for it"

    def card(self, log: Path, limit_s: float) -> str:
        """See the card by the torch of each packed environment, before minutes are spent."""
        code = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name(0))"
        for python in sorted(self.root.glob("envs/*-cuda-*/bin/python")):
            self.run([str(python), "-c", code], log, limit_s)
        return log.read_text().strip().splitlines()[-1]

    def site(self, log: Path, limit_s: float) -> str:
        try:
            return self.play("site.yml", "-v")(log, limit_s)
        finally:
            # a receipt that says failed ends the play, and leaves a service to look at
            self.serves = (self.root / "etc/plan.json").exists() and self.answers()

    def engine(self) -> int | None:
        """The process of the engine that serves, by the folder that it was started in."""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes()
                if b"EngineCore" in words and (process / "cwd").resolve() == self.root.resolve():
                    return int(process.name)
            except OSError:
                continue
        return None

    def answers(self) -> bool:
        """Whether a completion comes back."""
        plan = json.loads((self.root / "etc/plan.json").read_text())
        deploy = plan["deploy"]
        key = re.search(
            r"^VLLM_API_KEY=['\"]?([^'\"\n]+)", (self.root / "etc/vllm.env").read_text(), re.MULTILINE
        )
        body = {"model": deploy["served_model_name"], "prompt": "Hello", "max_tokens": 2}
        request = urllib.request.Request(
            f"http://{deploy['host']}:{deploy['port']}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {key[1] if key else ''}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill(self, log: Path, limit_s: float) -> str:
        """Kill the engine, and wait until another one answers."""
        old = self.engine()
        if old is None:
            raise Failed("no engine runs in the folder of the service")
        os.kill(old, signal.SIGKILL)
        began = time.monotonic()
        gone = None
        while time.monotonic() - began < min(limit_s, ANSWER_S):
            time.sleep(0.25)
            answers = self.answers()
            if gone is None and not answers:
                gone = time.monotonic() - began
            if answers and self.engine() not in (None, old):
                told = f"engine {old} killed; {self.engine()} answers after {time.monotonic() - began:.1f} s"
                log.write_text(told + "\n")
                return told
        raise Failed(f"no answer within {min(limit_s, ANSWER_S):.0f} s of the kill")

    def rollback(self, log: Path, limit_s: float) -> str:
        before = (self.root / "current").resolve().name
        said = self.play("playbooks/rollback.yml")(log, limit_s)
        after = (self.root / "current").resolve().name
        if before == after:
            raise Failed(f"{before} serves still")
        if not self.answers():
            raise Failed(f"{before} went back to {after}, which does not answer")
        return f"{said}; {before} went back to {after}, which answers"

    def collect(self, log: Path, _: float) -> str:
        """Copy what the run left: the plan, receipts, checks, logs and the status page."""
        wanted = [
            *self.root.glob("log/*"), *self.root.glob("etc/plan.json"), *self.root.glob("receipts/*.json"),
            *self.root.glob("current/*.sh"), *self.root.glob("status/*"),
            *self.root.glob("current/engine.env"),
            *self.root.glob("models/*.manifest.json"), *(TOP / ".lowmem/receipts").rglob("*"),
        ]  # fmt: skip
        for path in wanted:
            if path.is_file():
                base = self.root if path.is_relative_to(self.root) else TOP / ".lowmem"
                target = self.out / "left" / path.relative_to(base)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
        log.write_text("".join(f"{path}\n" for path in wanted))
        return f"{len(wanted)} files"


def reason(said: str) -> str:
    """The line of a log that says why: a failed task's message, or the last line."""
    messages = re.findall(r"^\s*(?:msg: |\[ERROR\]: |fatal: )(.+)", said, re.MULTILINE)
    lines = [line for line in said.splitlines() if line.strip()]
    return str((messages or lines or ["it said nothing"])[-1])[:400]


def machine_python() -> str | None:
    """This machine's own Python 3.12 if it can make environments and compile against itself (Triton does)."""
    code = (
        "import sys, venv, ensurepip, sysconfig, pathlib; sys.exit(sys.version_info[:2] != (3, 12) or not"
        " pathlib.Path(sysconfig.get_path('include'), 'Python.h').exists())"
    )
    for name in ("/usr/bin/python3.12", "/usr/local/bin/python3.12"):
        if Path(name).exists() and subprocess.run([name, "-c", code], capture_output=True).returncode == 0:
            return name
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", type=Path, help="folder of the parts; default: nothing is unpacked")
    parser.add_argument("--lab", type=Path, default=Path("/opt/lab"), help="where they are unpacked")
    parser.add_argument("--inventory", default="inventory/lab")
    parser.add_argument(
        "--root", type=Path, default=Path("/opt/lab/host"), help="lowmem_root of the inventory"
    )
    parser.add_argument(
        "--controller", type=Path, default=Path("/opt/lab/controller"), help="its environment"
    )
    parser.add_argument(
        "--upgrade", default="{lowmem_overrides: {max_num_seqs: 16}}", help="the second release"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="for every play; repeatable"
    )
    parser.add_argument("--deadline-s", type=float, default=900)
    chain = Chain(parser.parse_args())
    chain.step("machine", 30, chain.machine)
    if chain.options.parts:
        chain.step("unpack", 240, chain.unpack)
        chain.step("card", 120, chain.card)
    chain.step("site", 600, chain.site)
    # a measurement writes a receipt, so the run that must change nothing is one without
    chain.step("again", 180, chain.play("site.yml", "--skip-tags", "verify", changed=0), needs=True)
    chain.step("kill", 240, chain.kill, needs=True)
    upgrade = ("-e", chain.options.upgrade, "--skip-tags", "verify")
    chain.step("upgrade", 300, chain.play("site.yml", *upgrade), needs=True)
    chain.step("rollback", 240, chain.rollback, needs=True)
    chain.until = max(chain.until, time.monotonic() + 60)
    chain.step("collect", 60, chain.collect)
    return sum(step["verdict"] != "passed" for step in chain.steps)


if __name__ == "__main__":
    sys.exit(main())
