"""python_env's build script: what makes an environment complete, and what makes it be built again."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from .support import REPOSITORY

LOCK = """\
aiohttp==3.14.5 \\
    --hash=sha256:aa \\
    --hash=sha256:bb
setuptools==84.2.1 ; python_full_version >= '3.12' \\
    --hash=sha256:cc
setuptools-scm==1.0 \\
    --hash=sha256:dd
"""


@pytest.fixture
def build_env(scripts: Callable[[str, str], ModuleType]) -> ModuleType:
    return scripts("python_env", "build_env")


@pytest.fixture
def calls(build_env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ensure() did, with environments that are only folders."""
    done: list[str] = []

    def build(env: Path, spec: dict[str, Any]) -> None:
        done.append("build")
        (env / "bin").mkdir(parents=True, exist_ok=True)
        (env / "bin/python").touch()

    monkeypatch.setattr(build_env, "build", build)
    monkeypatch.setattr(build_env, "install_wheels", lambda env, wheels: done.append("wheels"))
    monkeypatch.setattr(build_env, "works", lambda env: (env / "bin/python").exists())
    return done


def spec(digest: str = "d", wheels: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"stamp": {"digest": digest, "python": "p", "wheels": list(wheels)}, "wheels": list(wheels)}


def test_the_build_tools_of_a_lock_keep_their_hashes(build_env: ModuleType) -> None:
    expected = "setuptools==84.2.1 ; python_full_version >= '3.12' \\\n    --hash=sha256:cc\n"
    assert build_env.select(LOCK, ("setuptools", "wheel")) == expected


def test_a_complete_environment_is_left_alone(
    build_env: ModuleType, calls: list[str], tmp_path: Path
) -> None:
    for _ in range(2):
        build_env.ensure(tmp_path / "env", spec())
    assert calls == ["build"]
    assert json.loads((tmp_path / "env/.complete").read_text(encoding="utf-8")) == spec()["stamp"]


def test_an_interrupted_build_is_begun_again(
    build_env: ModuleType, calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:

        def stop(env: Path, spec: dict[str, Any]) -> None:
            (env / "bin").mkdir(parents=True)
            raise KeyboardInterrupt

        broken.setattr(build_env, "build", stop)
        with pytest.raises(KeyboardInterrupt):
            build_env.ensure(tmp_path / "env", spec())
    assert not (tmp_path / "env/.complete").exists()
    build_env.ensure(tmp_path / "env", spec())
    assert calls == ["build"]


def test_an_environment_whose_python_is_gone_is_built_again(
    build_env: ModuleType, calls: list[str], tmp_path: Path
) -> None:
    build_env.ensure(tmp_path / "env", spec())
    (tmp_path / "env/bin/python").unlink()
    build_env.ensure(tmp_path / "env", spec())
    assert calls == ["build", "build"]


def test_other_local_wheels_make_another_environment_from_the_one_that_is_there(
    build_env: ModuleType, calls: list[str], tmp_path: Path
) -> None:
    build_env.ensure(tmp_path / "env-1", spec(wheels=("1/lowmem-1.whl",)))
    (tmp_path / "env-1/bin/tool").write_text(f"#!{tmp_path}/env-1/bin/python\n")
    (tmp_path / "env-1/bin/tool").chmod(0o755)
    (tmp_path / "env-1/module.py").write_text("x = 1\n")
    build_env.ensure(tmp_path / "env-2", spec(wheels=("2/lowmem-1.whl", "1/plugin-1.whl")))
    assert calls == ["build", "wheels"]
    assert (tmp_path / "env-2/bin/tool").read_text() == f"#!{tmp_path}/env-2/bin/python\n"
    assert (tmp_path / "env-2/bin/tool").stat().st_mode & 0o777 == 0o755
    # the old one is as it was, and its bytes are there once
    assert (tmp_path / "env-1/bin/tool").read_text() == f"#!{tmp_path}/env-1/bin/python\n"
    assert json.loads((tmp_path / "env-1/.complete").read_text()) == spec(wheels=("1/lowmem-1.whl",))["stamp"]
    assert (tmp_path / "env-1/module.py").samefile(tmp_path / "env-2/module.py")
    # a wheel that is no longer wanted cannot be left in
    build_env.ensure(tmp_path / "env-3", spec(wheels=("3/plugin-1.whl",)))
    assert calls == ["build", "wheels", "build"]


@pytest.fixture
def sealed(build_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """sealed(name, digest): an environment of one package, which counts in `built` how often it was built."""

    def build(env: Path, spec: dict[str, Any]) -> None:
        with (tmp_path / "built").open("a") as file:
            file.write(f"{env.name}\n")
        (env / "bin").mkdir(parents=True)
        (env / "bin/python").touch()
        (env / "bin/tool").write_text(f"#!{env}/bin/python\n")
        (env / "pkg/__pycache__").mkdir(parents=True)
        (env / "pkg/a.py").write_text("a = 1\n")
        (env / "pkg/b.so").write_text("b" * 100)
        (env / "lib64").symlink_to("pkg")

    monkeypatch.setattr(build_env, "build", build)
    monkeypatch.setattr(build_env, "install_wheels", lambda env, wheels: None)
    monkeypatch.setattr(build_env, "works", lambda env: (env / "bin/python").exists())

    def make(name: str = "env", *wheels: str) -> Path:
        build_env.ensure(tmp_path / name, spec(wheels=wheels))
        return tmp_path / name

    return make


DAMAGE: dict[str, Callable[[Path], object]] = {
    "pkg/a.py: missing": lambda env: (env / "pkg/a.py").unlink(),
    "pkg/b.so: altered": lambda env: (env / "pkg/b.so").write_text("c" * 100),
    "bin/tool: altered": lambda env: (env / "bin/tool").write_text(""),
    "lib64: missing": lambda env: (env / "lib64").unlink(),
    ".files.json: unreadable (JSONDecodeError)": lambda env: (env / ".files.json").write_text("{"),
    ".files.json: unreadable (AttributeError)": lambda env: (env / ".files.json").write_text("[]"),
}


@pytest.mark.fault("environment-damaged")
@pytest.mark.parametrize("said", DAMAGE)
def test_a_damaged_environment_is_named_and_made_anew(
    said: str,
    sealed: Callable[..., Path],
    build_env: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fault: Any,
) -> None:
    env = sealed()
    (env / "pkg/__pycache__/a.pyc").touch()
    (env / "pkg/later.json").touch()  # what a program adds is no damage
    sealed()
    assert (tmp_path / "built").read_text() == "env\n"
    DAMAGE[said](env)
    assert build_env.stamp_of(env) is None
    sealed()
    assert f"env: {said}\n" in capsys.readouterr().out
    # beside it first, so that it is away for a moment only
    assert (tmp_path / "built").read_text() == "env\n.env.new\n"
    assert (env / "bin/tool").read_text() == f"#!{env}/bin/python\n"
    assert build_env.stamp_of(env) == spec()["stamp"]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["env"]
    fault.saw(f"each named, and the environment made anew beside it: {'; '.join(DAMAGE)}")


def test_a_damaged_environment_gives_its_files_to_no_other(
    sealed: Callable[..., Path], tmp_path: Path
) -> None:
    """Both names of a hard link show what was written to one; a file that was removed is missing in one."""
    first, second = sealed("env-1", "1/lowmem-1.whl"), sealed("env-2", "2/lowmem-1.whl")
    assert (tmp_path / "built").read_text() == "env-1\n"
    (first / "pkg/a.py").unlink()
    sealed("env-1", "1/lowmem-1.whl")
    assert (first / "pkg/a.py").samefile(second / "pkg/a.py")
    (first / "pkg/a.py").write_text("a = 2\n")
    sealed("env-1", "1/lowmem-1.whl")
    assert (tmp_path / "built").read_text() == "env-1\n.env-1.new\n"
    assert (first / "pkg/a.py").read_text() == "a = 1\n"


def test_another_lock_is_another_build(build_env: ModuleType, calls: list[str], tmp_path: Path) -> None:
    build_env.ensure(tmp_path / "env", spec("d"))
    build_env.ensure(tmp_path / "env", spec("e"))
    assert calls == ["build", "build"]


def venv(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    pip = folder / "bin/pip"
    pip.write_text(f"#!{folder}/bin/python3\nimport sys\nprint(sys.prefix)\n")
    pip.chmod(0o755)
    packages = next(folder.glob("lib/*/site-packages"))
    (packages / "pip.py").touch()


def test_an_environment_built_through_a_link_is_whole_while_the_link_is_there(
    build_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As /opt/vllm -> /data/vllm: its scripts name the link. What was made of it names itself; without the
    link it is made again.
    """
    made: list[Path] = []

    def build(env: Path, spec: dict[str, Any]) -> None:
        made.append(env)
        shutil.rmtree(env, ignore_errors=True)
        venv(env)

    monkeypatch.setattr(build_env, "build", build)
    monkeypatch.setattr(build_env, "install_wheels", lambda env, wheels: None)
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    build_env.ensure(tmp_path / "link/env", spec())
    assert (tmp_path / "data/env/bin/pip").read_text().startswith(f"#!{tmp_path}/link/env/bin/")
    build_env.ensure(tmp_path / "data/env-2", spec(wheels=("lowmem-1.whl",)))
    assert len(made) == 1
    (tmp_path / "link").unlink()
    assert (
        subprocess.check_output([tmp_path / "data/env-2/bin/pip"], text=True).strip()
        == f"{tmp_path}/data/env-2"
    )
    build_env.ensure(tmp_path / "data/env", spec())
    assert made == [tmp_path / "link/env", tmp_path / "data/.env.new"]
    assert not (tmp_path / "data/.env.new").exists()
    assert (
        subprocess.check_output([tmp_path / "data/env/bin/pip"], text=True).strip() == f"{tmp_path}/data/env"
    )


def test_scripts_of_a_path_that_is_too_long_for_a_first_line(build_env: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/pip").write_text(
        "#!/bin/sh\n'''exec' /a/long/path/bin/python3.11 \"$0\" \"$@\"\n' '''\nimport sys\n"
    )
    assert build_env.home(tmp_path) == Path("/a/long/path")


def test_it_is_asked_without_being_changed(build_env: ModuleType, calls: list[str], tmp_path: Path) -> None:
    script = REPOSITORY / "roles/python_env/files/build_env.py"
    asked = [sys.executable, str(script), str(tmp_path / "env")]
    beside = {"PYTHONPATH": str(REPOSITORY / "lowmem/checkpoint"), "PYTHONDONTWRITEBYTECODE": "1"}
    assert subprocess.check_output(asked, text=True, env=beside) == "null\n"
    assert list(tmp_path.iterdir()) == []
    venv(tmp_path / "env")
    (tmp_path / "env/.complete").write_text('{"digest": "d"}')
    assert subprocess.check_output(asked, text=True, env=beside) == '{"digest": "d"}\n'


def preflight(*arguments: str) -> str:
    script = REPOSITORY / "roles/python_env/files/preflight.py"
    return subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=False
    ).stderr.strip()


def test_preflight_names_what_is_missing(tmp_path: Path) -> None:
    assert preflight(f"{tmp_path}/env", "1", "[]") == ""
    assert "10000000.0 GiB are needed; free" in preflight(f"{tmp_path}/env", str(10_000_000 * 2**30), "[]")
    assert "the torch lock has hashes for cp399-x86_64: set it to such a Python" in preflight(
        f"{tmp_path}/env", "1", '["cp399-x86_64"]'
    )


def test_every_lock_has_a_hash_for_each_pin_and_no_address() -> None:
    locks = sorted((REPOSITORY / "locks").glob("*.txt"))
    assert len(locks) == 11
    for lock in locks:
        text = lock.read_text(encoding="utf-8")
        pins = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)[1:]
        assert pins, lock
        assert all(re.match(r"\S+==\S+ ", pin) and "--hash=sha256:" in pin for pin in pins), lock
        assert "://" not in "".join(line for line in text.splitlines() if not line.startswith("#")), lock
