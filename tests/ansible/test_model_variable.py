"""`lowmem_model` alone chooses the model, and the inventory's limits and load reach the plan.

Each case is a host, so that one run of preflight serves all. The hub is a stub on loopback.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ..conftest import run_playbook
from ..quantize.stub_hub import COMMIT, StubHub
from ..quantize.test_hub_card import CONFIG, safetensors
from .test_wrong_inventories import GOOD, REFUSALS

KNOBS = {"max_model_len": 1024}
SMALL = {"lowmem_overrides": KNOBS}


def write(folder: Path, config: dict[str, Any] = CONFIG, *, lacking: int = 0) -> str:
    """Write a checkpoint, and leave out so many bytes of its end."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    content = safetensors()
    (folder / "model.safetensors").write_bytes(content[: len(content) - lacking])
    return str(folder)


def cases(folder: Path, endpoint: str) -> dict[str, dict[str, Any]]:
    """Return host -> its variables, beside those of a good one."""
    tiny, there = write(folder / "tiny"), {"model_source_endpoint": endpoint}
    quantized = {**CONFIG, "quantization_config": {"quant_method": "fp8"}}
    return {
        "path": {"lowmem_model": tiny, **SMALL},
        "hub": {"lowmem_model": f"owner/name@{COMMIT}", **SMALL, **there},
        "newest": {"lowmem_model": "owner/name", **SMALL, **there},
        "said": {
            "lowmem_model": tiny,
            "lowmem_source_model": "mine",
            "lowmem_served_model_name": "a/b",
            "lowmem_quantize": True,
            **SMALL,
        },
        "goals": {
            "lowmem_memory_limit": "4 GB",
            "lowmem_latency_limits": {"tpot_ms": 900},
            "lowmem_load": {"clients": 4, "input_tokens": 64, "output_tokens": 16},
        },
        "nowhere": {"lowmem_model": str(folder / "nowhere"), **SMALL},
        "cut": {"lowmem_model": write(folder / "cut", lacking=100), **SMALL},
        "twice": {"lowmem_model": write(folder / "twice", quantized), "lowmem_quantize": True, **SMALL},
        "other": {"model_source_type": "local", "model_source_path": tiny},
        "others": {
            "lowmem_model": tiny,
            "model_source_type": "huggingface",
            "model_source_repository": "owner/name",
            "model_source_revision": "nosuch",
            **SMALL,
            **there,
        },
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("m")


@pytest.fixture(scope="module")
def played(folder: Path) -> dict[str, dict[str, Any]]:
    """Return host -> the plan, its problems, and what the host would be asked for."""
    files = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": safetensors()}
    hub = StubHub(files, COMMIT)
    shared = GOOD | {"lowmem_root": str(folder / "root")}
    inventory = folder / "hosts.json"
    inventory.write_text(json.dumps({"vllm": {"hosts": cases(folder, hub.endpoint), "vars": shared}}))
    try:
        done = run_playbook(
            "-i",
            str(inventory),
            "playbooks/preflight.yml",
            environment={
                "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
                "HF_ENDPOINT": hub.endpoint,
                "HF_HOME": str(folder / "home"),
            },
        )
    finally:
        hub.close()
    assert "Traceback" not in done.text
    assert not (folder / "root").exists()
    seen: dict[str, dict[str, Any]] = {}
    report = json.JSONDecoder().raw_decode(done.text[done.text.index("{\n") :])[0]
    for play in report["plays"]:
        for task in play["tasks"]:
            for host, result in task["hosts"].items():
                mine = seen.setdefault(host, {})
                if task["task"]["name"].endswith("Plan the deployment"):
                    mine["plan"] = result.get("plan")
                elif task["task"]["name"].startswith("model_source : Ask whether the model can be fetched"):
                    mine["source"] = json.loads(result["cmd"][3])["source"]
                    mine["name"] = json.loads(result["cmd"][3])["name"]
                elif task["task"]["name"].startswith("model_source : Report the commit"):
                    mine["commit"] = result.get("msg")
                elif task["task"]["name"] in REFUSALS:
                    mine["refused"] = result["msg"].splitlines() if result.get("failed") else []
    return seen


@pytest.mark.parametrize("host", ["path", "hub", "newest", "said", "goals"])
def test_a_model_is_planned_without_a_word_more(played: dict[str, Any], host: str) -> None:
    assert played[host]["refused"] == []
    assert played[host]["plan"]["verdict"] != "impossible"


@pytest.mark.parametrize(
    ("host", "source"),
    [
        ("path", {"type": "local", "path": "{folder}/tiny"}),
        ("hub", {"type": "huggingface", "repository": "owner/name", "revision": COMMIT}),
        ("newest", {"type": "huggingface", "repository": "owner/name", "revision": ""}),
    ],
)
def test_the_source_follows_from_the_model(
    played: dict[str, Any], folder: Path, host: str, source: dict[str, str]
) -> None:
    asked = {name: value for name, value in played[host]["source"].items() if name != "patterns"}
    assert asked == {name: value.format(folder=folder) for name, value in source.items()}


@pytest.mark.parametrize(
    ("host", "folder_name", "served", "method"),
    [
        ("goals", "SmolLM2-135M-Instruct-awq", "SmolLM2-135M-Instruct", "awq"),
        ("path", "tiny", "tiny", "none"),
        ("hub", "name", "name", "none"),
        ("said", "mine-awq", "a/b", "awq"),
    ],
)
def test_names_and_quantization_follow_from_the_model(
    played: dict[str, Any], folder: Path, host: str, folder_name: str, served: str, method: str
) -> None:
    plan = played[host]["plan"]
    assert plan["deploy"]["model_path"] == f"{folder}/root/models/{folder_name}"
    assert plan["deploy"]["served_model_name"] == served
    assert plan["quantization"]["method"] == method


def test_a_repository_without_a_commit_is_told_which_one_it_is(played: dict[str, Any]) -> None:
    assert played["newest"]["commit"].endswith(f"lowmem_model: owner/name@{COMMIT}")
    assert "commit" not in str(played["hub"]["commit"])


def test_limits_and_load_reach_the_plan(played: dict[str, Any]) -> None:
    plan = played["goals"]["plan"]
    assert plan["limits"] == {"memory_bytes": 4_000_000_000, "tpot_p99_ms": 900, "ttft_p99_ms": 120_000}
    assert {name: plan["load"][name] for name in ("clients", "input_tokens", "output_tokens")} == {
        "clients": 4,
        "input_tokens": 64,
        "output_tokens": 16,
    }


@pytest.mark.parametrize(
    ("host", "said"),
    [
        (
            "nowhere",
            "lowmem_model is {folder}/nowhere: neither the host nor the controller has a checkpoint there"
            " (config.json and *.safetensors are needed); correct the path, or mount the folder",
        ),
        (
            "cut",
            "lowmem_model is {folder}/cut: {folder}/cut/model.safetensors is 182952 bytes, its header speaks"
            " of 183052; the download is incomplete",
        ),
        (
            "twice",
            "lowmem_quantize is true, and {folder}/twice is quantized already (fp8, 8 bits): set"
            " lowmem_quantize: false, or name a model in 16 bits.",
        ),
        (
            "other",
            "lowmem_model: the plan is for smollm2-135m, and {folder}/tiny is another model: layers 2"
            " (planned: 30), hidden_size 64 (planned: 576), intermediate_size 128 (planned: 1536), heads 4"
            " (planned: 9), kv_heads 2 (planned: 3), head_dim 16 (planned: 64), vocab_size 256 (planned:"
            " 49152). Plan what is fetched (lowmem_model), or fetch what is planned (model_source_*,"
            " lowmem_quantize).",
        ),
        ("others", "owner/name at nosuch: "),
    ],
)
def test_a_model_that_cannot_be_is_one_line(
    played: dict[str, Any], folder: Path, host: str, said: str
) -> None:
    assert len(played[host]["refused"]) == 1, played[host]["refused"]
    assert played[host]["refused"][0].startswith(said.format(folder=folder))
