"""A store that several deployments share: what no release of any of them names goes, and nothing else ever
does.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
MODULE = REPOSITORY / "plugins/modules/release.py"
# The module's own `time.time` an hour and a minute ahead: what is made in a test is old enough to go.
LATER = f"""
import runpy, time
now = time.time
time.time = lambda: now() + 3660
runpy.run_path({str(MODULE)!r}, run_name="__main__")
"""
Deploy = Callable[..., dict[str, Any]]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "store/envs").mkdir(parents=True)
    (tmp_path / "store/models").mkdir()
    (tmp_path / "store/lowmem_root").touch()
    return tmp_path / "store"


@pytest.fixture
def release(tmp_path: Path, store: Path) -> Deploy:
    """release(instance, state, **parameters): the module for the deployment in <tmp_path>/<instance>."""

    def run(instance: str, state: str, early: bool = False, **parameters: Any) -> dict[str, Any]:
        if state != "left":
            (tmp_path / instance).mkdir(exist_ok=True)
            (tmp_path / instance / "lowmem_root").touch()
        given = {
            "root": str(tmp_path / instance),
            "store": str(store),
            "state": state,
            "_ansible_remote_tmp": str(tmp_path / "tmp"),
        }
        program = [MODULE] if early else ["-c", LATER]
        done = subprocess.run(
            [sys.executable, *program, json.dumps({"ANSIBLE_MODULE_ARGS": {**given, **parameters}})],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    return run


def environment(store: Path, name: str) -> Path:
    path = store / "envs" / name
    path.mkdir(exist_ok=True)
    return path


def checkpoint(store: Path, text: str) -> Path:
    path = store / f"models/m-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    path.mkdir(exist_ok=True)
    path.with_name(f"{path.name}.manifest.json").write_text(text)
    return path


def deployed(release: Deploy, instance: str, env: Path, model: Path, **more: Any) -> dict[str, Any]:
    """As the role does it: staged, current, proven; what the last one said."""
    links = {"env": str(env), "model": str(model)}
    name = release(instance, "staged", name="r", files={"low_mem.sh": f"{env} {model}\n"}, links=links)["id"]
    release(instance, "current", id=name)
    return release(instance, "proven", id=name, environments="vllm-cpu", keep=2, **more)


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir()}


def test_what_no_release_of_any_deployment_names_goes(release: Deploy, store: Path) -> None:
    models = [checkpoint(store, "manifest 0")]
    # nobody's to remove: another role's environment, the model under its own name, a checkpoint of the site's
    for other in ("envs/autoawq-cpu-1", "models/m", "models/someones-0123456789ab"):
        (store / other).mkdir()
    deployed(release, "second", environment(store, "vllm-cpu-0"), models[0])
    for n in (1, 2, 3):
        models.append(checkpoint(store, f"manifest {n}"))
        said = deployed(release, "main", environment(store, f"vllm-cpu-{n}"), models[n])
    # keep=2: 3 is served, 2 is gone back to, 1 is pruned; 0 is the second's
    assert left_in(store / "envs") == {"vllm-cpu-0", "vllm-cpu-2", "vllm-cpu-3", "autoawq-cpu-1"}
    assert left_in(store / "models") == {
        models[0].name,
        models[2].name,
        models[3].name,
        "m",
        "someones-0123456789ab",
    }
    assert {Path(path).name for path in said["removed"]} >= {"vllm-cpu-1", models[1].name}
    assert len(list((store / "models").glob("*.manifest.json"))) == 3
    assert {entry.name for entry in (store / "roots").iterdir()} == {
        f"{platform.node()}:{str(store.parent / name).strip('/').replace('/', '-')}"
        for name in ("main", "second")
    }


def test_a_release_of_another_that_is_staged_and_not_served_yet_keeps_what_it_names(
    release: Deploy, store: Path
) -> None:
    env, model = environment(store, "vllm-cpu-1"), checkpoint(store, "one")
    deployed(release, "second", env, model)
    new = environment(store, "vllm-cpu-2")
    release(
        "second",
        "staged",
        name="r",
        files={"low_mem.sh": "next\n"},
        links={"env": str(new), "model": str(model)},
    )
    deployed(release, "main", environment(store, "vllm-cpu-3"), model)
    assert left_in(store / "envs") == {"vllm-cpu-1", "vllm-cpu-2", "vllm-cpu-3"}


def test_what_was_made_within_the_hour_stays(release: Deploy, store: Path) -> None:
    """A play of another deployment may have made it, for a release that it has not staged yet."""
    young = environment(store, "vllm-cpu-2")
    said = deployed(release, "main", environment(store, "vllm-cpu-1"), checkpoint(store, "one"), early=True)
    assert said["removed"] == []
    assert young.is_dir()


@pytest.mark.parametrize("why", ["its root is not there", "it is another machine's"])
def test_nothing_goes_while_a_deployment_cannot_be_looked_at(release: Deploy, store: Path, why: str) -> None:
    old = environment(store, "vllm-cpu-0")
    (store / "roots").mkdir()
    entry = f"{platform.node()}:gone" if why == "its root is not there" else "other-host:opt-vllm-lowmem"
    (store / "roots" / entry).symlink_to(
        store.parent / "gone" if why == "its root is not there" else store.parent / "main"
    )
    said = deployed(release, "main", environment(store, "vllm-cpu-1"), checkpoint(store, "one"))
    assert (said["unseen"], said["removed"]) == ([entry], [])
    assert old.is_dir()


def test_check_mode_removes_nothing_and_says_what_would_go(release: Deploy, store: Path) -> None:
    model = checkpoint(store, "one")
    name = deployed(release, "main", environment(store, "vllm-cpu-1"), model)["releases"][0]["id"]
    old = environment(store, "vllm-cpu-0")
    said = release("main", "proven", id=name, environments="vllm-cpu", _ansible_check_mode=True)
    assert (said["changed"], said["removed"]) == (True, [str(old)])
    assert old.is_dir()


def test_what_the_store_has_by_a_link_stays(release: Deploy, store: Path) -> None:
    (store / "envs").rename(store.parent / "elsewhere")
    (store / "envs").symlink_to(store.parent / "elsewhere")
    environment(store, "vllm-cpu-0")
    deployed(release, "main", environment(store, "vllm-cpu-1"), checkpoint(store, "one"))
    assert left_in(store / "envs") == {"vllm-cpu-0", "vllm-cpu-1"}


def test_a_deployment_that_is_reset_leaves_the_store_and_takes_its_own_along(
    release: Deploy, store: Path
) -> None:
    model = checkpoint(store, "one")
    deployed(release, "second", environment(store, "vllm-cpu-1"), model)
    deployed(release, "main", environment(store, "vllm-cpu-2"), model)
    assert release("main", "left", environments="vllm")["msg"].endswith(
        "still has releases: a root leaves its store when it has none"
    )
    subprocess.run(["rm", "-r", str(store.parent / "main")], check=True)
    said = release("main", "left", environments="vllm")
    assert (said["changed"], said["removed"]) == (True, [str(store / "envs/vllm-cpu-2")])
    assert len(list((store / "roots").iterdir())) == 1
    assert release("main", "left", environments="vllm")["changed"] is False
    subprocess.run(["rm", "-r", str(store.parent / "second")], check=True)
    release("second", "left", environments="vllm")
    assert (left_in(store / "envs"), left_in(store / "models"), (store / "roots").exists()) == (
        set(),
        set(),
        False,
    )


def test_a_release_whose_environment_was_removed_meanwhile_is_not_made(release: Deploy, store: Path) -> None:
    gone = store / "envs/vllm-cpu-1"
    said = release("main", "staged", name="r", files={"low_mem.sh": "x\n"}, links={"env": str(gone)})
    assert (
        said["msg"]
        == f"{gone} is not there any more: another play has removed it meanwhile; run this one again"
    )
    assert not list((store.parent / "main/releases").glob("*"))
