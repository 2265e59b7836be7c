"""Ansible loads all filters in every process that uses one, and forks one for each task of each host: they
must load in no time.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
LOAD = (
    "import runpy, sys; runpy.run_path(sys.argv[1]); print(*sorted({'pydantic', 'typer', 'yaml', 'jinja2'} &"
    " sys.modules.keys()))"
)


@pytest.mark.parametrize(
    "plugin", sorted((REPOSITORY / "plugins/filter").glob("*.py")), ids=lambda path: path.stem
)
def test_a_filter_brings_no_heavy_package_along(plugin: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, plugin], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
