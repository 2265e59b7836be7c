"""Stands in for `vllm` in the tests: `serve` prints an engine's log and answers completions, `bench serve` writes a result file.

FAKE_VLLM (JSON) changes it: {"fail": [log lines]} ends the server with status 1, {"bench": {...}} replaces result fields,
{"stubborn": true} ignores SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SETTINGS = json.loads(os.environ.get("FAKE_VLLM", "{}"))
LOG = [
    "INFO 11-22 20:00:00 [api_utils.py:286] non-default args: {}",
    "(EngineCore pid=7) INFO 11-22 20:00:01 [model_runner.py:425] Model loading took 0.12 GiB memory and 1.500000 seconds",
    "(EngineCore pid=7) INFO 11-22 20:00:02 [cpu_worker.py:260] Explicitly set (0.25/23.4) GiB for KV cache on node 0.",
    "(EngineCore pid=7) INFO 11-22 20:00:02 [kv_cache_utils.py:2329] "
    "CPU KV cache size: 11,648 tokens, Maximum concurrency for 2,048 tokens per request: 5.69x",
]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: object, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def allowed(self) -> bool:
        key = os.environ.get("VLLM_API_KEY")
        if key and self.headers.get("Authorization") != f"Bearer {key}":
            self.answer({"error": "Unauthorized"}, 401)
            return False
        return True

    def do_GET(self) -> None:
        if self.allowed():
            self.answer({"data": [{"id": "fake", "root": "/models/fake"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.allowed():
            self.answer({"choices": [{"text": "x"}], "usage": {"completion_tokens": body["max_tokens"]}})


def option(name: str, default: str = "") -> str:
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


def serve() -> None:
    for line in SETTINGS.get("fail") or LOG:
        print(line, flush=True)
    if SETTINGS.get("fail"):
        sys.exit(1)
    if SETTINGS.get("stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    ThreadingHTTPServer(("127.0.0.1", int(option("--port", "8000"))), Handler).serve_forever()


def bench() -> None:
    count, clients = int(option("--num-prompts")), int(option("--max-concurrency"))
    tokens = int(option("--random-output-len"))
    e2e_s = 1 + (tokens - 1) * 0.1
    duration = -(-count // clients) * e2e_s
    result: dict[str, object] = {
        "completed": count,
        "duration": duration,
        "request_throughput": count / duration,
        "output_throughput": count * tokens / duration,
    }
    for metric, value in (("ttft", 1000.0), ("tpot", 100.0), ("itl", 100.0), ("e2el", e2e_s * 1000)):
        result |= {f"{kind}_{metric}_ms": value for kind in ("mean", "p50", "p90", "p99")}
    result["key"] = os.environ.get("OPENAI_API_KEY")
    result["argv"] = sys.argv
    (Path(option("--result-dir")) / option("--result-filename")).write_text(json.dumps(result | SETTINGS.get("bench", {})))


serve() if sys.argv[1] == "serve" else bench()
