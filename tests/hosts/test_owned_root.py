"""Nothing is removed from, or deployed into, a folder that is not this project's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT, load

MODULE = ROOT / "plugins/modules/owned_root.py"


@pytest.fixture(scope="module")
def owned_root():
    return load(MODULE)


def call(root, state, check=False):
    words = {"ANSIBLE_MODULE_ARGS": {"root": str(root), "state": state, "_ansible_check_mode": check}}
    done = subprocess.run(
        [sys.executable, MODULE],
        input=json.dumps(words),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return json.loads(done.stdout)


SYSTEM_FOLDERS = (
    "/", "/usr", "/usr/", "//usr", "/usr/local", "/usr/local/lib", "/usr/share", "/var", "/var/lib", "/etc",
    "/etc/x", "/home", "/opt", "/opt/.", "/root", "/srv", "/tmp", "/run", "/boot/x", "/proc/1", "/dev/shm",
)  # fmt: skip


@pytest.mark.parametrize("state", ["free", "made", "owned"])
@pytest.mark.parametrize("root", SYSTEM_FOLDERS)
def test_a_folder_of_the_system_is_no_root(owned_root, root, state):
    assert "is a folder of the system" in owned_root.refusal(Path(root), state)


@pytest.mark.parametrize(
    "root", ["/opt/vllm-lowmem", "/srv/vllm", "/var/lib/vllm-lowmem", "/home/ops/x/.lowmem/host"]
)
def test_a_folder_of_its_own_is_a_root(owned_root, root):
    assert [owned_root.refusal(Path(root), state) for state in ("free", "made", "owned")] == ["", "", ""]


def test_a_link_to_a_folder_of_the_system_is_no_root(owned_root, tmp_path):
    (tmp_path / "root").symlink_to("/usr/local")
    assert "is a folder of the system" in owned_root.refusal(tmp_path / "root", "owned")


def test_a_store_is_refused_by_its_own_name(owned_root, tmp_path):
    (tmp_path / "own.txt").touch()
    said = owned_root.refusal(tmp_path, "free", "lowmem_store")
    assert said.startswith(f"lowmem_store {tmp_path} holds what is not this project's (own.txt): choose")


def test_a_shared_store_of_before_the_marker_is_recognised(owned_root, tmp_path):
    (tmp_path / "roots").mkdir()
    (tmp_path / "envs").mkdir()
    (tmp_path / "notes").touch()
    assert owned_root.refusal(tmp_path, "owned") != ""
    (tmp_path / "roots" / "host:srv-main").symlink_to("/srv/main")
    assert owned_root.refusal(tmp_path, "owned") == ""


@pytest.mark.parametrize("root", ["relative", "/opt/x/../../usr"])
def test_a_path_that_is_not_plain_is_no_root(owned_root, root):
    assert "is not an absolute path without '..'" in owned_root.refusal(Path(root), "free")


def test_a_folder_of_somebody_else_is_neither_deployed_to_nor_removed_from(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "bin").mkdir()
    assert "holds what is not this project's (bin)" in call(tmp_path, "free")["msg"]
    assert call(tmp_path, "made")["failed"]
    assert "so nothing is removed" in call(tmp_path, "owned")["msg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "etc"]


def test_a_new_root_is_marked_once(tmp_path):
    root = tmp_path / "new"
    assert not call(root, "free")["changed"]
    assert call(root, "made", check=True)["changed"]
    assert not root.exists()
    assert call(root, "made")["changed"]
    assert not call(root, "made")["changed"]
    (root / "notes of the operator").touch()
    assert [call(root, state)["changed"] for state in ("free", "made", "owned")] == [False, False, False]


def test_a_deployment_of_before_the_marker_is_recognised(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "plan.json").touch()
    (tmp_path / "releases").mkdir()
    (tmp_path / "own.txt").touch()
    assert call(tmp_path, "free") == call(tmp_path, "free") | {"changed": False}
    assert call(tmp_path, "owned")["changed"]
    assert (tmp_path / "lowmem_root").is_file()


def test_a_marker_that_is_a_link_marks_nothing(tmp_path):
    (tmp_path / "elsewhere").write_text("kept")
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "lowmem_root").symlink_to(tmp_path / "elsewhere")
    assert call(root, "owned")["failed"]
    assert (tmp_path / "elsewhere").read_text() == "kept"


PLAY = """
- hosts: localhost
  connection: local
  gather_facts: false
  tasks:
    - ansible.builtin.include_role: {name: vllm_service, tasks_from: remove}
"""


def test_the_role_removes_nothing_without_the_marker(tmp_path):
    """Its tasks run as they are; the first one refuses, so that no other is reached."""
    root = tmp_path / "usr-local"
    for folder in ("etc", "lib", "bin"):
        (root / folder).mkdir(parents=True)
        (root / folder / "kept").touch()
    play = tmp_path / "play.yml"
    play.write_text(PLAY)
    values = {
        "ansible_python_interpreter": sys.executable,
        "vllm_service_root": str(root),
        "vllm_service_store": str(root),
        "vllm_service_remove_models": True,
    }
    done = subprocess.run(
        [Path(sys.executable).parent / "ansible-playbook", "-i", "localhost,", play, "-e",
         json.dumps(values)],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2
    assert "so nothing is removed" in " ".join((done.stdout + done.stderr).split())
    assert sorted(str(p.relative_to(root)) for p in root.rglob("kept")) == [
        "bin/kept",
        "etc/kept",
        "lib/kept",
    ]


def test_a_host_that_was_only_provisioned_goes_on(tmp_path):
    """With a store of its own a root has nothing yet but the folder of the jobs that ran."""
    (tmp_path / "run/async").mkdir(parents=True)
    assert "failed" not in call(tmp_path, "free")


def test_an_older_deployment_beside_the_systems_folders_is_upgraded_and_removed(
    owned_root, tmp_path, monkeypatch
):
    monkeypatch.setattr(owned_root, "SYSTEM_PARENTS", (str(tmp_path),))
    root = tmp_path / "vllm"
    (root / "etc").mkdir(parents=True)
    assert "is a folder of the system" in owned_root.refusal(root, "free")
    (root / "etc/plan.json").touch()
    (root / "releases").mkdir()
    assert [owned_root.refusal(root, state) for state in ("free", "made", "owned")] == ["", "", ""]
