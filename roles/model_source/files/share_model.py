"""Let peers take a checkpoint from this host for a while: `share_model.py MANIFEST FOLDER ADDRESS PORT
LIMIT_S IDLE_S`.

Prints one line, {"port", "token", "manifest_sha256"}, and goes on in the background: files of the manifest,
and no others, by GET with ranges to whoever has the token, which is made here and dies with this process. It
ends when told to (DELETE / with the token), after IDLE_S without a request, or after LIMIT_S at the latest.
Standard library only: it is run from stdin, and leaves no file behind.
"""

import hashlib
import hmac
import ipaddress
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class Share(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, manifest: Path, folder: Path, address: tuple, family: int) -> None:
        self.address_family = family
        self.manifest = manifest.read_bytes()
        self.files = {entry["path"]: folder / entry["path"] for entry in json.loads(self.manifest)["files"]}
        self.token = secrets.token_urlsafe(32)
        self.busy, self.last = 0, time.monotonic()
        self.guard = threading.Lock()
        super().__init__(address, Handler)

    def count(self, change: int) -> None:
        with self.guard:
            self.busy += change
            self.last = time.monotonic()

    def end_in_time(self, limit_s: float, idle_s: float) -> None:
        start = time.monotonic()
        while time.monotonic() - start < limit_s and (self.busy or time.monotonic() - self.last < idle_s):
            time.sleep(0.5)
        os._exit(0)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds without a byte: a peer that died must not hold the server

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        self.server.count(1)
        try:
            self.answer()
        except OSError:  # the peer is gone; it asks again from where it was
            self.close_connection = True
        finally:
            self.server.count(-1)

    def do_DELETE(self) -> None:
        if self.known():
            self.reply(200, b"")
            threading.Thread(target=lambda: (time.sleep(0.2), os._exit(0))).start()

    def known(self) -> bool:
        if hmac.compare_digest(
            self.headers.get("Authorization", "").encode(), f"Bearer {self.server.token}".encode()
        ):
            return True
        self.reply(401, b"")
        return False

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer(self) -> None:
        if not self.known():
            return
        name = unquote(self.path.removeprefix("/"))
        if name == "":
            self.reply(200, self.server.manifest)
        elif name not in self.server.files:
            self.reply(404, b"")
        else:
            with self.server.files[name].open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
                first = min(int(wanted[1]), size) if wanted else 0
                self.send_response(206 if wanted else 200)
                self.send_header("Content-Length", str(size - first))
                if wanted:
                    self.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
                self.end_headers()
                if size > first:
                    self.connection.sendfile(file, first, size - first)


def main() -> None:
    manifest, folder, address, port, limit_s, idle_s = sys.argv[1:7]
    try:
        family, _, _, _, place = socket.getaddrinfo(address, int(port), type=socket.SOCK_STREAM)[0]
        if ipaddress.ip_address(place[0]).is_unspecified:
            sys.exit(
                f"model_source_peer_address {address} is every address of this host; name the one in the"
                " cluster's network"
            )
        server = Share(Path(manifest), Path(folder), place, family)
    except OSError as error:
        sys.exit(f"model_source_peer_address {address} port {port} cannot be listened on: {error}")
    said = {
        "port": server.server_address[1],
        "token": server.token,
        "manifest_sha256": hashlib.sha256(server.manifest).hexdigest(),
    }
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()
    if os.fork():
        os._exit(0)
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    threading.Thread(target=server.end_in_time, args=(float(limit_s), float(idle_s)), daemon=True).start()
    server.serve_forever()


main()
