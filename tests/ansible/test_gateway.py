"""The gateway's configuration: as literal files, and in a real nginx on loopback before a small server in
vLLM's place.
"""

from __future__ import annotations

import base64
import getpass
import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from lowmem.service import gateway_health

FILES = Path(__file__).parent / "files"
GOLDEN = Path(__file__).parent / "golden" / "gateway"
REPOSITORY = Path(__file__).resolve().parents[2]
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed: apt-get install nginx-light")

ALICE, BOB, SLOW, NEW = (
    "sk-alice-0123456789abcdef",
    "sk-bob~0123456789+/abcdef==",
    "sk-slow.0123456789abcdef",
    "sk-new-0123456789abcdefgh",
)
# a name that is a word of nginx's own too
KEYS = {"alice": ALICE, "bob": BOB, "default": SLOW}
LIMITS = {"default": {"requests_per_minute": 1, "burst": 2}, "bob": {"concurrent_requests": 1}}


TREE = ("nginx.conf", "forward.conf", "health.conf", "errors.conf", "gateway.sh")
NAMES = (
    *TREE, "firewall.nft", "tmpfiles.conf", "logrotate", "vllm-gateway@.service",
    "vllm-gateway-health@.service",
    "vllm-gateway-look@.service", "vllm-gateway-look@.timer", "vllm-gateway-firewall@.service",
)  # fmt: skip


def key_file(keys: dict[str, str]) -> dict[str, str]:
    text = "".join(f"VLLM_API_KEY_{name}={key}\n" for name, key in keys.items())
    return {
        "content": (
            base64.b64encode(f"# keys\nVLLM_API_KEY={next(iter(keys.values()))}\n{text}".encode()).decode()
        )
    }


def render(folder: Path, **variables: Any) -> subprocess.CompletedProcess[str]:
    """One case of tests/ansible/files/gateway.yml."""
    plan = json.loads((FILES / "plan.json").read_text())
    plan["deploy"] |= variables.pop("deploy", {})
    inventory, given = folder / "case.json", folder / "variables.json"
    local = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    inventory.write_text(json.dumps({"cases": {"hosts": {"gpu-1.example.org": local}}}))
    given.write_text(json.dumps({"lowmem_plan": plan, **variables}))
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    playbook = Path(sys.executable).with_name("ansible-playbook")
    command = [
        playbook,
        "-i",
        inventory,
        "tests/ansible/files/gateway.yml",
        "--diff",
        "--extra-vars",
        f"@{given}",
    ]
    return subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | {"PATH": path, "ANSIBLE_NOCOLOR": "1"}, text=True,
        check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    done = render(
        folder, destination=str(folder / "tree"), names=NAMES, __gateway_key_file=key_file(KEYS),
        gateway_key_limits=LIMITS,
        gateway_addresses=["0.0.0.0", "::"],
        gateway_routes=["GET /v1/models", "POST /v1/completions", "GET /v1/responses/{id}",
        "POST /v1/responses/{id}/cancel"],
        deploy={"port": 8000},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return folder / "tree"


@pytest.mark.parametrize("name", [*NAMES, "keys.conf"])
def test_golden(rendered: Path, name: str) -> None:
    """After a wanted change: LOWMEM_GOLDEN=write .lowmem/venv/bin/pytest tests/ansible/test_gateway.py, and
    read the diff.
    """
    if os.environ.get("LOWMEM_GOLDEN") == "write":
        GOLDEN.mkdir(exist_ok=True)
        shutil.copyfile(rendered / name, GOLDEN / name)
    assert (rendered / name).read_text() == (GOLDEN / name).read_text()


def test_the_script_is_legal_bash(rendered: Path) -> None:
    subprocess.run(["bash", "-n", rendered / "gateway.sh"], check=True)
    subprocess.run(["shellcheck", "--severity=warning", rendered / "gateway.sh"], check=True)


def test_keys_are_in_one_file(rendered: Path) -> None:
    assert [key for name in NAMES for key in KEYS.values() if key in (rendered / name).read_text()] == []


# ---------------------------------------------------------------- a real nginx


class Upstream(ThreadingHTTPServer):
    """In vLLM's place: notes what reaches it, answers everything with 200, and streams one line at a time as
    the test lets it.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Engine)
        self.seen: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.lines = threading.Semaphore(0)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Engine(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Upstream

    def _answer(self) -> None:
        self.server.seen.append((self.command, self.path))
        self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(200)
        if b"stream" in body:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for number in range(3):
                assert self.server.lines.acquire(timeout=60)
                self.wfile.write(f"8\r\ndata: {number}\n\r\n".encode())
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")
            return
        self.send_header("Content-Length", "3")
        self.end_headers()
        self.wfile.write(b"ok\n")

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_OPTIONS = _answer

    def log_message(self, *arguments: Any) -> None:
        pass


class Working:
    """An engine that answers, or not, as the test says."""

    answers = True

    def figures(self, timeout_s: float) -> tuple[str, ...] | None:
        return ("1",) if self.answers else None

    def busy(self) -> bool:
        return False

    def complete(self, timeout_s: float) -> Any:
        return "tokens" if self.answers else "nothing"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class Gateway:
    folder: Path
    port: int
    metrics_port: int
    upstream: Upstream
    variables: dict[str, Any] = field(default_factory=dict)

    @property
    def tree(self) -> Path:
        return self.folder / "etc/main"

    def connect(self) -> http.client.HTTPSConnection:
        trusted = ssl.create_default_context(cafile=str(self.folder / "certificate.pem"))
        return http.client.HTTPSConnection("127.0.0.1", self.port, context=trusted, timeout=60)

    def ask(
        self, method: str, path: str, key: str | None = None, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers in small letters, body. The path goes out as it is."""
        connection = self.connect()
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in (({"Authorization": f"Bearer {key}"} if key else {}) | headers).items():
            connection.putheader(name, value)
        if body is not None or method in ("POST", "PUT", "PATCH"):
            connection.putheader("Content-Length", str(len(body or b"")))
        connection.endheaders(body)
        answer = connection.getresponse()
        result = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        connection.close()
        return result

    def put(self, **changes: Any) -> subprocess.CompletedProcess[str]:
        self.variables |= changes
        return render(self.folder, names=TREE, **self.variables)

    def run(self, word: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.tree / "gateway.sh", word], capture_output=True, text=True, check=False, timeout=60
        )

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "log/main/access.log").read_text().splitlines()]

    def stream(self, key: str) -> tuple[http.client.HTTPSConnection, http.client.HTTPResponse]:
        connection = self.connect()
        connection.request("POST", "/v1/completions", b'{"stream": true}', {"Authorization": f"Bearer {key}"})
        return connection, connection.getresponse()


@contextmanager
def serving(folder: Path, behind: str = "service") -> Iterator[Gateway]:
    """nginx as the role configures it, but for its folders, its ports, and the user, who is this one."""
    upstream = Upstream()
    router: dict[str, Any] = {
        "gateway_upstream": "router", "gateway_upstream_address": f"127.0.0.1:{upstream.server_port}",
        "gateway_clients": 16,
        "gateway_stop_s": 300, "gateway_keys_path": "/opt/vllm-router/etc/keys.env", "lowmem_plan": {},
    }  # fmt: skip
    gateway = Gateway(folder, free_port(), free_port(), upstream)
    for name in ("etc", "run", "log/main"):
        (folder / name).mkdir(parents=True)
    make_certificate(folder)
    done = gateway.put(
        gateway_root=str(folder / "etc"), gateway_log_root=str(folder / "log"),
        __gateway_run=str(folder / "run"),
        __gateway_health_run=str(folder / "run"), gateway_status_root=str(folder / "status"),
        gateway_user=getpass.getuser(),
        gateway_addresses=["127.0.0.1"], gateway_port=gateway.port, gateway_metrics_port=gateway.metrics_port,
        gateway_tls_certificate=str(folder / "certificate.pem"), gateway_tls_key=str(folder / "key.pem"),
        __gateway_key_file=key_file(KEYS), gateway_key_limits=LIMITS, gateway_max_body_mib=1,
        gateway_answer_timeout_s=60,
        gateway_routes=["GET /v1/models", "POST /v1/completions", "GET /v1/responses/{id}"],
        deploy={"port": upstream.server_port}, **(router if behind == "router" else {}),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert gateway.run("note").returncode == 0
    nginx = subprocess.Popen(
        [str(NGINX), "-c", gateway.tree / "nginx.conf", "-g", "daemon off;"], stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: socket.create_connection(("127.0.0.1", gateway.port)).close() is None)
        yield gateway
    finally:
        nginx.terminate()
        nginx.wait(30)
        upstream.shutdown()
        upstream.server_close()


def make_certificate(folder: Path) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days",
        "2", "-subj", "/CN=test",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / "key.pem", "-out",
         folder / "certificate.pem"],
        check=True, capture_output=True,
    )  # fmt: skip


def wait_for(condition: Any, seconds: float = 30) -> None:
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise AssertionError("it did not come to pass")


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    # not pytest's own folder, whose path may be too long for a socket
    with tempfile.TemporaryDirectory(prefix="gw") as name, serving(Path(name)) as started:
        yield started


@needs_nginx
def test_what_is_listed_is_passed_on_and_nothing_else(gateway: Gateway) -> None:
    gateway.upstream.seen.clear()
    assert gateway.ask("GET", "/v1/models", ALICE)[0] == 200
    assert gateway.ask("POST", "/v1/completions?a=b", ALICE, b"{}")[0] == 200
    assert gateway.ask("GET", "/v1/responses/resp_1-a", ALICE)[0] == 200
    # spelled otherwise, it arrives as it is listed
    assert gateway.ask("POST", "/v1//completions", ALICE, b"{}")[0] == 200
    assert gateway.ask("POST", "/x/../v1/%63ompletions", ALICE, b"{}")[0] == 200
    known = [("GET", "/v1/models"), ("POST", "/v1/completions?a=b"), ("GET", "/v1/responses/resp_1-a")] + [
        ("POST", "/v1/completions")
    ] * 2
    assert gateway.upstream.seen == known
    for path in (
        "/", "/health", "/metrics", "/tokenize", "/version", "/load", "/invocations", "/openapi.json",
        "/docs", "/pause", "/ping",
        "/v1", "/v1/", "/v1/models/", "/v1/modelsx", "/V1/models", "/v1/embeddings", "/v1/../tokenize",
        "/v1/models/../../tokenize",
        "/v1/responses/a/cancel", "/v1/responses/..%2f..%2ftokenize", "/v1/responses/a%0d%0aX:y",
        "/v1/responses/a%20b", "/v1/responses/a%2fb",
        "/v1/models%00", "/%2e%2e/tokenize", "/.gateway/429", "/v1/models;x",
    ):  # fmt: skip
        for method in ("GET", "POST"):
            status, headers, body = gateway.ask(method, path, ALICE)
            # 400: no path at all
            assert status == (400 if "%00" in path or path.startswith("/%2e%2e") else 404), path
            assert headers["content-type"] == "application/json"
            assert json.loads(body)["error"]["code"] == status
    assert gateway.upstream.seen == known


@needs_nginx
def test_before_a_router_it_takes_no_plan_and_health_is_the_routers_own() -> None:
    with tempfile.TemporaryDirectory(prefix="gw") as name, serving(Path(name), behind="router") as gateway:
        assert gateway.ask("POST", "/v1/completions", ALICE, b"{}")[0] == 200
        assert gateway.ask("GET", "/healthz")[0] == 200
        assert gateway.ask("GET", "/workers", ALICE)[0] == 404
        assert gateway.ask("POST", "/add_worker?url=http://203.0.113.1", ALICE)[0] == 404
        assert gateway.upstream.seen == [("POST", "/v1/completions"), ("GET", "/readiness")]
        (gateway.folder / "run/figures.prom").write_text("lowmem_gateway_configuration_loaded 1\n")
        with urllib.request.urlopen(f"http://127.0.0.1:{gateway.metrics_port}/metrics", timeout=60) as answer:
            assert (answer.headers["Content-Type"], answer.read()) == (
                "text/plain; version=0.0.4",
                b"lowmem_gateway_configuration_loaded 1\n",
            )


@needs_nginx
def test_a_method_that_is_not_listed_is_refused(gateway: Gateway) -> None:
    gateway.upstream.seen.clear()
    for method, path in (
        ("POST", "/v1/models"),
        ("GET", "/v1/completions"),
        ("DELETE", "/v1/completions"),
        ("OPTIONS", "/v1/completions"),
        ("POST", "/healthz"),
    ):
        status, _, body = gateway.ask(method, path, ALICE)
        assert (status, json.loads(body)["error"]["code"]) == (405, 405)
    assert gateway.upstream.seen == []


@needs_nginx
def test_a_known_key_is_asked_for(gateway: Gateway) -> None:
    gateway.upstream.seen.clear()
    basic = base64.b64encode(f"alice:{ALICE}".encode()).decode()
    for sent in (
        None, "", "Bearer", "Bearer ", f"Bearer {ALICE}x", f"Bearer {ALICE[:-1]}", f"Bearer {ALICE.upper()}",
        f"Bearer  {ALICE}", ALICE,
        f"Basic {basic}", f"Bearer {ALICE} {BOB}", f"Bearer {SLOW.replace('.', 'x')}",
    ):  # fmt: skip
        status, headers, body = gateway.ask(
            "GET", "/v1/models", **({"Authorization": sent} if sent is not None else {})
        )
        assert status == 401, sent
        assert headers["www-authenticate"] == "Bearer"
        assert json.loads(body)["error"]["type"] == "authentication_error"
    assert gateway.upstream.seen == []
    for sent in (f"Bearer {ALICE}", f"bearer {BOB}"):
        assert gateway.ask("GET", "/v1/models", Authorization=sent)[0] == 200
    # vLLM holds the key against its own list once more
    assert [headers["authorization"] for headers in gateway.upstream.headers[-2:]] == [
        f"Bearer {ALICE}",
        f"bearer {BOB}",
    ]


@needs_nginx
def test_a_token_is_passed_on_when_it_comes(gateway: Gateway) -> None:
    connection, answer = gateway.stream(ALICE)
    for number in range(3):
        # the next one is sent only after this one was read here
        gateway.upstream.lines.release()
        assert answer.readline() == f"data: {number}\n".encode()
    assert answer.read() == b""
    connection.close()


@needs_nginx
def test_a_reload_takes_new_keys_and_leaves_a_stream(gateway: Gateway) -> None:
    before = (gateway.tree / "keys.conf").read_text()
    connection, answer = gateway.stream(ALICE)
    gateway.upstream.lines.release()
    assert answer.readline() == b"data: 0\n"
    assert gateway.ask("GET", "/v1/models", NEW)[0] == 401
    assert gateway.run("state").stdout == "loaded\n"
    done = gateway.put(__gateway_key_file=key_file({"bob": BOB, "default": SLOW, "new": NEW}))
    assert done.returncode == 0, done.stdout
    assert [key for key in (ALICE, BOB, NEW) if key in done.stdout] == []
    assert gateway.run("state").stdout == "stale\n"
    assert gateway.run("reload").returncode == 0
    assert gateway.run("state").stdout == "loaded\n"
    assert (gateway.ask("GET", "/v1/models", NEW)[0], gateway.ask("GET", "/v1/models", ALICE)[0]) == (
        200,
        401,
    )
    # begun with a key that is gone
    for number in (1, 2):
        gateway.upstream.lines.release()
        assert answer.readline() == f"data: {number}\n".encode()
    assert answer.read() == b""
    connection.close()
    (gateway.tree / "keys.conf").write_text(before)
    gateway.variables["__gateway_key_file"] = key_file(KEYS)
    assert gateway.run("reload").returncode == 0


def workers(gateway: Gateway) -> list[psutil.Process]:
    main = psutil.Process(int((gateway.folder / "run/nginx.pid").read_text()))
    return main.children()


Rotated = Callable[[], AbstractContextManager[None]]


@pytest.fixture(scope="module")
def rotated(gateway: Gateway) -> Rotated:
    """Return what puts alice's next key in place, as the role does before it reloads, and then the old one.

    Both were rendered before, since a play takes longer than a connection may be silent.
    """
    links = (gateway.tree, gateway.tree.with_name("main-keys"))
    assert gateway.put(__gateway_key_file=key_file({**KEYS, "alice": NEW})).returncode == 0
    later = [Path(shutil.copytree(link, gateway.folder / "rotated" / link.name)) for link in links]
    assert gateway.put(__gateway_key_file=key_file(KEYS)).returncode == 0
    assert gateway.run("reload").returncode == 0
    before = [link.resolve() for link in links]

    def point(targets: list[Path]) -> None:
        for link, target in zip(links, targets, strict=True):
            link.with_suffix(".new").symlink_to(target)
            link.with_suffix(".new").replace(link)

    @contextmanager
    def rotation() -> Iterator[None]:
        point(later)
        try:
            yield
        finally:
            point(before)
            assert gateway.run("reload").returncode == 0

    return rotation


@needs_nginx
def test_a_reload_ends_after_the_old_workers_took_their_last_connection(
    gateway: Gateway, rotated: Rotated
) -> None:
    old = workers(gateway)
    with rotated():
        old[0].suspend()
        with subprocess.Popen([gateway.tree / "gateway.sh", "reload"]) as reload:
            try:
                wait_for(lambda: len(set(workers(gateway)) - set(old)) == 2)
                # the new workers serve, and one old worker has not heard of it yet
                with pytest.raises(subprocess.TimeoutExpired):
                    reload.wait(1)
                assert gateway.run("state").stdout == "stale\n"
            finally:
                old[0].resume()
            assert reload.wait(30) == 0
        # 429 where it is asked too often
        assert {gateway.ask("GET", "/v1/models", NEW)[0] for _ in range(100)} <= {200, 429}


@needs_nginx
@pytest.mark.fault("revoked-key-old-worker")
@pytest.mark.parametrize("sent", [b"", b"GET /v1/models HTTP/1.1\r\nHost: a\r\n"], ids=["nothing", "half"])
def test_a_revoked_key_is_refused_on_a_connection_from_before(
    gateway: Gateway, rotated: Rotated, sent: bytes, fault: Any
) -> None:
    """An old worker keeps a connection whose request it has begun to read, and answers it."""
    trusted = ssl.create_default_context(cafile=str(gateway.folder / "certificate.pem"))
    streaming, answer = gateway.stream(BOB)
    with ExitStack() as stack:
        early = []
        for _ in range(8):  # some with each worker
            plain = stack.enter_context(socket.create_connection(("127.0.0.1", gateway.port), 60))
            early.append(stack.enter_context(trusted.wrap_socket(plain, server_hostname="127.0.0.1")))
            early[-1].sendall(sent)
        gateway.upstream.seen.clear()
        with rotated():
            assert gateway.run("reload").returncode == 0
            statuses = []
            for connection in early:
                rest = f"Authorization: Bearer {ALICE}\r\nConnection: close\r\n\r\n".encode()
                with suppress(OSError):  # closed by the old worker
                    connection.sendall((b"" if sent else b"GET /v1/models HTTP/1.1\r\nHost: a\r\n") + rest)
                    statuses.append(connection.recv(12))
        assert set(statuses) <= {b"HTTP/1.1 401", b""}
        assert (b"HTTP/1.1 401" in statuses) or not sent
        assert gateway.upstream.seen == []
    for number in range(3):
        gateway.upstream.lines.release()
        assert answer.readline() == f"data: {number}\n".encode()
    streaming.close()
    fault.saw(
        f"{statuses.count(b'HTTP/1.1 401')} of 8 refused by the old worker, the rest closed; streams go on"
    )


@needs_nginx
@pytest.mark.fault("slow-tls-clients")
def test_clients_that_begin_and_send_nothing_more(gateway: Gateway, fault: Any) -> None:
    trusted = ssl.create_default_context(cafile=str(gateway.folder / "certificate.pem"))
    header = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
    body = header + f"Authorization: Bearer {ALICE}\r\nContent-Length: 9\r\n\r\n{{".encode()
    began = time.monotonic()
    with ExitStack() as stack:
        kinds: dict[str, list[socket.socket]] = {"handshake": [], "header": [], "body": []}
        for number in range(400):
            plain = stack.enter_context(socket.create_connection(("127.0.0.1", gateway.port), 60))
            if number % 4:
                kinds["handshake"].append(plain)
                continue
            tls = stack.enter_context(trusted.wrap_socket(plain, server_hostname="127.0.0.1"))
            kind = "body" if number % 100 == 0 else "header"
            tls.sendall(body if kind == "body" else header)
            kinds[kind].append(tls)
        polite = []
        for _ in range(20):
            asked = time.monotonic()
            assert gateway.ask("GET", "/v1/models", BOB)[0] == 200
            polite.append(time.monotonic() - asked)
        closed = {}
        for kind, connections in kinds.items():
            for connection in connections:
                connection.settimeout(120)
                with suppress(OSError):  # reset
                    while connection.recv(4096):
                        pass
            closed[kind] = time.monotonic() - began
    assert gateway.ask("GET", "/v1/models", ALICE)[0] == 200
    # the configuration's limits are 15, 15 and 30 s from the last byte
    assert max(closed.values()) < 120
    fault.saw(
        f"20 polite requests beside 400 slow connections: the slowest took {max(polite):.1f} s; closed after "
        + ", ".join(f"{seconds:.0f} s ({kind})" for kind, seconds in closed.items())
    )


@needs_nginx
def test_a_key_of_the_same_name_is_another_key(gateway: Gateway, rotated: Rotated) -> None:
    """Refused by workers that have not reloaded yet, and the others' keys are not."""
    with rotated():
        assert (gateway.ask("GET", "/v1/models", ALICE)[0], gateway.ask("GET", "/v1/models", BOB)[0]) == (
            401,
            200,
        )
        basic = base64.b64encode(f"alice:{ALICE}".encode()).decode()
        (gateway.folder / "status").mkdir(exist_ok=True)
        assert gateway.ask("GET", "/status/", Authorization=f"Basic {basic}")[0] == 401
        (gateway.folder / "status").rmdir()


@needs_nginx
def test_what_nginx_refuses_does_not_land(gateway: Gateway) -> None:
    before = gateway.tree.resolve()
    done = gateway.put(broken="}\n")
    del gateway.variables["broken"]
    assert done.returncode == 2
    assert "was not changed, since nginx refuses what was to land there" in " ".join(done.stdout.split())
    assert 'unexpected "}" in' in done.stdout
    assert gateway.tree.resolve() == before
    marks = (gateway.folder / "etc/main-keys").resolve()
    assert {path.name for path in (gateway.folder / "etc").iterdir()} == {
        "main", before.name, "main-keys", marks.name,
    }  # fmt: skip
    assert gateway.run("state").stdout == "loaded\n"


@needs_nginx
def test_a_certificate_that_does_not_fit_is_not_loaded(gateway: Gateway) -> None:
    kept = (gateway.folder / "key.pem").read_bytes()
    (gateway.folder / "key.pem").write_bytes(b"nonsense\n")
    assert gateway.run("state").stdout == "stale\n"
    refused = gateway.run("reload")
    assert refused.returncode == 1
    assert "key.pem" in refused.stderr
    assert gateway.ask("GET", "/v1/models", ALICE)[0] == 200
    (gateway.folder / "key.pem").write_bytes(kept)
    assert gateway.run("state").stdout == "loaded\n"


@needs_nginx
def test_a_key_has_its_rate(gateway: Gateway) -> None:
    seen = [gateway.ask("GET", "/v1/models", SLOW) for _ in range(5)]
    assert [status for status, _, _ in seen] == [200, 200, 200, 429, 429]
    _, headers, body = seen[-1]
    assert headers["retry-after"] == "60"
    assert json.loads(body)["error"]["type"] == "rate_limit_error"
    assert gateway.ask("GET", "/v1/models", ALICE)[0] == 200


@needs_nginx
def test_a_key_has_so_many_open_requests(gateway: Gateway) -> None:
    connection, answer = gateway.stream(BOB)
    assert gateway.ask("GET", "/v1/models", BOB)[0] == 429
    assert gateway.ask("GET", "/v1/models", ALICE)[0] == 200
    for _ in range(3):
        gateway.upstream.lines.release()
    assert answer.read() == b"data: 0\ndata: 1\ndata: 2\n"
    connection.close()
    wait_for(lambda: gateway.ask("GET", "/v1/models", BOB)[0] == 200)


@needs_nginx
def test_a_request_has_a_size(gateway: Gateway) -> None:
    gateway.upstream.seen.clear()
    assert gateway.ask("POST", "/v1/completions", ALICE, b" " * 2**20)[0] == 200
    assert gateway.ask("POST", "/v1/completions", ALICE, b" " * (2**20 + 1))[0] == 413
    assert len(gateway.upstream.seen) == 1
    # no request is ever on a disk
    assert [path for path in (gateway.folder / "run/body").rglob("*") if path.is_file()] == []


@needs_nginx
def test_what_is_no_request_is_answered_in_json(gateway: Gateway) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port)) as plain:
        plain.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        said = plain.makefile("rb").read()
    assert b" 400 " in said.splitlines()[0]
    assert b"This port speaks HTTPS." in said
    assert gateway.ask("GET", "/v1/models", ALICE, **{"X-Long": "x" * 40000})[0] in (400, 200)
    status, _, body = gateway.ask("GET", "/v1/models", **{"X-Long": "x" * 40000})
    assert (status, json.loads(body)["error"]["code"]) == (400, 400)


@needs_nginx
def test_the_log_names_the_key_and_never_holds_it(gateway: Gateway) -> None:
    assert gateway.ask("POST", "/v1/completions?user=x", ALICE, b"{}")[0] == 200
    passed_on = gateway.upstream.headers[-1]["x-request-id"]
    assert gateway.ask("POST", "/of-the-log", BOB, b"{}")[0] == 404
    assert gateway.ask("GET", "/v1/responses/of-the-log", NEW)[0] == 401

    def rows() -> set[tuple[Any, ...]]:
        ours = [row for row in gateway.log() if row["id"] == passed_on or row["path"].endswith("/of-the-log")]
        return {(row["key"], row["method"], row["path"], row["status"]) for row in ours}

    # a worker of nginx writes a line when the answer is out, and there are two of them
    wait_for(lambda: len(rows()) == 3)
    assert rows() == {
        ("alice", "POST", "/v1/completions", 200),
        ("bob", "POST", "/of-the-log", 404),
        ("", "GET", "/v1/responses/of-the-log", 401),
    }
    texts = [path for path in (gateway.folder / "log").rglob("*") if path.is_file()]
    assert len(texts) == 2
    assert [path for path in texts for key in (*KEYS.values(), NEW) if key in path.read_text()] == []


@needs_nginx
def test_the_status_page_is_for_those_with_a_key(gateway: Gateway) -> None:
    def basic(name: str, key: str) -> dict[str, str]:
        return {"Authorization": "Basic " + base64.b64encode(f"{name}:{key}".encode()).decode()}

    root = gateway.folder / "status"
    assert gateway.ask("GET", "/status/")[0] == 404
    root.mkdir()
    (root / "index.html").write_text("<p>plan and measured</p>")
    (gateway.folder / "secret").write_text("not for them")
    status, headers, _ = gateway.ask("GET", "/status/")
    assert (status, headers["www-authenticate"][:6]) == (401, "Basic ")
    for name, key in (("alice", BOB), ("bob", ALICE), ("", ALICE), ("alice", ALICE.upper())):
        assert gateway.ask("GET", "/status/", **basic(name, key))[0] == 401
    status, headers, body = gateway.ask("GET", "/status/", **basic("bob", BOB))
    assert (status, headers["content-type"], body) == (
        200,
        "text/html; charset=utf-8",
        b"<p>plan and measured</p>",
    )
    assert "default-src 'none'" in headers["content-security-policy"]
    assert gateway.ask("GET", "/status/index.html", ALICE)[0] == 200
    assert gateway.ask("GET", "/status", **basic("bob", BOB))[1]["location"] == "/status/"
    for path in ("/status/../secret", "/status/..%2fsecret", "/status/nothing"):
        assert gateway.ask("GET", path, ALICE)[0] == 404, path
    assert gateway.ask("POST", "/status/", ALICE)[0] == 405
    wait_for(
        lambda: (
            [row["key"] for row in gateway.log() if row["path"] == "/status/" and row["status"] == 200]
            == ["bob"]
        )
    )
    shutil.rmtree(root)
    assert gateway.ask("GET", "/status/", ALICE)[0] == 404


@needs_nginx
def test_health_means_that_a_request_can_be_completed(gateway: Gateway) -> None:
    status, headers, _ = gateway.ask("GET", "/healthz")
    assert (status, headers["retry-after"]) == (503, "10")
    engine = Working()
    health = gateway_health.Health(engine, 60)
    (gateway.folder / "figures").write_text("lowmem_gateway_firewall_loaded 1\n")
    server = gateway_health.serve(health, gateway.folder / "run/health.sock", gateway.folder / "figures")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert gateway.ask("GET", "/healthz")[0] == 503
        health.look(time.monotonic())
        assert gateway.ask("GET", "/healthz")[::2] == (200, b'{"status": "ok"}\n')
        scraped = http.client.HTTPConnection("127.0.0.1", gateway.metrics_port, timeout=30)
        scraped.request("GET", "/metrics")
        text = scraped.getresponse().read().decode()
        assert "\nlowmem_gateway_can_complete 1\n" in text
        assert text.endswith("lowmem_gateway_firewall_loaded 1\n")
        engine.answers = False
        health.look(time.monotonic())
        assert gateway.ask("GET", "/healthz")[::2] == (
            503,
            b'{"status": "unavailable", "reason": "starting"}\n',
        )
    finally:
        server.shutdown()
        server.server_close()
    assert gateway.ask("GET", "/metrics", ALICE)[0] == 404
    # nginx writes a line when the answer is out
    wait_for(lambda: ("/metrics", 404) in [(row["path"], row["status"]) for row in gateway.log()])
    assert "/healthz" not in {row["path"] for row in gateway.log() if row["method"] == "GET"}


@needs_nginx
def test_an_engine_that_is_not_there_is_told_from_one_that_says_no(gateway: Gateway) -> None:
    """Last: it ends the server behind it."""
    gateway.upstream.shutdown()
    gateway.upstream.server_close()
    status, headers, body = gateway.ask("GET", "/v1/models", ALICE)
    assert (status, headers["retry-after"], json.loads(body)["error"]["type"]) == (503, "10", "server_error")
