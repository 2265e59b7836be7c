r"""Runs the role's own quantization on a GPU, serves the result, and judges it by the server's answers.

    python benchmarks/gpu/awq_on_gpu.py MODELS OUT.json --backend llmcompressor=SITE/site-packages \
        [--backend autoawq=…]

MODELS holds SmolLM2-135M-Instruct/ and its manifest, as `make demo` leaves them. SITE is the folder with that
backend's packages (locks/<backend>-cuda.txt, less torch). It lies below a folder named site-packages.
`datasets` names a function by `dill`, which takes by value what lies elsewhere. That fails on pyarrow ("Can't
pickle <class 'MonthDayNano'>").

Every backend quantizes with the role's defaults. Then `vllm serve` serves the source and the results side by
side. Each server scores the held-back text, so the perplexity is that of the served model, kernels included.
Nothing here is a timing of the engine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from servers import end_on_sigterm, stop

TOP = Path(__file__).resolve().parent.parent.parent
ROLE = TOP / "roles" / "awq_quantize"
SOURCE = "SmolLM2-135M-Instruct"
WINDOW = 256  # as roles/awq_quantize/files/perplexity.py
VERSIONS = {"autoawq": "0.2.9", "llmcompressor": "0.14.0.1"}
KERNEL = re.compile(r"Using \S*(?:Kernel|Linear|arlin)\S*.*|Selected \S+.* for \S+|.*[Mm]arlin.*")


def spec(models: Path, lib: Path, backend: str) -> dict[str, Any]:
    """Build the specification as roles/awq_quantize/vars/main.yml does with the role's defaults."""
    texts = {
        name: (ROLE / "files" / "texts" / f"{name}.txt").read_bytes()
        for name in ("calibration", "perplexity")
    }
    return {
        "models": str(models), "source_name": SOURCE, "name": f"{SOURCE}-{backend}",
        "recipe": {
            "version": 2, "backend": backend, "backend_version": VERSIONS[backend], "bits": 4,
            "group_size": 0, "zero_point": True,
            "clip": backend == "autoawq", "calibration_tokens": 65536, "sample_tokens": 512,
            **{f"{name}_sha256": hashlib.sha256(text).hexdigest() for name, text in texts.items()},
        },
        "calibration": str(lib / "calibration.txt"), "perplexity": str(lib / "perplexity.txt"),
        "limit_ratio": 1.2,
    }  # fmt: skip


def make_lib(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file in (
        *(ROLE / "files").glob("*.py"),
        TOP / "lowmem/checkpoint/manifest.py",
        *(ROLE / "files" / "texts").glob("*.txt"),
    ):
        shutil.copy(file, folder)
    return folder


def quantize(models: Path, lib: Path, sites: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Run all backends at once. Return the output, the time and the manifest of each."""
    running = {}
    for backend, site in sites.items():
        environment = {
            **os.environ,
            "PYTHONPATH": ":".join([site, os.environ.get("PYTHONPATH", "")]),
            "HF_HUB_OFFLINE": "1",
        }
        command = [
            sys.executable,
            str(lib / "quantize_model.py"),
            "quantize",
            json.dumps(spec(models, lib, backend)),
        ]
        work = lib / backend
        work.mkdir(exist_ok=True)
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=work,
            stdout=(work / "out").open("w"),
            stderr=(work / "err").open("w"),
            text=True,
        )
        running[backend] = (process, time.monotonic())
    done: dict[str, dict[str, Any]] = {}
    while len(done) < len(running):
        for backend, (process, began) in running.items():
            if backend not in done and process.poll() is not None:
                lines = [
                    line
                    for line in (lib / backend / "out").read_text().splitlines()
                    if "quantizing layer" not in line
                ]
                done[backend] = {
                    "status": process.returncode,
                    "seconds": round(time.monotonic() - began, 1),
                    "said": lines,
                }
                if process.returncode:
                    done[backend]["errors"] = (lib / backend / "err").read_text().splitlines()[-60:]
                print(backend, done[backend], flush=True)
        time.sleep(0.5)
    for backend, result in done.items():
        manifest = models / f"{SOURCE}-{backend}.manifest.json"
        if manifest.exists():
            result |= {
                k: v
                for k, v in json.loads(manifest.read_text()).items()
                if k in ("perplexity", "quantization")
            }
    return done


def ask(url: str, body: dict[str, Any] | None = None, timeout_s: float = 120) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode() if body else None, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        return json.loads(answer.read() or b"null")


def served_perplexity(url: str, rows: list[list[int]]) -> float:
    """Return exp of the mean negative log likelihood that the server gives each token after the first of its
    row.
    """
    loss, count = 0.0, 0
    for row in rows:
        answer = ask(
            f"{url}/v1/completions",
            {"model": "m", "prompt": row, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0},
        )
        scores = answer["choices"][0]["prompt_logprobs"]
        loss -= sum(scores[i][str(token)]["logprob"] for i, token in enumerate(row) if i)
        count += len(row) - 1
    return math.exp(loss / count)


def serve_and_score(
    models: Path, names: list[str], logs: Path, extra: list[str]
) -> dict[str, dict[str, Any]]:
    """Serve each model on a server of its own, all at once.

    Return its perplexity and the log's lines on kernels.
    """
    from transformers import AutoTokenizer

    text = (ROLE / "files" / "texts" / "perplexity.txt").read_text()
    ids = AutoTokenizer.from_pretrained(models / SOURCE)(text, add_special_tokens=False)["input_ids"]
    rows = [ids[i : i + WINDOW] for i in range(0, len(ids) // WINDOW * WINDOW, WINDOW)]
    servers = {}
    for port, name in enumerate(names, 8200):
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.cli.main",
            "serve",
            str(models / name),
            "--served-model-name",
            "m",
        ]
        # a pool in bytes: engines that start side by side would count each other's memory as their own
        command += [
            "--port",
            str(port),
            "--max-model-len",
            "1024",
            "--dtype",
            "float16",
            "--kv-cache-memory-bytes",
            str(2**28),
            *extra,
        ]
        log = (logs / f"awq-{name}.log").open("w")
        servers[name] = (
            port,
            subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True),
        )
    found: dict[str, dict[str, Any]] = {}
    try:
        for name, (port, process) in servers.items():
            url, until = f"http://127.0.0.1:{port}", time.monotonic() + 300
            while True:
                try:
                    ask(f"{url}/v1/models", timeout_s=5)
                    break
                except OSError:
                    if process.poll() is not None or time.monotonic() > until:
                        found[name] = {"error": (logs / f"awq-{name}.log").read_text().splitlines()[-8:]}
                        break
                    time.sleep(1)
            if name not in found:
                found[name] = {
                    "served_perplexity": round(served_perplexity(url, rows), 4),
                    "tokens": len(rows) * (WINDOW - 1),
                }
            log_text = (logs / f"awq-{name}.log").read_text()
            found[name]["kernels"] = sorted({m.group(0)[-160:] for m in KERNEL.finditer(log_text)})[:6]
            print(name, found[name], flush=True)
    finally:
        stop(*(process for _, process in servers.values()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--backend", action="append", default=[], metavar="NAME=SITE")
    parser.add_argument(
        "--arg", action="append", default=[], help="one more argument for every `vllm serve`, repeatable"
    )
    options = parser.parse_args()
    end_on_sigterm()
    sites = dict(word.split("=", 1) for word in options.backend)
    for backend, path in sites.items():
        for site in path.split(":"):
            if "site-packages" not in Path(site).parts:
                sys.exit(
                    f"awq_on_gpu: --backend {backend}={site}: dill wants a folder named site-packages in its"
                    " path; move it there"
                )
    result: dict[str, Any] = {"source": SOURCE, "window_tokens": WINDOW}
    result["quantized"] = quantize(options.models, make_lib(Path("/tmp/awq-lib")), sites)
    made = [f"{SOURCE}-{backend}" for backend, r in result["quantized"].items() if r["status"] == 0]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    result["served"] = serve_and_score(options.models, [SOURCE, *made], options.out.parent, options.arg)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
