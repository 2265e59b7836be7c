"""Reads memory figures and errors from vLLM's own log.

The texts are those of vLLM 0.32.0; each pattern names the source file that prints it. The engine rounds to
0.01 GiB (10 MiB).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from lowmem.schema import Strict

GIB = 2**30

GB = 10**9

_ANSI = re.compile(r"\x1b\[[0-9;]*m")

_PREFIX = re.compile(
    r"^(?:\([^)]*pid=\d+\)\s*)?(?:(?:DEBUG|INFO|WARNING|ERROR|CRITICAL)\s+\d\d-\d\d \d\d:\d\d:\d\d"
    r" \[[^\]]*\]\s*)?"
)

_RUN_BEGINS = re.compile(r"vLLM server version|non-default args:")  # entrypoints/serve/utils/api_utils.py

_STOPPING = re.compile(
    r"\[shutdown\] API server: shutdown triggered"
)  # an EngineDeadError that follows is not a failure

_NUMBER = r"(-?\d{1,15}(?:\.\d{1,9})?)"
"""A longer one is no figure of the engine's."""

_LINE_LIMIT = 4000
"""Characters of a line that are looked at; the engine's own lines are shorter."""

_KEPT_LIMIT = 1000
"""Entries of each list that a log may fill."""

_VALUES: tuple[tuple[str, re.Pattern[str], float], ...] = tuple(
    (name, re.compile(pattern), scale)
    for name, pattern, scale in (
        ("weights", rf"Model loading took {_NUMBER} GiB", GIB),  # v1/worker/gpu/model_runner.py
        ("load_s", rf"Model loading took .{{0,200}} and {_NUMBER} seconds", 1),
        ("kv_cache", rf"Available KV cache memory: {_NUMBER} GiB", GIB),  # v1/worker/gpu_worker.py
        ("kv_cache", rf"reserved {_NUMBER} GiB memory for KV Cache", GIB),
        (
            "kv_cache",
            rf"(?:Explicitly|Auto) set \({_NUMBER}/[\d.]+\) GiB for KV cache",
            GIB,
        ),  # v1/worker/cpu_worker.py
        ("kv_tokens", r"KV cache size: (\d[\d,]{0,19}) tokens", 1),  # v1/core/kv_cache_utils.py
        ("graphs", rf"Graph capturing finished in .{{0,200}} took {_NUMBER} GiB", GIB),
        (
            "cpu_offload",
            rf"Total CPU offloaded parameters: {_NUMBER}",
            GIB,
        ),  # model_executor/offloader/uva.py
        (
            "prefetch_offload",
            rf"\[PrefetchOffloader\] Initialized .{{0,200}}Total GPU memory saved: {_NUMBER} GB",
            GB,
        ),
        (
            "prefetch_buffers",
            rf"\[PrefetchOffloader\] Initialized .{{0,200}}Static buffer pool: {_NUMBER} GB",
            GB,
        ),
        (
            "activations",
            rf"GiB for consumed memory \(weights \+ non-torch\), {_NUMBER} GiB for peak activation",
            GIB,
        ),
        ("consumed", rf"Actual usage is {_NUMBER} GiB for consumed memory", GIB),
        (
            "non_kv",
            rf"Total non KV cache memory: {_NUMBER}GiB",
            GIB,
        ),  # utils/mem_utils.py, at VLLM_LOGGING_LEVEL=DEBUG
        ("torch_peak_increase", rf"torch peak memory increase: {_NUMBER}GiB", GIB),
        ("consumed", rf"total consumed \(from mem_get_info\): {_NUMBER}GiB", GIB),
        ("free_before", rf"Initial free memory:? {_NUMBER} GiB", GIB),
        ("compile_s", rf"torch\.compile took {_NUMBER} s", 1),  # compilation/monitor.py
        ("init_s", rf"init engine \(.{{0,200}}\) took {_NUMBER} s", 1),  # v1/engine/core.py
    )
)

_WORDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("attention_backend", re.compile(r"Using (\w+) attention backend")),
    (
        "kernel",
        re.compile(
            r"Using (\w+) for (?:\S*[mM]ixed-precision linear|\S+Method|CompressedTensors\S+|\S+ GEMM)"
        ),
    ),
    ("offloader", re.compile(r"Offloader set to (\w+)")),
    ("nccl", re.compile(r"vLLM is using nccl==(\S+)")),
    ("model_runner", re.compile(r"Using (V\d) Model Runner")),
)

_ADVICE: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), advice)
    for pattern, advice in (
        (
            r"unrecognized arguments: (.*)",
            (
                "this vLLM has no such flag: take it out of the profile (`vllm serve --help=all` lists the"
                " flags)"
            ),
        ),
        (
            r"Cannot find the config file for (\w+)",
            "the model folder is not quantized: quantize it, or leave --quantization out",
        ),
        (
            r"Quantization method specified in the model config",
            "the checkpoint names another method: leave --quantization out, it is read from the checkpoint",
        ),
        (
            r"torch\.float32 is not supported for quantization method",
            "set dtype to float16 or bfloat16: 4-bit kernels take no float32",
        ),
        (
            r"cpu_gemm_wna16",
            (
                "this CPU has no AVX-512 and vLLM no int4 kernel for it: install the vllm_avx2_int4 plugin"
                " into the engine's environment"
            ),
        ),
        (
            r"No available memory for the cache blocks",
            (
                "the budget leaves nothing for the KV cache: weights and activations alone exceed it; raise"
                " the budget, shard or offload"
            ),
        ),
        (
            r"To serve at least one request .*max seq len",
            (
                "the KV pool is smaller than one request of max_model_len: raise kv_cache_memory_bytes or"
                " lower max_model_len"
            ),
        ),
        (
            r"Free memory on device .* is less than",
            (
                "another process holds this GPU's memory: find it with nvidia-smi (workers of a killed"
                " server?), or lower gpu_memory_utilization"
            ),
        ),
        (
            r"Available memory on node .* is less than",
            (
                "on a CPU gpu_memory_utilization is a share of all RAM: set kv_cache_memory_bytes, or free"
                " some RAM"
            ),
        ),
        (
            r"max_num_batched_tokens .* is smaller than max_model_len",
            "keep chunked prefill on, or raise max_num_batched_tokens to max_model_len",
        ),
        (
            r"CUDA out of memory|OutOfMemoryError",
            "the card is full: lower kv_cache_memory_bytes, or see which term of the receipt passes its plan",
        ),
        (
            r"KeyError: .*qweight",
            (
                "the checkpoint's quantization_config is missing: the tensors are there, config.json does not"
                " say how to read them"
            ),
        ),
        (
            r"[Aa]ddress already in use",
            "another process listens on this port: stop it, or choose another port",
        ),
        (
            r"driver on your system is too old",
            "the NVIDIA driver is older than this CUDA needs (CUDA 13: 580 or newer)",
        ),
        (
            r"Failed to infer device type|No CUDA GPUs are available",
            "no GPU is visible: look at nvidia-smi and CUDA_VISIBLE_DEVICES",
        ),
        (r"libnuma", "install libnuma1"),
        (r"InvalidCxxCompiler|C\+\+ compiler|C compiler", "install g++, or set TORCHDYNAMO_DISABLE=1"),
        (
            r"cudaHostAlloc|pin_memory|memlock",
            "pinned memory was refused: set LimitMEMLOCK=infinity and leave enough free RAM",
        ),
        (r"No module named", "the engine's environment lacks a module: build it again from its lock file"),
    )
)

_ERROR = re.compile(r"(?:^|\s)((?:[\w.]*(?:Error|Exception)|\S+: error|error): .+)")

_SECONDARY = re.compile(
    r"Engine core initialization failed|WorkerProc initialization failed|failed due to an"
    r" exception|cancelled|EngineDeadError"
)


class EngineLog(Strict):
    """Log of one start of the engine. Lists have one entry per worker, in the order of the lines."""

    values: dict[str, tuple[float, ...]]
    """Name -> readings; bytes, seconds (`*_s`) or tokens (`kv_tokens`)."""
    words: dict[str, tuple[str, ...]]
    """Name -> distinct readings: attention backend, kernels, offloader, NCCL."""
    lines: tuple[str, ...]
    """The lines that were read, without prefix, each once."""
    error: str | None = None
    advice: str | None = None

    def largest(self, name: str) -> int | None:
        """Return the largest reading over the workers; None if the engine did not log it."""
        readings = self.values.get(name)
        return round(max(readings)) if readings else None

    def last(self, name: str) -> int | None:
        """Return the last reading; None if the engine did not log it.

        Graphs are captured twice: first to estimate, then for good.
        """
        readings = self.values.get(name)
        return round(readings[-1]) if readings else None


def strip(line: str) -> str:
    """Strip colour, process, level, time and source file from a line."""
    return _PREFIX.sub("", _ANSI.sub("", line.rstrip()), count=1).strip()


def advise(text: str) -> str | None:
    """Return the advice on a known error text; None if it is not known."""
    return next((advice for pattern, advice in _ADVICE if pattern.search(text)), None)


def read(lines: Iterable[str]) -> EngineLog:
    """Read the last start in a log, which follows its banner. A log file outlives restarts."""
    values: dict[str, list[float]] = {}
    words: dict[str, dict[str, None]] = {}  # as sets that keep their order
    kept: dict[str, None] = {}
    errors: list[str] = []
    had_values = stopping = False
    for raw in lines:
        line = strip(raw[:_LINE_LIMIT])
        if _RUN_BEGINS.search(line) and had_values:
            values, words, kept, errors, had_values, stopping = {}, {}, {}, [], False, False
        matched = False
        for name, pattern, scale in _VALUES:
            if match := pattern.search(line):
                values.setdefault(name, []).append(float(match[1].replace(",", "")) * scale)
                matched = had_values = True
        for name, pattern in _WORDS:
            if match := pattern.search(line):
                _keep(words.setdefault(name, {}), match[1])
                matched = True
        stopping = stopping or bool(_STOPPING.search(line))
        if (match := _ERROR.search(line)) and not stopping:
            if len(errors) < _KEPT_LIMIT:
                errors.append(match[1][:400])
            matched = had_values = True
        if matched:
            _keep(kept, line[:400])
    error = _root_cause(errors)
    return EngineLog(
        values={k: tuple(v) for k, v in values.items()},
        words={k: tuple(v) for k, v in words.items()},
        lines=tuple(kept),
        error=error,
        advice=advise(error) if error else None,
    )


def _keep(seen: dict[str, None], text: str) -> None:
    if len(seen) < _KEPT_LIMIT:
        seen[text] = None


def _root_cause(errors: list[str]) -> str | None:
    primary = [e for e in errors if not _SECONDARY.search(e)]
    known = [e for e in primary if advise(e)]
    return next(iter(known or primary or errors), None)
