"""Each role says what it takes: its defaults, its argument specs, its README and the generated reference
agree.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
ROLES = sorted(path.name for path in (REPOSITORY / "roles").iterdir() if (path / "tasks").is_dir())


def defaults(role: str) -> dict[str, Any]:
    path = REPOSITORY / "roles" / role / "defaults/main.yml"
    return (yaml.safe_load(path.read_text()) or {}) if path.is_file() else {}


def specs(role: str) -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "roles" / role / "meta/argument_specs.yml").read_text())[
        "argument_specs"
    ]


@pytest.mark.parametrize("role", ROLES)
def test_specs_and_defaults_name_the_same_variables_with_the_same_values(role: str) -> None:
    in_specs = {
        name: option["default"]
        for name, option in specs(role)["main"]["options"].items()
        if "default" in option
    }
    assert in_specs == defaults(role)


@pytest.mark.parametrize("role", ROLES)
def test_an_option_without_default_is_required_or_may_be_absent(role: str) -> None:
    for name, option in specs(role)["main"]["options"].items():
        assert "default" in option or "required" in option, (
            f"{name}: give it a default, or say whether it is required"
        )


@pytest.mark.parametrize("role", ROLES)
def test_preflight_checks_what_main_takes(role: str) -> None:
    if (REPOSITORY / "roles" / role / "tasks/preflight.yml").is_file():
        assert specs(role)["preflight"]["options"] == specs(role)["main"]["options"]


@pytest.mark.parametrize("role", ROLES)
def test_variables_carry_the_roles_name(role: str) -> None:
    # what an operator sets of a deployment carries the project's name
    prefix = {"plan": "lowmem"}.get(role, role)
    strangers = [name for name in specs(role)["main"]["options"] if not name.startswith(f"{prefix}_")]
    assert strangers == []


@pytest.mark.parametrize("role", ROLES)
def test_a_role_reads_only_its_own_variables_and_the_plan(role: str) -> None:
    others = [other for other in ROLES if other not in (role, "plan")]
    allowed = {f"{other}_" for other in others if role.startswith(f"{other}_")}
    for path in sorted((REPOSITORY / "roles" / role).rglob("*.yml")):
        text = re.sub(r"#.*", "", path.read_text())
        # what is passed to an included role, and what it answers, is that role's interface
        included = set(re.findall(r"name: (\w+)", text))
        for other in others:
            if other in included or f"{other}_" in allowed or other == "python_env":
                continue
            assert not re.findall(rf"\b{other}_\w+", text), f"{path} reads a variable of {other}"


@pytest.mark.parametrize("role", ROLES)
def test_metadata_and_readme(role: str) -> None:
    folder = REPOSITORY / "roles" / role
    assert yaml.safe_load((folder / "meta/main.yml").read_text())["galaxy_info"]["license"] == "Apache-2.0"
    readme = (folder / "README.md").read_text()
    assert readme.startswith(f"# {role}\n")
    assert f"docs/variables.md#{role}" in readme


@pytest.mark.parametrize("role", ROLES)
def test_a_readme_names_only_variables_that_exist(role: str) -> None:
    options = set(specs(role)["main"]["options"])
    named = set(re.findall(rf"`({role}_[a-z_]+)", (REPOSITORY / "roles" / role / "README.md").read_text()))
    assert named - options - {"lowmem_plan", "lowmem_root", "python_env_paths"} == set()


def test_the_variable_reference_is_current() -> None:
    script = REPOSITORY / "scripts/variables_doc.py"
    wanted = subprocess.run(
        [sys.executable, str(script), "--print"], capture_output=True, text=True, check=True
    ).stdout
    assert (REPOSITORY / "docs/variables.md").read_text() == wanted, "run `make docs`"


def test_the_controllers_ansible_is_the_pinned_one() -> None:
    lock = (REPOSITORY / "requirements.txt").read_text()
    assert "ansible==12.3.0 ; python_full_version < '3.12'" in lock
    assert "ansible==14.5.0 ; python_full_version >= '3.12'" in lock
    assert lock.count("--hash=sha256:") > 100


def test_the_reference_has_each_variable_once() -> None:
    page = (REPOSITORY / "docs/variables.md").read_text()
    own = yaml.safe_load((REPOSITORY / "playbooks/vars/variables.yml").read_text())
    names = {name for role in ROLES for name in specs(role)["main"]["options"]} | set(own["options"])
    rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(rows) == sorted(names)
    # those of the playbooks are all an operator's, and come first
    first = re.findall(r"^\| `(\w+)` \|", page.partition("# Other variables, by role")[0], re.MULTILINE)
    assert set(own["options"]) | {"lowmem_profile", "lowmem_model", "lowmem_port"} <= set(first)
