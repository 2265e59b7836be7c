"""README.md, the index of the runbooks and the tests of the checks keep up with what the code accepts."""

import re
from pathlib import Path

import pytest

from lowmem import schema
from lowmem.data import load_yaml
from lowmem.inputs import devices

ROOT = Path(__file__).parents[2]
ROWS = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", (ROOT / "README.md").read_text(), re.MULTILINE))


def test_the_architectures_and_cards_are_as_many_as_the_tables_have():
    counted = load_yaml("architectures.yml")["architectures"]
    assert ROWS["model families"].startswith(f"{len(counted)} architectures that vLLM 0.32 loads: ")
    assert f"has {len(devices.names()) - 1} cards" in ROWS["GPUs"]  # the table has the CPU too


def test_the_engine_is_the_pinned_one():
    assert ROWS["engine"] == f"vLLM {schema.VLLM_VERSION}, locked by hash."


def test_the_index_names_each_runbook_once():
    folder = ROOT / "docs/runbooks"
    named = re.findall(r"\]\(([\w-]+\.md)\)", (folder / "README.md").read_text())
    assert sorted(named) == sorted(path.name for path in folder.glob("*.md") if path.name != "README.md")


@pytest.mark.parametrize(
    "suite", sorted(path.stem.removeprefix("test_") for path in (ROOT / "checks").glob("test_*.py"))
)
def test_a_broken_host_is_shown_to_each_suite_of_checks(suite):
    assert f'"{suite}"' in (ROOT / "tests/measure/test_checks.py").read_text()


def test_links_between_pages_lead_somewhere():
    pages = [*ROOT.glob("*.md"), ROOT / "locks/README.md"]
    broken = []
    for page in [*pages, *(ROOT / "docs").rglob("*.md"), *(ROOT / "roles").glob("*/README.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)(?:#[\w-]*)?\)", page.read_text()):
            if not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []
