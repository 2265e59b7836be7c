"""What inventory/README.md says of the inventories is so."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from .conftest import ROOT

README = (ROOT / "inventory/README.md").read_text()
FOLDERS = sorted(path.parent.name for path in (ROOT / "inventory").glob("*/hosts.yml"))
BIN = Path(sys.executable).parent


def variables(inventory, host):
    done = subprocess.run(
        [BIN / "ansible-inventory", "-i", inventory, "--host", host],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_every_inventory_is_in_the_table_with_its_profile():
    rows = dict(re.findall(r"^\| `([\w-]+)` \|[^|]*\|([^|]*)\|", README, re.MULTILINE))
    assert sorted(rows) == FOLDERS
    for name, text in rows.items():
        profile = yaml.safe_load((ROOT / "inventory" / name / "group_vars/vllm.yml").read_text())[
            "lowmem_profile"
        ]
        assert f"`{profile}`" in text
        assert (ROOT / "profiles" / f"{profile}.yml").exists()


@pytest.mark.parametrize("name", [n for n in FOLDERS if n not in ("demo", "lab")])
def test_an_inventory_for_gpus_says_what_its_hosts_need(name):
    host = variables(f"inventory/{name}", "gpu-1.example.org")
    assert host["lowmem_device"] == "a100-40g"
    assert (
        host["lowmem_device_count"] == {"a100-2x40g": 2, "a100-1x40g": 1, "cluster": 2, "two-hosts": 1}[name]
    )
    assert (host["gpu_driver_source"], host["gpu_driver_branch"], host["gpu_driver_reboot"]) == (
        "nvidia",
        "580",
        False,
    )
    assert host["cuda_toolkit_parts"] == ["c_compiler"]
    assert host["host_memory_swap_gib"] > 0


def test_the_lab_leaves_the_machine_as_it_is_and_asks_no_registry():
    host = variables("inventory/lab", "lab")
    assert (host["gpu_driver_source"], host["gpu_driver_reboot"], host["cuda_toolkit_parts"]) == (
        "preinstalled",
        False,
        [],
    )
    assert (host["host_memory_manage"], host["vllm_service_manager"]) == (False, "supervisor")
    assert host["lowmem_environment"]["PIP_NO_INDEX"] == "1"
    assert (host["lowmem_python"], host["lowmem_root"]) == ("/opt/lab/bin/python3.12", "/opt/lab/host")


def test_the_clusters_router_has_every_replica_and_the_replicas_share_their_download():
    router = variables("inventory/cluster", "router-1.example.org")
    (workers,) = re.findall(
        r'^router_workers: "(.*)"$',
        (ROOT / "inventory/cluster/group_vars/router.yml").read_text(),
        re.MULTILINE,
    )
    assert router["router_workers"] == workers.replace("\\\\", "\\")
    host = variables("inventory/cluster", "gpu-2.example.org")
    assert host["model_source_peers"] == "{{ groups['vllm'] }}"
    command = [
        BIN / "ansible",
        "-i",
        "inventory/cluster",
        "router-1.example.org",
        "-m",
        "ansible.builtin.debug",
        "-a",
        "var=router_workers",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.findall(r"http://[\d.:]+", done.stdout) == [f"http://10.0.0.1{n}:8000" for n in (1, 2, 3)]


def test_a_secret_in_a_vault_leaves_the_other_variables(tmp_path):
    """The commands of the README, with a plain file in place of the encrypted one."""
    shutil.copytree(ROOT / "inventory/a100-2x40g", tmp_path / "inventory/mine")
    (commands,) = re.findall(r"^ {4}(cd inventory/mine.*)$", README, re.MULTILINE)
    subprocess.run(["bash", "-euc", commands], cwd=tmp_path, check=True)
    (tmp_path / "inventory/mine/group_vars/vllm/vault.yml").write_text(
        "vllm_service_api_key: from-the-vault\n"
    )
    host = variables(tmp_path / "inventory/mine", "gpu-1.example.org")
    assert host["vllm_service_api_key"] == "from-the-vault"
    assert host["lowmem_profile"] == "low_mem"


def test_the_plan_that_it_names_can_be_asked_for():
    (command,) = re.findall(r"`(lowmem plan [^`]*)`", README)
    done = subprocess.run(
        [BIN / command.split()[0], *command.split()[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("low_mem: llama-2-70b"), done.stderr
