"""Stands in for `vllm` in the tests.

`serve` prints an engine's log and answers completions, and `bench serve` writes a result file. FAKE_VLLM
(JSON) changes it. {"fail": [log lines]} ends the server with status 1. {"bench": {...}} replaces result
fields. {"stubborn": true} ignores SIGTERM. {"open": true} asks for no key. {"oversize": status} and
{"logprob": of every prompt token} change its answers.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SETTINGS = json.loads(os.environ.get("FAKE_VLLM", "{}"))
MAX_MODEL_LEN = 2048
LOG = [
    "INFO 11-22 20:00:00 [api_utils.py:286] non-default args: {}",
    (
        "(EngineCore pid=7) INFO 11-22 20:00:01 [model_runner.py:425] Model loading took 0.12 GiB memory and"
        " 1.500000 seconds"
    ),
    (
        "(EngineCore pid=7) INFO 11-22 20:00:02 [cpu_worker.py:260] Explicitly set (0.25/23.4) GiB for KV"
        " cache on node 0."
    ),
    (
        "(EngineCore pid=7) INFO 11-22 20:00:02 [kv_cache_utils.py:2329] "
        "CPU KV cache size: 11,648 tokens, Maximum concurrency for 2,048 tokens per request: 5.69x"
    ),
]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: object, status: int = 200) -> None:
        self.answer_text(json.dumps(body), status)

    def answer_text(self, text: str, status: int = 200) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def allowed(self) -> bool:
        key = os.environ.get("VLLM_API_KEY") or SETTINGS.get("key", "")[::-1]
        if key and not SETTINGS.get("open") and self.headers.get("Authorization") != f"Bearer {key}":
            self.answer({"error": "Unauthorized"}, 401)
            return False
        return True

    def do_GET(self) -> None:
        if self.allowed():
            self.answer(
                {
                    "data": [
                        {
                            "id": option("--served-model-name", "fake"),
                            "root": "/models/fake",
                            "max_model_len": MAX_MODEL_LEN,
                        }
                    ]
                }
            )

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        text = SETTINGS.get("text", " hello")
        if body["model"] == "no-such-model":
            self.answer({"error": {"message": "The model `no-such-model` does not exist."}}, 404)
        elif len(body.get("prompt", "")) > MAX_MODEL_LEN:
            self.answer(
                {"error": {"message": f"the maximum context length is {MAX_MODEL_LEN} tokens"}},
                SETTINGS.get("oversize", 400),
            )
        elif body.get("stream"):
            events = [json.dumps({"choices": [{"text": text}]})] * 3 + ["[DONE]"]
            self.answer_text("".join(f"data: {event}\n\n" for event in events))
        else:
            logprobs = [None, *({"5": {"logprob": SETTINGS.get("logprob", -2.0)}} for _ in range(20))]
            choice = {"text": text, "message": {"content": text}, "prompt_logprobs": logprobs}
            self.answer({"choices": [choice], "usage": {"completion_tokens": body["max_tokens"]}})


def option(name: str, default: str = "") -> str:
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


def serve() -> None:
    for line in SETTINGS.get("fail") or LOG:
        print(line, flush=True)
    if SETTINGS.get("fail"):
        sys.exit(1)
    # the engine is a process of its own, as in vLLM
    engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "VLLM::EngineCore"])
    server = ThreadingHTTPServer(("127.0.0.1", int(option("--port", "8000"))), Handler)
    if SETTINGS.get("stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: (engine.kill(), os._exit(0)))
    threading.Thread(target=lambda: (engine.wait(), os._exit(1)), daemon=True).start()
    server.serve_forever()


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
    (Path(option("--result-dir")) / option("--result-filename")).write_text(
        json.dumps(result | SETTINGS.get("bench", {}))
    )


serve() if sys.argv[1] == "serve" else bench()
