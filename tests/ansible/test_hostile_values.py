"""A hostile value of any variable is refused in one line, or read back as the very same value.

The table of variables is docs/variables.md, so a new variable is tried without a word here.
One whose kind takes more than inert characters needs an entry in SINKS: the place that quotes it.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowmem.plan.planner import make_plan
from lowmem.plan.request import PlanRequest
from lowmem.values import kinds

REPOSITORY = Path(__file__).resolve().parents[2]
PLAN = json.loads((Path(__file__).parent / "files/plan.json").read_text())
KINDS: dict[str, str] = yaml.safe_load((REPOSITORY / "lowmem/data/variables.yml").read_text())
SPECS = {
    name: option
    for path in sorted((REPOSITORY / "roles").glob("*/meta/argument_specs.yml"))
    for name, option in yaml.safe_load(path.read_text())["argument_specs"]["main"]["options"].items()
}
DOCUMENTED = re.findall(
    r"^\| `([a-z0-9_]+)` \|", (REPOSITORY / "docs/variables.md").read_text(), re.MULTILINE
)

INERT = set(string.ascii_letters + string.digits + "_./+@:,=~[]-")
"""What no syntax that a template is written in reads as anything but text, in the middle of a word."""

TOKENS = [
    "\n",
    "\r",
    ";",
    "$(id)",
    "`id`",
    "${HOME}",
    "'",
    '"',
    "\\",
    "%",
    "%n",
    "%(x)s",
    "{{ 1 }}",
    "{% raw %}",
    "#",
    "&&",
    "|",
    "<",
    ">",
    "*",
    "?",
    "[",
    "]",
    "~",
    "!",
    " ",
    "\t",
    "\0",
    "\x1b[2J",
    "\x9b31m",
    "\u2028",
    "\u2029",
    "\x85",
    "\u202e",
    "\ufeff",
    "\ud800",
    "..",
    "../",
    "/",
    "a",
    "b1",
    "-",
    "--",
    "-rf",
    "=",
    ":",
    "@",
    ",",
    "é",
    "世",
    "😀",
]
HOSTILE = st.lists(st.sampled_from(TOKENS), max_size=6).map("".join)
ONE_LINE = st.lists(
    st.sampled_from([token for token in TOKENS if token.isprintable()]), min_size=1, max_size=6
).map("".join)
ENVIRONMENT = HOSTILE.filter(lambda value: not set(value) & {"\0", "\ud800"})

bounded = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
rendered_each = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


# ------------------------------------------------------------------ the table


def test_every_variable_has_a_kind_and_no_other() -> None:
    assert len(SPECS) > 150
    assert set(DOCUMENTED) == set(KINDS)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_kind_is_what_the_argument_spec_says(name: str) -> None:
    option, kind = SPECS[name], KINDS[name]
    assert kind.startswith("list of ") == (option.get("type") == "list")
    assert (" to " in kind) == (option.get("type") == "dict")
    assert (kind == "boolean") == (option.get("type") == "bool")
    assert (kind == "number") == (option.get("type") == "float")
    if "choices" in option:
        assert kind.removeprefix("list of ") == f"one of {', '.join(map(str, option['choices']))}"
    elif option.get("type") == "int":
        assert kind in ("integer", "seconds", "port", "port or 0")
    if "default" in option and "{{" not in str(option["default"]):
        assert kinds.refusal(name, kind, option["default"]) == ""


def shapes(name: str, value: str) -> list[Any]:
    """The value as the variable would hold it: by itself, in a list, as a name and under a name."""
    return [value, [value], {value: 1}, {"A": value}, {"a": value}, {"a": {"burst": value}}, {"A": [value]}]


@bounded
@given(HOSTILE)
def test_a_hostile_text_is_refused_in_one_line_or_is_inert(value: str) -> None:
    for name, kind in KINDS.items():
        for given_value in shapes(name, value):
            line = kinds.refusal(name, kind, given_value)
            if line:
                assert line.isprintable()
                assert line.startswith(f"{name} ")
                assert len(line) < 500
            elif name not in SINKS:
                assert set(json.dumps(given_value)) - set('{}" ') <= INERT, (name, given_value)
                assert kinds.kind(kind).secret or ".." not in value.split("/"), (name, value)


@bounded
@given(HOSTILE)
def test_a_secret_is_in_no_message(value: str) -> None:
    secret = f"open-sesame-{value}"
    for name, kind in KINDS.items():
        if kinds.kind(kind).secret:
            for given_value in (secret, {"alice": secret}, {"alice": [secret]}):
                assert "open-sesame" not in kinds.refusal(name, kind, given_value)


@pytest.mark.parametrize("kind", ["integer", "seconds", "number", "port", "port or 0", "card"])
@pytest.mark.parametrize(
    "value",
    [
        True,
        False,
        "1_0",
        " 1",
        "1 ",
        "1\n",
        "0x10",
        "1e3",
        "nan",
        float("nan"),
        "٣",
        "",
        None,
        [1],
        {},
        "--1",
    ],
)
def test_a_number_is_written_in_plain_digits(kind: str, value: Any) -> None:
    assert kinds.refusal("x", kind, value)


@pytest.mark.parametrize("value", [-1, "-1", 1e300, "1" * 19])
def test_a_duration_is_not_negative_and_ends(value: Any) -> None:
    assert kinds.refusal("x_timeout_s", "seconds", value).endswith(
        ": it must be a whole number of seconds, 0 or more, such as 30."
    )


# ------------------------------------------------------------------ the places that quote


def render(template: str, **variables: Any) -> str:
    """A template as Ansible renders it; the values are untrusted, so that none of them is a template."""
    given_values = {"ansible_managed": "Ansible managed", "lowmem_plan": PLAN, **variables}
    made = Templar(loader=DataLoader(), variables=given_values).template(
        trust_as_template((REPOSITORY / template).read_text())
    )
    return str(made)


ROOT = "/srv/a-b_c.d+e@f"

SERVICE = {
    "vllm_service_root": ROOT,
    "vllm_service_instance": "A_1",
    "vllm_service_user": "_a-1",
    "vllm_service_group": "g-1_",
    "vllm_service_extra_environment": {},
    "__vllm_service_cache_folders": {"HF_HOME": "huggingface"},
    "__vllm_service_checkpoint_id": f"{ROOT}/models/m, manifest 0123",
    "__vllm_service_environment_path": f"{ROOT}/envs/e",
    "__vllm_service_spans": False,
    "__vllm_service_rank": 0,
    "__vllm_service_local_only": True,
    "__vllm_service_start_interval_s": 100,
    "__vllm_service_device_nodes": [],
    "vllm_service_start_limit": 3,
    "vllm_service_restart_pause_s": 5,
    "vllm_service_watchdog_silence_s": 0,
    "vllm_service_log_max_mib": 20,
    "vllm_service_log_files": 5,
    "vllm_service_settle_s": 45,
}


def environment_as_bash_has_it(value: str, tmp_path: Path) -> str:
    """The value of a variable of engine.env, sourced as low_mem.sh does it."""
    settings_file = tmp_path / "engine.env"
    text = render("templates/engine.env.j2", **{**SERVICE, "vllm_service_extra_environment": {"OURS": value}})
    settings_file.write_bytes(text.encode())
    seen = subprocess.run(
        ["bash", "-euc", 'set -a; source "$1"; exec env -0', "bash", settings_file],
        capture_output=True,
        check=True,
        env={"PATH": os.environ["PATH"]},
        cwd=tmp_path,
    ).stdout
    return dict(pair.split("=", 1) for pair in seen.decode().split("\0")[:-1])["OURS"]


def arguments_as_the_engine_has_them(plan: Any, tmp_path: Path) -> list[str]:
    """What a program in vLLM's place is given by low_mem.sh of this plan."""
    probe = tmp_path / "vllm"
    probe.write_text('#!/bin/bash\nprintf "%s\\0" "$@"\n')
    probe.chmod(0o755)
    (tmp_path / "keys").touch()
    (tmp_path / "engine.env").write_text(f"LOWMEM_API_KEYS={shlex.quote(str(tmp_path / 'keys'))}\n")
    launcher = tmp_path / "low_mem.sh"
    given_plan = json.loads(plan.model_dump_json())
    checkpoint = f"{given_plan['deploy']['model_path']}, manifest 0123"
    launcher.write_bytes(
        render(
            "templates/low_mem.sh.j2",
            **{**SERVICE, "lowmem_plan": given_plan, "__vllm_service_checkpoint_id": checkpoint},
        ).encode()
    )
    done = subprocess.run(
        ["bash", launcher],
        capture_output=True,
        check=True,
        env={"PATH": os.environ["PATH"], "VLLM_BIN": str(probe)},
    )
    assert done.stderr == b""
    return done.stdout.decode().split("\0")[1:-1]


def planned(tmp_path: Path, **deploy: Any) -> list[str]:
    place = {"model_path": "/m", "served_model_name": "m", **deploy}
    plan = make_plan(PlanRequest("demo_cpu", deploy=place, search=False))
    given_arguments = arguments_as_the_engine_has_them(plan, tmp_path)
    assert given_arguments == list(plan.argv)
    return given_arguments


def test_an_environment_value_is_read_back(tmp_path: Path) -> None:
    @rendered_each
    @given(ENVIRONMENT)
    def check(value: str) -> None:
        assert kinds.refusal("x", KINDS["vllm_service_extra_environment"], {"OURS": value}) == ""
        assert environment_as_bash_has_it(value, tmp_path) == value

    check()


def test_the_names_of_the_plan_are_read_back(tmp_path: Path) -> None:
    @rendered_each
    @given(ONE_LINE, ONE_LINE)
    def check(model: str, name: str) -> None:
        model = f"/m{model}"
        if kinds.refusal("x", KINDS["lowmem_model_path"], model) or kinds.refusal(
            "x", KINDS["lowmem_served_model_name"], name
        ):
            return
        seen = planned(tmp_path, model_path=model, served_model_name=name, host="fe80::1%eth0")
        assert seen[0] == model
        assert seen[seen.index("--served-model-name") + 1] == name
        assert seen[seen.index("--host") + 1] == "fe80::1%eth0"

    check()


def test_a_knob_is_read_back(tmp_path: Path) -> None:
    value = """{"a": "it's $(id) `id` % \\" ;"}"""
    overrides = {"generation_config": value}
    place = {"model_path": "/m", "served_model_name": "m"}
    plan = make_plan(PlanRequest("demo_cpu", overrides=overrides, deploy=place, search=False))
    assert value in arguments_as_the_engine_has_them(plan, tmp_path)


def test_an_argument_is_read_back(tmp_path: Path) -> None:
    evil = "it's $(id) `id` % \\ \" ; {{ 7 * 7 }}"
    given = {
        "tool_call_parser": evil,
        "override_generation_config": {evil: [evil]},
        "lora_modules": [{"name": evil, "path": "/x"}, f"a={evil}"],
    }
    assert kinds.refusal("x", KINDS["lowmem_arguments"], given) == ""
    place = {"model_path": "/m", "served_model_name": "m"}
    plan = make_plan(PlanRequest("demo_cpu", overrides=given, deploy=place, search=False))
    seen = arguments_as_the_engine_has_them(plan, tmp_path)
    assert seen[seen.index("--tool-call-parser") + 1] == evil
    assert json.loads(seen[seen.index("--override-generation-config") + 1]) == {evil: [evil]}
    adapters = seen[seen.index("--lora-modules") + 1 :][:2]
    assert json.loads(adapters[0]) == {"name": evil, "path": "/x"}
    assert adapters[1] == f"a={evil}"


@pytest.mark.parametrize(
    "given", [{"a b": 1}, {"x": "a\nb"}, {"x": ["a\0"]}, {"x": {"a\u2028b": 1}}, {"x": None}, {"-x": 1}]
)
def test_what_no_argument_may_be(given: dict[str, Any]) -> None:
    assert "lowmem_arguments" in kinds.refusal("lowmem_arguments", KINDS["lowmem_arguments"], given)


def test_labels_are_read_back_by_yaml() -> None:
    @rendered_each
    @given(ONE_LINE)
    def check(value: str) -> None:
        made = render(
            "roles/monitoring/templates/prometheus.yml.j2",
            inventory_hostname="h",
            monitoring_external_labels={"site": value},
            monitoring_scrape_interval_s=15,
            __monitoring_etc="/etc/p",
            __monitoring_reach="127.0.0.1",
            monitoring_node_exporter_port=1,
            monitoring_prometheus_port=2,
            monitoring_alertmanager_url="https://a.example:9093/x~y",
        )
        assert yaml.safe_load(made)["global"]["external_labels"] == {"host": "h", "site": value}

    check()


def test_routes_are_read_back() -> None:
    source = (REPOSITORY / "roles/gateway/templates/nginx.conf.j2").read_text()
    assert "regex_replace('[.]', '\\\\.')" in source  # a dot of a route is a dot, as it stands in a pattern
    for route in ("GET /v1/a.b", "POST /v1/{id}/x-y~z"):
        assert kinds.refusal("r", "route", route) == ""
    for route in ("GET /a;", "GET /a b", "GET /a\n", 'GET /a"', "GET /a{", "GET /$x", "GET /../a", "GET /a#"):
        assert kinds.refusal("r", "route", route)


def test_names_of_a_certificate_are_quoted() -> None:
    text = (REPOSITORY / "roles/gateway/tasks/certificate.yml").read_text()
    uses = re.findall(
        r"\{\{([^}]*gateway_tls_(?:names|alternatives)[^}]*)\}\}",
        text.split("cmd: |")[1].split("changed_when")[0],
    )
    assert [use.strip().endswith("| quote") for use in uses] == [True, True]


def as_data(*names: str) -> Callable[[], None]:
    """These variables are never written into a text: only data that JSON or an argument vector carries."""

    def check() -> None:
        for path in [*(REPOSITORY / "templates").iterdir(), *(REPOSITORY / "roles").glob("*/templates/*")]:
            for name in names:
                assert name not in path.read_text(), path
        for path in (REPOSITORY / "roles").glob("*/tasks/*.yml"):
            for task in re.findall(r"(?:shell|raw):[^\n]*\n(?:[ ]{4,}[^\n]*\n)*", path.read_text()):
                for name in names:
                    assert name not in task, path

    return check


SINKS: dict[str, Callable[..., None]] = {
    "vllm_service_extra_environment": test_an_environment_value_is_read_back,
    "lowmem_model_path": test_the_names_of_the_plan_are_read_back,
    "lowmem_served_model_name": test_the_names_of_the_plan_are_read_back,
    "lowmem_host": test_the_names_of_the_plan_are_read_back,
    "lowmem_overrides": test_a_knob_is_read_back,
    "lowmem_arguments": test_an_argument_is_read_back,
    "monitoring_external_labels": test_labels_are_read_back_by_yaml,
    "gateway_routes": test_routes_are_read_back,
    "gateway_tls_names": test_names_of_a_certificate_are_quoted,
    "nvidia_repository_key_fingerprint": as_data("nvidia_repository_key_fingerprint"),
    "lowmem_model": as_data("lowmem_model "),
    "model_source_path": as_data("model_source_path"),
    "model_source_patterns": as_data("model_source_patterns"),
    "skip_unchanged_more": as_data("skip_unchanged_more"),
    # Ansible itself quotes the values, and the names are of a kind of their own
    "lowmem_environment": as_data("lowmem_environment"),
}


@pytest.mark.parametrize("name", sorted(name for name, check in SINKS.items() if check.__name__ == "check"))
def test_a_value_is_only_data(name: str) -> None:
    SINKS[name]()


def test_what_is_not_inert_has_a_place_that_quotes_it() -> None:
    assert {name for name, kind in KINDS.items() if not kinds.kind(kind).inert} == set(SINKS)


# --------------------------------------------------- inert values, as each reader has them


def directives(unit: str) -> dict[str, list[str]]:
    """The settings of a unit by systemd's rules: no value here may hold what systemd expands or unquotes."""
    found: dict[str, list[str]] = {}
    for line in unit.splitlines():
        if line and not line.startswith(("#", ";", "[")):
            name, _, value = line.partition("=")
            assert not set(value) & set("%$'\"\\"), line
            found.setdefault(name, []).append(value)
    return found


def test_systemd_reads_the_values_of_the_service(tmp_path: Path) -> None:
    made = render("templates/vllm@.service.j2", **SERVICE)
    unit = directives(made)
    assert unit["User"] == ["_a-1"]
    assert unit["Group"] == ["g-1_"]
    assert unit["WorkingDirectory"] == [ROOT]
    assert unit["ExecStart"] == [f"{ROOT}/current/low_mem.sh"]
    assert unit["ReadWritePaths"] == [f"{ROOT}/cache"]
    if shutil.which("systemd-analyze"):
        file = tmp_path / "vllm@A_1.service"
        file.write_text(re.sub(rf"{re.escape(ROOT)}/current/(low_mem.sh|env/bin/lowmem)", "/bin/true", made))
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", file], capture_output=True, text=True, check=False
        )
        assert [line for line in done.stderr.splitlines() if file.name in line] == []


def test_supervisor_reads_the_values_of_the_service() -> None:
    made = render("templates/supervisord.conf.j2", **SERVICE)
    # as supervisor's own reader: a comment begins after a blank and a semicolon, and %(x)s is expanded
    config = configparser.ConfigParser(inline_comment_prefixes=(";", "#"), strict=False)
    config.read_string(made)
    assert config["program:vllm"]["command"] == f"{ROOT}/etc/run_under_supervisor.sh"
    assert config["program:vllm"]["directory"] == ROOT
    assert config["unix_http_server"]["file"] == f"{ROOT}/run/supervisor.sock"


@pytest.mark.parametrize("name", ["run_under_supervisor.sh", "supervise.sh"])
def test_bash_reads_the_root(name: str) -> None:
    line = next(x for x in render(f"templates/{name}.j2", **SERVICE).splitlines() if x.startswith("root="))
    done = subprocess.run(
        ["bash", "-c", f'{line}; printf %s "$root"'], capture_output=True, text=True, check=True
    )
    assert done.stdout == ROOT


# ------------------------------------------------------------------ as an operator meets it

EXAMPLES: dict[str, tuple[dict[str, Any], str]] = {
    "a host that is a command": (
        {"lowmem_host": "$(id)"},
        "lowmem_host is $(id): it must be the name or address",
    ),
    "a host that is an option": (
        {"lowmem_host": "-rf"},
        "lowmem_host is -rf: it must be the name or address",
    ),
    "the file of the keys": (
        {"vllm_service_extra_environment": {"LOWMEM_API_KEYS": "/tmp/keys"}},
        "vllm_service_extra_environment has LOWMEM_API_KEYS: a name must be a letter or _",
    ),
    "a name that ends a command": (
        {"vllm_service_extra_environment": {"A;id": "x"}},
        "vllm_service_extra_environment has A;id: a name must be a letter or _",
    ),
    "a name that ends a line": (
        {"vllm_service_extra_environment": {"A\nB": "x"}},
        "vllm_service_extra_environment has A\\nB: a name must be a letter or _",
    ),
    "a name for every task": (
        {"lowmem_environment": {"A;id": "x"}},
        "lowmem_environment has A;id: a name must be a letter or _",
    ),
    "a path with a line": (
        {"lowmem_model_path": "/m\ntouch /tmp/x"},
        "lowmem_model_path is /m\\ntouch /tmp/x: it must be an absolute path in one line, without '..'.",
    ),
    "a port that is true": ({"lowmem_port": True}, "lowmem_port is true: it must be a TCP port, 1 to 65535."),
    "a time that is negative": (
        {"vllm_service_watchdog_silence_s": -1},
        "vllm_service_watchdog_silence_s is -1: it must be a whole number of seconds, 0 or more, such as 30.",
    ),
    "a time with an underscore": (
        {"model_source_timeout_s": "1_0"},
        "model_source_timeout_s is 1_0: it must be a whole number of seconds, 0 or more, such as 30.",
    ),
    "a boolean that is a word": (
        {"lowmem_become": "perhaps"},
        "lowmem_become is perhaps: it must be true or false.",
    ),
    "a repository that goes up": (
        {"model_source_repository": "a/.."},
        "model_source_repository is a/..: it must be of the form owner/name",
    ),
    "a URL with a line": (
        {"nvidia_repository_base_url": "https://a/\nTrusted: yes"},
        "nvidia_repository_base_url is https://a/\\nTrusted: yes: it must be a URL",
    ),
    "a text for a list": (
        {"gateway_addresses": "0.0.0.0"},
        "gateway_addresses is 0.0.0.0: it must be a list",
    ),
    "an item with a command": (
        {"router_workers": ["http://a:1/$(id)"]},
        "router_workers has http://a:1/$(id): each must be",
    ),
    "a root that goes up": (
        {"lowmem_root": "/srv/x/../.."},
        "lowmem_root is /srv/x/../..: it must be an absolute path",
    ),
    "an instance that is a path": (
        {"lowmem_instance": "../x"},
        "lowmem_instance is ../x: it must be 1 to 32 letters",
    ),
    "an escape sequence": (
        {"lowmem_profile": "\x1b[2J\u202e"},
        "lowmem_profile is \\x1b[2J\\u202e: it must be the name of a profile",
    ),
    "a secret": (
        {"model_source_token": "hf_secret $(id)"},
        "model_source_token must be at most 1024 letters, digits or . _ ~ + / = -, or empty.",
    ),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Case -> the lines with which the action refuses it; each case is a host."""
    folder = tmp_path_factory.mktemp("values")
    hosts = {f"case-{number}": values for number, (values, _) in enumerate(EXAMPLES.values())}
    hosts["good"] = {
        "lowmem_port": "8000",
        "lowmem_become": "no",
        "vllm_service_extra_environment": {"A": "$(id)\n"},
    }
    inventory = folder / "hosts.json"
    inventory.write_text(json.dumps({"cases": {"hosts": hosts, "vars": {"ansible_connection": "local"}}}))
    playbook = folder / "values.yml"
    play = {"name": "Values", "hosts": "all", "gather_facts": False, "tasks": [{"check_values": None}]}
    playbook.write_text(yaml.safe_dump([play]))
    done = subprocess.run(
        [Path(sys.executable).with_name("ansible-playbook"), "-i", inventory, playbook],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json", "ANSIBLE_NOCOLOR": "1"},
    )
    report = json.loads(done.stdout[done.stdout.index("{") :])
    [task] = report["plays"][0]["tasks"]
    said = {host: result.get("msg", "").splitlines() for host, result in task["hosts"].items()}
    return {case: said[f"case-{number}"] for number, case in enumerate(EXAMPLES)} | {"good": said["good"]}


@pytest.mark.parametrize("case", EXAMPLES, ids=[name.replace(" ", "-") for name in EXAMPLES])
def test_an_example_is_refused_in_one_line(answers: dict[str, list[str]], case: str) -> None:
    [line] = answers[case]
    assert line.startswith(EXAMPLES[case][1])
    assert "hf_secret" not in line


def test_ordinary_values_pass(answers: dict[str, list[str]]) -> None:
    assert answers["good"] == []


@pytest.mark.parametrize(
    "playbook",
    [path.name for path in (REPOSITORY / "playbooks").glob("*.yml") if path.name != "check_inventory.yml"],
)
def test_a_playbook_that_is_run_by_itself_checks_the_values_first(playbook: str) -> None:
    plays = yaml.safe_load((REPOSITORY / "playbooks" / playbook).read_text())
    first = plays[0].get("ansible.builtin.import_playbook")
    # the others are stages of site.yml, which begins with preflight.yml, or begin with it themselves
    stages = {
        "provision.yml",
        "quantize.yml",
        "serve.yml",
        "edge.yml",
        "router.yml",
        "verify.yml",
        "summary.yml",
        "environment.yml",
    }
    assert first in ("check_inventory.yml", "preflight.yml") or playbook in stages
