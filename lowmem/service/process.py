"""Starts the engine or finds it running, and ends what it started."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from lowmem.errors import BadInput
from lowmem.schema import Deploy
from lowmem.units import MIB, local_url

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)

_TELLING = re.compile(r"^(VLLM_|CUDA_|NCCL_|TORCH|PYTORCH_|OMP_|HF_HUB_OFFLINE|LD_PRELOAD|MALLOC)")


def telling(variables: Mapping[str, str]) -> dict[str, str]:
    """Pick the variables that change how the engine runs, sorted, without any that may hold a secret."""
    return {k: v for k, v in sorted(variables.items()) if _TELLING.match(k) and not _SECRET.search(k)}


class Engine:
    """Processes of the engine and its log, whether it was started here or found running."""

    def __init__(
        self, pid: int | None, log: Path | None, process: subprocess.Popen[bytes] | None = None
    ) -> None:
        self.pid = pid
        self.log = log
        self.process = process
        self.seen: set[psutil.Process] = set()

    def alive(self) -> bool:
        if self.process is not None:
            return self.process.poll() is None
        return self.pid is None or psutil.pid_exists(self.pid)

    def look(self) -> None:
        """Note the processes that live now.

        psutil identifies each by its start time too, so a reused process id does no harm.
        """
        if self.pid is not None:
            with contextlib.suppress(psutil.Error):
                main = psutil.Process(self.pid)
                self.seen |= {main, *main.children(recursive=True)}

    def log_lines(self) -> list[str]:
        if self.log is None or not self.log.is_file():
            return []
        with self.log.open("rb") as stream:
            stream.seek(max(0, self.log.stat().st_size - 50 * MIB))
            return stream.read().decode(errors="replace").splitlines()

    def argv(self) -> tuple[str, ...]:
        try:
            argv = psutil.Process(self.pid).cmdline() if self.pid else []
        except psutil.Error:
            return ()
        return tuple(
            "<secret>" if before == "--api-key" else word
            for before, word in zip(["", *argv], argv, strict=False)
        )

    def environment(self) -> dict[str, str]:
        try:
            variables = psutil.Process(self.pid).environ() if self.pid else {}
        except psutil.Error:
            return {}
        return telling(variables)

    def stop(self, timeout_s: float) -> list[str]:
        """End the processes that were started here and no others. Return those that had to be killed."""
        if self.process is None:
            return []
        self.look()
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        killed: list[str] = []
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
        # Workers outlive an ended server by a moment. If it did not end, they have had their time.
        _, alive = psutil.wait_procs(self.seen, timeout=10 if self.process.poll() is not None else 0)
        for process in alive:
            with contextlib.suppress(psutil.Error):
                killed.append(f"{process.pid} ({process.name()})")
                process.kill()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return killed


def vllm_command() -> list[str]:
    """Find the command that runs `vllm`.

    It is $VLLM_BIN, the one beside this Python, the one on PATH, or this Python's own module.
    """
    if named := os.environ.get("VLLM_BIN"):
        return shlex.split(named)
    beside = Path(sys.executable).parent / "vllm"
    if beside.exists():
        return [str(beside)]
    if on_path := shutil.which("vllm"):
        return [on_path]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main"]


def listening_url(deploy: Deploy | None, extra: Sequence[str]) -> str:
    """Return the URL at which `vllm serve` listens.

    The extra arguments override the plan; the last --host and --port win, as in vLLM. Raises BadInput for a
    port that is no number.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--host", default=deploy.host if deploy else "127.0.0.1")
    parser.add_argument("--port", type=int, default=deploy.port if deploy else 8000)
    try:
        given, _ = parser.parse_known_args([*extra])
    except argparse.ArgumentError as error:
        raise BadInput(f"--arg: {error}") from None
    return local_url(given.host, given.port)


def start_engine(command: list[str], variables: dict[str, str], log: Path) -> Engine:
    """Start the command in a session of its own, with its output in `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **variables}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Engine(process.pid, log, process)


def listener_pid(url: str) -> int:
    """Return the process that listens on the URL's port. Raises BadInput if none of this user's does."""
    port = urlsplit(url).port
    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        connections = []
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,) and connection.pid:
            return int(connection.pid)
    raise BadInput(
        f"--url {url}: no process of yours listens on port {port}: name it with --pid, or run as its owner"
    )


@contextlib.contextmanager
def wrapped_vllm() -> Iterator[str]:
    """Yield a path that runs `vllm`, since launchers take one executable."""
    command = vllm_command()
    if len(command) == 1:
        yield command[0]
        return
    with tempfile.TemporaryDirectory(prefix="lowmem-") as folder:
        script = Path(folder) / "vllm"
        script.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        script.chmod(0o755)
        yield str(script)
