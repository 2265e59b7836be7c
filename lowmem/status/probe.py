"""Looks at a deployed server from its own host: its state, its metrics, and the memory it takes. Input and
output only.

What the figures mean is in `metrics` and `status` beside this file.
"""

from __future__ import annotations

import http.client
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import psutil
from pydantic import ValidationError

from lowmem.artefacts import read_plan
from lowmem.errors import BadInput
from lowmem.files import read_text, write_text
from lowmem.probes import Gpus, ProcessTree
from lowmem.schema import Plan
from lowmem.service.server import VllmServer
from lowmem.status.metrics import Sample, parse
from lowmem.status.status import Look, State

TIMEOUT_S = 5.0
"""/metrics answers from the API server's own counters, at once also on a loaded machine; what takes longer is
worth being told.
"""

DEFAULT_PLAN = Path("/opt/vllm-lowmem/etc/plan.json")
"""Of a deployment with the default lowmem_root."""


class Host:
    """A deployed server and the memory of the host it runs on. `look` never raises for what a
    server may do.
    """

    def __init__(self, plan: Plan) -> None:
        """ValueError for a plan without a deployment."""
        self.plan = plan
        self.server = VllmServer(plan, Path())
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._gpus: Gpus | None = None
        self._tree: ProcessTree | None = None

    def look(self) -> Look:
        at = time.time()
        sample: Sample | None = None
        state: State = "serving"
        trouble = ""
        try:
            sample = parse(self._get("/metrics"), at)
            self._get("/health")
        except urllib.error.HTTPError as error:
            # 503 on /health is vLLM's EngineDeadError
            state, trouble = (
                "failing",
                f"{error.url} answers {error.code}{': its engine is dead' if error.code == 503 else ''}",
            )
        except ValueError as error:
            state, trouble = "failing", f"{self.server.url}/metrics: {error}"
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)
            refused = isinstance(cause, ConnectionRefusedError)
            state = "down" if refused else "silent"
            trouble = f"{self.server.url}: connection refused" if refused else f"{self.server.url}: {cause}"
        process = self._process()
        if state == "down" and process is not None:
            state, trouble = (
                "starting",
                f"{self.server.url}: the server's process runs and does not listen yet",
            )
        memory, source = self._memory_bytes(process)
        started = sample.started if sample else None
        if started is None and process is not None:
            started = process.create_time()
        if sample is not None:
            sample = sample.model_copy(update={"started": started, "memory_bytes": memory})
        return Look(
            at=at,
            state=state,
            trouble=trouble,
            started=started,
            sample=sample,
            memory_bytes=memory,
            memory_source=source,
        )

    def _get(self, path: str) -> str:
        with self._opener.open(self.server.url + path, timeout=TIMEOUT_S) as answer:
            return str(answer.read().decode())

    def _process(self) -> psutil.Process | None:
        processes = self.server.processes()
        return processes[-1] if processes else None

    def _memory_bytes(self, process: psutil.Process | None) -> tuple[tuple[int, ...], str]:
        """Per GPU, or of the server's processes; and where the figure comes from, or why there is none."""
        if self.plan.device_kind == "cuda":
            try:
                self._gpus = self._gpus or Gpus(self.plan.device_count)
                return self._gpus.used_bytes(), "NVML `used` per GPU, all processes"
            except Exception as error:
                self._gpus = None
                return (), str(error)
        if process is None:
            return (), "the server's processes are not to be seen from here"
        if self._tree is None or self._tree.root_pid != process.pid:
            self._tree = ProcessTree(process.pid, pss=True)
        used = self._tree.memory_bytes()
        return (used,) if used else (), self._tree.source


def deployed(plan: Path) -> Host:
    """The server of this plan. BadInput, one line, where the file is no plan of a deployment."""
    planned = read_plan(plan)
    if planned.deploy is None:
        raise BadInput(f"--plan {plan} names no port and model: give the plan.json of a deployment")
    return Host(planned)


def read_samples(path: Path) -> list[Sample]:
    """Earlier looks, oldest first, one JSON object a line; what is not whole, or of another version, is left
    out.
    """
    samples = []
    try:
        lines = read_text(path).splitlines()
    except BadInput:
        return []
    for line in lines:
        try:
            samples.append(Sample.model_validate_json(line))
        except ValidationError:
            continue
    return samples


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    write_text(path, "\n".join(sample.model_dump_json() for sample in samples))
