"""Dashboards are what their script writes; each expression in them and in the rules is legal and names series
that there are.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import DASHBOARDS, GOLDEN, HERE, REPOSITORY

BOARDS = sorted(path.stem for path in DASHBOARDS.glob("*.json"))


@pytest.mark.parametrize("name", ["vllm", "host"])
def test_a_dashboard_is_what_the_script_writes(name: str) -> None:
    pytest.importorskip("grafana_foundation_sdk")
    script = REPOSITORY / "scripts/dashboards.py"
    wanted = subprocess.run(
        [sys.executable, script, "--print", name], capture_output=True, text=True, check=True
    ).stdout
    assert (DASHBOARDS / f"{name}.json").read_text() == wanted, "run `make dashboards`"


def of_board(name: str) -> dict[str, str]:
    """Panel and legend -> expression, with a deployment in the variable's place."""
    board = json.loads((DASHBOARDS / f"{name}.json").read_text())
    return {
        f"{name}: {panel['title']}: {target['legendFormat']}": target["expr"].replace("$deployment", "main")
        for panel in board["panels"]
        for target in panel.get("targets", [])
    }


def of_rules(path: Path) -> dict[str, str]:
    rules = [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]
    return {
        f"{path.parent.name} {path.stem}: {rule.get('alert') or rule['record']}": rule["expr"]
        for rule in rules
    }


def recorded() -> set[str]:
    return {
        rule.rsplit(" ", 1)[1]
        for path in GOLDEN.glob("*/*.rules.yml")
        for rule in of_rules(path)
        if " lowmem:" in rule
    }


def scraped() -> set[str]:
    """Series of the recorded answers of vLLM, node exporter and nvitop-exporter, and those that
    host_metrics.py writes.
    """
    names = {
        re.match(r"[^{ ]+", line)[0]  # type: ignore[index]
        for path in (HERE / "data").glob("*.prom")
        for line in path.read_text().splitlines()
        if line and not line.startswith("#")
    }
    tree = ast.parse((REPOSITORY / "roles/monitoring/files/host_metrics.py").read_text())
    [help_] = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "HELP"
    ]
    return names | set(ast.literal_eval(help_))


PROMETHEUS_OWN = {"up", "ALERTS"}
# a server without speculative decoding, as those recorded, has none (0.32.0, v1/spec_decode/metrics.py)
OF_DRAFTS = {"vllm:spec_decode_num_accepted_tokens_total"}

WORDS = {
    "and",
    "or",
    "unless",
    "bool",
    "offset",
    "by",
    "without",
    "on",
    "ignoring",
    "group_left",
    "group_right",
}


def names_in(expression: str) -> set[str]:
    """Series that a PromQL expression names: what is left without labels, ranges, functions, words and
    numbers.
    """
    text = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"", " ", expression)
    text = re.sub(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", text)
    found = re.findall(r"(?<![\w:.])([A-Za-z_:][\w:]*)(?!\s*\()(?![\w:])", text)
    return {name for name in found if name not in WORDS}


def test_the_names_in_an_expression() -> None:
    said = names_in(
        'sum by (a, le) (rate(vllm:x_bucket{le="y_z"}[5m])) / on (b) group_left () lowmem:c:p99 * 1e6 and'
        " time() - d > 0"
    )
    assert said == {"vllm:x_bucket", "lowmem:c:p99", "d"}


EXPRESSIONS = {key: expr for name in BOARDS for key, expr in of_board(name).items()} | {
    key: expr for path in sorted(GOLDEN.glob("*/*.rules.yml")) for key, expr in of_rules(path).items()
}


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_every_series_that_is_named_exists(where: str) -> None:
    assert names_in(EXPRESSIONS[where]) - scraped() - recorded() - PROMETHEUS_OWN - OF_DRAFTS == set()


def test_prometheus_reads_every_panel(promtool: Any, tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": expr} for number, expr in enumerate(of_board("vllm").values())
    ]
    rules += [
        {"record": f"host:{number}", "expr": expr} for number, expr in enumerate(of_board("host").values())
    ]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", tmp_path / "panels.yml")


@pytest.mark.parametrize("name", BOARDS)
def test_panels_do_not_overlap_and_each_asks_the_chosen_prometheus(name: str) -> None:
    board = json.loads((DASHBOARDS / f"{name}.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert panel["targets"], panel["title"]
