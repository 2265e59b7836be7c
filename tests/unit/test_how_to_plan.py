"""docs/how-to/plan.md shows what its commands print; LOWMEM_GOLDEN=write puts today's outputs there."""

import os
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lowmem.cli.main import app

PAGE = Path(__file__).parents[2] / "docs/how-to/plan.md"
BLOCK = re.compile(
    r"^```console(?P<kind>| host)\n\$ lowmem (?P<words>[^\n]+)\n(?P<shown>.*?)```$", re.M | re.S
)
BLOCKS = list(BLOCK.finditer(PAGE.read_text()))


def output(words):
    """What the command prints in 80 columns, without the blanks that fill its lines."""
    done = CliRunner().invoke(app, shlex.split(words), prog_name="lowmem", env={"COLUMNS": "80"})
    return "".join(f"{line.rstrip()}\n" for line in done.output.splitlines())


def test_nine_questions_have_one_command_each():
    parts = re.split(r"^## (\d)\. .*\?$", PAGE.read_text(), flags=re.M)
    assert parts[1::2] == [str(n) for n in range(1, 10)]
    assert [len(BLOCK.findall(part)) for part in parts[2::2]] == [1] * 9


@pytest.mark.parametrize("block", BLOCKS, ids=[block["words"] for block in BLOCKS])
def test_the_page_shows_what_the_command_prints(block):
    if os.environ.get("LOWMEM_GOLDEN") == "write":
        old = block.group()
        new = f"```console{block['kind']}\n$ lowmem {block['words']}\n{output(block['words'])}```"
        PAGE.write_text(PAGE.read_text().replace(old, new))
    elif block["kind"]:  # it differs from host to host
        assert output(block["words"]).splitlines()[0].split("/")[0] == block["shown"].split("/")[0]
        assert re.search(r"^verdict: (ok|warn|bad)$", block["shown"], re.M)
    else:
        assert block["shown"] == output(block["words"])
