"""awq_quantize's decisions that need no model: group size, what a run needs, what text it takes, what it
accepts.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Scripts = Callable[[str, str], ModuleType]
GIB = 2**30


@pytest.fixture
def checkpoint(scripts: Scripts) -> ModuleType:
    return scripts("awq_quantize", "checkpoint")


@pytest.fixture
def quantizer(scripts: Scripts, checkpoint: ModuleType) -> ModuleType:
    return scripts("awq_quantize", "quantize_model")


def write_checkpoint(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Headers only count; the tensors are zeros of float16."""
    folder.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        size = 2
        for n in shape:
            size *= n
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text("{}", encoding="utf-8")


LLAMA_70B = {"model.layers.0.self_attn.q_proj.weight": 8192, "model.layers.0.mlp.down_proj.weight": 28672}
SMOLLM2 = {"model.layers.0.self_attn.q_proj.weight": 576, "model.layers.0.mlp.down_proj.weight": 1536}


@pytest.mark.parametrize(("inputs", "size"), [(LLAMA_70B, 128), (SMOLLM2, 64), ({**SMOLLM2, "x": 96}, 32)])
def test_the_largest_group_that_divides_every_layer(
    checkpoint: ModuleType, inputs: dict[str, int], size: int
) -> None:
    assert checkpoint.choose_group_size(inputs) == size


def test_a_wanted_group_size_that_does_not_divide_is_refused_by_name(checkpoint: ModuleType) -> None:
    assert checkpoint.choose_group_size(SMOLLM2, 32) == 32
    message = (
        "group size 128 does not divide the 576 inputs of model.layers.0.self_attn.q_proj.weight; the largest"
        " that fits all layers is 64"
    )
    with pytest.raises(checkpoint.CheckpointError, match=message):
        checkpoint.choose_group_size(SMOLLM2, 128)


def test_dimensions_that_no_group_divides_are_refused(checkpoint: ModuleType) -> None:
    with pytest.raises(checkpoint.CheckpointError, match="group size 32 does not divide the 100 inputs of w"):
        checkpoint.choose_group_size({"w": 100})


def test_only_matrices_inside_the_layers_are_quantized(checkpoint: ModuleType) -> None:
    shapes = {
        "model.embed_tokens.weight": (100, 64),
        "lm_head.weight": (100, 64),
        "model.layers.0.input_layernorm.weight": (64,),
        "model.layers.0.mlp.up_proj.weight": (256, 64),
        "model.layers.0.block_sparse_moe.gate.weight": (8, 64),
    }
    assert checkpoint.linear_inputs(shapes) == {"model.layers.0.mlp.up_proj.weight": 64}


def test_what_a_run_needs_in_bytes(quantizer: ModuleType) -> None:
    # 135 M parameters, 1,024 tokens, 1,536 wide: 1.25 GiB + 5 B a parameter + 12 * 1024 * 1536 * 4 B; disk:
    # 3/4 of 16-bit
    assert quantizer.needs(135_000_000, 1536, 1024) == (5 * GIB // 4 + 675_000_000 + 75_497_472, 202_500_000)


def test_too_little_ram_is_refused_with_what_is_missing(quantizer: ModuleType) -> None:
    with pytest.raises(
        quantizer.Refused,
        match=r"needs 8\.00 GiB of RAM, 5\.50 GiB are free: 2\.50 GiB are missing; close tabs",
    ):
        quantizer.require("RAM", 8 * GIB, int(5.5 * GIB), "close tabs")
    quantizer.require("RAM", 8 * GIB, 8 * GIB, "")


def spec(models: Path, **recipe: Any) -> dict[str, Any]:
    return {
        "models": str(models),
        "source_name": "m",
        "name": "m-awq",
        "limit_ratio": 1.1,
        "recipe": {
            "version": 2,
            "backend": "autoawq",
            "group_size": 0,
            "calibration_tokens": 1024,
            "sample_tokens": 256,
            **recipe,
        },
    }


@pytest.fixture
def models(tmp_path: Path) -> Path:
    from lowmem.checkpoint import manifest

    write_checkpoint(tmp_path / "m", {"model.layers.0.mlp.up_proj.weight": (64, 192)})
    manifest.write_json(
        tmp_path / "m.manifest.json", {"schema": 1, "files": manifest.entries(manifest.scan(tmp_path / "m"))}
    )
    return tmp_path


def test_preflight_refuses_before_the_start_when_the_host_is_too_small(
    quantizer: ModuleType, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizer, "available_ram_bytes", lambda: GIB // 2)
    with pytest.raises(
        quantizer.Refused, match=r"needs 1\.26 GiB of RAM, 0\.50 GiB are free: 0\.76 GiB are missing"
    ):
        quantizer.preflight(spec(models))
    monkeypatch.setattr(quantizer, "available_ram_bytes", lambda: 2 * GIB)
    quantizer.preflight(spec(models))
    monkeypatch.setattr(quantizer.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 0})())
    with pytest.raises(quantizer.Refused, match="of disk in"):
        quantizer.preflight(spec(models))


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"group_size": 48}, "awq_quantize_group_size 48 is none of"),
        ({"sample_tokens": 2048}, "awq_quantize_sample_tokens 2048 must be"),
        ({"sample_tokens": -1}, "awq_quantize_sample_tokens -1 must be"),
    ],
)
def test_preflight_refuses_bad_numbers(
    quantizer: ModuleType, models: Path, recipe: dict[str, Any], said: str
) -> None:
    with pytest.raises(quantizer.Refused, match=said):
        quantizer.preflight(spec(models, **recipe))


def test_preflight_is_silent_about_a_source_that_is_yet_to_come(
    quantizer: ModuleType, tmp_path: Path
) -> None:
    quantizer.preflight(spec(tmp_path))


def test_the_recipe_holds_the_group_size_and_the_source(quantizer: ModuleType, models: Path) -> None:
    from lowmem.checkpoint import manifest

    recipe = quantizer.full_recipe(spec(models))
    assert recipe["group_size"] == 64
    assert recipe["source_sha256"] == manifest.digest_of(manifest.read(models / "m.manifest.json")["files"])


def test_a_result_stands_until_recipe_source_or_bytes_change(quantizer: ModuleType, models: Path) -> None:
    from lowmem.checkpoint import manifest

    assert quantizer.state(spec(models)) == [f"{models}/m-awq.manifest.json: no such manifest"]
    write_checkpoint(models / "m-awq", {"w": (2, 2)})
    made = {
        "schema": 1,
        "files": manifest.entries(manifest.scan(models / "m-awq")),
        "recipe_sha256": manifest.digest_of(quantizer.full_recipe(spec(models))),
        "perplexity": {"before": 20.0, "after": 21.0},
    }
    manifest.write_json(models / "m-awq.manifest.json", made)
    assert quantizer.state(spec(models)) == []
    assert quantizer.state(spec(models, calibration_tokens=2048)) == ["m-awq was made by another recipe"]
    quantizer.require_accepted(spec(models))
    with pytest.raises(
        quantizer.Refused, match=r"rose from 20\.00 to 21\.00, 1\.050 times; the limit is 1\.010"
    ):
        quantizer.require_accepted({**spec(models), "limit_ratio": 1.01})
    (models / "m-awq/config.json").write_text("[]", encoding="utf-8")
    assert [text.split(",")[0] for text in quantizer.state(spec(models))] == ["m-awq/config.json: altered"]


@pytest.mark.parametrize("after", [46_733.0, float("inf"), float("nan")])
def test_the_garbage_model_is_not_accepted(quantizer: ModuleType, after: float) -> None:
    with pytest.raises(quantizer.Refused, match="the result was thrown away"):
        quantizer.judge(24.85, after, 1.25)


def test_what_is_accepted_is_written_down(quantizer: ModuleType) -> None:
    assert quantizer.judge(25.0, 30.0, 1.25) == {
        "before": 25.0,
        "after": 30.0,
        "increase_ratio": 1.2,
        "limit_ratio": 1.25,
    }


def test_calibration_text_is_taken_from_the_whole_file_in_full_rows(quantizer: ModuleType) -> None:
    passages = [[i] * 10 for i in range(8)]
    assert quantizer.blocks(passages, 16, 40) == [[0] * 10 + [2] * 6, [2] * 4 + [4] * 10 + [6] * 2]
    assert quantizer.blocks(passages, 80, 10_000) == [[i for i in range(8) for _ in range(10)]]
    assert quantizer.blocks([[1, 2, 3], []], 100, 10_000) == [[1, 2, 3]]


def test_passages_of_text_and_jsonl(quantizer: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\n  three \n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": ""}\n', encoding="utf-8")
    (tmp_path / "b.txt").write_text("\n\n", encoding="utf-8")
    assert quantizer.passages(tmp_path / "a.txt") == ["one\ntwo", "three"]
    assert quantizer.passages(tmp_path / "a.jsonl") == ["one"]
    with pytest.raises(quantizer.Refused, match="no text in it"):
        quantizer.passages(tmp_path / "b.txt")


def test_the_texts_of_the_repository_do_not_overlap(quantizer: ModuleType) -> None:
    texts = Path(quantizer.__file__).parent / "texts"
    calibration, held_back = (
        set(quantizer.passages(texts / name)) for name in ("calibration.txt", "perplexity.txt")
    )
    assert len(calibration) >= 30
    assert len(held_back) >= 10
    assert not calibration & held_back
