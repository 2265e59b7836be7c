"""Names, types and choices of variables, without Ansible's run around them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleError

from .plugin import load

REPOSITORY = Path(__file__).resolve().parents[2]
check = load("action/check_variables.py")
groups = load("action/check_groups.py")
require = load("action/require.py")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("lowmem_profle", "lowmem_profile"),
        ("lowmen_profile", "lowmem_profile"),
        ("low_mem_profile", "lowmem_profile"),
        ("LOWMEM_ROOT", "lowmem_root"),
        ("lowmem-root", "lowmem_root"),
        ("gpu_driver_sourc", "gpu_driver_source"),
        ("gpu_drivers_source", "gpu_driver_source"),
        ("vlm_service_api_keys", "vllm_service_api_keys"),
        ("gatewya_port", "gateway_port"),
        ("rollback_too", "rollback_to"),
        ("doctor_strct", "doctor_strict"),
    ],
)
def test_a_mistyped_name_is_one_line_that_says_what_was_meant(name: str, meant: str) -> None:
    assert check.name_problems([name], check.KNOWN) == {
        name: f"{name} is not a variable of this project: did you mean {meant}? Correct it, or take it out."
    }


def test_a_name_of_an_earlier_release_is_refused_with_the_new_one() -> None:
    assert check.name_problems(["as_deployed_more"], check.KNOWN) == {
        "as_deployed_more": "as_deployed_more was renamed: set skip_unchanged_more in its place."
    }
    assert set(check.KNOWN.renamed.values()) <= check.KNOWN.options.keys()


def test_a_name_like_no_other_is_refused_too() -> None:
    assert check.name_problems(["lowmem_zzzzzzzzzzz"], check.KNOWN) == {
        "lowmem_zzzzzzzzzzz": "lowmem_zzzzzzzzzzz is not a variable of this project: correct it"
        " (docs/variables.md), or take it out."
    }


@pytest.mark.parametrize(
    "name",
    [
        "lowmem_root",
        "lowmem_planned",  # registered
        "skip_unchanged_seen",
        "__gateway_host",
        "ansible_host",
        "plan_of_the_site",
        "my_gateway_port",
        "site_lowmem_owner",
        "nginx_port",
        8000,
    ],
)
def test_what_is_known_or_not_ours_is_no_problem(name: Any) -> None:
    assert check.name_problems([name], check.KNOWN) == {}


def test_a_plan_that_no_run_computed_is_refused() -> None:
    assert check.name_problems(["lowmem_plan"], check.KNOWN) == {
        "lowmem_plan": "lowmem_plan is what a run computes for itself: take it out."
    }
    assert check.name_problems(["lowmem_plan", "lowmem_planned"], check.KNOWN) == {}


def test_variables_in_a_circle_are_told_and_what_they_make_is_not() -> None:
    variables = {
        "lowmem_root": "{{ lowmem_store }}",
        "lowmem_store": "{{ lowmem_root }}",
        "between": "{{ lowmem_root }}/x",
        "gateway_root": "{{ between }}",
        "gateway_port": "{{ gateway_port }}",
        "router_port": "{{ hostvars['a'].lowmem_root }}",
        "hostvars": {"a": "{{ lowmem_root }}"},
    }
    problems = dict.fromkeys(variables.keys() - {"between", "hostvars"}, "wrong")
    assert sorted(check.roots(problems, variables)) == ["gateway_port", "lowmem_root", "lowmem_store"]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("lowmem_port", "http", "lowmem_port is http: it must be a whole number; correct it."),
        ("lowmem_port", True, "lowmem_port is true: it must be a whole number; correct it."),
        ("lowmem_port", 8000.5, "lowmem_port is 8000.5: it must be a whole number; correct it."),
        ("lowmem_port", "1_0", "lowmem_port is 1_0: it must be a whole number; correct it."),
        ("lowmem_port", "9" * 5000, f"lowmem_port is {'9' * 60}…: it must be a whole number; correct it."),
        (
            "lowmem_port",
            None,
            "lowmem_port has no value: it must be a whole number; give it one, or take the line out.",
        ),
        ("lowmem_become", "maybe", "lowmem_become is maybe: it must be true or false; correct it."),
        ("lowmem_profile", ["a"], "lowmem_profile is ['a']: it must be a string; correct it."),
        (
            "lowmem_peers",
            "10.0.0.2",
            "lowmem_peers is 10.0.0.2: it must be a list, such as [a, b]; correct it.",
        ),
        (
            "lowmem_peers",
            [{"a": 1}],
            "lowmem_peers is [{'a': 1}]: it must be a list, and each of its members a string; correct it.",
        ),
        (
            "lowmem_overrides",
            "max_num_seqs=4",
            "lowmem_overrides is max_num_seqs=4: it must be a dictionary, such as {name: value}; correct it.",
        ),
        (
            "router_balance_rel_threshold",
            "nan",
            "router_balance_rel_threshold is nan: it must be a number; correct it.",
        ),
        (
            "gpu_driver_mig",
            True,
            "gpu_driver_mig is true: it must be one of these: refuse, allow; correct it.",
        ),
        (
            "cuda_toolkit_parts",
            ["nvcc", "all"],
            "cuda_toolkit_parts is ['nvcc', 'all']: it must be of these: c_compiler, nvcc; correct it.",
        ),
        (
            "lowmem_profile",
            {"a": "b\n\x1b[31m"},
            "lowmem_profile is {'a': 'b\\n\\x1b[31m'}: it must be a string; correct it.",
        ),
        (
            "model_source_token",
            ["geheim"],
            "model_source_token is set to a value that is not shown here: it must be a string; correct it.",
        ),
        (
            "vllm_service_api_key",
            {"a": "geheim"},
            "vllm_service_api_key is set to a value that is not shown here: it must be a string; correct it.",
        ),
        ("lowmem_port", "8000", None),
        ("lowmem_become", "no", None),
        ("gpu_driver_branch", 580, None),
        ("gpu_driver_branch", "580", None),
        ("cuda_toolkit_parts", [], None),
        ("host_memory_overcommit", "1", None),
        ("router_balance_rel_threshold", 2, None),
    ],
)
def test_a_value_of_a_wrong_kind_is_one_line(name: str, value: Any, said: str | None) -> None:
    assert check.value_problem(name, value, check.KNOWN.options[name]) == said


def test_the_default_of_every_option_is_a_value_that_it_takes() -> None:
    for name, option in check.KNOWN.options.items():
        if option.get("default") is not None and "{{" not in str(option["default"]):
            assert check.value_problem(name, option["default"], option) is None


def test_a_problem_is_told_of_the_variable_that_has_it_and_not_of_those_that_take_it_over() -> None:
    problems = {"lowmem_root": "a", "lowmem_store": "b", "gateway_root": "c"}
    variables = {"lowmem_root": [1], "lowmem_store": "{{ lowmem_root }}/x", "gateway_root": "lowmem_root"}
    assert check.roots(problems, variables) == {"lowmem_root": "a", "gateway_root": "c"}


def _registered(node: Any) -> set[str]:
    """Return what a file of tasks registers or sets as facts, and what it gives to an included role."""
    names: set[str] = set()
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "register":
                names.add(value)
            if key in ("ansible.builtin.set_fact", "vars") and isinstance(value, dict):
                names |= set(value)
            names |= _registered(value)
    elif isinstance(node, list):
        for entry in node:
            names |= _registered(entry)
    return names


def test_what_the_playbooks_and_roles_set_is_no_false_alarm() -> None:
    names: set[str] = set()
    for pattern in (
        "playbooks/**/*.yml",
        "roles/*/tasks/*.yml",
        "roles/*/vars/*.yml",
        "roles/*/handlers/*.yml",
    ):
        for path in REPOSITORY.glob(pattern):
            names |= _registered(yaml.load(path.read_text(), Loader=_Loader))
            if path.parent.name == "vars" and path.parts[-4] == "roles":
                names |= set(yaml.load(path.read_text(), Loader=_Loader) or {})
    assert {"lowmem_plan", "skip_unchanged_seen", "router_version"} <= names
    assert check.name_problems(names, check.KNOWN) == {}


class _Loader(yaml.SafeLoader):
    """Reads Ansible's own tags as text."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: str(node.value))


def test_every_variable_that_is_used_is_known() -> None:
    """In playbooks, roles, templates and inventories, in comments as well."""
    used: dict[str, str] = {}
    name = re.compile(rf"(?<![\w./$-])(?:{'|'.join(check.PREFIXES)})[a-z0-9_]+\b(?!\()")
    for pattern in (
        "site.yml",
        "playbooks/*.yml",
        "playbooks/tasks/*.yml",
        "playbooks/group_vars/*.yml",
        "inventory/**/*.yml",
        "roles/*/defaults/*.yml",
        "roles/*/tasks/*.yml",
        "roles/*/handlers/*.yml",
        "roles/*/vars/*.yml",
        "roles/*/templates/**/*.j2",
        "templates/**/*.j2",
    ):
        for path in REPOSITORY.glob(pattern):
            text = path.read_text()
            if path.suffix == ".j2":  # the rest of a template has names of its own
                text = " ".join(re.findall(r"\{[{%].*?[%}]\}", text, re.DOTALL))
            for found in name.findall(text):
                used.setdefault(found, str(path))
    assert {"lowmem_root", "gateway_port"} <= used.keys()
    modules = {path.stem for path in REPOSITORY.glob("plugins/*/*.py")}
    # beginnings of names, which a text completes
    known = check.KNOWN.names | modules | {"lowmem_problem", "gateway_tls_", "lowmem_verify_"}
    assert {found: path for found, path in used.items() if found not in known} == {}


def test_the_defaults_of_the_playbooks_are_those_of_the_list() -> None:
    values = yaml.safe_load((REPOSITORY / "playbooks/group_vars/all.yml").read_text())
    own = yaml.safe_load((REPOSITORY / "playbooks/vars/variables.yml").read_text())
    settable = {name for name in values if name.startswith("lowmem_")} - set(own["facts"])
    without_default = {name for name, option in own["options"].items() if "default" not in option}
    # role plan has three of them
    assert settable == without_default | {
        "lowmem_model_path",
        "lowmem_quantize",
        "lowmem_served_model_name",
    }
    assert set(own["facts"]).isdisjoint(check.KNOWN.options)


def test_a_file_of_variables_without_a_group_is_told(tmp_path: Path) -> None:
    for name in ("vlm.yml", "vllm.yaml", "all.yml", ".hidden", "nobody.yml", "vllm.yml~"):
        (tmp_path / name).touch()
    (tmp_path / "gateways").mkdir()
    assert list(groups.unread(tmp_path, ["all", "vllm", "gateway"], "group")) == [
        f"{tmp_path}/gateways is read for no group: did you mean gateway? Rename it, or take it out.",
        f"{tmp_path}/nobody.yml is read for no group: there is no such group; correct it, or take it out.",
        f"{tmp_path}/vlm.yml is read for no group: did you mean vllm? Rename it, or take it out.",
    ]


def test_a_file_of_a_host_with_dots_is_its_own(tmp_path: Path) -> None:
    for name in ("gpu-1.example.org", "gpu-1.example.org.yml", "gpu-1.yml"):
        (tmp_path / name).touch()
    assert list(groups.unread(tmp_path, ["gpu-1.example.org"], "host")) == [
        f"{tmp_path}/gpu-1.yml is read for no host: did you mean gpu-1.example.org? Rename it, or take it"
        " out."
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"all": ["a"], "vllm": ["a"]}, []),
        ({"all": ["r"], "router": ["r"]}, []),
        (
            {"all": ["a"], "vlm": ["a"], "vllm": []},
            [
                "group vllm of the inventory has no host: did you mean it by vlm? Rename that group, or"
                " choose another inventory with -i."
            ],
        ),
        (
            {"all": []},
            [
                "group vllm of the inventory has no host: put your hosts into it, or choose another inventory"
                " with -i."
            ],
        ),
    ],
)
def test_an_inventory_without_hosts_is_told(given: dict[str, list[str]], said: list[str]) -> None:
    assert list(groups.missing_hosts(given)) == said


def test_each_line_of_a_refusal_is_a_fact_of_its_variable() -> None:
    assert require.facts("gateway_port is 0: x\n\n  no RAM here\n") == {
        "lowmem_problem gateway_port": "gateway_port is 0: x",
        "lowmem_problem no RAM here": "no RAM here",
    }


def test_a_secret_is_not_in_the_reason() -> None:
    error = AnsibleError("invalid literal: 'geheim'")
    assert check.unresolved("model_source_token", error, later=True) == (
        "model_source_token cannot be resolved; correct it."
    )
    assert check.unresolved("lowmem_port", error, later=True) == (
        "lowmem_port cannot be resolved: invalid literal: 'geheim'; correct it."
    )
