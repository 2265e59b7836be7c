"""The host with the service, and the client beside it that sees what any other host sees."""

import json
import os
import shlex

import pytest
import testinfra

KEYS = {
    "alice": "sk-alice-0123456789abcdefABCDEF",
    "bob": "sk-bob~0123456789+/abcdef==",
    "limited": "sk-limited.0123456789abcdef",
}
MODEL = "SmolLM2-135M-Instruct"
# where all scenarios run together
needs_minutes = pytest.mark.skipif(
    os.environ.get("MOLECULE_QUICK") == "1",
    reason="stops the engine, and waits for minutes: make molecule SCENARIO=edge",
)
CERTIFICATE = "/etc/vllm-gateway/main-tls/certificate.pem"


@pytest.fixture(autouse=True)
def as_root(host):
    with host.sudo():
        yield


@pytest.fixture
def client(host):
    """Asks `host` over the network, and trusts no certificate but the one that it serves from its disk."""
    return Client(
        host, testinfra.get_host("ansible://edge-client", ansible_inventory=host.backend.ansible_inventory)
    )


class Client:
    def __init__(self, server, shell):
        self.server, self.shell = server, shell
        self.address = server.backend.get_variables()["ansible_host"]

    def ask(self, method, path, key=None, body=None, more=()):
        """(status, body) over HTTPS; status 0 where nothing answered."""
        trust = self.server.file(CERTIFICATE).content_string
        command = [
            "curl",
            "--silent",
            "--max-time",
            "300",
            "--path-as-is",
            "--cacert",
            "/tmp/gateway.pem",
            "--request",
            method,
        ]
        command += [
            "--write-out",
            "\n%{http_code}",
            *(["--header", f"Authorization: Bearer {key}"] if key else []),
            *more,
        ]
        if body is not None:
            command += ["--header", "Content-Type: application/json", "--data", json.dumps(body)]
        command.append(f"https://{self.address}{path}")
        done = self.shell.run(f"cat >/tmp/gateway.pem <<'EOF'\n{trust}\nEOF\n{shlex.join(command)}")
        text, _, status = done.stdout.rpartition("\n")
        return int(status or 0), text
