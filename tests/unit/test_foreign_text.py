"""What a file or a server says cannot steer a terminal, nor style what is printed."""

import io
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem.text import terminal, visible, visible_json

from .command import ROOT, lowmem

STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200b-\u200f\u2028\u2029]")

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe\r[/bold][link=x]"

IN_RICH = r"\x1b]0;owned\x1b[2J\x9b31m\u202egnp.exe[/bold][link=x]"
"""Rich leaves the bell and the return out."""

SHOWN = r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe\x0d[/bold][link=x]"


def test_what_would_steer_is_shown():
    assert visible(HOSTILE) == SHOWN
    assert visible("Grüße, 世界\n\t▏½ · ✗") == "Grüße, 世界\n\t▏½ · ✗"


@given(st.text(st.characters()))
def test_nothing_that_steers_is_left(text):
    assert not STEERS.search(visible(text))
    assert visible(visible(text)) == visible(text)


@given(st.text(st.characters()))
def test_json_stays_the_same_json(text):
    for ascii_only in (True, False):
        told = visible_json(json.dumps({text: [text]}, ensure_ascii=ascii_only))
        assert not STEERS.search(told)
        assert json.loads(told) == {text: [text]}


@pytest.mark.parametrize("colour", [None, "truecolor"])
def test_a_terminal_has_no_escape_sequence_but_its_own(colour):
    page = io.StringIO()
    terminal(file=page, width=200, color_system=colour, force_terminal=True).print(
        HOSTILE, markup=False, style="red"
    )
    assert page.getvalue().replace("\x1b[31m", "").replace("\x1b[0m", "") == IN_RICH + "\n"


def test_an_error_shows_what_a_name_holds():
    done = lowmem("receipt", "/nonexistent/\x1b[2J\u202e.json", timeout_s=120)
    assert done.stderr == "lowmem: receipt /nonexistent/\\x1b[2J\\u202e.json: No such file or directory\n"


def every_text(value):
    """The same object with each free text of a receipt made hostile."""
    free = {"model", "notes", "findings", "advice", "hardware"}
    if isinstance(value, dict):
        return {k: hostile_of(v) if k in free else every_text(v) for k, v in value.items()}
    return [every_text(one) for one in value] if isinstance(value, list) else value


def hostile_of(value):
    if isinstance(value, dict):
        return {k: hostile_of(v) for k, v in value.items()}
    if isinstance(value, list):
        return [*(hostile_of(one) for one in value), *([] if value else [HOSTILE])]
    return HOSTILE if isinstance(value, str) else value


RECEIPT = ROOT / "docs/measurements/2026-11-23-1xh100/ll-enforce_eager.json"


@pytest.mark.parametrize(
    "command", [("receipt",), ("report", "--out", "{page}"), ("fleet", "--qps", "0.01", "--receipt")]
)
def test_a_hostile_receipt_is_printed_as_text(command, tmp_path):
    receipt, page = tmp_path / "receipt.json", tmp_path / "page.html"
    receipt.write_text(json.dumps(every_text(json.loads(RECEIPT.read_text()))))
    done = lowmem(*(word.replace("{page}", str(page)) for word in command), str(receipt), timeout_s=120)
    assert "a fault in lowmem itself" not in done.stderr
    printed = done.stdout + done.stderr + (page.read_text() if page.exists() else "")
    assert not STEERS.search(printed)
    assert "x1b" in printed or command[0] == "fleet"
