"""The inventories of docs/how-to are planned as they stand: names, types and kinds of their variables, and
the plan. A block marked `model=folder` or `model=awq` names a checkpoint of the reader, for which the test
has one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowmem import data
from lowmem.files import read_yaml
from lowmem.inputs.model_cards import card_from_config
from lowmem.inputs.model_choice import choose
from lowmem.values.kinds import refusal

from ..ansible.plugin import load

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs/how-to").glob("*.md"))
BLOCK = re.compile(r"^```yaml inventory ?(\S*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(kind, text, id=f"{path.stem}-{number}")
    for path in PAGES
    for number, (kind, text) in enumerate(BLOCK.findall(path.read_text()))
]
KINDS = read_yaml(Path(data.__file__).with_name("variables.yml"))
check, planner = load("action/check_variables.py"), load("action/lowmem_plan.py")
MISTRAL = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 32768, "max_position_embeddings": 32768, "torch_dtype": "bfloat16",
}  # fmt: skip
AWQ = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}}
SMALL = {**MISTRAL, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4,
         "num_attention_heads": 9, "num_key_value_heads": 3}  # fmt: skip


def wanted(variables: dict[str, Any]) -> dict[str, Any]:
    """Return what role plan gives to the planner, with the defaults of the role."""
    defaults = yaml.safe_load((ROOT / "roles/plan/defaults/main.yml").read_text())
    given = {**defaults, **variables}
    choice = choose(given["lowmem_model"], given["lowmem_profile"])
    place = {name: given[f"lowmem_{name}"] for name in ("host", "port", "served_model_name", "model_path")}
    return {
        **{
            name: given[f"lowmem_{name}"] for name in ("profile", "model", "device", "overrides", "arguments")
        },
        **{name: given[f"lowmem_{name}"] for name in ("memory_limit", "latency_limits", "load")},
        "calibration": given["lowmem_calibration"],
        "count": given["lowmem_device_count"],
        "quantize": variables.get("lowmem_quantize", choice.quantize),
        "checkpoint": {},
        "deploy": place,
        "members": {},
    }


@pytest.mark.parametrize(("kind", "text"), BLOCKS)
def test_an_inventory_is_planned_as_it_stands(kind: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = yaml.safe_load(text)
    assert check.name_problems(variables, check.KNOWN) == {}
    for name, value in variables.items():
        if "{{" in str(value):  # of a vault
            continue
        assert check.value_problem(name, value, check.KNOWN.options[name]) is None
        assert refusal(name, KINDS[name], value) == ""
    if kind:
        config = MISTRAL | AWQ if kind == "model=awq" else SMALL
        card = card_from_config(config, "name", variables["lowmem_model"])
        monkeypatch.setattr(planner, "read_model", lambda _: card)
    plan, fetched, _ = planner.compute(wanted(variables))
    assert plan.verdict != "impossible", plan.reasons
    assert fetched["weights"] == ("awq 4-bit, groups of 128" if kind == "model=awq" else "not quantized")
    for option, value in variables.get("lowmem_arguments", {}).items():
        assert f"--{option.replace('_', '-')}" in {argument.flag for argument in plan.arguments}, value


def test_each_page_is_in_the_index_and_shows_an_inventory() -> None:
    index = (ROOT / "docs/how-to/README.md").read_text()
    named = re.findall(r"^\| \[[\w-]+\.md\]\(([\w-]+)\.md\)", index, re.MULTILINE)
    pages = {path.stem for path in PAGES} - {"README"}
    assert sorted(named) == sorted(pages)
    shown = {parameter.id.rsplit("-", 1)[0] for parameter in BLOCKS}
    assert pages - shown <= {"plan"}  # it shows commands


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_variables_and_files_that_are_named_exist(path: Path) -> None:
    text = path.read_text()
    names = set(re.findall(rf"\b((?:{'|'.join(check.PREFIXES)})[a-z_]+)\b", text))
    assert {name for name in names if name not in check.KNOWN.names} == set()
    for link in re.findall(r"\]\(([^)#:]+)", text):
        assert (path.parent / link).exists(), link
