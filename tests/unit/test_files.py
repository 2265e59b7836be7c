"""Readers of files of anybody, at the edges that a whole command does not reach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowmem.artefacts import read_plan
from lowmem.errors import BadInput
from lowmem.files import read_yaml, tree_digest


def test_a_node_that_contains_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.yml"
    path.write_text("&a [*a, *a]\n")
    with pytest.raises(BadInput, match=r"holds a node that contains itself \(\*a\)"):
        read_yaml(path)


def test_an_alias_of_a_whole_node_is_read(tmp_path: Path) -> None:
    path = tmp_path / "profile.yml"
    path.write_text("one: &a [1, 2]\ntwo: *a\n")
    assert read_yaml(path) == {"one": [1, 2], "two": [1, 2]}


@pytest.mark.parametrize("arguments", [None, 5, "text", [1], [{"flag": ["--max-num-seqs"]}]])
def test_a_plan_with_odd_arguments_is_one_line(tmp_path: Path, arguments: Any) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"arguments": arguments}))
    with pytest.raises(BadInput, match="Field required"):
        read_plan(path)


def test_the_digest_of_a_tree_is_of_names_and_contents(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text("x")
    files = [tmp_path / "b", tmp_path / "a"]
    first = tree_digest(tmp_path, files)
    assert first == tree_digest(tmp_path, files[::-1])
    (tmp_path / "a").write_text("y")
    assert tree_digest(tmp_path, files) != first
