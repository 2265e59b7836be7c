"""The reader of vLLM's log, on lines that real engines printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowmem.measure.engine_log import advise, read, strip

DATA = Path(__file__).parent.parent / "data"
GIB = 2**30


def gpu_lines(name: str, version: str) -> list[str]:
    runs: list[dict[str, Any]] = json.loads((DATA / "engine_logs" / "gpu_h200.json").read_text())
    return next(r["engine_log"] for r in runs if (r["name"], r["vllm"]) == (name, version))


def test_a_line_is_stripped_of_all_that_is_not_the_message() -> None:
    prefix = "\x1b[0;36m(EngineCore pid=7)\x1b[0;0m INFO 11-22 21:06:28 [cpu_worker.py:260] "
    line = f"{prefix}Explicitly set (0.25/9.84) GiB for KV cache on node 0.\n"
    assert strip(line) == "Explicitly set (0.25/9.84) GiB for KV cache on node 0."


def test_a_cpu_engines_log() -> None:
    log = read((DATA / "engine_logs" / "cpu_float32.log").read_text().splitlines())
    assert log.values == {"kv_cache": (268435456.0,), "kv_tokens": (5760.0,), "init_s": (0.27,)}
    assert log.error is None


def test_offload_is_seen_in_the_log_of_a_gpu_engine() -> None:
    log = read(gpu_lines("uva20", "0.32.0"))
    assert log.words == {
        "offloader": ("UVAOffloader",),
        "kernel": ("MacheteLinearKernel",),
        "attention_backend": ("FLASH_ATTN",),
    }
    assert log.largest("cpu_offload") == round(19.04 * GIB)
    assert log.largest("weights") == round(15.42 * GIB)
    assert log.largest("kv_cache") == round(5.95 * GIB)
    assert log.largest("kv_tokens") == 19488
    assert log.values["graphs"] == (0.09 * GIB, 0.04 * GIB)
    assert log.last("graphs") == round(0.04 * GIB)


def test_offload_that_was_ignored_is_absent() -> None:
    log = read(gpu_lines("uva20", "0.26.0"))
    assert "cpu_offload" not in log.values
    assert log.largest("weights") == round(34.91 * GIB)


def test_two_workers_give_two_readings() -> None:
    assert read(gpu_lines("tp2", "0.26.0")).values["weights"] == (17.49 * GIB, 17.49 * GIB)


def test_why_an_engine_did_not_start() -> None:
    log = read(gpu_lines("seed", "0.26.0"))
    assert log.largest("kv_cache") == round(-17.32 * GIB)
    assert log.error is not None
    assert log.error.startswith("ValueError: No available memory for the cache blocks.")
    assert (
        log.advice
        == "the budget leaves nothing for the KV cache: weights and activations alone exceed it; raise"
        " the budget, shard or offload"
    )


def test_flags_that_vllm_does_not_have() -> None:
    log = read(gpu_lines("verbatim", "0.26.0"))
    assert log.error == "api_server.py: error: unrecognized arguments: --max-batch-size --swap-space 20"
    assert log.advice is not None
    assert log.advice.startswith("this vLLM has no such flag")


def test_only_the_last_start_in_a_file_counts() -> None:
    banner = "(APIServer pid=1) INFO 11-22 21:05:59 [api_utils.py:286] non-default args: {'port': 8013}"
    loaded = "Model loading took {} GiB memory and 1.0 seconds"
    failed = "ValueError: No available memory for the cache blocks"
    log = read([banner, loaded.format(1.0), failed, banner, loaded.format(2.0)])
    assert log.values["weights"] == (2.0 * GIB,)
    assert log.error is None


def test_the_cause_is_told_and_not_what_followed_from_it() -> None:
    log = read(
        [
            "RuntimeError: Engine core initialization failed. See root cause above.",
            "KeyError: 'layers.0.mlp.down_proj.qweight'",
        ]
    )
    assert log.error == "KeyError: 'layers.0.mlp.down_proj.qweight'"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("ValueError: Cannot find the config file for awq", "not quantized"),
        ("Quantization method specified in the model config (compressed-tensors) does not match",
        "leave --quantization out"),
        ("ValueError: torch.float32 is not supported for quantization method awq.", "float16 or bfloat16"),
        ("Available memory on node 0 (14.53/17.71 GiB) on startup is less than desired CPU memory",
        "kv_cache_memory_bytes"),
        ("max_num_batched_tokens (512) is smaller than max_model_len (2048)", "chunked prefill"),
        ("AttributeError: '_C' object has no attribute 'cpu_gemm_wna16'", "vllm_avx2_int4"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 224.00 MiB", "card is full"),
        ("Free memory on device cuda:0 (3.1/39.4 GiB) on startup is less than desired GPU memory utilization",
        "nvidia-smi"),
    ],
)  # fmt: skip
def test_known_errors_have_advice(text: str, word: str) -> None:
    advice = advise(text)
    assert advice is not None
    assert word in advice


def test_what_a_server_prints_while_it_is_stopped_is_no_failure() -> None:
    shutdown = (
        "(APIServer pid=1) INFO 11-22 21:06:58 [launcher.py:254] [shutdown] API server: shutdown triggered"
    )
    assert read(["RuntimeError: before", shutdown]).error == "RuntimeError: before"
    assert (
        read([shutdown, "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue."]).error
        is None
    )


def test_an_unknown_error_has_none() -> None:
    assert advise("ValueError: something new") is None
