"""What the tests of model_source, awq_quantize and python_env share: their scripts as modules, and their
on-host environments.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lowmem.checkpoint import lock, manifest, own_code, seal

from .stub_hub import COMMIT, FILES, StubHub
from .support import HOST, PYTHON, REPOSITORY, include, play


@pytest.fixture(scope="session")
def scripts() -> Iterator[Callable[[str, str], ModuleType]]:
    """scripts(role, name): a script under roles/<role>/files as a module; what it imports of its neighbours
    on the host is lowmem's.
    """
    sys.modules |= {"manifest": manifest, "lock": lock, "own_code": own_code, "seal": seal}
    path = list(sys.path)

    def load(role: str, name: str) -> ModuleType:
        folder = str(REPOSITORY / "roles" / role / "files")
        sys.modules.pop(name, None)
        sys.path.insert(0, folder)
        try:
            return importlib.import_module(name)
        finally:
            sys.path.remove(folder)

    yield load
    sys.path[:] = path
    for name in ("manifest", "lock", "own_code", "seal"):
        del sys.modules[name]


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """environment(name, version, torch): the on-host environment of that lock, the demo's own where it is
    built already.
    """

    def ensure(name: str, version: str, *, torch: bool = True) -> Path:
        variables = {
            "python_env_name": name,
            "python_env_version": version,
            "python_env_lock": str(REPOSITORY / "locks" / f"{name}.txt"),
            "python_env_torch_lock": str(REPOSITORY / "locks/torch-cpu.txt") if torch else "",
            "python_env_root": str(HOST),
            "python_env_python": PYTHON,
        }
        folder = tmp_path_factory.mktemp("environment")
        show = {
            "ansible.builtin.copy": {
                "content": "{{ python_env_paths[python_env_name] }}",
                "dest": str(folder / "path"),
                "mode": "0644",
            }
        }
        done = play(
            [include("python_env"), show], folder, {**variables, "ansible_async_dir": str(HOST / "run/async")}
        )
        assert done.returncode == 0, done.stdout
        return Path((folder / "path").read_text(encoding="utf-8"))

    return ensure


@pytest.fixture(scope="session")
def on_host() -> Callable[..., dict[str, Any]]:
    """on_host(environment, script, *arguments): run a script of tests/quantize/on_host there; what it says on
    stdout is JSON.
    """

    def run(env: Path, script: str, *arguments: str) -> dict[str, Any]:
        done = subprocess.run(
            [str(env / "bin/python"), str(Path(__file__).parent / "on_host" / script), *arguments],
            env={
                **os.environ,
                "PYTHONPATH": ":".join(
                    f"{REPOSITORY}/{folder}"
                    for folder in (
                        "roles/awq_quantize/files",
                        "roles/model_source/files",
                        "lowmem/checkpoint",
                    )
                ),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer

    return run


@pytest.fixture(scope="session")
def downloader(environment: Callable[..., Path]) -> Path:
    return environment("model-source", "1", torch=False)


@pytest.fixture
def hub() -> Iterator[StubHub]:
    stub = StubHub(FILES, COMMIT)
    yield stub
    stub.close()
