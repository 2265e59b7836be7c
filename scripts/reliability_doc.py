"""Writes docs/reliability.md from tests/faults/catalogue.yml and the records of the fault tests.

    LOWMEM_SLOW=1 .lowmem/venv/bin/pytest -m fault && make molecule SCENARIO="service cluster two_hosts"
    .lowmem/venv/bin/python scripts/reliability_doc.py

The records lie in .lowmem/faults. A fault that was not injected again keeps its row, with the day and the
load of that run. A fault has no row if it has neither a record nor an old row, or if its injection or
expectation has changed since. The text above the table names it, since the page holds only what was seen.
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

Each fault below was injected into a running service by a test, with requests under way if that matters.
A client keeps a ledger of its requests: each ends with a complete answer or an error that the client saw.
A request that ends otherwise is lost, and fails the test.

**What was run.** vLLM {vllm}, profile demo_cpu under its supervisor, {cpu_cores} cores ({cpu}).
Rows `unit-` ran the engine as `vllm@main.service` in its sandbox, on a systemd host (scenario `service`).
Rows `cluster-` ran two such hosts behind the router on a third (scenario `cluster`).
Rows `two-hosts-` ran one server over two such hosts, half of the layers on each (scenario `two_hosts`).
Rows `disk-read-only` to `revoked-key-old-worker` ran without an engine.
They had the real commands, tasks, nginx and logrotate, in a mount, a namespace or a limit of their own.

**Recovery** is the time from the fault to the next complete answer; most of it is vLLM's own start.
Beside it stand the day and the machine's load (mean of a minute, when the test ended).
If 15 programs want two cores, a start takes several times as long as alone.
Rows without a day are of 2026-11-23, those named `unit-` at a load of 15 to 20.

**How to repeat it.** `scripts/reliability_doc.py` writes this page from the records that these tests leave:

```
LOWMEM_SLOW=1 pytest -m fault
make molecule SCENARIO="service cluster two_hosts"
```

**What these runs could not have.** No kernel enforced MemoryMax in the hosts (scenario `vm` has one).
No host had a clock of its own (`unit-clock-jump` shows another clock to the service's programs).
No machine had a GPU.

**What one key can take from another.** Sixteen clients of one key repeated a refused request without a pause.
That was on 2026-12-01, on 2 cores at a load of 27.
The server answered at most 37 times a second and used 4 to 10 % of one core for it.
The kinds: numbers out of range, 100,000 choices, a prompt of 9 MiB, 2,000 properties, a schema without end.
While another key is here, the engine computes one step of a busy key's prompts at a time, or one longer one.
`benchmarks/abuse.py` measures the other key's first token.
Its bound, 3 times the quiet p99, was not measured on an idle machine yet.

Written and not seen yet: {unseen}.

| fault | what happens | recovery | runbook |
|---|---|--:|---|
"""


def kept(page: str) -> dict[str, list[str]]:
    """Return fault, injected, expected, seen and recovery of each fault on the page."""
    short = re.finditer(
        r"^\| \[([\w-]+)\]\(#[\w-]+\) \| .+ \| (.+?) \| \[[\w-]+\]\(.+\) \|$", page, re.MULTILINE
    )
    recoveries = {found[1]: found[2] for found in short}
    details = re.finditer(
        r"^### ([\w-]+)\n\n\*\*(.+)\.\*\*\n\n- Injected: (.+)\n- Expected: (.+)\n- Seen: (.+)$",
        page,
        re.MULTILINE,
    )
    return {found[1]: [*found.groups()[1:], recoveries[found[1]]] for found in details}


def row(fault: dict[str, Any], record: dict[str, Any] | None, old: list[str] | None) -> list[str] | None:
    """Return fault, injected, expected, seen and recovery; None if nothing was seen of the fault as the
    catalogue now has it.
    """
    words = [fault["fault"], fault["injected"], fault["expected"]]
    if record is None:
        return old if old and old[:3] == words else None
    recovery = "-" if record["recovery_s"] is None else f"{record['recovery_s']:.0f} s"
    seen = "; ".join(record["seen"]).replace("\n", " ")
    return [*words, seen, f"{recovery} ({record['taken']}, load {record['load']:.0f})"]


def body(catalogue: dict[str, Any], rows: dict[str, list[str] | None]) -> str:
    """Return the short rows, then the details of each fault."""
    found = {name: cells for name, cells in rows.items() if cells}
    table, details = [], []
    for name, (fault, injected, expected, seen, recovery) in found.items():
        runbook = f"[{Path(catalogue[name]['runbook']).stem}](runbooks/{catalogue[name]['runbook']})"
        table.append(f"| [{name}](#{name}) | {fault.replace('|', chr(92) + '|')} | {recovery} | {runbook} |")
        details.append(
            f"### {name}\n\n**{fault}.**\n\n- Injected: {injected}\n- Expected: {expected}\n- Seen: {seen}\n"
        )
    return "\n".join([*table, "", "## Details", "", *details])


def main() -> None:
    catalogue = yaml.safe_load(CATALOGUE.read_text())
    records = {path.stem: json.loads(path.read_text()) for path in RECORDS.glob("*.json")}
    page = kept(PAGE.read_text())
    rows = {name: row(fault, records.get(name), page.get(name)) for name, fault in catalogue.items()}
    unseen = [name for name, found in rows.items() if found is None]
    plan = json.loads((REPOSITORY / ".lowmem/host/etc/plan.json").read_text())
    head = HEAD.format(unseen=", ".join(unseen) or "none", vllm=plan["vllm_version"], **host_facts())
    write_text(PAGE, head + body(catalogue, rows))
    again = [name for name in rows if name not in records and name not in unseen]
    sys.stdout.write(
        f"from records: {len(rows.keys() & records.keys())} rows\nas they stood:"
        f" {', '.join(again) or 'none'}\n"
    )
    sys.stdout.write(f"without a row: {', '.join(unseen) or 'none'}\n")


if __name__ == "__main__":
    main()
