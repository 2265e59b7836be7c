"""The checks of a deployed host can fail: each is run against a healthy deployment, then against one with
that one thing broken.

The deployment is a folder laid out as the service role does it, with a stand-in for vLLM; `make demo` runs
the same checks against a real one.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lowmem.measure.receipt import read_checks
from lowmem.schema import LoadResult, Percentiles, Plan, Receipt, Term

from .conftest import MIB, make_plan

REPOSITORY = Path(__file__).parents[2]
LAYERS = 2
STUB_PARSER = """
import argparse
def make_arg_parser(parser):
    parser.add_argument("model_tag")
    for flag in ("--served-model-name", "--host", "--port", "--max-model-len"):
        parser.add_argument(flag)
    return parser
def validate_parsed_serve_args(arguments):
    pass
"""


def write_model(folder: Path) -> int:
    """A quantized checkpoint of two blocks, small and well-formed; returns the bytes of its tensors."""
    folder.mkdir(parents=True)
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
    (folder / "config.json").write_text(
        json.dumps({"num_hidden_layers": LAYERS, "quantization_config": quantization})
    )
    header: dict[str, Any] = {}
    end = 0
    for layer in range(LAYERS):
        for name in (
            "self_attn.q",
            "self_attn.k",
            "self_attn.v",
            "self_attn.o",
            "mlp.gate",
            "mlp.up",
            "mlp.down",
        ):
            for part, dtype, shape in (
                ("qweight", "I32", [128, 8]),
                ("qzeros", "I32", [2, 8]),
                ("scales", "F16", [2, 64]),
            ):
                size = shape[0] * shape[1] * (4 if dtype == "I32" else 2)
                header[f"model.layers.{layer}.{name}_proj.{part}"] = {
                    "dtype": dtype,
                    "shape": shape,
                    "data_offsets": [end, end + size],
                }
                end += size
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    for path in folder.iterdir():
        path.chmod(0o644)
    entries = [
        {"path": p.name, "size_bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in folder.iterdir()
    ]
    (folder.parent / f"{folder.name}.manifest.json").write_text(
        json.dumps({"schema": 1, "name": folder.name, "files": entries})
    )
    return end


def same(value: float) -> Percentiles:
    return Percentiles(mean=value, p50=value, p90=value, p99=value)


def write_measurement(
    root: Path, plan: Plan, peak_mib: int = 1500, tpot_ms: float = 90, failed: int = 0, kv_tokens: int = 11648
) -> None:
    load = LoadResult(
        load=plan.load, requests=8, failed=failed, duration_s=10, request_throughput_per_s=0.8,
        output_tokens_per_s=9,
        ttft_ms=same(900), tpot_ms=same(tpot_ms), itl_ms=same(tpot_ms), e2e_ms=same(2500),
    )  # fmt: skip
    receipt = Receipt(
        created_utc="2026-11-22T20:00:00Z", plan=plan, versions={}, hardware={}, argv=(), ready_s=None,
        loads=(load,), verdict="passed",
        terms=(Term(name="peak", planned_bytes=None, measured_bytes=1, source=""),),
        engine_values={"kv_tokens": (float(kv_tokens),)},
        memory_before_bytes=(0,), memory_idle_bytes=(1,), memory_peak_bytes=(peak_mib * MIB,),
    )  # fmt: skip
    (root / "run" / "measured.json").write_text(receipt.model_dump_json())


class Host:
    """A deployed folder, its server, and the checks run against them."""

    def __init__(self, root: Path, port: int) -> None:
        self.root = root
        self.port = port
        for name, mode in (
            ("etc", 0o755),
            ("log", 0o700),
            ("run", 0o700),
            ("cache", 0o700),
            ("env/bin", 0o755),
        ):
            (root / name).mkdir(parents=True)
            (root / name).chmod(mode)
        (root / "current").symlink_to("etc")
        (root / "current/env").symlink_to(root / "env")
        arguments = [
            ("", str(root / "models" / "m")),
            ("--served-model-name", "fake"),
            ("--host", "127.0.0.1"),
        ]
        arguments += [("--port", str(port)), ("--max-model-len", "2048")]
        self.plan = make_plan(
            weight_bytes=write_model(root / "models" / "m"),
            arguments=[{"flag": flag, "value": value, "why": "a test"} for flag, value in arguments],
            deploy={
                "model_path": str(root / "models" / "m"),
                "served_model_name": "fake",
                "host": "127.0.0.1",
                "port": port,
            },
        )
        self.write("etc/plan.json", self.plan.model_dump_json(), 0o644)
        self.write("etc/low_mem.sh", self.launcher(self.plan.argv), 0o755)
        self.write("etc/vllm.env", "VLLM_API_KEY=sk-0123456789abcdef\n", 0o600)
        self.write("etc/supervisord.conf", "", 0o600)
        self.write("log/vllm.log", "ready\n", 0o600)
        self.stand_ins()
        write_measurement(root, self.plan)
        self.server: subprocess.Popen[bytes] | None = None

    def write(self, name: str, text: str, mode: int = 0o644) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    def launcher(self, argv: list[str]) -> str:
        return f'#!/bin/bash\nexec "${{VLLM_BIN:-{self.root}/env/bin/vllm}}" serve {" ".join(argv)} "$@"\n'

    def stand_ins(self) -> None:
        site = self.root / "site"
        self.write(
            "site/vllm-0.32.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n"
        )
        self.write("site/vllm/entrypoints/launchers/cli_args.py", STUB_PARSER)
        self.write(
            "site/vllm/utils/argparse_utils.py",
            "from argparse import ArgumentParser as FlexibleArgumentParser\n",
        )
        self.write("env/bin/python", f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} "$@"\n', 0o755)
        self.write(
            "env/bin/vllm",
            f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parent / "fake_vllm.py"} "$@"\n',
            0o755,
        )
        self.write(
            "env/bin/supervisorctl",
            "#!/bin/sh\necho 'vllm                             RUNNING   pid 1, uptime 0:01:00'\n",
            0o755,
        )

    def start(self, **settings: Any) -> None:
        # backwards: the key itself is in no environment, as on a real host
        settings = {"key": "sk-0123456789abcdef"[::-1], **settings}
        environment = os.environ | {"FAKE_VLLM": json.dumps(settings)}
        launcher = [str(self.root / "etc" / "low_mem.sh")]
        self.server = subprocess.Popen(launcher, env=environment, stdout=subprocess.DEVNULL)
        for _ in range(100):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v1/models", timeout=5).close()
            except urllib.error.HTTPError:
                return
            except OSError:
                time.sleep(0.1)
            else:
                return
        raise RuntimeError("the stand-in does not listen")

    def stop(self) -> None:
        if self.server is not None:
            self.server.terminate()
            self.server.wait(10)

    def failed(self, suite: str, *more: str) -> list[str]:
        """Names of the checks of this suite (a file of checks/, or empty for all) that fail."""
        xml = self.root / "checks.xml"
        command = [
            sys.executable, "-m", "pytest", f"checks/test_{suite}.py" if suite else "checks", "-q", "--hosts=local://",
            f"--lowmem-root={self.root}", f"--measurement={self.root / 'run' / 'measured.json'}",
            f"--junitxml={xml}", *more,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert done.returncode in (0, 1), done.stdout + done.stderr
        return sorted(name for name, check in read_checks(xml).items() if check["outcome"] == "failed")


@pytest.fixture
def host(tmp_path: Path, port: int) -> Iterator[Host]:
    deployed = Host(tmp_path / "host", port)
    yield deployed
    deployed.stop()


def change_plan(host: Host, **changes: Any) -> None:
    host.plan = Plan.model_validate(host.plan.model_dump() | changes)
    host.write("etc/plan.json", host.plan.model_dump_json())


def alter_a_shard(host: Host) -> None:
    path = host.root / "models" / "m" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit_config(host: Host, **changes: Any) -> None:
    path = host.root / "models" / "m" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


def test_a_healthy_deployment_fails_no_check(host: Host) -> None:
    host.start()
    assert host.failed("", "--leave-running") == []


SWAP_SPACE = {"flag": "--swap-space", "value": "20", "why": "the article"}
PARSER = {"flag": "--tool-call-parser", "value": "hermes", "why": "a test"}
MANIFEST = "model: every file is the manifests"
FATAL = "#!/bin/sh\necho 'vllm   FATAL   Exited too quickly'\n"
OLD_VLLM = "Metadata-Version: 2.1\nName: vllm\nVersion: 0.31.0\n"

BROKEN: dict[str, tuple[str, Callable[[Host], object], list[str]]] = {
    "one byte of a shard": ("model", alter_a_shard, [MANIFEST]),
    "a file too many": ("model", lambda h: h.write("models/m/old.json", "{}"), [MANIFEST]),
    "another group size": (
        "model",
        lambda h: edit_config(h, group_size=128),
        [MANIFEST, "model: quantization is the planned one"],
    ),
    "other sizes than planned": (
        "model",
        lambda h: change_plan(h, weight_bytes=1),
        ["model: tensor bytes are the plans"],
    ),
    "an argument too many": (
        "launcher",
        lambda h: h.write("etc/low_mem.sh", h.launcher([*h.plan.argv, "--enforce-eager"]), 0o755),
        ["launcher: arguments are the plans"],
    ),
    "a flag vLLM does not have": (
        "launcher",
        lambda h: change_plan(h, arguments=[*h.plan.model_dump()["arguments"], SWAP_SPACE]),
        [
            "launcher: arguments are the plans",
            "launcher: the installed vllm takes the arguments",
            "launcher: the running process has the plans arguments",
        ],
    ),
    "a readable key": (
        "service",
        lambda h: (h.root / "etc" / "vllm.env").chmod(0o644),
        ["service: modes (etc/vllm.env, 0o600)"],
    ),
    "a writable model": (
        "service",
        lambda h: (h.root / "models" / "m" / "config.json").chmod(0o666),
        ["service: the model is readable by the service and writable by its owner only"],
    ),
    "the key in the environment": (
        "service",
        lambda h: (h.stop(), h.start(leak="VLLM_API_KEY=sk-0123456789abcdef")),
        ["service: the key is in no environment"],
    ),
    "the key in the log": (
        "service",
        lambda h: h.write("log/vllm.log", "sk-0123456789abcdef"),
        ["service: the log has no key"],
    ),
    "a parser that finds no call": (
        "options",
        lambda h: change_plan(h, arguments=[*h.plan.model_dump()["arguments"], PARSER]),
        ["options: a tool is called (named)", "options: a tool is called (required)"],
    ),
    "a stopped service": (
        "service",
        lambda h: h.write("env/bin/supervisorctl", FATAL, 0o755),
        ["service: the manager says it runs"],
    ),
    "too much memory": (
        "memory",
        lambda h: write_measurement(h.root, h.plan, peak_mib=2049),
        ["memory: peak is within the limit"],
    ),
    "too small a pool": (
        "memory",
        lambda h: write_measurement(h.root, h.plan, kv_tokens=11000),
        ["memory: the kv pool holds the planned tokens"],
    ),
    "too slow": ("latency", lambda h: write_measurement(h.root, h.plan, tpot_ms=201), ["latency: tpot p99"]),
    "failed requests": (
        "latency",
        lambda h: write_measurement(h.root, h.plan, failed=1),
        ["latency: no request failed"],
    ),
    "another vLLM": (
        "host",
        lambda h: h.write("site/vllm-0.32.0.dist-info/METADATA", OLD_VLLM),
        ["host: environment has the planned vllm"],
    ),
    "more RAM than there is": (
        "host",
        lambda h: change_plan(h, host_ram={"pinned_offload": 2**60}),
        ["host: ram holds what the plan asks of the host"],
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_on_the_host_is_named(host: Host, what: str) -> None:
    suite, break_it, expected = BROKEN[what]
    if suite in ("launcher", "service", "host"):
        host.start()
    break_it(host)
    assert host.failed(suite, "--leave-running") == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"open": True},
            [
                "endpoint: without the key nothing is answered (None)",
                "endpoint: without the key nothing is answered (wrong-key)",
            ],
        ),
        ({"oversize": 500}, ["endpoint: an oversize request is a clear refusal"]),
        ({"logprob": -9.0}, ["endpoint: the model knows english"]),
        ({"text": ""}, ["endpoint: chat", "endpoint: completion"]),
    ],
)
def test_a_server_that_answers_wrongly_is_named(
    host: Host, settings: dict[str, Any], expected: list[str]
) -> None:
    host.start(**settings)
    assert host.failed("endpoint") == expected


def test_a_wrong_key_in_the_environment_file_is_noticed(host: Host) -> None:
    host.start()
    host.write("etc/vllm.env", "VLLM_API_KEY=sk-another-key\n", 0o600)
    assert "endpoint: models lists the served name" in host.failed("endpoint")


def test_a_service_that_stays_dead_is_noticed(host: Host) -> None:
    change_plan(host, service=host.plan.service.model_dump() | {"timeout_start_s": 3})
    host.start()
    assert host.failed("service") == ["service: it answers again after its engine was killed"]
