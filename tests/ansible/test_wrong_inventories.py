"""Gives preflight wrong inventories, and holds every line that it says and that the host stays as it was.

Each case of wrong_inventories.yml is a host, so that two runs of ansible-playbook serve all. A folder that is
no inventory, or one with a file that nothing reads, takes a run of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ..conftest import run_playbook

CASES = yaml.safe_load(Path(__file__).with_name("wrong_inventories.yml").read_text())
SECRET = "geheim"
PLAYBOOKS = {"values": "playbooks/check_inventory.yml", "plans": "playbooks/preflight.yml"}
REFUSALS = {"Refuse unknown variables and wrong values", "Refuse a host with problems"}
# as inventory/demo, without its places
GOOD = {
    "ansible_connection": "local",
    "ansible_python_interpreter": sys.executable,
    "lowmem_become": False,
    "lowmem_profile": "demo_cpu",
    "lowmem_port": 18999,
    "lowmem_python": "{{ ansible_playbook_python | realpath }}",
    "host_memory_manage": False,
    "vllm_service_manager": "supervisor",
    "awq_quantize_device": "cpu",
}


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in sorted(folder.rglob("*"))
    }


def name(part: str, case: str) -> str:
    return f"{part}-{list(CASES[part]).index(case)}"


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Return host -> what it was refused for."""
    host = tmp_path_factory.mktemp("host")
    (host / "neighbour").write_text("whole\n")
    shared = GOOD | {"lowmem_root": str(host / "root")}
    before, said = tree(host), {}
    for part, cases in CASES.items():
        hosts = {name(part, case): variables for case, (variables, *_) in cases.items()}
        inventory = tmp_path_factory.mktemp("inventory") / "hosts.json"
        inventory.write_text(json.dumps({"vllm": {"hosts": hosts | {f"{part}-good": {}}, "vars": shared}}))
        done = run_playbook(
            "-i",
            str(inventory),
            PLAYBOOKS[part],
            environment={"ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json"},
        )
        assert done.rc != 0
        assert SECRET not in done.text
        assert "Traceback" not in done.text
        report = json.JSONDecoder().raw_decode(done.text[done.text.index("{\n") :])[0]
        assert {counts["changed"] for counts in report["stats"].values()} == {0}
        for play in report["plays"]:
            for task in play["tasks"]:
                if task["task"]["name"] in REFUSALS:
                    for each, result in task["hosts"].items():
                        said[each] = result["msg"].splitlines() if result.get("failed") else []
    assert tree(host) == before, "the host was changed"
    return said


def test_there_are_sixty() -> None:
    assert sum(len(cases) for cases in CASES.values()) >= 60


@pytest.mark.parametrize(("part", "case"), [(part, case) for part, cases in CASES.items() for case in cases])
def test_each_problem_is_one_line(answers: dict[str, list[str]], part: str, case: str) -> None:
    said, wanted = sorted(answers[name(part, case)]), sorted(CASES[part][case][1:])
    # a line that ends in … goes on with names of a table
    cut = [
        line[: len(want) - 1] + "…" if want[-1] == "…" else line
        for line, want in zip(said, wanted, strict=False)
    ]
    assert cut + said[len(wanted) :] == wanted


@pytest.mark.parametrize("part", CASES)
def test_a_good_host_beside_them_is_not_refused(answers: dict[str, list[str]], part: str) -> None:
    assert answers[f"{part}-good"] == []


def inventory(folder: Path, hosts: str, **files: str) -> Path:
    folder.mkdir()
    (folder / "hosts.yml").write_text(hosts)
    for path, text in files.items():
        place = folder / path.replace("__", "/")
        place = place.with_name(f"{place.name}.yml")
        place.parent.mkdir(exist_ok=True)
        place.write_text(text)
    return folder


def check(source: Any, *arguments: str) -> tuple[int, str]:
    done = run_playbook("-i", str(source), "playbooks/check_inventory.yml", *arguments)
    assert "Traceback" not in done.text
    return done.rc, done.flat


HOST = "vllm: {hosts: {one: {ansible_connection: local}}}\n"


def test_a_wrong_path_of_the_inventory_ends_the_run(tmp_path: Path) -> None:
    rc, said = check(tmp_path / "nosuch")
    assert rc != 0
    assert f"{tmp_path}/nosuch" in said


def test_an_inventory_that_is_no_yaml_ends_the_run(tmp_path: Path) -> None:
    rc, said = check(inventory(tmp_path / "a", "vllm: {hosts: [}\n"))
    assert rc != 0
    assert f"{tmp_path}/a/hosts.yml" in said


def test_a_mistyped_group_ends_the_run(tmp_path: Path) -> None:
    rc, said = check(inventory(tmp_path / "a", HOST.replace("vllm", "vlm")))
    assert rc != 0
    assert (
        "group vllm of the inventory has no host: did you mean it by vlm? Rename that group, or choose"
        " another inventory with -i."
    ) in said


def test_a_file_of_a_mistyped_group_ends_the_run(tmp_path: Path) -> None:
    rc, said = check(inventory(tmp_path / "a", HOST, group_vars__vlm="lowmem_port: 8001\n"))
    assert rc != 0
    assert "group_vars/vlm.yml is read for no group: did you mean vllm? Rename it, or take it out." in said


def test_a_file_of_an_unknown_host_is_warned_of(tmp_path: Path) -> None:
    rc, said = check(inventory(tmp_path / "a", HOST, host_vars__ome="lowmem_port: 8001\n"))
    assert rc == 0, said
    assert "host_vars/ome.yml is read for no host: did you mean one? Rename it, or take it out." in said


@pytest.mark.parametrize(
    ("files", "arguments"),
    [
        ({"group_vars__vllm": "lowmem_profle: x\n"}, ()),
        ({"group_vars__all": "lowmem_profle: x\n"}, ()),
        ({"host_vars__one": "lowmem_profle: x\n"}, ()),
        ({}, ("-e", "lowmem_profle=x")),
    ],
    ids=["group_vars", "group_vars of all", "host_vars", "extra variable"],
)
def test_a_mistyped_name_is_refused_wherever_it_stands(
    tmp_path: Path, files: dict[str, str], arguments: tuple[str, ...]
) -> None:
    rc, said = check(inventory(tmp_path / "a", HOST, **files), *arguments)
    assert rc != 0
    assert "lowmem_profle is not a variable of this project: did you mean lowmem_profile?" in said


def test_a_value_of_a_vault_without_its_password_is_one_line(tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("x\n")
    vaulted = subprocess.run(
        [
            Path(sys.executable).with_name("ansible-vault"),
            "encrypt_string",
            f"--vault-password-file={password}",
            "--name=model_source_token",
            SECRET,
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    source = inventory(tmp_path / "a", HOST, group_vars__vllm=vaulted)
    wrong = tmp_path / "wrong"
    wrong.write_text("y\n")
    for password_of in ((), (f"--vault-password-file={wrong}",)):
        rc, said = check(source, *password_of)
        assert rc != 0
        assert (
            "model_source_token is encrypted with ansible-vault and no password opens it: give"
            " --vault-password-file FILE or --ask-vault-pass."
        ) in said
    assert check(source, f"--vault-password-file={password}")[0] == 0
