"""Stands in for the Hugging Face hub on loopback, as far as huggingface_hub needs it to download one
repository.

It serves model information at a revision, file metadata by HEAD, and content by GET with ranges. It can
require a token. It can also stop half way through a file until told to go on, so that a test interrupts a
download at a known point.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def weights(size: int) -> bytes:
    """A whole safetensors file: one tensor of `size` bytes."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(i % 251 for i in range(size))


FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": weights(40_000_000),
    "pytorch_model.bin": b"x" * 2000,
}


class StubHub:
    """One repository `owner/name` at one commit, which is also its branch `main`; `files` maps path to
    content. Files of 1 KiB and more are
    served as LFS files are.
    """

    def __init__(self, files: dict[str, bytes], commit: str, token: str = "") -> None:
        self.files, self.commit, self.token = files, commit, token
        self.names = (commit, "main")
        self.ranges: list[tuple[str, int]] = []
        """(path, first byte) of each content request."""
        self.stop_after: int | None = None
        self.stopped = threading.Event()
        self.go_on = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, *_: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.go_on.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = request.path.split("?")[0]
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            self.send(request, 401, {"X-Error-Code": "GatedRepo"}, b'{"error": "unauthorized"}', body)
        elif path in (
            "/api/models/owner/name",
            *(f"/api/models/owner/name/revision/{r}" for r in self.names),
        ):
            self.send(
                request,
                200,
                {"Content-Type": "application/json"},
                json.dumps(self.information()).encode(),
                body,
            )
        elif path in [f"/api/models/owner/name/tree/{name}" for name in self.names]:
            self.send(
                request, 200, {"Content-Type": "application/json"}, json.dumps(self.tree()).encode(), body
            )
        elif (found := re.fullmatch(rf"/owner/name/resolve/(?:{'|'.join(self.names)})/(.+)", path)) and found[
            1
        ] in self.files:
            self.send_file(request, found[1], body)
        else:
            self.send(request, 404, {"X-Error-Code": "RevisionNotFound"}, b'{"error": "not found"}', body)

    def information(self) -> dict[str, Any]:
        siblings = []
        for name, content in self.files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": etag(content)[:40]}
            if len(content) >= 1024:
                entry["lfs"] = {
                    "sha256": hashlib.sha256(content).hexdigest(),
                    "size": len(content),
                    "pointerSize": 130,
                }
            siblings.append(entry)
        return {
            "id": "owner/name",
            "modelId": "owner/name",
            "sha": self.commit,
            "private": False,
            "tags": [],
            "downloads": 0,
            "siblings": siblings,
        }

    def tree(self) -> list[dict[str, Any]]:
        entries = []
        for name, content in self.files.items():
            entry: dict[str, Any] = {
                "type": "file",
                "path": name,
                "size": len(content),
                "oid": etag(content)[:40],
            }
            if len(content) >= 1024:
                entry["lfs"] = {"oid": etag(content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return entries

    def send_file(self, request: BaseHTTPRequestHandler, name: str, body: bool) -> None:
        content = self.files[name]
        first = int((re.match(r"bytes=(\d+)-", request.headers.get("Range", "")) or [0, 0])[1])
        headers = {"ETag": f'"{etag(content)}"', "X-Repo-Commit": self.commit, "Accept-Ranges": "bytes"}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        if body:
            self.ranges.append((name, first))
        self.send(request, 206 if first else 200, headers, content[first:], body)

    def send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        headers: dict[str, str],
        content: bytes,
        body: bool,
    ) -> None:
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            request.send_header(name, value)
        request.end_headers()
        if not body:
            return
        if self.stop_after is not None and len(content) > self.stop_after and status in (200, 206):
            request.wfile.write(content[: self.stop_after])
            request.wfile.flush()
            content = content[self.stop_after :]
            self.stopped.set()
            self.go_on.wait()
        try:
            request.wfile.write(content)
        except OSError:  # the client was killed: that is what the test is for
            request.close_connection = True


def etag(content: bytes) -> str:
    """SHA-256 for LFS files, git's blob hash for the others, as the hub does."""
    if len(content) >= 1024:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\x00%s" % (len(content), content), usedforsecurity=False).hexdigest()
