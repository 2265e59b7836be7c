"""The checkpoint on the host is, byte for byte, the one that was made, and is quantized as planned."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from lowmem.inputs.model_cards import quantization_of
from lowmem.schema import Plan

HASHES = r"""
import hashlib, json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
found = {}
for path in sorted(p for p in folder.rglob("*") if p.is_file()):
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        found[str(path.relative_to(folder))] = [path.stat().st_size, digest]
print(json.dumps(found))
"""

HEADERS = r"""
import json, pathlib, struct, sys
tensors = {}
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.safetensors")):
    with path.open("rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    header.pop("__metadata__", None)
    for name, t in header.items():
        tensors[name] = [t["dtype"], t["shape"], t["data_offsets"][1] - t["data_offsets"][0]]
print(json.dumps(tensors))
"""

PACKED = {
    "awq": ("qweight", "qzeros", "scales"),
    "gptq": ("qweight", "qzeros", "scales"),
    "auto-round": ("qweight", "qzeros", "scales"),
}
CACHE: dict[str, Any] = {}


@pytest.fixture
def tensors(deployment: Any) -> dict[str, tuple[str, list[int], int]]:
    """Name -> dtype, shape, bytes, from the headers of the safetensors files."""
    if deployment.root not in CACHE:
        CACHE[deployment.root] = json.loads(deployment.python(HEADERS, deployment.deploy.model_path))
    found: dict[str, tuple[str, list[int], int]] = CACHE[deployment.root]
    return found


@pytest.fixture
def config(deployment: Any) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(
        deployment.host.file(f"{deployment.deploy.model_path}/config.json").content_string
    )
    return loaded


def test_every_file_is_the_manifests(deployment: Any) -> None:
    file = deployment.host.file(f"{deployment.deploy.model_path}.manifest.json")
    assert file.exists, (
        f"{file.path} is missing: the checkpoint was not made by this project, or not to its end"
    )
    wanted = {f["path"]: [f["size_bytes"], f["sha256"]] for f in json.loads(file.content_string)["files"]}
    found = json.loads(deployment.python(HASHES, deployment.deploy.model_path))
    altered = sorted(name for name in wanted if name in found and found[name] != wanted[name])
    assert (sorted(wanted.keys() - found.keys()), altered, sorted(found.keys() - wanted.keys())) == (
        [],
        [],
        [],
    ), "missing, altered, not in the manifest"


def test_quantization_is_the_planned_one(config: dict[str, Any], plan: Plan) -> None:
    found = quantization_of(config)
    compared = (
        ("method", "bits", "group_size", "zero_point") if plan.quantization.method != "none" else ("method",)
    )
    assert {k: getattr(found, k) for k in compared} == {k: getattr(plan.quantization, k) for k in compared}


def test_tensor_bytes_are_the_plans(tensors: dict[str, tuple[str, list[int], int]], plan: Plan) -> None:
    # compressed-tensors also stores the shape of each packed matrix, which no card holds
    found = sum(size for name, (_, _, size) in tensors.items() if not name.endswith(".weight_shape"))
    planned = plan.weight_bytes
    assert found == planned


def test_linear_layers_are_packed_with_the_planned_group_size(
    tensors: dict[str, tuple[str, list[int], int]], config: dict[str, Any], plan: Plan
) -> None:
    method, group = plan.quantization.method, plan.quantization.group_size
    if method not in ("awq", "compressed-tensors"):
        pytest.skip(f"quantization is {method}")
    packed, scale = ("qweight", "scales") if method == "awq" else ("weight_packed", "weight_scale")
    layers = {name.removesuffix(f".{packed}") for name in tensors if name.endswith(f".{packed}")}
    wanted = config["num_hidden_layers"] * 7
    assert len(layers) == wanted, (
        f"{len(layers)} packed linear layers, {wanted} wanted (7 in each of {config['num_hidden_layers']}"
        " blocks)"
    )
    wrong = {}
    for layer in sorted(layers):
        dtype, shape, _ = tensors[f"{layer}.{packed}"]
        scales = tensors[f"{layer}.{scale}"][1]
        # AWQ packs outputs, so that the first dimension is the inputs; compressed-tensors packs inputs, eight
        # to a word.
        inputs, groups = (
            (shape[0], scales[0]) if method == "awq" else (shape[1] * 32 // plan.quantization.bits, scales[1])
        )
        if dtype != "I32" or inputs != groups * (inputs if group == -1 else group):
            wrong[layer] = (dtype, inputs, groups)
    assert not wrong, "layer: (dtype, inputs, groups)"


def test_no_layer_is_left_unquantized_by_mistake(
    tensors: dict[str, tuple[str, list[int], int]], plan: Plan
) -> None:
    if plan.quantization.method == "none":
        pytest.skip("the plan quantizes nothing")
    whole = [n for n in tensors if re.search(r"(q|k|v|o|gate|up|down)_proj\.weight$", n)]
    assert [n for n in whole if not any(pattern in n for pattern in plan.quantization.ignored)] == []
