"""The release module on real folders: what makes a release, how one is switched to, which are kept."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
Release = Callable[..., dict[str, Any]]


@pytest.fixture
def release(tmp_path: Path) -> Release:
    """release(state, **parameters): the module as Ansible runs it, as a program; its answer, `failed`
    included.
    """

    (tmp_path / "lowmem_root").touch()

    def run(state: str, **parameters: Any) -> dict[str, Any]:
        arguments = {
            "root": str(tmp_path),
            "state": state,
            "_ansible_remote_tmp": str(tmp_path / "tmp"),
            **parameters,
        }
        program = REPOSITORY / "plugins/modules/release.py"
        given = json.dumps({"ANSIBLE_MODULE_ARGS": arguments})
        done = subprocess.run([sys.executable, program, given], capture_output=True, text=True, check=False)
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    return run


def stage(release: Release, root: Path, text: str, **more: Any) -> dict[str, Any]:
    for folder in ("envs/vllm-cpu-1", "models"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    return release(
        "staged",
        name="vllm-0.32.0-demo_cpu",
        files={"low_mem.sh": text, "plan.json": "{}\n"},
        private={"engine.env": "SECRET=of-this-host\n"},
        links={"env": f"{root}/envs/vllm-cpu-1"},
        **more,
    )


def test_a_release_is_whole_and_its_private_file_is_private(release: Release, tmp_path: Path) -> None:
    done = stage(release, tmp_path, "#!/bin/bash\n")
    folder = Path(done["path"])
    assert done["changed"] is True
    assert folder.parent == tmp_path / "releases"
    assert folder.name.startswith("vllm-0.32.0-demo_cpu-")
    assert {
        path.name: oct(path.lstat().st_mode & 0o777) for path in folder.iterdir() if not path.is_symlink()
    } == {
        "low_mem.sh": "0o755",
        "plan.json": "0o644",
        "engine.env": "0o600",
    }
    assert str((folder / "env").readlink()) == f"{tmp_path}/envs/vllm-cpu-1"
    assert "of-this-host" not in json.dumps(done)


def test_the_same_content_is_the_same_release(release: Release, tmp_path: Path) -> None:
    first = stage(release, tmp_path, "one\n")
    assert release("current", id=first["id"])["changed"] is True
    again = stage(release, tmp_path, "one\n")
    assert (again["id"], again["changed"]) == (first["id"], False)
    other = stage(release, tmp_path, "two\n")
    assert other["id"] != first["id"]
    assert [(d["before"], d["after"]) for d in other["diff"]] == [("one\n", "two\n")]


def test_check_mode_makes_nothing(release: Release, tmp_path: Path) -> None:
    done = stage(release, tmp_path, "one\n", _ansible_check_mode=True)
    assert done["changed"] is True
    assert not (tmp_path / "releases").exists()
    assert release("current", id=done["id"], _ansible_check_mode=True)["changed"] is True
    assert not (tmp_path / "current").exists()


def test_a_launcher_that_is_no_bash_makes_no_release(release: Release, tmp_path: Path) -> None:
    done = stage(release, tmp_path, "if\n", validate={"low_mem.sh": ["bash", "-n", "%s"]})
    assert done["failed"] is True
    assert done["msg"].startswith("low_mem.sh is not as it should be: ")
    assert list((tmp_path / "releases").iterdir()) == []


def test_what_a_killed_run_left_is_no_release(release: Release, tmp_path: Path) -> None:
    name = stage(release, tmp_path, "one\n", _ansible_check_mode=True)["id"]
    half = tmp_path / f"releases/.{name}.999"
    half.mkdir(parents=True)
    (half / "low_mem.sh").write_text("on")
    assert [entry["id"] for entry in release("read")["releases"]] == []
    assert stage(release, tmp_path, "one\n")["id"] == name
    assert [path.name for path in (tmp_path / "releases").iterdir()] == [name]


@pytest.mark.fault("current-missing")
@pytest.mark.parametrize("how", ["gone", "to nothing", "a folder"])
def test_a_link_to_the_current_release_that_is_lost(
    how: str, release: Release, tmp_path: Path, fault: Any
) -> None:
    (tmp_path / "etc").mkdir()
    first = stage(release, tmp_path, "one\n")["id"]
    release("current", id=first, shown=["plan.json"])
    release("proven", id=first, environments="vllm")
    current = tmp_path / "current"
    current.unlink()
    if how == "to nothing":
        current.symlink_to("releases/removed-by-hand")
    if how == "a folder":
        current.mkdir()
    seen = release("read")
    # what an upgrade and a rollback go by, and nothing is pruned for a link that names nothing
    assert seen["current"] == ("removed-by-hand" if how == "to nothing" else "")
    assert seen["fallback"] == first
    again = stage(release, tmp_path, "one\n")
    assert (again["id"], again["changed"], again["mended"]) == (first, True, [])
    done = release("current", id=first, shown=["plan.json"])
    if how == "a folder":
        assert done["msg"] == (
            f"{current} is a folder, and this project has a link there: move it away, and run this again"
        )
        current.rmdir()
        done = release("current", id=first, shown=["plan.json"])
    assert (done["changed"], done["current"]) == (True, first)
    assert (tmp_path / "etc/plan.json").read_text() == "{}\n"
    assert [path.name for path in tmp_path.glob(".current*")] == []
    fault.saw(
        "gone, to nothing, or a folder in its place: the next play sets it, or says that a folder is there"
    )


def test_a_damaged_release_is_mended_file_by_file(release: Release, tmp_path: Path) -> None:
    made = stage(release, tmp_path, "one\n")
    folder = Path(made["path"])
    release("proven", id=made["id"], environments="vllm")
    (folder / "receipt.json").write_text("{}")
    (folder / "low_mem.sh").write_text("tw")
    (folder / "engine.env").unlink()
    (folder / "env").unlink()
    assert stage(release, tmp_path, "one\n", _ansible_check_mode=True)["mended"] == [
        "low_mem.sh",
        "engine.env",
        "env",
    ]
    assert not (folder / "env").is_symlink()
    again = stage(release, tmp_path, "one\n")
    assert (again["changed"], again["mended"]) == (True, ["low_mem.sh", "engine.env", "env"])
    assert (folder / "low_mem.sh").read_text() == "one\n"
    assert ((folder / "engine.env").stat().st_mode & 0o777, (folder / "env").exists()) == (0o600, True)
    assert ((folder / "receipt.json").read_text(), (folder / ".proven").exists()) == ("{}", True)
    assert [path.name for path in (tmp_path / "releases").iterdir()] == [made["id"]]


def test_the_switch_is_a_rename_and_shows_the_files_in_etc(release: Release, tmp_path: Path) -> None:
    first, second = (stage(release, tmp_path, text)["id"] for text in ("one\n", "two\n"))
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/plan.json").write_text("of a deployment before there were releases")
    for name in (first, second):
        release("current", id=name, shown=["plan.json"])
        assert (tmp_path / "current").resolve().name == name
    assert str((tmp_path / "etc/plan.json").readlink()) == "../current/plan.json"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_an_unknown_release_is_refused_by_name(release: Release, tmp_path: Path) -> None:
    known = stage(release, tmp_path, "one\n")["id"]
    done = release("current", id="no-such")
    assert done["msg"] == f"there is no release no-such on this host; there are: {known}"
    assert not (tmp_path / "current").exists()


def test_what_runs_is_asked_of_the_process(release: Release, tmp_path: Path) -> None:
    name = stage(release, tmp_path, "one\n")["id"]
    release("current", id=name)
    assert release("current", id=name)["changed"] is True, "nothing runs: there is something to start"
    environment = {**os.environ, "LOWMEM_RELEASE": f"{tmp_path}/releases/{name}"}
    with subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)", "serve"], env=environment
    ) as server:
        deadline = time.monotonic() + 20
        while release("read")["running"] != [name]:
            assert time.monotonic() < deadline
        assert release("current", id=name)["changed"] is False
        server.kill()


def test_the_last_proven_one_is_what_is_gone_back_to(release: Release, tmp_path: Path) -> None:
    first, second, third = (stage(release, tmp_path, text)["id"] for text in ("1\n", "2\n", "3\n"))
    assert release("read", id=third)["fallback"] == ""
    for name in (first, second):
        release("current", id=name)
        assert release("proven", id=name, environments="vllm-cpu")["changed"] is True
        assert release("proven", id=name, environments="vllm-cpu")["changed"] is False
        time.sleep(0.02)
    assert release("read", id=third)["fallback"] == second
    assert release("refuted", id=second)["changed"] is True
    assert release("read", id=third)["fallback"] == first


def kept_checkpoint(root: Path, text: str) -> Path:
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    folder = root / f"models/m-{digest}"
    folder.mkdir(parents=True)
    (root / f"models/m-{digest}.manifest.json").write_text(text)
    return folder


def test_old_releases_go_with_what_only_they_name(release: Release, tmp_path: Path) -> None:
    names = []
    for number in range(5):
        environment = tmp_path / f"envs/vllm-cpu-{number}"
        environment.mkdir(parents=True)
        model = kept_checkpoint(tmp_path, f"manifest {number}")
        done = release(
            "staged",
            name="r",
            files={"low_mem.sh": str(number)},
            links={"env": str(environment), "model": str(model)},
        )
        names.append(done["id"])
        release("current", id=done["id"])
        release("proven", id=done["id"], environments="vllm-cpu", keep=3)
        time.sleep(0.02)
    # what is nobody's to remove: another role's environment, the site's own checkpoints
    for other in ("envs/autoawq-cpu-1", "models/m", "models/someones-0123456789ab"):
        (tmp_path / other).mkdir()
    release("refuted", id=names[4])
    release("proven", id=names[4], environments="vllm-cpu", keep=3)
    assert sorted(path.name for path in (tmp_path / "releases").iterdir()) == sorted(names[2:])
    assert sorted(path.name for path in (tmp_path / "envs").iterdir()) == [
        "autoawq-cpu-1",
        "vllm-cpu-2",
        "vllm-cpu-3",
        "vllm-cpu-4",
    ]
    digests = {hashlib.sha256(f"manifest {number}".encode()).hexdigest()[:12] for number in (2, 3, 4)}
    kept = {path.name for path in (tmp_path / "models").iterdir() if path.is_dir()}
    assert kept == {"m", "someones-0123456789ab", *(f"m-{digest}" for digest in digests)}
    assert len(list((tmp_path / "models").glob("*.manifest.json"))) == 3


def test_the_current_and_the_one_to_go_back_to_stay_whatever_the_number(
    release: Release, tmp_path: Path
) -> None:
    old, tried, served = (stage(release, tmp_path, text)["id"] for text in ("1\n", "2\n", "3\n"))
    release("current", id=old)
    release("proven", id=old, environments="vllm-cpu")
    release("current", id=served)
    release("proven", id=served, environments="vllm-cpu", keep=1)
    assert sorted(path.name for path in (tmp_path / "releases").iterdir()) == sorted([old, served])
    assert tried not in {old, served}


def test_nothing_behind_a_link_is_removed(release: Release, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    (shared / "vllm-cpu-9").mkdir(parents=True)
    (tmp_path / "host").mkdir()
    (tmp_path / "host/envs").symlink_to(shared)
    root = str(tmp_path / "host")
    done = release("staged", root=root, name="r", files={"low_mem.sh": "1"})
    release("current", root=root, id=done["id"])
    release("proven", root=root, id=done["id"], environments="vllm-cpu")
    assert (shared / "vllm-cpu-9").is_dir()
