"""`promtool test rules`: each alert is seen to fire and to be silent, on rules as they are rendered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import GOLDEN, HERE

TESTS = sorted((HERE / "alerts").glob("*.yml"))


def alerts(rules: Path) -> set[str]:
    return {
        rule["alert"]
        for group in yaml.safe_load(rules.read_text())["groups"]
        for rule in group["rules"]
        if "alert" in rule
    }


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_alerts(path: Path, promtool: Any) -> None:
    promtool("test", "rules", path)


@pytest.mark.parametrize("kind", ["fires", "is silent"])
def test_each_alert_has_a_test_in_which_it(kind: str) -> None:
    seen = {
        case["alertname"]
        for path in TESTS
        for test in yaml.safe_load(path.read_text())["tests"]
        for case in test["alert_rule_test"]
        if bool(case["exp_alerts"]) == (kind == "fires")
    }
    assert seen == set().union(*(alerts(rules) for rules in GOLDEN.glob("*/*.rules.yml")))
