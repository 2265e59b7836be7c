"""Holds every condition to `| bool` for what an operator sets.

`-e host_memory_manage=false` is a string, and a string that is not empty is true.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from .test_task_names import FILES, Loader

REPOSITORY = Path(__file__).resolve().parents[2]


def booleans() -> set[str]:
    """Names of the operator's booleans: those of every role's argument specs, and the playbooks' own."""
    own = yaml.safe_load((REPOSITORY / "playbooks/vars/variables.yml").read_text())["options"]
    names = {name for name, option in own.items() if option["type"] == "bool"}
    for path in REPOSITORY.glob("roles/*/meta/argument_specs.yml"):
        for entry in yaml.safe_load(path.read_text())["argument_specs"].values():
            names |= {name for name, option in entry["options"].items() if option["type"] == "bool"}
    return names


BARE = re.compile(rf"\b(?:{'|'.join(sorted(booleans()))})\b(?!\s*(?:\|\s*default\([^)]*\)\s*)?\|\s*bool\b)")


def conditions(node: Any) -> Iterator[str]:
    """Yield every condition of a file: of tasks, plays' roles and assertions, and those inside templates."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("when", "that", "until", "failed_when", "changed_when"):
                yield from (str(line) for line in (value if isinstance(value, list) else [value]))
            else:
                yield from conditions(value)
    elif isinstance(node, list):
        for entry in node:
            yield from conditions(entry)
    elif isinstance(node, str):
        yield from re.findall(r"\bif (.*?) else\b", node, re.DOTALL)


def test_the_booleans_are_known() -> None:
    assert {"host_memory_manage", "gpu_driver_reboot_allowed", "gateway_access_log"} & booleans()
    assert BARE.search("host_memory_manage and x")
    assert not BARE.search("host_memory_manage | bool and x")
    assert BARE.search("doctor_strict | default(true) and x")
    assert not BARE.search("doctor_strict | default(true) | bool and x")


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[0] != "molecule"], ids=str)
def test_no_condition_takes_an_operators_boolean_bare(path: Path) -> None:
    documents = yaml.load_all((REPOSITORY / path).read_text(), Loader=Loader)
    assert [line for document in documents for line in conditions(document) if BARE.search(line)] == []


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("roles/*/vars/main.yml")), ids=lambda p: p.parts[-3])
def test_no_value_of_a_role_takes_one_bare(path: Path) -> None:
    lines = conditions(yaml.safe_load(path.read_text()))
    assert [line for line in lines if BARE.search(line)] == []


@pytest.mark.parametrize(
    "path",
    sorted([*REPOSITORY.glob("templates/*.j2"), *REPOSITORY.glob("roles/*/templates/*.j2")]),
    ids=lambda p: p.name,
)
def test_no_template_takes_one_bare(path: Path) -> None:
    text = path.read_text()
    tests = re.findall(r"\{%-?\s*(?:el)?if (.*?)-?%\}", text) + re.findall(
        r"\{\{[^}]*?\bif (.*?) else\b", text
    )
    assert [line for line in tests if BARE.search(line)] == []
