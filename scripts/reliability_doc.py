"""Writes docs/reliability.md from tests/faults/catalogue.yml and the records that the fault tests left in
.lowmem/faults.

    LOWMEM_SLOW=1 .lowmem/venv/bin/pytest -m fault && make molecule SCENARIO="service cluster two_hosts"
    .lowmem/venv/bin/python scripts/reliability_doc.py

A fault that was not injected again keeps its row, with the day and the load of that run. One that has neither
a record nor a row, or whose injection or expectation is another one since, has no row and is named above the
table: the page holds only what was seen.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from lowmem.files import write_text
from lowmem.measure.facts import host_facts

REPOSITORY = Path(__file__).resolve().parents[1]
CATALOGUE = REPOSITORY / "tests/faults/catalogue.yml"
RECORDS = Path(os.environ.get("LOWMEM_FAULTS", REPOSITORY / ".lowmem/faults"))
PAGE = REPOSITORY / "docs/reliability.md"

HEAD = """# Reliability

Each fault is injected for real into a running service by a test, with requests under way where that matters. A client keeps a ledger of
them: each ends with a complete answer or with an error that the client saw; a request that ends otherwise is lost, and fails the test.

Written by `scripts/reliability_doc.py` from the records that the tests leave (`LOWMEM_SLOW=1 pytest -m fault`, `make molecule
SCENARIO="service cluster two_hosts"`): vLLM {vllm}, profile demo_cpu under its supervisor, {cpu_cores} cores ({cpu}). Recovery: from
the fault to the next complete answer; most of it is vLLM's own start. Beside it stand the day and the machine's load (mean of a
minute, when the test ended): where 15 programs want two cores a start takes several times as long as alone. Rows without a day are of
2026-11-23, those named `unit-` at a load of 15 to 20.

Rows `unit-`: the same engine as `vllm@main.service` in its sandbox, on a systemd host (Molecule's scenario `service`, which
runs `tests/faults/test_units.py` and `test_unit_plays.py`).

Rows `cluster-`: two such hosts behind the router on a third (scenario `cluster`, `tests/faults/test_cluster.py`).

Rows `two-hosts-`: two such hosts that are one server, half of the layers on each (`two_hosts`, `tests/faults/test_two_hosts.py`).

Not to be had on the machine of these runs: a kernel that enforces MemoryMax in the hosts (scenario `vm` has one), a clock of a host's own
(`unit-clock-jump` shows the service's programs another one), a card.

Written and not seen yet: {unseen}.

| fault | injected | expected | seen | recovery | runbook |
|---|---|---|---|--:|---|
"""


def cells(text: str) -> list[str]:
    """Of a row of the page, as they stand."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", text)[1:-1]]


def kept(page: str) -> dict[str, list[str]]:
    return {
        found[1]: cells(line)
        for line in page.splitlines()
        if (found := re.match(r"\| \*\*([\w-]+)\*\*: ", line))
    }


def row(
    name: str, fault: dict[str, Any], record: dict[str, Any] | None, old: list[str] | None
) -> list[str] | None:
    """None where nothing was seen of the fault as the catalogue now has it."""
    runbook = f"[{Path(fault['runbook']).stem}](runbooks/{fault['runbook']})"
    words = [f"**{name}**: {fault['fault']}", fault["injected"], fault["expected"]]
    words = [word.replace("|", "\\|") for word in words]
    if record is None:
        return [*words, *old[3:5], runbook] if old and old[:3] == words else None
    recovery = "-" if record["recovery_s"] is None else f"{record['recovery_s']:.0f} s"
    seen = "; ".join(record["seen"]).replace("|", "\\|").replace("\n", " ")
    return [*words, seen, f"{recovery} ({record['taken']}, load {record['load']:.0f})", runbook]


def main() -> None:
    catalogue = yaml.safe_load(CATALOGUE.read_text())
    records = {path.stem: json.loads(path.read_text()) for path in RECORDS.glob("*.json")}
    page = kept(PAGE.read_text())
    rows = {name: row(name, fault, records.get(name), page.get(name)) for name, fault in catalogue.items()}
    unseen = [name for name, found in rows.items() if found is None]
    plan = json.loads((REPOSITORY / ".lowmem/host/etc/plan.json").read_text())
    head = HEAD.format(unseen=", ".join(unseen) or "none", vllm=plan["vllm_version"], **host_facts())
    write_text(PAGE, head + "\n".join(f"| {' | '.join(found)} |" for found in rows.values() if found))
    again = [name for name in rows if name not in records and name not in unseen]
    sys.stdout.write(
        f"from records: {len(rows.keys() & records.keys())} rows\nas they stood:"
        f" {', '.join(again) or 'none'}\n"
    )
    sys.stdout.write(f"without a row: {', '.join(unseen) or 'none'}\n")


if __name__ == "__main__":
    main()
