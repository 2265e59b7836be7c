"""Defines what the engine's own classes are asked, what they answer, and how a record of both is kept."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from lowmem.errors import BadInput, first_problem
from lowmem.files import JSON_LIMIT_BYTES, read_text, write_text
from lowmem.schema import Bytes, Device, Plan, Strict
from lowmem.units import MIB, capability_tuple

CONFIG_FILES = ("config.json", "hf_quant_config.json")
"""Files of a checkpoint that decide what the engine registers."""

UNKNOWN = (0, 0)
"""Capability of a card that no table has: it can be asked where it is, and has no stubs."""

ROOMY_POOL_BYTES = 2**40
"""Pool that holds a request of any model; the layout does not depend on it."""


class Card(Strict):
    """Figures of the GPU that vLLM's CUDA paths ask for; `count` GPUs are alike."""

    name: str
    capability: tuple[int, int]
    memory_bytes: Bytes
    multiprocessors: int
    count: int = 1


class Question(Strict):
    """Everything that decides an answer: the build of vLLM, the checkpoint's files, arguments and card."""

    vllm: str
    files_sha256: dict[str, str]
    arguments: tuple[str, ...]
    environment: dict[str, str]
    card: Card | None
    pool_bytes: Bytes


class TensorGroup(Strict):
    """Equal parameters or buffers of several layers; `*` stands for the layer in the name."""

    name: str
    kind: Literal["parameter", "buffer"]
    shape: tuple[int, ...]
    dtype: str
    count: int
    bytes: Bytes


class KvGroup(Strict):
    """Group of layers that share a block table."""

    spec: str
    layers: int
    block_tokens: int
    page_bytes: Bytes


class KvAnswer(Strict):
    """Layout of the KV cache; `bytes_per_block` is over all tensors of the pool."""

    blocks: int
    bytes_per_block: Bytes
    blocks_per_request: int
    groups: tuple[KvGroup, ...]

    @property
    def bytes_per_request(self) -> int:
        return self.blocks_per_request * self.bytes_per_block


class Answer(Strict):
    """Bytes that vLLM's classes register on one GPU, and the KV cache that its own code lays out.

    `way` is how the CUDA paths were reached: on a card, or with stubs for NVML and CUDA.
    """

    vllm: str
    way: Literal["card", "stubs", "cpu"]
    architecture: str
    dtype: str
    parameter_bytes: Bytes
    buffer_bytes: Bytes
    tensors: tuple[TensorGroup, ...]
    attention_backends: tuple[str, ...]
    kv_cache: KvAnswer | None


class Record(Strict):
    """Answer with its question: a fixture of the tests, or what a deployment need not ask again."""

    question: Question
    answer: Answer


def card_of(device: Device, count: int) -> Card | None:
    """Return the figures of a device of the table; None for a CPU."""
    if device.kind == "cpu":
        return None
    return Card(
        name=device.title,
        capability=capability_tuple(device.capability),
        memory_bytes=device.torch_total_mib * MIB,
        multiprocessors=device.sm_count,
        count=count,
    )


def question_of(
    folder: Path,
    arguments: tuple[str, ...],
    environment: Mapping[str, str],
    card: Card | None,
    pool_bytes: int = ROOMY_POOL_BYTES,
) -> Question:
    """Put the question to the vLLM of this environment. BadInput without vLLM or config.json."""
    try:
        vllm = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        raise BadInput(
            "lowmem oracle asks vLLM's own classes, and this Python has no vLLM; run it with the engine's"
            " environment: <environment>/bin/python -m lowmem oracle"
        ) from None
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder} has no config.json; give the directory of a checkpoint")
    sums = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in CONFIG_FILES
        if (folder / name).is_file()
    }
    return Question(
        vllm=vllm,
        files_sha256=sums,
        arguments=arguments,
        environment=dict(environment),
        card=card,
        pool_bytes=pool_bytes,
    )


def card_of_plan(plan: Plan, device: Device | None) -> Card | None:
    """Return the figures of a plan's card; without a device of the table only its name is known."""
    if plan.device_kind == "cpu":
        return None
    if device is not None:
        return card_of(device, plan.device_count * plan.hosts)
    return Card(name=plan.device, capability=UNKNOWN, memory_bytes=plan.limit_bytes, multiprocessors=1)


def question_of_plan(folder: Path, plan: Plan, device: Device | None) -> Question:
    """Put a plan's question: its arguments, its environment, its device and its pool."""
    pool = plan.per_gpu.get("kv_cache", 0)
    return question_of(
        folder,
        tuple(plan.argv[1:]),  # the first one is the model's path
        {v.name: v.value for v in plan.environment if v.name.startswith("VLLM_")},
        card_of_plan(plan, device),
        pool if plan.verdict != "impossible" and pool > 0 else ROOMY_POOL_BYTES,
    )


def read_record(path: Path) -> Record:
    """Read a record. BadInput, one line, where the file holds none."""
    try:
        return Record.model_validate_json(read_text(path, JSON_LIMIT_BYTES, f"record {path}"))
    except ValidationError as error:
        raise BadInput(f"record {path}: {first_problem(error, 'the file')}; remove it") from None


def write_record(path: Path, record: Record) -> None:
    """Write a record, readable by all."""
    write_text(path, record.model_dump_json(indent=1) + "\n")
