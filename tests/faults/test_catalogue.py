"""The catalogue, the tests and the pages name the same faults."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CATALOGUE = yaml.safe_load((ROOT / "tests/faults/catalogue.yml").read_text())
PAGE = (ROOT / "docs/reliability.md").read_text()


def test_the_page_lists_exactly_the_catalogue() -> None:
    rows = re.findall(
        r"^\| \[([\w-]+)\]\(#([\w-]+)\) \| (.+?) \| (.+?) \| \[[\w-]+\]\(runbooks/([\w-]+\.md)\) \|$",
        PAGE,
        re.MULTILINE,
    )
    details = re.findall(
        r"^### (.+)\n\n\*\*(.+)\.\*\*\n\n- Injected: (.+)\n- Expected: (.+)\n- Seen: (.+)$",
        PAGE,
        re.MULTILINE,
    )
    [unseen] = re.findall(r"^Written and not seen yet: (.+)\.$", PAGE, re.MULTILINE)
    seen = {name: f for name, f in CATALOGUE.items() if name not in unseen.split(", ")}
    assert [(name, link, fault, runbook) for name, link, fault, _, runbook in rows] == [
        (name, name, f["fault"], f["runbook"]) for name, f in seen.items()
    ]
    assert [detail[:4] for detail in details] == [
        (name, f["fault"], f["injected"], f["expected"]) for name, f in seen.items()
    ]
    assert all(seen.strip() for *_, seen in details)


def test_each_fault_has_a_test_and_each_test_its_fault() -> None:
    text = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    marked = set(re.findall(r'fault\("([\w-]+)"\)', text)) | {
        f"{who}-killed" for who in ("engine", "server", "worker", "unit-engine", "unit-server", "unit-worker")
    }
    assert marked == set(CATALOGUE)


def test_each_fault_has_its_runbook() -> None:
    assert {
        f["runbook"] for f in CATALOGUE.values() if not (ROOT / "docs/runbooks" / f["runbook"]).is_file()
    } == set()


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_runbook_of_a_fault_names_it(name: str) -> None:
    """`engine-killed` stands for `unit-engine-killed` too: what to do is the same."""
    text = (ROOT / "docs/runbooks" / CATALOGUE[name]["runbook"]).read_text()
    named = re.search(r"Faults?[^:.]*:\s([\w, \n-]+)\.", text)
    assert named, "the runbook says for which faults it is: `Faults: …`"
    known = set(re.split(r"[, \n]+", named[1]))
    assert name in known or name.removeprefix("unit-") in known


def test_the_generator_reads_its_own_page_and_writes_it_again() -> None:
    from scripts import reliability_doc

    kept = reliability_doc.kept(PAGE)
    rows = {name: reliability_doc.row(f, None, kept.get(name)) for name, f in CATALOGUE.items()}
    assert PAGE.endswith("\n|---|---|--:|---|\n" + reliability_doc.body(CATALOGUE, rows))
