"""Writes docs/reliability.md from tests/faults/catalogue.yml and the records that the fault tests left in .lowmem/faults.

    LOWMEM_SLOW=1 .lowmem/venv/bin/pytest -m fault && make molecule SCENARIO=service && .lowmem/venv/bin/python scripts/reliability_doc.py

A fault without a record is an error: the page holds only what was seen.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from lowmem.files import write_text
from lowmem.measure import host_facts

REPOSITORY = Path(__file__).resolve().parents[1]
CATALOGUE = REPOSITORY / "tests/faults/catalogue.yml"
RECORDS = Path(os.environ.get("LOWMEM_FAULTS", REPOSITORY / ".lowmem/faults"))
PAGE = REPOSITORY / "docs/reliability.md"

HEAD = """# Reliability

Each fault is injected for real into a running service by a test, with requests under way where that matters. A client keeps a ledger of
them: each ends with a complete answer or with an error that the client saw; a request that ends otherwise is lost, and fails the test.

Written by `scripts/reliability_doc.py` from the records that the tests leave (`LOWMEM_SLOW=1 pytest -m fault`, `make molecule
SCENARIO=service`): vLLM {vllm}, profile demo_cpu under its supervisor, {cpu_cores} cores ({cpu}). Recovery: from the fault to the next
complete answer; most of it is vLLM's own start. Beside it stand the day and the machine's load (mean of a minute, when the test ended):
where 15 programs want two cores a start takes several times as long as alone.

Rows `unit-`: the same engine as `vllm@main.service` in its sandbox, on a systemd host (Molecule's scenario `service`, which
runs `tests/faults/test_units.py` and `test_unit_plays.py`).

Not to be had on the machine of these runs: a kernel that enforces MemoryMax in the hosts (scenario `vm` has one), a clock of a host's own
(`unit-clock-jump` shows the service's programs another one), a card.

| fault | injected | expected | seen | recovery | runbook |
|---|---|---|---|--:|---|
"""


def rows(catalogue: dict[str, dict[str, Any]], records: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, fault in catalogue.items():
        record = records[name]
        recovery = "-" if record["recovery_s"] is None else f"{record['recovery_s']:.0f} s"
        recovery += f" ({record['taken']}, load {record['load']:.0f})"
        runbook = f"[{Path(fault['runbook']).stem}](runbooks/{fault['runbook']})"
        cells = [f"**{name}**: {fault['fault']}", fault["injected"], fault["expected"], "; ".join(record["seen"]), recovery, runbook]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    catalogue = yaml.safe_load(CATALOGUE.read_text())
    records = {path.stem: json.loads(path.read_text()) for path in RECORDS.glob("*.json")}
    missing = sorted(catalogue.keys() - records.keys())
    if missing:
        sys.exit(f"no record in {RECORDS} of {', '.join(missing)}: run pytest -m fault first")
    plan = json.loads((REPOSITORY / ".lowmem/host/etc/plan.json").read_text())
    head = HEAD.format(vllm=plan["vllm_version"], **host_facts())
    write_text(PAGE, head + rows(catalogue, records))


if __name__ == "__main__":
    main()
