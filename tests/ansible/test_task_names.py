"""Holds the names of plays, tasks and handlers to plain words: a verb and its object, and no pronoun.

`--list-tasks` has to tell the deployment to somebody who opens no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]

FILES = sorted(
    path.relative_to(REPOSITORY)
    for pattern in (
        "site.yml",
        "playbooks/*.yml",
        "playbooks/tasks/*.yml",
        "roles/*/tasks/*.yml",
        "roles/*/handlers/*.yml",
        "molecule/**/*.yml",
    )
    for path in REPOSITORY.glob(pattern)
)

VERBS = re.compile(
    r"""(Activate|Add|Allocate|Apply|Ask|Begin|Boot|Bring|Build|Change|Check|Choose|Collect|Compare
    |Compile|Compute|Configure|Copy|Create|Deploy|Describe|Disable|Drive|Enable|Expect|Export|Fail
    |Fetch|Find|Forget|Format|Give|Hand|Hide|Hold|Inject|Install|Judge|Keep|Kill|Leave|Let|Link|List
    |Load|Lock|Make|Mark|Mask|Measure|Move|Name|Note|Open|Plan|Prefer|Prepare|Provide|Prune|Put
    |Quantize|Read|Reboot|Record|Refuse|Release|Reload|Remove|Report|Request|Restart|Roll|Rotate|Run
    |Say|Send|Serve|Set|Share|Show|Simulate|Stage|Start|Stop|Switch|Take|Tell|Triage|Unload|Upgrade
    |Use|Verify|Wait|Warn|Write)\b""",
    re.VERBOSE,
)

VAGUE = re.compile(
    r"\b(it|them|they|these|whose|who|whom|what|where|why|here|there|somebody|nobody)\b", re.IGNORECASE
)


class Loader(yaml.SafeLoader):
    """Reads a playbook; vaulted and unsafe values are none of its business."""


Loader.add_multi_constructor("!", lambda loader, suffix, node: None)  # type: ignore[no-untyped-call]


def tasks(node: Any) -> Iterator[dict[str, Any]]:
    for entry in node if isinstance(node, list) else []:
        if not isinstance(entry, dict):
            continue
        if "hosts" not in entry and "name" in entry:
            yield entry
        for part in ("pre_tasks", "tasks", "post_tasks", "handlers", "block", "rescue", "always"):
            yield from tasks(entry.get(part))


def names(path: Path) -> list[str]:
    text = (REPOSITORY / path).read_text()
    plays = ("import_playbook", "ansible.builtin.import_playbook")
    return [
        str(task["name"])
        for document in yaml.load_all(text, Loader=Loader)
        for task in tasks(document)
        if not any(word in task for word in plays)
    ]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_task_is_named_by_a_verb_and_its_object(path: Path) -> None:
    words = [name for name in names(path) if not VERBS.match(name) or len(name.split()) < 2]
    assert words == []


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_tasks_name_has_no_word_that_points_elsewhere(path: Path) -> None:
    plain = [re.sub(r"\{\{.*?\}\}", "", name) for name in names(path)]
    assert [name for name in plain if VAGUE.search(name)] == []


def test_the_names_of_the_deployment_are_read() -> None:
    assert "Activate the release" in names(Path("roles/vllm_service/tasks/main.yml"))
    assert sum(len(names(path)) for path in FILES) > 600
