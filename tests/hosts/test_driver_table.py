"""What gpu_driver and nvidia_repository ask apt for, by system and branch: the systems that no test host can
be booted of included.
"""

import pytest
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar

from .conftest import ROOT

FILES = [
    f"roles/{role}/{part}/main.yml"
    for role in ("gpu_driver", "nvidia_repository")
    for part in ("defaults", "vars")
]


def ask(system, version, wanted=None, **given):
    """The roles' own variables as Ansible resolves them on such a host, with what an inventory gives."""
    loader = DataLoader()
    variables = {}
    for path in FILES:
        variables |= loader.load_from_file(str(ROOT / path), trusted_as_template=True)
    major = version.split(".", maxsplit=1)[0]
    facts = {
        "distribution": system,
        "distribution_version": version,
        "distribution_major_version": major,
        "architecture": "x86_64",
    }
    templar = Templar(loader=loader, variables=variables | given | {"ansible_facts": facts})
    wanted = {name: name for name in wanted or ()} or {
        "packages": "__gpu_driver_packages",
        "pattern": "__gpu_driver_release_regex",
        "telling": "__gpu_driver_telling",
        "url": "__nvidia_repository_url",
        "key": "__nvidia_repository_wanted_key_url",
        "fingerprint": "__nvidia_repository_wanted_fingerprint",
    }
    return {name: templar.template(variables[variable]) for name, variable in wanted.items()}


@pytest.mark.parametrize(
    ("system", "version", "variables", "packages"),
    [
        (
            "Debian",
            "12.11",
            {},
            "nvidia-driver-cuda nvidia-kernel-open-dkms nvidia-persistenced nvidia-modprobe",
        ),
        (
            "Debian",
            "13.1",
            {"gpu_driver_modules": "proprietary"},
            "nvidia-driver-cuda nvidia-kernel-dkms nvidia-persistenced nvidia-modprobe",
        ),
        (
            "Ubuntu",
            "24.04",
            {},
            "libnvidia-compute-580 nvidia-utils-580 nvidia-dkms-580-open nvidia-persistenced nvidia-modprobe",
        ),
        (
            "Ubuntu",
            "22.04",
            {"gpu_driver_branch": "590"},
            "libnvidia-compute nvidia-utils nvidia-dkms-open nvidia-persistenced nvidia-modprobe",
        ),
        (
            "Ubuntu",
            "24.04",
            {"gpu_driver_source": "distribution", "gpu_driver_modules": "proprietary"},
            (
                "libnvidia-compute-580-server nvidia-utils-580-server nvidia-compute-utils-580-server"
                " nvidia-dkms-580-server"
            ),
        ),
        (
            "Debian",
            "13.1",
            {"gpu_driver_source": "distribution"},
            "libcuda1 nvidia-smi nvidia-open-kernel-dkms nvidia-persistenced nvidia-modprobe",
        ),
    ],
)
def test_packages(system, version, variables, packages):
    assert ask(system, version, **variables)["packages"] == packages.split()


def test_an_exact_version_and_a_mirror():
    got = ask(
        "Ubuntu",
        "24.04",
        gpu_driver_version="580.159.04",
        nvidia_repository_base_url="https://mirror.example.org/nvidia/cuda/repos/",
    )
    assert got["pattern"] == r"^([0-9]+:)?580\.159\.04[.+~-]"
    assert got["telling"] == "nvidia-driver-pinning-580.159.04"
    assert got["url"] == "https://mirror.example.org/nvidia/cuda/repos/ubuntu2404/x86_64/"
    assert got["key"] == "https://mirror.example.org/nvidia/cuda/repos/ubuntu2404/x86_64/3bf863cc.pub"
    assert got["fingerprint"] == "EB693B3035CD5710E231E123A4B469963BF863CC"


def test_nvidias_own_place_is_the_default():
    got = ask("Debian", "13.1")
    assert got["pattern"] == "^([0-9]+:)?580[.+~-]"
    assert got["url"] == "https://developer.download.nvidia.com/compute/cuda/repos/debian13/x86_64/"
    assert (
        got["key"] == "https://developer.download.nvidia.com/compute/cuda/repos/debian13/x86_64/8793F200.pub"
    )
    assert got["fingerprint"] == "02182E60104FCDC26EAE1B8597A5D4CB8793F200"


POLICY = """nvidia-utils-580:
  Installed: (none)
  Candidate: 580.159.04-1ubuntu1
  Version table:
     580.178.04-0ubuntu0.24.04.1 100
        100 http://archive.ubuntu.com/ubuntu noble-updates/restricted amd64 Packages
     580.159.04-1ubuntu1 1000
        500 https://mirror.example.org/nvidia/cuda/repos/ubuntu2404/x86_64  Packages
nvidia-persistenced:
  Installed: 580.95.05-1ubuntu1
  Candidate: 580.159.04-1ubuntu1
  Version table:
"""


def test_what_is_there_and_of_the_branch_stays_and_the_rest_is_asked_for_by_its_version():
    """580.178.04 of Ubuntu's own is higher, and was taken when apt was asked for 580.*."""
    seen = {
        "report": {
            "packages": {
                "nvidia-persistenced": "580.95.05-1ubuntu1",
                "nvidia-modprobe": "570.1-1",
                "libnvidia-compute-580": "5800.1-1",
            }
        }
    }
    got = ask(
        "Ubuntu", "24.04", wanted=("__gpu_driver_kept", "__gpu_driver_new", "__gpu_driver_candidates"),
        __gpu_driver_seen=seen, __gpu_driver_policy={"stdout": POLICY},
    )  # fmt: skip
    assert got["__gpu_driver_kept"] == ["nvidia-persistenced"]
    assert sorted(got["__gpu_driver_new"]) == [
        "libnvidia-compute-580",
        "nvidia-dkms-580-open",
        "nvidia-modprobe",
        "nvidia-utils-580",
    ]
    assert got["__gpu_driver_candidates"] == {
        "libnvidia-compute-580": "(none)", "nvidia-utils-580": "580.159.04-1ubuntu1",
        "nvidia-dkms-580-open": "(none)",
        "nvidia-persistenced": "580.159.04-1ubuntu1", "nvidia-modprobe": "(none)",
    }  # fmt: skip
