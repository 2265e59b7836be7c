"""AWQ-quantize a checkpoint: `quantize_model.py quantize SPEC`.

`state SPEC` says on stderr, with status 1, why there is something to do; `preflight SPEC` why it cannot be
done. Both read only and need the standard library only.

SPEC is a JSON object:
  models             folder that has `<source_name>/` and its manifest; it gets `<name>/` and its manifest
  source_name, name
  recipe             {backend, backend_version, bits, group_size (0: chosen), zero_point, clip,
                     calibration_sha256, calibration_tokens, sample_tokens, perplexity_sha256, version}:
                     all that decides the result
  calibration        file of passages: .txt (blank lines between), .jsonl or .parquet (a `text` in each row)
  perplexity         held-back text
  limit_ratio        perplexity after / before that is still accepted
Progress goes to stdout, noise to stderr. The work is done in `.<name>.<pid>.partial`. It is
moved into place whole, after the result was read back from disk and judged. The next run removes what an
interrupted one left.
"""

from __future__ import annotations

import gc
import glob
import importlib
import json
import math
import os
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import checkpoint
import lock
import manifest

GIB = 2**30
# Seen on SmolLM2-135M (float32 on a CPU): AutoAWQ 1.23 GiB with 3,840 calibration tokens, llm-compressor 1.74
# GiB with 1,024. What is not the model and its activations is the libraries themselves.
LIBRARIES_BYTES = 5 * GIB // 4
# float32 on a CPU: the model, one layer's copy for the search, and the packed result beside the last layers
BYTES_PER_PARAMETER = 5
# activations of the calibration text that are alive at once, in units of the widest layer's float32 inputs
LIVE_ACTIVATIONS = 12
# 4-bit weights with their scales and zeros, and the 16-bit copy of embeddings and head, never exceed this
# share of a 16-bit model
OUTPUT_SHARE = 0.75


class Refused(RuntimeError):
    """Not started, or not accepted; the message says why and what to do."""


class Progress:
    """The real stdout, for lines meant for the operator. The libraries write to both streams; all of theirs
    goes to stderr.
    """

    def __init__(self) -> None:
        self.stream: TextIO = sys.stdout

    def keep_to_itself(self) -> None:
        self.stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def __call__(self, line: str) -> None:
        self.stream.write(f"{line}\n")
        self.stream.flush()


say = Progress()


def passages(path: Path) -> list[str]:
    """The calibration texts of a file; Refused when there is none."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        texts = pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()
    elif path.suffix == ".jsonl":
        texts = [
            json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    else:
        texts = path.read_text(encoding="utf-8").split("\n\n")
    texts = [text.strip() for text in texts if text and text.strip()]
    if not texts:
        raise Refused(f"calibration file {path}: no text in it")
    return texts


def blocks(passages_tokens: list[list[int]], sample_tokens: int, total_tokens: int) -> list[list[int]]:
    """Passages from the whole file, `total_tokens` of them together, run together and cut into rows of
    `sample_tokens`.

    Full rows make the search several times as quick as one passage at a time. A shorter rest is left out,
    unless it is all there is.
    """
    text = [ids for ids in passages_tokens if ids]
    wanted = max(1, round(len(text) * min(1.0, total_tokens / sum(map(len, text)))))
    ids = [token for i in range(wanted) for token in text[i * len(text) // wanted]]
    if len(ids) < sample_tokens:
        return [ids]
    return [ids[i : i + sample_tokens] for i in range(0, len(ids) - sample_tokens + 1, sample_tokens)]


def needs(parameters: int, widest: int, calibration_tokens: int) -> tuple[int, int]:
    """Bytes of RAM and of disk that quantizing takes; an upper estimate.

    parameters: of the whole model; widest: largest input dimension of a layer; see the constants for where
    they come from.
    """
    ram = (
        LIBRARIES_BYTES
        + BYTES_PER_PARAMETER * parameters
        + LIVE_ACTIVATIONS * calibration_tokens * widest * 4
    )
    return ram, math.ceil(2 * parameters * OUTPUT_SHARE)


def available_ram_bytes() -> int:
    """MemAvailable, or what the control group still allows if that is less."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    )
    available = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (
            (group / f"memory.{name}").read_text(encoding="ascii").strip() for name in ("max", "current")
        )
    except OSError:
        return available
    return available if limit == "max" else min(available, int(limit) - int(used))


def require(what: str, need_bytes: int, have_bytes: int, remedy: str) -> None:
    if have_bytes < need_bytes:
        raise Refused(
            f"quantization needs {need_bytes / GIB:.2f} GiB of {what}, {have_bytes / GIB:.2f} GiB are free: "
            f"{(need_bytes - have_bytes) / GIB:.2f} GiB are missing; {remedy}"
        )


def full_recipe(spec: dict[str, Any]) -> dict[str, Any]:
    """The recipe with what the source model decides: its bytes and, unless set, the group size."""
    models = Path(spec["models"])
    source = manifest.read(models / f"{spec['source_name']}.manifest.json")
    inputs = checkpoint.linear_inputs(checkpoint.shapes(models / spec["source_name"]))
    group_size = checkpoint.choose_group_size(inputs, spec["recipe"]["group_size"] or None)
    return {**spec["recipe"], "group_size": group_size, "source_sha256": manifest.digest_of(source["files"])}


def to_half(folder: Path, dtype: str) -> None:
    """Store every float tensor (embeddings, norms, scales) in `dtype`, the source's own 16 bits, whatever the
    library worked in.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    wanted = getattr(torch, dtype)
    others = {"F32", "F16", "BF16"} - {{"float16": "F16", "bfloat16": "BF16"}[dtype]}
    for path in sorted(folder.glob("*.safetensors")):
        if not any(tensor["dtype"] in others for tensor in manifest.safetensors_header(path).values()):
            continue
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        half = {name: t.to(wanted) if t.is_floating_point() else t for name, t in tensors.items()}
        bad = next(
            (name for name, t in half.items() if t.is_floating_point() and not t.isfinite().all()), None
        )
        if bad:
            raise Refused(f"{path.name}: tensor {bad} has values that {dtype} cannot hold")
        beside = path.with_suffix(".half")
        save_file(half, beside, metadata={"format": "pt"})
        beside.replace(path)
    config = checkpoint.read_config(folder)
    config.pop("torch_dtype", None)
    manifest.write_json(folder / "config.json", {**config, "dtype": dtype})


def source_dtype(folder: Path) -> str:
    config = checkpoint.read_config(folder)
    dtype = config.get("dtype") or config.get("torch_dtype") or "float16"
    return dtype if dtype in ("float16", "bfloat16") else "float16"


def judge(before: float, after: float, limit_ratio: float) -> dict[str, float]:
    """Refused when the quantized model is worse than the limit allows; a not-a-number is."""
    ratio = after / before
    if not ratio <= limit_ratio:
        raise Refused(
            f"perplexity rose from {before:.2f} to {after:.2f}, {ratio:.3f} times; the limit is"
            f" {limit_ratio:.3f}: the result was thrown away. Use a smaller awq_quantize_group_size or more"
            " calibration text, or raise awq_quantize_limit_ratio"
        )
    return {
        "before": round(before, 4),
        "after": round(after, 4),
        "increase_ratio": round(ratio, 5),
        "limit_ratio": limit_ratio,
    }


def state(spec: dict[str, Any]) -> list[str]:
    """Why the result has to be made (again); empty when it is there, as its manifest has it and by this
    recipe.
    """
    models, name = Path(spec["models"]), spec["name"]
    path = models / f"{name}.manifest.json"
    try:
        made = manifest.read(path)
        if made.get("recipe_sha256") != manifest.digest_of(full_recipe(spec)):
            return [f"{name} was made by another recipe"]
        return [f"{name}/{problem}" for problem in manifest.check(path, models / name)]
    except ValueError as error:  # of manifest and checkpoint
        return [str(error)]


def require_accepted(spec: dict[str, Any]) -> None:
    """Refused when the limit was lowered below what the existing result was judged with."""
    made = manifest.read(Path(spec["models"]) / f"{spec['name']}.manifest.json")["perplexity"]
    judge(made["before"], made["after"], spec["limit_ratio"])


def preflight(spec: dict[str, Any]) -> None:
    """Refused, or a ValueError of the checkpoint, when quantizing cannot work; nothing is said of a source
    that is yet to come.
    """
    models, recipe = Path(spec["models"]), spec["recipe"]
    if recipe["group_size"] not in (0, *checkpoint.GROUP_SIZES):
        raise Refused(
            f"awq_quantize_group_size {recipe['group_size']} is none of 0 (chosen from the model), 32, 64"
            " and 128"
        )
    if recipe["sample_tokens"] < 16 or recipe["calibration_tokens"] < recipe["sample_tokens"]:
        raise Refused(
            f"awq_quantize_sample_tokens {recipe['sample_tokens']} must be at least 16 and at most "
            f"awq_quantize_calibration_tokens {recipe['calibration_tokens']}"
        )
    if not spec["limit_ratio"] >= 1:
        raise Refused(
            f"awq_quantize_limit_ratio {spec['limit_ratio']} must be at least 1: quantizing does not make a"
            " model better"
        )
    if spec["name"] == spec["source_name"]:
        raise Refused(
            f"awq_quantize_name {spec['name']!r} is the source's own name; the result needs another"
        )
    if not (models / f"{spec['source_name']}.manifest.json").exists():
        return
    if not state(spec):
        require_accepted(spec)
    else:
        require_resources(models, spec["source_name"], full_recipe(spec))


def require_resources(models: Path, source_name: str, recipe: dict[str, Any]) -> None:
    tensor_shapes = checkpoint.shapes(models / source_name)
    widest = max(checkpoint.linear_inputs(tensor_shapes).values())
    ram, disk = needs(checkpoint.parameter_count(tensor_shapes), widest, recipe["calibration_tokens"])
    require(
        "RAM", ram, available_ram_bytes(), "stop other programs, take less calibration text or a larger host"
    )
    require(f"disk in {models}", disk, shutil.disk_usage(models).free, "make room or move the root")


def work(spec: dict[str, Any], recipe: dict[str, Any], recipe_sha256: str) -> None:
    models, name = Path(spec["models"]), spec["name"]
    source, folder = models / spec["source_name"], models / name
    if problems := manifest.check(models / f"{spec['source_name']}.manifest.json", source):
        raise Refused(f"{source}: {problems[0]}; fetch it again (model_source) before quantizing it")
    require_resources(models, spec["source_name"], recipe)

    started = time.monotonic()
    from perplexity import perplexity
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    tokens = [tokenizer(text)["input_ids"] for text in passages(Path(spec["calibration"]))]
    samples = blocks(tokens, recipe["sample_tokens"], recipe["calibration_tokens"])
    held_back = Path(spec["perplexity"]).read_text(encoding="utf-8")
    before = perplexity(source, held_back)
    say(
        f"{spec['source_name']}: perplexity {before:.2f}; groups of {recipe['group_size']};"
        f" {sum(map(len, samples))} calibration tokens"
    )

    staging = models / f".{name}.{os.getpid()}.partial"
    staging.mkdir()
    try:
        backend = importlib.import_module(f"backend_{recipe['backend']}")
        backend.quantize(source, staging, samples, recipe, say)
        gc.collect()
        to_half(staging, source_dtype(source))
        after = perplexity(staging, held_back)
        say(f"{name}: perplexity {after:.2f}, {after / before:.3f} times that of the source")
        judged = judge(before, after, spec["limit_ratio"])
        for path in staging.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        staging.chmod(0o755)
        files = manifest.scan(staging)
        shutil.rmtree(folder, ignore_errors=True)
        staging.replace(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    manifest.write_json(
        models / f"{name}.manifest.json",
        {
            "schema": manifest.SCHEMA,
            "name": name,
            "source": {"type": "quantized", "name": spec["source_name"], "revision": recipe["source_sha256"]},
            "files": manifest.entries(files),
            "recipe": recipe,
            "recipe_sha256": recipe_sha256,
            "quantization": {
                "method": "awq" if recipe["backend"] == "autoawq" else "compressed-tensors",
                **{key: recipe[key] for key in ("backend", "bits", "group_size", "zero_point")},
            },
            "perplexity": {"text_sha256": recipe["perplexity_sha256"], **judged},
            "created_by": "awq_quantize",
        },
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    size = sum(file.size_bytes for file in files)
    say(
        f"{name}: {size / 2**20:.0f} MiB in place after {time.monotonic() - started:.0f} s, peak RAM"
        f" {peak / GIB:.2f} GiB"
    )


def quantize(spec: dict[str, Any]) -> None:
    models, name = Path(spec["models"]), spec["name"]
    recipe = full_recipe(spec)
    if name == spec["source_name"]:
        raise Refused(
            f"awq_quantize_name is {name}, the model to quantize: choose another name for the result"
        )
    if foreign := lock.refusal_to_replace(models / name, models / f"{name}.manifest.json"):
        raise Refused(foreign)
    with lock.held(lock.beside(models / name), lambda: say("waiting for another run that is quantizing it")):
        for left in models.glob(f".{glob.escape(name)}.*.partial"):
            if left.is_symlink():
                continue
            say(f"removing {left.name}, left by an interrupted run")
            shutil.rmtree(left)
        if state(spec):
            work(spec, recipe, manifest.digest_of(recipe))
        else:
            require_accepted(spec)


def main() -> int:
    mode, spec = sys.argv[1], json.loads(sys.argv[2])
    try:
        if mode == "state":
            if reasons := state(spec):
                raise Refused("; ".join(reasons))
            require_accepted(spec)
        elif mode == "preflight":
            preflight(spec)
        else:
            say.keep_to_itself()
            quantize(spec)
    except Exception as error:
        named = "" if isinstance(error, Refused | ValueError) else f"{type(error).__name__}: "
        sys.stderr.write(f"{named}{' '.join(str(error).split())}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
