"""A plan for the fake engine, made without the planner: these tests are about measuring."""

from __future__ import annotations

import json
import socket
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from lowmem.schema import Plan

MIB = 2**20


def make_plan(**changes: Any) -> Plan:
    plan: dict[str, Any] = {
        "profile": "test", "model": "fake", "parameters": 1, "weight_bytes": 120 * MIB,
        "quantization": {"method": "awq", "bits": 4, "group_size": 64},
        "device": "cpu", "device_kind": "cpu", "device_count": 1, "tensor_parallel_size": 1,
        "load": {"clients": 2, "input_tokens": 16, "output_tokens": 11},
        "limits": {"memory_bytes": 2048 * MIB, "tpot_p99_ms": 200, "ttft_p99_ms": 2000},
        "verdict": "fits", "reasons": [], "limit_bytes": 2048 * MIB,
        "per_gpu": {"weights": 120 * MIB, "kv_cache": 256 * MIB, "runtime": 900 * MIB, "total": 1276 * MIB},
        "host_ram": {}, "kv_tokens": 11648, "max_requests": 9,
        "latency_ms": {"decode_floor": 10, "decode_expected": 100, "prefill_floor": 5,
        "prefill_expected": 100},
        "arguments": [{"flag": "", "value": "/models/fake", "why": "the model"},
        {"flag": "--port", "value": "8000", "why": "where"}],
        "environment": [],
        "service": {"timeout_start_s": 20, "timeout_stop_s": 3, "memory_max_bytes": 4096 * MIB,
        "memlock": "default"},
    }  # fmt: skip
    return Plan.model_validate(plan | changes)


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("lowmem.measure.session.IDLE_S", 0.3)
    script = tmp_path / "vllm"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parent / "fake_vllm.py"} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("VLLM_BIN", str(script))
    return script


@pytest.fixture
def deployed(tmp_path: Path, port: int, fake_vllm: Path) -> Path:
    """A folder with plan.json, low_mem.sh and vllm.env as the service role lays it out."""
    plan = make_plan()
    argv = [*plan.argv[:-1], str(port)]
    data = json.loads(plan.model_dump_json())
    data["arguments"][1]["value"] = str(port)
    data["deploy"] = {"model_path": "/models/fake", "served_model_name": "fake", "port": port}
    (tmp_path / "plan.json").write_text(json.dumps(data))
    launcher = tmp_path / "low_mem.sh"
    launcher.write_text(f'#!/bin/sh\nexec "$VLLM_BIN" serve {" ".join(argv)} "$@"\n')
    launcher.chmod(0o755)
    (tmp_path / "vllm.env").write_text("# for the service only\nVLLM_API_KEY=sk-test-1\n")
    (tmp_path / "vllm.env").chmod(0o600)
    return tmp_path
