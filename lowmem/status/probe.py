"""Looks at a deployed server from its own host: its state, its metrics, and the memory it takes.

This module holds input and output only; `metrics` and `status` beside it interpret the figures.
"""

from __future__ import annotations

import http
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from pydantic import ValidationError

from lowmem.artefacts import read_deployed_plan
from lowmem.errors import BadInput
from lowmem.files import parse_json, read_text, write_text
from lowmem.probes import Gpus, ProcessTree
from lowmem.schema import DeployedPlan
from lowmem.service.call import call
from lowmem.service.server import VllmServer
from lowmem.status.metrics import Sample, parse
from lowmem.status.status import Look, State

TIMEOUT_S = 5.0
"""/metrics answers at once from the API server's own counters, even on a loaded machine. A slower answer is
worth reporting.
"""

DEFAULT_PLAN = Path("/opt/vllm-lowmem/etc/plan.json")
"""Plan of a deployment with the default lowmem_root."""


class Host:
    """Deployed server and the memory of the host it runs on."""

    def __init__(self, plan: DeployedPlan) -> None:
        self.plan = plan
        self.server = VllmServer(plan, Path())
        self._gpus: Gpus | None = None
        self._tree: ProcessTree | None = None

    def look(self) -> Look:
        """Look at the server once. It never raises, whatever the server does."""
        at = time.time()
        sample: Sample | None = None
        state: State = "serving"
        trouble = ""
        try:
            sample = self._sample(at)
            self._get("/health")
        except ValueError as error:
            state, trouble = "failing", str(error)
        except ConnectionRefusedError:
            state, trouble = "down", f"{self.server.url}: connection refused"
        except OSError as error:
            state, trouble = "silent", f"{self.server.url}: {error}"
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

    def _sample(self, at: float) -> Sample:
        text = self._get("/metrics")
        try:
            return parse(text, at)
        except ValueError as error:
            raise ValueError(f"{self.server.url}/metrics: {error}") from None

    def _get(self, path: str) -> str:
        """Return the text of an answer. Raises ValueError for a bad one, OSError for none."""
        url = self.server.url + path
        status, body = call(url, TIMEOUT_S)
        if status != http.HTTPStatus.OK:
            # 503 on /health is vLLM's EngineDeadError
            dead = ": its engine is dead" if status == http.HTTPStatus.SERVICE_UNAVAILABLE else ""
            raise ValueError(f"{url} answers {status}{dead}")
        try:
            return body.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{url} is not UTF-8 at byte {error.start}") from None

    def _process(self) -> psutil.Process | None:
        processes = self.server.processes()
        return processes[-1] if processes else None

    def _memory_bytes(self, process: psutil.Process | None) -> tuple[tuple[int, ...], str]:
        """Return the bytes per GPU, or of the server's processes, and their source.

        If there are no figures, the second part says why.
        """
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
    """Return the host of the server of this plan.

    Raises BadInput, one line, if the file is no plan of a deployment.
    """
    return Host(read_deployed_plan(plan))


def read_samples(path: Path) -> list[Sample]:
    """Read earlier samples, oldest first, one JSON object a line.

    A line that is cut or of another version is left out.
    """
    samples = []
    try:
        lines = read_text(path).splitlines()
    except BadInput:
        return []
    for line in lines:
        try:
            parse_json(line, str(path))  # pydantic's own parser has other bounds
            samples.append(Sample.model_validate_json(line))
        except (BadInput, ValidationError):
            continue
    return samples


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write samples, one JSON object a line."""
    write_text(path, "\n".join(sample.model_dump_json() for sample in samples))
