"""Stub of a vLLM replica: `stub_replica.py PORT NAME SECONDS` answers /health, /v1/models and, after so long,
/v1/completions.
"""

from __future__ import annotations

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PORT, NAME, SECONDS = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        return

    def answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        known = {"/health": {}, "/v1/models": {"object": "list", "data": [{"id": "m", "object": "model"}]}}
        self.answer(200 if self.path in known else 404, known.get(self.path, {}))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(SECONDS)
        key = self.headers.get("Authorization", "")
        choice = {"index": 0, "text": f"{NAME} {key}".strip(), "finish_reason": "stop"}
        self.answer(200, {"id": "c", "object": "text_completion", "model": "m", "choices": [choice]})


ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
