"""Asks vLLM's own model classes and KV code for bytes, groups and blocks, on the meta device.

No weight is read and no memory of a card is taken. The names that are imported here are those of vLLM 0.32.0.
Where another version has moved one, the answer is one line that says so.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from lowmem.errors import BadInput
from lowmem.oracle import cuda_without_card
from lowmem.oracle.question import UNKNOWN, Answer, KvAnswer, KvGroup, Question, TensorGroup

_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}

# What decides where weights lie and how steps run, and no shape; each would ask for a card or for files.
_SETTINGS: dict[str, Any] = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "cpu_offload_gb": 0,
    "offload_group_size": 0,
    "kv_offloading_size": None,
    "pipeline_parallel_size": 1,
    "nnodes": 1,
    "node_rank": 0,
}


def ask(folder: Path, question: Question) -> Answer:
    """Ask once in a process. BadInput, one line, with vLLM's own words where it refuses."""
    os.environ.update(question.environment)
    os.environ.update(_QUIET)
    with tempfile.TemporaryDirectory(prefix="lowmem-oracle-") as scratch, _quiet():
        os.environ.update(VLLM_CACHE_ROOT=scratch, HF_HOME=f"{scratch}/huggingface")
        try:
            way = _platform(question)
            return _answer(folder, question, way)
        except BadInput:
            raise
        except (Exception, SystemExit) as error:
            if os.environ.get("LOWMEM_DEBUG"):
                raise
            said = " ".join(str(error).split())[:400] or "no words"
            raise BadInput(
                f"vLLM {question.vllm} does not build the model of {folder} ({type(error).__name__}: {said});"
                " LOWMEM_DEBUG=1 shows where"
            ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep stdout for the answer: libraries print and log there."""
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _platform(question: Question) -> Literal["card", "stubs", "cpu"]:
    """Choose the way to vLLM's code for the question's device; with stubs only where no card is found."""
    import torch

    if question.card is None:
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            raise BadInput("the plan is for a CPU, and this environment's vLLM is not its CPU build")
        return "cpu"
    if torch.cuda.is_available():
        return "card"
    if question.card.capability == UNKNOWN:
        raise BadInput(
            f"there is no card here, and {question.card.name} is no device of the table: name the nearest one"
            " with --device, or run this on a host with the card"
        )
    cuda_without_card.install(question.card)
    return "stubs"


def _answer(folder: Path, question: Question, way: Literal["card", "stubs", "cpu"]) -> Answer:
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    config = _engine_config(folder, question)
    if way == "stubs":
        cuda_without_card.imported()
    with set_current_vllm_config(config):
        _groups_of_one(config.parallel_config.tensor_parallel_size)
        torch.set_default_dtype(config.model_config.dtype)
        try:
            with torch.device("meta"), _nothing_on_a_card():
                model = initialize_model(vllm_config=config)
        finally:
            torch.set_default_dtype(torch.float32)
        tensors = (
            *_tensors(model.named_parameters(), "parameter"),
            *_tensors(model.named_buffers(), "buffer"),
        )
        backends, kv_cache = _kv_cache(config, question.pool_bytes, way)
    total = {kind: sum(t.bytes for t in tensors if t.kind == kind) for kind in ("parameter", "buffer")}
    return Answer(
        vllm=question.vllm,
        way=way,
        architecture=config.model_config.architectures[0],
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        parameter_bytes=total["parameter"],
        buffer_bytes=total["buffer"],
        tensors=tensors,
        attention_backends=backends,
        kv_cache=kv_cache,
    )


def _engine_config(folder: Path, question: Question) -> Any:
    """Let vLLM's own parser read the arguments; those of its HTTP server are not of the engine."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(allow_abbrev=False))
    namespace, _ = parser.parse_known_args(["--model", str(folder), *question.arguments])
    arguments = EngineArgs.from_cli_args(namespace)
    for name, value in _SETTINGS.items():
        if hasattr(arguments, name):
            setattr(arguments, name, value)
    if arguments.tensor_parallel_size > 1:
        arguments.distributed_executor_backend = "external_launcher"  # no process is started for a rank
    return arguments.create_engine_config()


def _groups_of_one(tp: int) -> None:
    """Make this process rank 0 of `tp`: layers ask the group for its size, and none is sent anything."""
    import torch
    from vllm.distributed import init_distributed_environment, initialize_model_parallel, parallel_state
    from vllm.v1.worker.workspace import init_workspace_manager

    with tempfile.TemporaryDirectory(prefix="lowmem-oracle-") as folder:
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        init_workspace_manager(torch.device("meta"))
        initialize_model_parallel(1, 1)
    for name in ("_TP", "_EP"):
        group = getattr(parallel_state, name, None)
        if group is not None:
            group.world_size, group.rank_in_group = tp, 0


def _nothing_on_a_card() -> Any:
    """Return a mode of torch that puts on the meta device what a module asks a card for."""
    import torch
    from torch.overrides import TorchFunctionMode

    def moved(value: Any, is_to: bool) -> Any:
        if isinstance(value, torch.device) and value.type == "cuda":
            return torch.device("meta")
        return "meta" if is_to and isinstance(value, str) and value.startswith("cuda") else value

    class OnMeta(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            device = kwargs.get("device")
            if device is not None and (isinstance(device, int) or str(device).startswith("cuda")):
                kwargs["device"] = "meta"
            return function(*(moved(a, function is torch.Tensor.to) for a in args), **kwargs)

    return OnMeta()


def _tensors(named: Any, kind: Literal["parameter", "buffer"]) -> list[TensorGroup]:
    """Group tensors that differ in their layer alone."""
    counts: dict[tuple[str, tuple[int, ...], str], tuple[int, int]] = {}
    for name, tensor in named:
        key = (
            re.sub(r"\.\d+(?=\.)", ".*", name),
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
        )
        count, size = counts.get(key, (0, 0))
        counts[key] = (count + 1, size + tensor.numel() * tensor.element_size())
    return [
        TensorGroup(name=name, kind=kind, shape=shape, dtype=dtype, count=count, bytes=size)
        for (name, shape, dtype), (count, size) in counts.items()
    ]


def _kv_cache(config: Any, pool_bytes: int, way: str) -> tuple[tuple[str, ...], KvAnswer | None]:
    """Let vLLM lay out the cache as its engine core does: specs of the layers, then groups and blocks."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
    from vllm.v1.core import kv_cache_utils

    current_platform.update_block_size_for_backend(config)
    layers = get_layers_from_vllm_config(config, AttentionLayerBase)
    backends = {layer.get_attn_backend() for layer in layers.values()}
    names = tuple(sorted(backend.get_name() for backend in backends))
    specs = {
        name: spec
        for name, layer in layers.items()
        if not getattr(layer, "kv_sharing_target_layer_name", None)
        and (spec := layer.get_kv_cache_spec(config))
    }
    if not specs:
        return names, None
    layouts = [layout.name for layout in get_supported_kv_cache_layouts(backends)]
    resolve_kv_cache_layout(config, [layouts], list(specs.values()))
    laid = kv_cache_utils.get_kv_cache_configs(config, [specs], [pool_bytes])[0]
    concurrency = kv_cache_utils.get_max_concurrency_for_kv_cache_config(config, laid)
    groups = tuple(
        KvGroup(
            spec=type(group.kv_cache_spec).__name__,
            layers=len(group.layer_names),
            block_tokens=group.kv_cache_spec.block_size,
            page_bytes=group.kv_cache_spec.page_size_bytes,
        )
        for group in laid.kv_cache_groups
    )
    return names, KvAnswer(
        blocks=laid.num_blocks,
        bytes_per_block=kv_cache_utils._pool_bytes_per_block(config, laid.kv_cache_groups),
        blocks_per_request=round(laid.num_blocks / concurrency),
        groups=groups,
    )
