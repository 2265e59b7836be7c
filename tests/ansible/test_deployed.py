"""The demo's deployment, with the real engine: it comes back, it stays as it is, it keeps its
key to itself.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.engine


def complete(deployed: Any, **replaced: str) -> tuple[int, dict[str, Any]]:
    """Status and answer of a completion of eight tokens. OSError where nobody listens."""
    headers = {
        "Authorization": f"Bearer {replaced.get('key', deployed.key)}",
        "Content-Type": "application/json",
    }
    body = {
        "model": deployed.plan["deploy"]["served_model_name"],
        "prompt": "The capital of France is",
        "max_tokens": 8,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{deployed.url}/v1/completions", data=json.dumps(body).encode(), headers=headers
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, {}


def server_of(deployed: Any) -> psutil.Process:
    """The API server: the supervisor's child that is not the watchdog."""
    children = psutil.Process(int((deployed.root / "run/supervisord.pid").read_text())).children()
    [server] = [child for child in children if "watch" not in child.cmdline()]
    return server


def test_it_answers(deployed: Any) -> None:
    status, answer = complete(deployed)
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["model"] == "SmolLM2-135M-Instruct"


def test_a_wrong_key_is_refused(deployed: Any) -> None:
    assert complete(deployed, key="sk-wrong-0123456789abcdef")[0] == 401


def test_a_second_run_changes_nothing(deployed: Any, playbook: Any) -> None:
    server = server_of(deployed)
    done = playbook("site.yml", "--skip-tags", "verify", variables=deployed.variables)
    assert done.rc == 0, done.text
    assert done.changed == 0, done.text
    assert server_of(deployed).pid == server.pid


def test_a_run_leaves_out_a_host_that_is_as_the_last_one_left_it(deployed: Any, playbook: Any) -> None:
    def run() -> str:
        done = playbook(
            "site.yml",
            "--skip-tags",
            "verify",
            variables={**deployed.variables, "lowmem_skip_unchanged": True},
        )
        assert done.rc == 0, done.text
        return str(done.text)

    file, record = deployed.root / "etc/supervise.sh", deployed.root / "as-deployed.json"
    mode = file.stat().st_mode & 0o777
    try:
        run()
        said = run()
        assert "left it: the rest of this run is left out" in said
        assert "TASK [vllm_service" not in said
        file.chmod(0o700)
        assert f"left it: {file}\n" in run()
        assert file.stat().st_mode & 0o777 == mode
    finally:
        record.unlink(missing_ok=True)


def test_check_mode_on_the_deployed_host_finds_nothing_to_do(deployed: Any, playbook: Any) -> None:
    done = playbook("site.yml", "--check", "--diff", "--skip-tags", "verify", variables=deployed.variables)
    assert done.rc == 0, done.text
    assert done.changed == 0, done.text


def test_check_mode_on_a_clean_host_runs_to_its_end(clean_root: Path, playbook: Any) -> None:
    variables = {"lowmem_root": str(clean_root), "lowmem_port": 18999}
    done = playbook("site.yml", "--check", "--diff", "--skip-tags", "verify", variables=variables)
    assert done.rc == 0, done.text
    assert "+    --kv-cache-memory-bytes 268435456" in done.text


def test_the_key_lies_in_one_file_that_only_its_user_reads(deployed: Any, playbook: Any) -> None:
    environment_file = deployed.root / "etc/vllm.env"
    assert environment_file.stat().st_mode & 0o777 == 0o600
    assert len(deployed.key) == 40
    holders = [
        path
        for folder in ("etc", "log", "run")
        for path in (deployed.root / folder).rglob("*")
        if path.is_file() and deployed.key in path.read_text(errors="replace")
    ]
    assert holders == [environment_file]
    for process in psutil.process_iter(["cmdline"]):
        assert deployed.key not in " ".join(process.info["cmdline"] or [])


def test_a_changed_key_is_in_no_output(deployed: Any, playbook: Any) -> None:
    """Check mode, so that the other tests keep theirs."""
    secret = "sk-test-changed-0123456789"
    done = playbook(
        "site.yml",
        "--check",
        "--diff",
        "-vvv",
        "--skip-tags",
        "verify",
        variables={**deployed.variables, "vllm_service_api_key": secret},
    )
    assert done.rc == 0, done.text
    assert done.changed >= 1
    assert secret not in done.text.split("--extra-vars")[0]
    assert deployed.key not in done.text


def test_the_launcher_on_the_host_passes_shellcheck(deployed: Any) -> None:
    subprocess.run(["shellcheck", deployed.root / "etc/low_mem.sh"], check=True)


def test_a_changed_argument_is_shown_before_it_is_made(deployed: Any, playbook: Any) -> None:
    variables = {**deployed.variables, "lowmem_overrides": {"max_num_seqs": 4}}
    done = playbook("site.yml", "--check", "--diff", "--skip-tags", "verify", variables=variables)
    assert done.rc == 0, done.text
    assert "-    --max-num-seqs 8" in done.text
    assert "+    --max-num-seqs 4" in done.text


def test_a_service_that_cannot_start_is_given_up_and_shown(
    deployed: Any, playbook: Any, tmp_path: Path
) -> None:
    """A second deployment beside the first, whose vLLM is told to log at a level that does not exist."""
    root = tmp_path / "host"
    root.mkdir()
    for folder in ("envs", "models"):
        (root / folder).symlink_to(deployed.root / folder)
    variables = {
        "lowmem_root": str(root),
        "lowmem_port": 18998,
        "vllm_service_start_limit": 1,
        "vllm_service_extra_environment": {"VLLM_LOGGING_LEVEL": "NOSUCH"},
    }
    try:
        done = playbook("site.yml", "--skip-tags", "verify", variables=variables)
        assert done.rc != 0
        assert "vLLM does not answer a completion: the service manager has given up on it" in done.flat
        assert f"the log is {root}/log/vllm.log" in done.flat
        assert "TASK [vllm_service : Show the end of the log]" in done.text
    finally:
        control = next((deployed.root / "envs").glob("vllm-*/bin/supervisorctl"))
        subprocess.run([control, "-c", root / "etc/supervisord.conf", "shutdown"], check=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="whoever runs the tests is an ordinary user already")
def test_an_ordinary_user_deploys_it(deployed: Any) -> None:
    """As `nobody`, with the environments that are there: nothing of the deploy needs root."""
    nobody = pwd.getpwnam("nobody")
    # pytest's own temporary folders are closed to other users
    home = Path(tempfile.mkdtemp(prefix="lowmem-", dir="/var/tmp"))
    root = home / "host"
    (root / "models").mkdir(parents=True)
    (root / "envs").mkdir()
    for environment in (deployed.root / "envs").glob("*-*/"):
        (root / "envs" / environment.name).symlink_to(environment)
    for entry in (deployed.root / "models").iterdir():
        copy = shutil.copytree if entry.is_dir() else shutil.copy2
        copy(entry, root / "models" / entry.name)
    for path in [home, *home.rglob("*")]:
        os.chown(path, nobody.pw_uid, nobody.pw_gid, follow_symlinks=False)
    as_nobody = [
        "setpriv",
        f"--reuid={nobody.pw_uid}",
        f"--regid={nobody.pw_gid}",
        "--clear-groups",
        "--bounding-set=-all",
        "env",
    ]
    as_nobody += [
        f"HOME={home}",
        f"ANSIBLE_HOME={home}/ansible",
        f"XDG_CACHE_HOME={home}/cache",
        "PYTHONDONTWRITEBYTECODE=1",
    ]
    playbook = Path(sys.executable).parent / "ansible-playbook"
    settings = [
        "-e",
        f"lowmem_root={root}",
        "-e",
        "lowmem_port=18997",
        "-e",
        f"ansible_remote_tmp={home}/tmp",
    ]
    control = [
        next((deployed.root / "envs").glob("vllm-*/bin/supervisorctl")),
        "-c",
        root / "etc/supervisord.conf",
    ]
    try:
        done = subprocess.run(
            [*as_nobody, playbook, "site.yml", "--skip-tags", "verify", *settings],
            cwd=Path(__file__).resolve().parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        assert (root / "etc/vllm.env").stat().st_uid == nobody.pw_uid
        supervisor = psutil.Process(int((root / "run/supervisord.pid").read_text()))
        assert {child.uids().effective for child in supervisor.children()} == {nobody.pw_uid}
    finally:
        subprocess.run([*control, "shutdown"], check=False)
        shutil.rmtree(home)
