"""LoRA, tool calls, a chat template and drafts, deployed by an inventory alone and judged by checks/.

One more start of the demo serves all of them; the demo as it was comes back at the end.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowmem.measure.receipt import read_checks

from ..conftest import Deployed, Playbook
from .adapter import write_adapter

REPOSITORY = Path(__file__).resolve().parents[2]
TEMPLATE = """{%- for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }} (said plainly)<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def write_inventory(folder: Path, root: Path, model: str, port: int) -> Path:
    """Write an inventory of this machine whose variables are those of docs/how-to/lora-and-tools.md."""
    config = json.loads((Path(model) / "config.json").read_text())
    adapter = write_adapter(folder / "polite", config)
    (folder / "chat.jinja").write_text(TEMPLATE)
    page = (REPOSITORY / "docs/how-to/lora-and-tools.md").read_text()
    variables: dict[str, Any] = yaml.safe_load(
        page.split("```yaml inventory model=folder\n")[1].split("```")[0]
    )
    variables["lowmem_arguments"] |= {
        "lora_modules": [{"name": "polite", "path": str(adapter)}],
        "chat_template": str(folder / "chat.jinja"),
    }
    variables |= {
        "lowmem_model": model,
        "lowmem_source_model": "options-demo",
        "lowmem_root": str(root),
        "lowmem_port": port,
        "lowmem_become": False,
        "lowmem_python": "{{ ansible_playbook_python | realpath }}",
        "host_memory_manage": False,
        "vllm_service_manager": "supervisor",
        "vllm_service_settle_s": 60,
    }
    host = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    inventory = folder / "hosts.yml"
    inventory.write_text(yaml.safe_dump({"vllm": {"hosts": {"demo": host}, "vars": variables}}))
    return inventory


def checked(inventory: Path, root: Path, xml: Path) -> dict[str, str]:
    """Return the name of each check of the options -> how it ended."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "checks/test_options.py",
            "-q",
            "--hosts=ansible://demo",
            f"--ansible-inventory={inventory}",
            f"--lowmem-root={root}",
            f"--junitxml={xml}",
        ],
        cwd=REPOSITORY,
        check=False,
    )
    return {name: check["outcome"] for name, check in read_checks(xml).items()}


@pytest.fixture
def inventory(deployed: Deployed, playbook: Playbook, tmp_path: Path) -> Iterator[Path]:
    model = deployed.plan["deploy"]["model_path"]
    made = write_inventory(tmp_path, deployed.root, model, deployed.plan["deploy"]["port"])
    try:
        done = playbook("-i", str(made), "site.yml", "--skip-tags", "verify")
        assert done.rc == 0, done.text
        yield made
    finally:
        back = playbook("site.yml", "--skip-tags", "verify", variables=deployed.variables)
        assert back.rc == 0, back.text


@pytest.mark.engine
def test_what_the_options_promise_is_so(deployed: Deployed, inventory: Path, tmp_path: Path) -> None:
    assert checked(inventory, deployed.root, tmp_path / "checks.xml") == {
        "options: each adapter is listed and changes the model": "passed",
        "options: a tool is called (named)": "passed",
        "options: a tool is called (required)": "passed",
        "options: a chat is written by the planned template": "passed",
        "options: drafts are made": "passed",
    }
