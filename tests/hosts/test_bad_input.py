"""Gives a bad value to every variable of the gateway and of the roles that prepare a host.

Each ends in one line that names the variable, before the host is touched. A new variable without an entry
here fails the test. One ansible-playbook run serves all cases: each is a host of its inventory.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from .conftest import ROOT

ROLES = ("gpu_driver", "nvidia_repository", "cuda_toolkit", "host_memory", "gateway", "peer_firewall")
INT, BOOL = "cannot be converted to an int", "is not a valid boolean"
URL = "it has to start with https://, http:// or file://"

TLS = Path(tempfile.gettempdir(), f"lowmem-bad-input-{os.getpid()}")
# a port that somebody has
TAKEN = socket.create_server(("127.0.0.1", 0))


def tls(name):
    return str(TLS / name)


def make_certificates():
    """What a site may wrongly give: a good pair, a key of another pair, one that is locked, one that has
    expired, and no PEM at all.
    """

    def openssl(*words):
        subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=TLS)

    TLS.mkdir()
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-subj", "/CN=test")
    openssl("req", "-x509", *curve, "-nodes", "-days", "9", "-keyout", "key.pem", "-out", "good.pem")
    openssl("req", "-new", *curve, "-nodes", "-keyout", "expired.key", "-out", "request.pem")
    openssl(
        "x509", "-req", "-in", "request.pem", "-signkey", "expired.key", "-days", "-1", "-out", "expired.pem"
    )
    openssl("ec", "-in", "key.pem", "-aes128", "-passout", "pass:secret", "-out", "locked.key")
    (TLS / "broken.pem").write_text("-----BEGIN CERTIFICATE-----\nbm90aGluZw==\n-----END CERTIFICATE-----\n")


PATH = "must be an absolute path"
# variable -> (bad value, words of the answer, and what else such a case needs);
# what the words do not name is the variable's name and the value, which are always asked for
BAD = {
    "gpu_driver_source": [
        ("runfile", "must be one of: nvidia, distribution, preinstalled"),
        (
            "distribution",
            "the packages of debian12 are of branch 535: choose another branch or another source.",
        ),
    ],
    "gpu_driver_branch": [
        ("999", "known are 535, 550, 570, 580, 590, 595, 610: choose one of them."),
        (
            "570",
            (
                "whose CUDA is 12.8; the engine was built for 13.0 (gpu_driver_cuda_version): choose branch"
                " 580 or later."
            ),
        ),
        ("", "choose one of them."),
        (
            "570",
            (
                "apt can be locked to 580, 590, 595, 610 in NVIDIA's repository: choose another branch or"
                " another source."
            ),
            {"gpu_driver_cuda_version": "12.8"},
        ),
    ],
    "gpu_driver_version": [
        (
            "590.48.01",
            (
                "it has to be a version of branch 580 (gpu_driver_branch), such as 580.95.05: correct one of"
                " the two"
            ),
        ),
        ("580", "it has to be a version of branch 580"),
        ("580.95.05; reboot", "it has to be a version of branch 580"),
    ],
    "gpu_driver_cuda_version": [
        ("13", "it has to be major.minor, such as 13.0: read it from torch.version.cuda."),
        ("cu130", "it has to be major.minor, such as 13.0"),
        ("14.0", "choose branch of a newer release of this project or later."),
    ],
    "gpu_driver_modules": [("nouveau", "must be one of: open, proprietary")],
    "gpu_driver_cards": [
        (-1, "it has to be 0 (at least one card) to 16: correct it."),
        (17, "to 16: correct it."),
        ("two", INT),
    ],
    "gpu_driver_mig": [("on", "must be one of: refuse, allow")],
    "gpu_driver_secure_boot": [("off", "must be one of: refuse, signed")],
    "gpu_driver_hold": [("perhaps", BOOL)],
    "gpu_driver_persistence": [("perhaps", BOOL)],
    "gpu_driver_reboot": [("tonight", BOOL)],
    "gpu_driver_reboot_timeout_s": [
        (59, "it has to be 60 to 7200 seconds: correct it."),
        (7201, "60 to 7200"),
        ("15m", INT),
    ],
    "nvidia_repository_base_url": [
        ("mirror.example/cuda", URL),
        ("https://mirror.example/a folder", URL),
        ("", URL),
    ],
    "nvidia_repository_key_url": [("mirror.example/key.pub", f"{URL}: correct it, or leave it empty")],
    "nvidia_repository_key_file": [
        ("/nowhere/key.asc", "which is no file on the controller: correct the path, or leave it empty.")
    ],
    "nvidia_repository_key_fingerprint": [
        ("3BF863CC", "it has to be the 40 hexadecimal digits of the primary key's fingerprint: read it with"),
        ("Z" * 40, "it has to be the 40 hexadecimal digits"),
    ],
    "cuda_toolkit_parts": [(["everything"], "must be one or more of: c_compiler, nvcc")],
    "cuda_toolkit_version": [
        ("13", "it has to be major.minor, such as 13.0: read it from torch.version.cuda.")
    ],
    "host_memory_manage": [("perhaps", BOOL)],
    "host_memory_swap_path": [
        ("/swap file", "an absolute path of a file, with no blank, which fstab could not name): correct it."),
        ("swapfile", "an absolute path"),
        ("/swap/", "an absolute path of a file"),
    ],
    "host_memory_swap_gib": [
        (-1, "(0 or more): correct it."),
        ("64 GiB", INT),
        (90_000_000, "free: make room, or choose another path or size."),
    ],
    "host_memory_swappiness": [
        (201, "(0 to 200): correct it."),
        (-1, "(0 to 200): correct it."),
        ("low", INT),
    ],
    "host_memory_overcommit": [(2, "must be one of: 0, 1")],
    "host_memory_max_map_count": [
        (65529, "(65530, the kernel's default, or more"),
        (2147483648, "at most 2147483647): correct it."),
        ("many", INT),
    ],
    "host_memory_hugepages": [
        (-1, "(0 or more): correct it."),
        (10_000_000, "which sets 19531.25 GiB aside"),
        ("all", INT),
    ],
    "host_memory_memlock": [("64G", "must be one of: infinity, default")],
    "host_memory_user": [
        ("Serve User", "a user's name of small letters"),
        ("", "a user's name"),
        ("x" * 33, "at most 32): correct it."),
    ],
    "host_memory_sysctl_file": [
        ("/etc/sysctl.conf", "/etc/sysctl.d/NAME.conf, since only those are applied at boot): correct it."),
        ("/etc/sysctl.d/60-lowmem", "/etc/sysctl.d/NAME.conf"),
    ],
    "host_memory_root": [("opt/vllm", "an absolute path): correct it.")],
    "gateway_instance": [("a b", "it must be 1 to 32 letters, digits or _"), ("x" * 33, "1 to 32 letters")],
    "gateway_service_root": [("opt/vllm", PATH)],
    "gateway_root": [("/etc/vllm gateway", PATH), ("/etc/gateway;", PATH)],
    "gateway_log_root": [("log", PATH)],
    "gateway_user": [("Serve User", "a user's name of small letters"), ("", "a user's name")],
    "gateway_upstream": [("nginx", "must be one of: service, router")],
    "gateway_upstream_address": [
        (
            "10.0.0.2:8080",
            "have it listen there, or take the host out of group gateway.",
            {"gateway_upstream": "router"},
        ),
        (
            "127.0.0.1:443",
            "and gateway_upstream_address 127.0.0.1:443: they must be three different ports.",
            {"gateway_upstream": "router"},
        ),
    ],
    "gateway_keys_path": [("etc/keys.env", PATH)],
    "gateway_clients": [(0, "it must be 1 to 100000.")],
    "gateway_stop_s": [(0, "it must be 1 to 86400."), ("soon", INT)],
    "gateway_addresses": [
        (["gpu-1.example.org"], "it must be one or more IP addresses of this host"),
        (["300.1.1.1"], "one or more IP addresses"),
        (["0.0.0.0; x"], "one or more IP addresses"),
        ([], "one or more IP addresses"),
    ],
    "gateway_port": [
        (0, "it must be 1 to 65535."),
        (65536, "it must be 1 to 65535."),
        ("https", INT),
        (8000, "they must be three different ports."),
        (TAKEN.getsockname()[1], "listens there already: stop it, or choose another gateway_port."),
    ],
    "gateway_metrics_port": [(0, "it must be 1 to 65535."), (443, "they must be three different ports.")],
    "gateway_tls_certificate": [
        (tls("good.pem"), "and gateway_tls_key is empty: give both, or neither to have one made."),
        ("good.pem", PATH, {"gateway_tls_key": tls("key.pem")}),
        (
            tls("nowhere.pem"),
            "it is no file on this host; put a certificate",
            {"gateway_tls_key": tls("key.pem")},
        ),
        (
            tls("broken.pem"),
            "it is no certificate in PEM that OpenSSL reads;",
            {"gateway_tls_key": tls("key.pem")},
        ),
        (tls("expired.pem"), "it has expired on 20", {"gateway_tls_key": tls("expired.key")}),
    ],
    "gateway_tls_key": [
        (tls("key.pem"), "give both, or neither"),
        (
            tls("expired.key"),
            "it does not belong to the certificate;",
            {"gateway_tls_certificate": tls("good.pem")},
        ),
        (
            tls("locked.key"),
            "it is locked with a passphrase, which a server cannot type;",
            {"gateway_tls_certificate": tls("good.pem")},
        ),
        (tls("broken.pem"), "it is no private key in PEM", {"gateway_tls_certificate": tls("good.pem")}),
        (tls("nowhere.key"), "it is no file on this host", {"gateway_tls_certificate": tls("good.pem")}),
    ],
    "gateway_tls_names": [([], "one or more host names"), (["a b"], "one or more host names")],
    "gateway_tls_days": [(0, "it must be 1 to 3650."), (3651, "it must be 1 to 3650.")],
    "gateway_tls_renew_days": [(397, "and less than gateway_tls_days (397)."), (-1, "it must be 0 or more")],
    "gateway_routes": [
        (["/v1/models"], "a route is GET, POST, PUT, PATCH or DELETE, one blank, and a path"),
        (["get /v1/models"], "a route is GET"),
        (["GET v1/models"], "a route is GET"),
        (["GET /v1/models/"], "a route is GET"),
        (["GET /v1/../tokenize"], "a route is GET"),
        (["GET /v1/.*"], "a route is GET"),
        (["POST /v1/responses/{}"], "a route is GET"),
        (["GET /healthz"], "/healthz and /status are the gateway's own; leave it out."),
        (["GET /status/x"], "the gateway's own"),
        ([], "name at least one"),
    ],
    "gateway_status_root": [("/var/lib/status/", PATH)],
    "gateway_max_body_mib": [(0, "it must be 1 to 1024."), (1025, "it must be 1 to 1024.")],
    "gateway_requests_per_minute": [(0, "it must be 1 to 1000000."), ("many", INT)],
    "gateway_burst": [(0, "it must be 1 to 1000000.")],
    "gateway_concurrent_requests": [(0, "it must be 1 to 100000.")],
    "gateway_key_limits": [
        (
            {"alice": {"burst": 0}},
            "one or more of requests_per_minute, burst, concurrent_requests, each 1 or more.",
        ),
        ({"alice": {"rate": 5}}, "one or more of"),
        ({"alice": {}}, "one or more of"),
        ({"a b": {"burst": 1}}, "a key's name (a letter, then letters, digits or _)"),
    ],
    "gateway_answer_timeout_s": [(0, "it must be 1 to 86400."), (86401, "it must be 1 to 86400.")],
    "gateway_workers": [(0, "it must be 1 to 256.")],
    "gateway_health_stale_s": [(5, "it must be 10 seconds or more")],
    "gateway_firewall": [("perhaps", BOOL)],
    "gateway_log_max_mib": [(0, "it must be 1 to 100000.")],
    "gateway_log_files": [(0, "it must be 1 to 1000.")],
    "peer_firewall_addresses": [
        (
            ["router-1.example.org"],
            (
                "peer_firewall_addresses (lowmem_peers) has router-1.example.org: it must be IP addresses or"
                " networks"
            ),
        ),
        (["10.0.0.300"], "(lowmem_peers) has 10.0.0.300"),
        (["10.0.0.0/33"], "(lowmem_peers) has 10.0.0.0/33"),
        (["fd00::/129"], "(lowmem_peers) has fd00::/129"),
        (["10.0.0.2; drop"], "(lowmem_peers) has 10.0.0.2; drop"),
    ],
    "peer_firewall_instance": [("a b", "it must be 1 to 32 letters, digits or _")],
    "peer_firewall_service_root": [("opt/vllm", PATH)],
    "peer_firewall_root": [("etc", PATH)],
}
CASES = [(variable, value, words, *more) for variable, bad in BAD.items() for value, words, *more in bad]

# systems that the roles do not know; what each says, and what the same roles say on the four that they know,
# where this machine has no card
SYSTEMS = [
    (
        "gpu_driver",
        ["Debian", "11.9", "x86_64"],
        "this host is debian11 on x86_64; supported are debian12, debian13, ubuntu2204, ubuntu2404 on x86_64",
    ),
    (
        "gpu_driver",
        ["Ubuntu", "20.04", "x86_64"],
        "this host is ubuntu2004 on x86_64; supported are debian12, debian13, ubuntu2204, ubuntu2404",
    ),
    ("gpu_driver", ["Ubuntu", "24.04", "aarch64"], "this host is ubuntu2404 on aarch64; supported are"),
    (
        "nvidia_repository",
        ["Fedora", "43", "x86_64"],
        "this host is fedora43 on x86_64; supported are debian12, debian13, ubuntu2204, ubuntu2404",
    ),
    *(
        (
            "gpu_driver",
            [name, version, "x86_64"],
            "the PCI bus shows 0 NVIDIA cards, gpu_driver_cards asks for 1: reseat or power the missing card",
        )
        for name, version in (
            ("Debian", "12.12"),
            ("Debian", "13.1"),
            ("Ubuntu", "22.04"),
            ("Ubuntu", "24.04"),
        )
    ),
    ("cuda_toolkit", ["Ubuntu", "22.04", "x86_64"], None),
    ("nvidia_repository", ["Ubuntu", "24.04", "x86_64"], None),
    ("host_memory", ["Ubuntu", "24.04", "x86_64"], None),
]


def role_of(variable):
    return next(role for role in ROLES if variable.startswith(f"{role}_"))


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Host of the inventory -> what its first failed task said (None: none failed), and how many tasks
    changed something.
    """
    plan = {
        "host_ram_bytes": 2**20, "host_ram": {"workers": 2**20},
        "service": {"memlock": "infinity", "drain_s": 280, "timeout_stop_s": 310},
        "load": {"clients": 8}, "deploy": {"host": "127.0.0.1", "port": 8000},
    }  # fmt: skip
    make_certificates()
    hosts = {}
    for number, (variable, value, _, *more) in enumerate(CASES):
        hosts[f"case-{number}"] = {
            "case_role": role_of(variable),
            "case_system": ["Debian", "12.12", "x86_64"],
            variable: value,
        }
        hosts[f"case-{number}"] |= more[0] if more else {}
    hosts["open"] = {
        "case_role": "gateway",
        "case_system": ["Debian", "12.12", "x86_64"],
        "lowmem_plan": plan | {"deploy": {"host": "0.0.0.0", "port": 8000}},
    }
    for number, (role, system, _) in enumerate(SYSTEMS):
        hosts[f"system-{number}"] = {"case_role": role, "case_system": system}
    # what the roles' own places must not be taken from, so that a case fails for its own variable only
    for host in hosts.values():
        host.setdefault("host_memory_swap_gib", 0)
        host.setdefault("lowmem_plan", plan)
    inventory = tmp_path_factory.mktemp("inventory") / "hosts.json"
    shared = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    inventory.write_text(json.dumps({"cases": {"hosts": hosts, "vars": shared}}))
    done = subprocess.run(
        [
            Path(sys.executable).with_name("ansible-playbook"),
            "-i",
            inventory,
            "tests/ansible/files/refusals.yml",
        ],
        cwd=ROOT,
        env=os.environ
        | {
            "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_FORKS": "4",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    report = json.loads(done.stdout[done.stdout.index("{") :])
    said = dict.fromkeys(hosts)
    for task in report["plays"][0]["tasks"]:
        for host, result in task["hosts"].items():
            if result.get("failed") and said[host] is None:
                said[host] = re.sub(r"^Validation of arguments failed:\n", "", result["msg"].strip())
    shutil.rmtree(TLS)
    return said, {host: counts["changed"] for host, counts in report["stats"].items()}


@pytest.mark.parametrize("role", ROLES)
def test_every_variable_has_an_entry_and_no_other(role):
    options = yaml.safe_load((ROOT / "roles" / role / "meta/argument_specs.yml").read_text())[
        "argument_specs"
    ]["main"]["options"]
    assert {variable for variable in BAD if role_of(variable) == role} == set(options)


# by number, as a value may hold a port or a folder of this process: workers that run side by side must give a
# case the same name
@pytest.mark.parametrize(
    ("number", "case"),
    [*enumerate(CASES)],
    ids=[f"{variable}-{number}" for number, (variable, *_) in enumerate(CASES)],
)
def test_a_bad_value_is_one_line_that_names_it(answers, number, case):
    (variable, value, words, *_), (said, changed) = case, answers
    line = said[f"case-{number}"]
    assert line is not None, "it was not refused"
    assert "\n" not in line
    assert words in line
    assert variable in line
    assert str(next(iter(value)) if isinstance(value, list | dict) and value else value) in line
    assert changed[f"case-{number}"] == 0


@pytest.mark.parametrize(
    ("number", "case"), [*enumerate(SYSTEMS)], ids=["-".join([role, *system]) for role, system, _ in SYSTEMS]
)
def test_systems(answers, number, case):
    (_, _, words), (said, changed) = case, answers
    line = said[f"system-{number}"]
    assert (line is None) if words is None else (words in line)
    assert changed[f"system-{number}"] == 0


def test_a_gateway_before_a_server_that_listens_everywhere_is_refused(answers):
    said, changed = answers
    assert (
        said["open"]
        == "lowmem_host is 0.0.0.0, where other hosts reach vLLM past the gateway: set it to 127.0.0.1, or"
        " take the host out of group gateway."
    )
    assert changed["open"] == 0
