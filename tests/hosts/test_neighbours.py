"""Every step that removes something runs in a tree with neighbours and links to them, which stay whole."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowmem.checkpoint import keep, manifest

from .conftest import ROOT, load

SIGN = "Made by vllm-lowmem.\n"


def contents(folder):
    """Every path below a folder with what it is; links are not followed."""
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else path.is_file() and path.read_text()
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def neighbour(tmp_path):
    """A folder of somebody else, which has the shape of ours, and is as it was when the test ends."""
    folder = tmp_path / "neighbour"
    for name in ("releases/old", "envs/vllm-cpu-1", "models/m-0123456789ab", "etc", "root/usr"):
        (folder / name).mkdir(parents=True)
        (folder / name / "kept").write_text("kept")
    before = contents(folder)
    yield folder
    assert contents(folder) == before


def call(module, later_s=0, check=False, **parameters):
    """The module as Ansible runs it, with the clock so far ahead."""
    path = ROOT / f"plugins/modules/{module}.py"
    given = json.dumps({"ANSIBLE_MODULE_ARGS": {**parameters, "_ansible_check_mode": check}})
    program = (
        f"import runpy, time; now = time.time; time.time = lambda: now() + {later_s};"
        f"runpy.run_path({str(path)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, given], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


# ------------------------------------------------------------------ releases


def releases(root, store, count=3):
    """Stage and prove so many releases, the newest of which names the only wanted environment."""
    (store / "envs/vllm-cpu-new").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        env = store / f"envs/vllm-cpu-{number if number < count - 2 else 'new'}"
        env.mkdir(exist_ok=True)
        made = call(
            "release",
            root=str(root),
            store=str(store),
            state="staged",
            name="v",
            files={"plan.json": str(number)},
            links={"env": str(env)},
        )
        call("release", root=str(root), store=str(store), state="current", id=made["id"])
        time.sleep(0.01)
        answer = call(
            "release",
            7200,
            root=str(root),
            store=str(store),
            state="proven",
            id=made["id"],
            keep=2,
            environments="vllm-cpu",
        )
    return answer


@pytest.mark.parametrize("marker", [None, "link", "file"])
def test_no_release_goes_without_the_marker(tmp_path, neighbour, marker):
    root = tmp_path / "root"
    root.mkdir()
    (neighbour.parent / "sign").write_text(SIGN)
    if marker == "file":
        (root / "lowmem_root").write_text(SIGN)
    elif marker == "link":
        (root / "lowmem_root").symlink_to(tmp_path / "sign")
    answer = releases(root, root)
    left = len(list((root / "releases").iterdir()))
    if marker == "file":
        assert [Path(path).parent.name for path in answer["removed"]] == ["releases", "envs"]
        assert left == 2
    else:
        assert answer["msg"] == (
            f"{root} holds no lowmem_root, so it may not be this project's and nothing is removed there:"
            " deploy it once more with site.yml, which marks it"
        )
        assert left == 3


@pytest.mark.parametrize("part", ["envs", "models", "releases"])
def test_prune_follows_no_link_out_of_the_root(tmp_path, neighbour, part):
    root = tmp_path / "root"
    root.mkdir()
    (root / "lowmem_root").write_text(SIGN)
    if part == "models":
        (root / part).symlink_to(neighbour / part)
    else:
        (root / part).mkdir()
        (root / part / "vllm-cpu-9").symlink_to(neighbour / "envs/vllm-cpu-1")
        (root / part / ".left.removed").symlink_to(neighbour / "releases/old")
    assert "msg" not in releases(root, root)
    assert part == "models" or (root / part / "vllm-cpu-9").is_symlink()


@pytest.mark.parametrize("marked", [False, True])
def test_a_shared_store_is_pruned_with_its_own_marker_only(tmp_path, neighbour, marked):
    root, store = tmp_path / "root", tmp_path / "store"
    root.mkdir()
    store.mkdir()
    (root / "lowmem_root").write_text(SIGN)
    if marked:
        (store / "lowmem_root").write_text(SIGN)
    (store / "envs").mkdir()
    (store / "envs/vllm-cpu-9").symlink_to(neighbour / "envs/vllm-cpu-1")
    answer = releases(root, store)
    assert (store / "envs/vllm-cpu-0").exists() is not marked
    assert ("msg" in answer) is not marked


def test_a_root_that_leaves_takes_nothing_of_an_unmarked_store(tmp_path, neighbour):
    root, store = tmp_path / "root", tmp_path / "store"
    (store / "envs/vllm-cpu-0").mkdir(parents=True)
    (store / "roots").mkdir()
    entry = store / "roots" / f"{platform.node()}:{str(root).strip('/').replace('/', '-')}"
    entry.symlink_to(root)
    given = {"root": str(root), "store": str(store), "state": "left", "environments": "vllm-cpu"}
    assert "holds no lowmem_root" in call("release", 7200, **given)["msg"]
    assert (store / "envs/vllm-cpu-0").is_dir()
    (store / "lowmem_root").write_text(SIGN)
    assert call("release", 7200, **given)["removed"] == [f"{store}/envs/vllm-cpu-0"]


@pytest.mark.parametrize("name", ["../neighbour/etc", "a b", "$(id)", "a\nb", ".hidden", "a;b"])
def test_a_name_that_is_a_path_is_refused(tmp_path, neighbour, name):
    (tmp_path / "releases").mkdir()
    for given in (
        {"state": "refuted", "id": name},
        {"state": "staged", "name": name, "files": {"plan.json": ""}},
        {"state": "staged", "name": "v", "files": {name: "x"}},
        {"state": "staged", "name": "v", "files": {}, "links": {name: str(tmp_path)}},
    ):
        answer = call("release", root=str(tmp_path), **given)
        assert answer["msg"].startswith(f"{name!r} is no name of a release or of its files")
    assert list((tmp_path / "releases").iterdir()) == []


# ------------------------------------------------------- trees and folders of configuration


def tree(folder, text):
    return call("config_tree", path=str(folder / "main"), files={"a.conf": text})


def test_a_new_configuration_removes_its_own_older_ones_only(tmp_path, neighbour):
    folder = tmp_path / "etc"
    folder.mkdir()
    (folder / "main.01234567").mkdir()
    (folder / "main.01234567" / "kept").write_text("of somebody else")
    (folder / ".main.01234567.1").mkdir()
    (folder / ".main.01234567.1" / "a.conf").write_text("half")
    (folder / "main.76543210").symlink_to(neighbour / "etc")
    (folder / ".main.76543210.2").symlink_to(neighbour / "etc")
    first = tree(folder, "one")["folder"]
    second = tree(folder, "two")["folder"]
    assert {path.name for path in folder.iterdir()} == {
        "main",
        Path(second).name,
        "main.01234567",
        "main.76543210",
        ".main.76543210.2",
    }
    assert not Path(first).exists()


def test_an_edited_configuration_is_still_replaced(tmp_path):
    first = Path(tree(tmp_path, "one")["folder"])
    (first / "a.conf").write_text("edited")
    tree(tmp_path, "two")
    assert not first.exists()


def test_files_and_marked_folders_are_removed_and_others_stay(tmp_path, neighbour):
    marked, unmarked, empty, behind = (tmp_path / name for name in ("marked", "unmarked", "empty", "behind"))
    for folder in (marked, unmarked, empty):
        folder.mkdir()
    for folder in (marked, unmarked):
        (folder / "file").touch()
        (folder / "link").symlink_to(neighbour / "etc")
    (marked / "lowmem_root").write_text(SIGN)
    (unmarked / "lowmem_root").symlink_to(marked / "lowmem_root")
    behind.symlink_to(neighbour / "etc")
    (tmp_path / "file").touch()
    paths = [str(tmp_path / name) for name in ("marked", "unmarked", "empty", "behind", "file", "nothing")]
    dry = call("remove_owned", check=True, paths=paths)
    assert marked.exists()
    answer = call("remove_owned", paths=paths)
    assert (
        dry["removed"]
        == answer["removed"]
        == [str(path) for path in (marked, empty, behind, tmp_path / "file")]
    )
    assert answer["left"] == [str(unmarked)]
    assert f"{unmarked} holds no lowmem_root, so it may not be this project's and stays" in str(
        answer["warnings"]
    )


def test_a_configuration_goes_with_its_link(tmp_path):
    made = tree(tmp_path, "one")["folder"]
    foreign = tmp_path / "main.01234567"
    foreign.mkdir()
    (foreign / "kept").touch()
    answer = call("remove_owned", paths=[str(tmp_path / "main"), made, str(foreign)])
    assert answer["removed"] == [str(tmp_path / "main"), made]
    assert answer["left"] == [str(foreign)]


def test_a_folder_is_marked_unless_somebody_elses_files_lie_in_it(tmp_path, neighbour):
    def have(path):
        return call("folders", folders=[{"path": str(path), "mode": "0755", "marked": r"access\.log.*"}])

    assert have(tmp_path / "log")["changed"]
    assert not have(tmp_path / "log")["changed"]
    assert (tmp_path / "log/lowmem_root").is_file()
    (tmp_path / "older").mkdir()
    (tmp_path / "older/access.log.1").touch()
    assert have(tmp_path / "older")["changed"]
    assert have(neighbour / "etc")["msg"].endswith("holds what is not this project's (kept): choose another")


# ----------------------------------------------------------- environments and models


def test_an_environment_of_somebody_else_is_not_built_over(tmp_path, neighbour, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "lowmem/checkpoint"))
    build_env = load("roles/python_env/files/build_env.py")
    monkeypatch.setattr(build_env, "build", lambda env, spec: pytest.fail("it was built over"))
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs/linked").symlink_to(neighbour / "envs/vllm-cpu-1")
    spec = {"stamp": {"digest": "a", "python": sys.executable, "wheels": []}, "wheels": []}
    for env in (neighbour / "envs/vllm-cpu-1", tmp_path / "envs/linked"):
        done = subprocess.run(
            [sys.executable, ROOT / "roles/python_env/files/build_env.py", env, json.dumps(spec)],
            env=os.environ | {"PYTHONPATH": str(ROOT / "lowmem/checkpoint")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == (
            f"{neighbour}/envs/vllm-cpu-1 was not made by this project, so it is not replaced: move it away,"
            " or choose another name\n"
        )


@pytest.mark.parametrize("linked", [False, True])
def test_a_model_of_somebody_else_is_not_replaced(tmp_path, neighbour, linked, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "lowmem/checkpoint"))
    fetch_model = load("roles/model_source/files/fetch_model.py")
    models = tmp_path / "models" if linked else neighbour / "models"
    if linked:
        models.mkdir()
        (models / "m-0123456789ab").symlink_to(neighbour / "models/m-0123456789ab")
    spec = {
        "models": str(models),
        "name": "m-0123456789ab",
        "source": {"type": "local"},
        "recipe_sha256": "a" * 64,
    }
    for _ in range(2):  # the first run leaves nothing by which the second one takes it for its own
        with pytest.raises(fetch_model.SourceError, match="so it is not replaced"):
            fetch_model.fetch(spec)


def test_a_kept_copy_replaces_no_folder_of_somebody_else(tmp_path, neighbour):
    source = tmp_path / "m"
    source.mkdir()
    (source / "config.json").write_text("{}")
    manifest.write_json(
        tmp_path / "m.manifest.json",
        {"schema": manifest.SCHEMA, "name": "m", "files": manifest.entries(manifest.scan(source))},
    )
    place = keep.place_of(source)
    place.mkdir()
    (place / "kept").write_text("kept")
    with pytest.raises(manifest.ManifestError, match="was not made by this project"):
        keep.keep(source)
    assert contents(place) == {"kept": "kept"}
    (place / "kept").unlink()
    place.rmdir()
    place.symlink_to(neighbour / "etc")
    with pytest.raises(manifest.ManifestError, match="is a link, so it is not replaced"):
        keep.keep(source)


# ------------------------------------------------------------------ the reset of a deployment

PLAY = """
- hosts: localhost
  connection: local
  gather_facts: false
  tasks:
    - ansible.builtin.include_role: {name: vllm_service, tasks_from: remove}
"""


def test_a_reset_leaves_neighbours_and_what_links_name(tmp_path, neighbour):
    root = tmp_path / "root"
    root.mkdir()
    (root / "lowmem_root").write_text(SIGN)
    (root / "etc").symlink_to(neighbour / "etc")
    (root / "releases").mkdir()
    (root / "releases/r").symlink_to(neighbour / "releases/old")
    (root / "envs").mkdir()
    (root / "envs/linked").symlink_to(neighbour / "envs")
    (root / "models").symlink_to(neighbour / "models")
    (root / "notes of the operator").write_text("kept")
    (tmp_path / "play.yml").write_text(PLAY)
    values = {
        "ansible_python_interpreter": sys.executable,
        "vllm_service_root": str(root),
        "vllm_service_store": str(root),
        "vllm_service_remove_models": True,
        "vllm_service_manager": "supervisor",
        "lowmem_plan": {"device_kind": "cpu", "service": {"timeout_start_s": 1}},
    }
    done = subprocess.run(
        [
            Path(sys.executable).parent / "ansible-playbook",
            "-i",
            "localhost,",
            tmp_path / "play.yml",
            "-e",
            json.dumps(values),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    assert contents(root) == {"lowmem_root": SIGN, "notes of the operator": "kept"}


# ---------------------------------------------------------------------- test hosts


@pytest.fixture
def testhosts(tmp_path, monkeypatch):
    monkeypatch.setenv("TESTHOSTS_STATE", str(tmp_path / "state"))
    found = load("molecule/hosts/testhosts")
    answer = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(found, "run", lambda *words, **_: answer)
    monkeypatch.setattr(found, "network_down", lambda: None)
    return found


def host(state, name, said=None):
    home = state / name
    (home / "root").mkdir(parents=True)
    (home / "host.json").write_text(json.dumps({"name": said or name}))
    return home


def test_a_sweep_takes_marked_hosts_and_nothing_that_their_files_name(tmp_path, neighbour, testhosts):
    state = tmp_path / "state"
    testhosts.mark()
    host(state, "one")
    host(state, "odd", said="../neighbour")
    (neighbour / "host.json").write_text('{"name": "linked"}')
    (state / "linked").symlink_to(neighbour)
    testhosts.sweep("")
    (neighbour / "host.json").unlink()
    assert sorted(path.name for path in state.iterdir() if path.is_dir()) == ["linked", "odd"]


def test_a_sweep_removes_nothing_without_the_marker(tmp_path, testhosts):
    home = host(tmp_path / "state", "one")
    with pytest.raises(SystemExit, match="holds no lowmem_root, so it may not be of test hosts"):
        testhosts.sweep("")
    assert home.is_dir()
    with pytest.raises(SystemExit, match="holds what is not of test hosts"):
        testhosts.mark()


@pytest.mark.parametrize("name", ["../neighbour", "/etc", "", ".", "..", "usage", "a b", "a/b", "a\n"])
def test_a_host_is_a_folder_of_its_own(tmp_path, neighbour, testhosts, name):
    testhosts.mark()
    with pytest.raises(SystemExit, match="is no name of a host"):
        testhosts.down(name)


def test_the_stub_repository_replaces_its_own_folder_only(tmp_path, neighbour, monkeypatch):
    build_repo = load("molecule/stub/build_repo.py")
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "stub-repo-old").symlink_to(neighbour)
    (cache / "stub-repo-other").mkdir()
    (cache / "stub-repo-other/kept").touch()
    (cache / "stub-repo-ours/compute/cuda/repos").mkdir(parents=True)
    monkeypatch.setattr(
        build_repo, "build", lambda out, releases: (out / "compute/cuda/repos").mkdir(parents=True)
    )
    monkeypatch.setattr(build_repo, "machine", lambda out, tar: None)
    monkeypatch.setattr(sys, "argv", ["build_repo.py", str(neighbour), str(cache), "debian12"])
    with pytest.raises(SystemExit, match="holds no stub repository, so it is not replaced"):
        build_repo.main()
    assert not (cache / "stub-repo-ours").exists()
    assert (cache / "stub-repo-other/kept").exists()


# ------------------------------------------------------------------ make


@pytest.mark.parametrize(("name", "refused"), [("notes", True), ("cache", False), ("venv", False)])
def test_setup_does_not_make_a_foreign_folder_its_own(tmp_path, name, refused):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/mark-state").write_bytes((ROOT / "scripts/mark-state").read_bytes())
    (tmp_path / ".lowmem" / name).mkdir(parents=True)
    done = subprocess.run(
        ["bash", tmp_path / "scripts/mark-state"], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == refused
    assert (tmp_path / ".lowmem/lowmem_root").exists() is not refused
    assert ("is not make's" in done.stderr) is refused
