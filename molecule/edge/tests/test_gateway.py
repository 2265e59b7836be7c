"""What another host can reach of the service, and how: after the play, and again after a reboot."""

import base64
import json
import re
import shlex
import time
from pathlib import Path

import pytest
from conftest import CERTIFICATE, KEYS, MODEL, needs_minutes

testinfra_hosts = ["ansible://edge-one"]

LISTED = {
    ("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/messages"), ("POST", "/v1/messages/count_tokens"),
}  # fmt: skip
COMPLETION = {"model": MODEL, "prompt": "Hello", "max_tokens": 8, "ignore_eos": True}
UNITS = (
    "vllm-gateway@main.service",
    "vllm-gateway-health@main.service",
    "vllm-gateway-look@main.timer",
    "vllm-gateway-firewall@main.service",
)


def until(condition, seconds, what):
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        if condition():
            return
        time.sleep(2)
    pytest.fail(f"not within {seconds} s: {what}")


@pytest.fixture(autouse=True)
def healthy(host, client):
    """After a reboot the engine needs its time; the play waited for it."""
    until(lambda: client.ask("GET", "/healthz")[0] == 200, 600, "healthz 200")


@pytest.mark.parametrize("unit", UNITS)
def test_units_run_and_start_at_boot(host, unit):
    assert host.check_output("systemctl is-active %s", unit) == "active", host.run(
        "journalctl -u %s -n 40 --no-pager", unit
    ).stdout
    assert host.run("systemctl is-enabled %s", unit).stdout.strip() == "enabled"


def test_the_distributions_own_server_does_not_run(host):
    assert host.run("systemctl is-active nginx.service").stdout.strip() == "inactive"


def test_the_sandbox_holds(host):
    for unit, most in (("vllm-gateway@main.service", 3.0), ("vllm-gateway-health@main.service", 2.0)):
        said = host.run("systemd-analyze security --no-pager %s", unit).stdout
        assert float(re.search(r"Overall exposure level for \S+: (\d+\.\d)", said)[1]) <= most, said
    workers = host.check_output("ps -o user= --ppid $(cat /run/vllm-gateway-main/nginx.pid)").split()
    assert set(workers) <= {"vllm-gateway", "vllm-g+"}
    assert len(workers) >= 2


SCAN = """
import asyncio, sys
address, limit = sys.argv[1], asyncio.Semaphore(400)
async def one(port):
    async with limit:
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(address, port), 5)
        except (OSError, asyncio.TimeoutError):
            return None
        writer.close()
        return port
async def main():
    found = await asyncio.gather(*(one(port) for port in range(1, 65536)))
    print(*(port for port in found if port))
asyncio.run(main())
"""


def open_ports(client, ports=None):
    script = SCAN if ports is None else SCAN.replace("range(1, 65536)", repr(ports))
    return [
        int(word)
        for word in client.shell.check_output(f"python3 -c {shlex.quote(script)} {client.address}").split()
    ]


def test_from_another_host_two_ports_are_open(host, client):
    """All of them are tried, and above all those that something of the host listens on."""
    listening = {
        int(line.split()[3].rsplit(":", 1)[1])
        for line in host.check_output("ss --no-header -ltn").splitlines()
    }
    assert {22, 443, 8000, 9444} <= listening
    assert len(listening) > 5, "the engine's own listeners are among them"
    assert open_ports(client) == [22, 443]


STORE = """
import socket, sys, time, torch.distributed
store = torch.distributed.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(300)
"""


def test_a_listener_of_torch_is_hidden_though_it_takes_every_interface(host, client):
    """torch's own TCPStore as several cards have one, run by the service's user; with the rules, and without
    them.
    """
    unit = "edge-tcpstore"
    host.run("systemctl stop %s; rm -f /run/edge-tcpstore", unit)
    start = [
        "systemd-run",
        f"--unit={unit}",
        "--collect",
        "--uid=vllm",
        "--property=StandardOutput=file:/run/edge-tcpstore",
        "--setenv=HOME=/tmp",
    ]
    host.check_output(shlex.join([*start, "/opt/vllm-lowmem/current/env/bin/python", "-c", STORE]))
    try:
        until(lambda: host.run("cat /run/edge-tcpstore").stdout.strip(), 300, "a TCPStore")
        port = int(host.file("/run/edge-tcpstore").content_string)
        assert re.search(rf"(\*|0\.0\.0\.0|\[::\]):{port}\b", host.check_output("ss --no-header -ltn")), (
            "it listens on every interface"
        )
        assert host.run(f"timeout 5 bash -c '</dev/tcp/127.0.0.1/{port}'").rc == 0
        assert open_ports(client, [port]) == []
        host.check_output("systemctl stop vllm-gateway-firewall@main.service")
        assert open_ports(client, [port]) == [port], (
            "without the rules it is reachable: that is what they are for"
        )
        host.check_output("systemctl start vllm-gateway-firewall@main.service")
        assert open_ports(client, [port]) == []
    finally:
        host.run("systemctl start vllm-gateway-firewall@main.service; systemctl stop %s", unit)


def routes_of(host):
    """Every method and path that this server says it has: in its own OpenAPI, and in its log at the start."""
    text = host.check_output(
        "curl --silent --fail http://127.0.0.1:8000/openapi.json -H %s",
        f"Authorization: Bearer {KEYS['alice']}",
    )
    found = {
        (method.upper(), path) for path, methods in json.loads(text)["paths"].items() for method in methods
    }
    log = host.check_output("grep -oE 'Route: \\S+, Methods: .*' /opt/vllm-lowmem/log/vllm.log").splitlines()
    for line in log:
        path, methods = re.match(r"Route: (\S+), Methods: (.*)", line).groups()
        found |= {(method.strip(), path) for method in methods.split(",")}
    return found


def test_only_what_is_listed_reaches_the_server(host, client):
    every = routes_of(host)
    assert every >= LISTED
    assert len(every) > 25
    for method, path in sorted(every):
        status, text = client.ask(
            method,
            path.replace("{", "").replace("}", ""),
            KEYS["alice"],
            {} if method == "POST" else None,
            ["--head"] if method == "HEAD" else [],
        )
        if (method, path) in LISTED:
            assert status in (200, 400, 422), (method, path, status, text)
        else:
            assert status in (404, 405), (method, path, status, text)
            assert (
                "x-answered-by: gateway" in text.lower()
                if method == "HEAD"
                else json.loads(text)["error"]["code"] == status
            )
    for path in ("/health", "/metrics", "/openapi.json", "/tokenize"):
        assert client.ask("GET", path)[0] == 404


def test_a_completion_with_each_key_and_none_without(client):
    for name in ("alice", "bob"):
        status, text = client.ask("POST", "/v1/completions", KEYS[name], COMPLETION)
        assert status == 200, text
        assert json.loads(text)["usage"]["completion_tokens"] == 8
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    assert client.ask("POST", "/v1/chat/completions", KEYS["bob"], chat)[0] == 200
    for key in (None, "sk-wrong-0123456789abcdef", KEYS["alice"].lower()):
        assert client.ask("POST", "/v1/completions", key, COMPLETION)[0] == 401


def renew(host, client, name):
    """Puts another pair where the certificate lies, as a site's own tool does."""
    make = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 90 -keyout key.new"
        " -out new"
    )
    names = f"-subj /CN={name} -addext subjectAltName=DNS:edge-one,IP:{client.address}"
    command = (
        f"cd {CERTIFICATE.rsplit('/', 1)[0]} && {make} {names} && mv key.new key.pem && mv new"
        " certificate.pem"
    )
    host.check_output(f"sh -c {shlex.quote(command)} 2>/dev/null")


def test_a_stream_outlives_a_renewed_certificate(host, client):
    """The certificate on the disk is another one while a stream runs: new connections get it, and the stream
    ends whole.
    """
    body = {**COMPLETION, "max_tokens": 300, "stream": True}
    client.ask("GET", "/v1/models", KEYS["alice"])
    command = ["curl", "--silent", "--no-buffer", "--max-time", "1800", "--cacert", "/tmp/before.pem"]
    command += [
        "--header",
        f"Authorization: Bearer {KEYS['alice']}",
        "--header",
        "Content-Type: application/json",
    ]
    command += ["--data", json.dumps(body), f"https://{client.address}/v1/completions"]
    before = served(client)
    client.shell.run(
        f"rm -f /tmp/stream; cp /tmp/gateway.pem /tmp/before.pem; {shlex.join(command)} >/tmp/stream 2>&1 &"
    )
    until(lambda: "data: {" in client.shell.run("head -c 300 /tmp/stream").stdout, 300, "the first token")
    renew(host, client, "streaming")
    host.check_output("systemctl start vllm-gateway-look@main.service")
    assert "[DONE]" not in client.shell.run("tail -c 300 /tmp/stream").stdout, (
        "the stream ended before the reload: nothing was proven"
    )
    assert served(client) not in ("", before)
    assert client.ask("GET", "/v1/models", KEYS["bob"])[0] == 200
    until(
        lambda: "data: [DONE]" in client.shell.run("tail -c 300 /tmp/stream").stdout,
        1800,
        "the end of the stream",
    )
    assert client.shell.check_output("grep -c '^data: {' /tmp/stream").strip() == "300"


def test_a_renewed_certificate_is_noticed(host, client):
    before = served(client)
    renew(host, client, "noticed")
    until(lambda: served(client) not in ("", before), 240, "the renewed certificate")
    assert client.ask("GET", "/v1/models", KEYS["bob"])[0] == 200
    figures = host.check_output("curl --silent --fail http://127.0.0.1:9444/metrics")
    assert "\nlowmem_gateway_configuration_loaded 1\n" in figures
    left = float(re.search(r"\nlowmem_gateway_certificate_not_after_seconds (\d+)\n", figures)[1]) - float(
        host.check_output("date +%s")
    )
    assert 89 * 86400 < left <= 90 * 86400


def served(client):
    return client.shell.run(
        f"timeout 10 python3 -c 'import ssl; print(ssl.get_server_certificate((\"{client.address}\", 443)))'"
    ).stdout


def test_a_key_that_does_not_fit_is_not_loaded_and_is_told(host, client):
    key = CERTIFICATE.replace("certificate", "key")
    host.check_output(
        f"cp {key} /root/key.kept && openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out"
        f" {key} 2>/dev/null"
    )
    try:
        assert host.run("systemctl start vllm-gateway-look@main.service").rc != 0
        assert "nginx refuses what lies on the disk" in host.check_output(
            "journalctl -u vllm-gateway-look@main.service -n 20 --no-pager"
        )
        assert "\nlowmem_gateway_configuration_loaded 0\n" in host.check_output(
            "curl --silent http://127.0.0.1:9444/metrics"
        )
        assert client.ask("GET", "/v1/models", KEYS["alice"])[0] == 200
    finally:
        host.check_output(f"mv /root/key.kept {key}")
    host.check_output("systemctl start vllm-gateway-look@main.service")
    assert "\nlowmem_gateway_configuration_loaded 1\n" in host.check_output(
        "curl --silent http://127.0.0.1:9444/metrics"
    )


@needs_minutes
def test_health_is_no_while_the_engine_hangs(host, client):
    """vLLM's own /health goes on saying 200."""
    engine = host.check_output("pgrep --full '^VLLM::EngineCore'")
    host.check_output("kill -STOP %s", engine)
    try:
        until(lambda: client.ask("GET", "/healthz")[0] == 503, 120, "healthz 503")
        assert json.loads(client.ask("GET", "/healthz")[1])["reason"] == "hung"
        assert host.run("curl --silent --fail --max-time 10 http://127.0.0.1:8000/health").rc == 0
    finally:
        host.check_output("kill -CONT %s", engine)
    until(lambda: client.ask("GET", "/healthz")[0] == 200, 120, "healthz 200")


def test_health_is_no_when_nobody_looks(host, client):
    host.check_output("systemctl stop vllm-gateway-health@main.service")
    try:
        assert client.ask("GET", "/healthz")[0] == 503
    finally:
        host.check_output("systemctl start vllm-gateway-health@main.service")


def test_a_key_has_its_limit(client):
    seen = [client.ask("GET", "/v1/models", KEYS["limited"])[0] for _ in range(5)]
    assert 429 in seen
    assert seen[-1] == 429
    assert client.ask("GET", "/v1/models", KEYS["bob"])[0] == 200


def test_the_log_names_keys_and_holds_none(host, client):
    client.ask("GET", "/v1/models", KEYS["bob"])
    last = json.loads(host.check_output("tail -n 1 /var/log/vllm-gateway/main/access.log"))
    assert (last["key"], last["path"], last["status"]) == ("bob", "/v1/models", 200)
    place = host.check_output("readlink -f /etc/vllm-gateway/main") + "/keys.conf"
    for name, key in KEYS.items():
        # as it is, as a pattern, and as a browser sends it; the journal holds this test's own commands, which
        # sudo notes
        forms = (key, re.escape(key), base64.b64encode(f"{name}:{key}".encode()).decode())
        words = " ".join(f"-e {shlex.quote(form)}" for form in forms)
        assert host.run(
            f"grep -rlF --exclude-dir=journal {words} /var/log /run /etc 2>/dev/null"
        ).stdout.split() == [place]
    assert host.file("/etc/vllm-gateway/main/keys.conf").mode == 0o600
    assert host.run("logrotate --debug /etc/logrotate.d/vllm-gateway-main").rc == 0


def test_the_log_is_rotated_and_goes_on(host, client):
    host.check_output("logrotate --force /etc/logrotate.d/vllm-gateway-main")
    client.ask("GET", "/v1/models", KEYS["bob"])
    until(lambda: host.file("/var/log/vllm-gateway/main/access.log").size > 0, 30, "a line in the new log")


def quoted():
    """The commands that runbooks quote for a host with a gateway: blocks marked `bash edge`."""
    block = re.compile(r"^( *)```bash edge\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
    for path in sorted((Path(__file__).parents[3] / "docs/runbooks").glob("*.md")):
        for _, text in block.findall(path.read_text()):
            for line in filter(None, map(str.strip, text.splitlines())):
                yield pytest.param(line, id=f"{path.stem}: {line[:50]}")


@pytest.mark.parametrize("command", list(quoted()))
def test_runbook_commands_run(host, command):
    done = host.run("bash -euo pipefail -c %s", command)
    assert done.rc == 0, done.stderr + done.stdout
