"""Hold hand-written pages to plain English, as far as a program can tell.

One sentence a line, short sentences, and no word on how the work was organised.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GENERATED = {"claims.md", "variables.md", "planning.md", "reliability.md"}
PAGES = sorted(
    [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
    + [ROOT / "benchmarks/gpu/README.md", ROOT / "locks/README.md", ROOT / "scripts/planning.md.in"]
    + [ROOT / "molecule/README.md", ROOT / "inventory/README.md", *(ROOT / "roles").glob("*/README.md")]
    + [path for path in (ROOT / "docs").rglob("*.md") if path.name not in GENERATED]
)
IDS = [str(path.relative_to(ROOT)) for path in PAGES]

# The aim is 25 words. Figures, units and code are not counted, since a reader takes them in at a glance.
# The tolerance of 5 is for sentences that name parts in a row, which would only get longer if they were cut.
MOST_WORDS = 30

SENTENCE_END = re.compile(r"(?<=[.!?])[)\"*]* +(?=[A-Z*`\[(\"])")
ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|vs|etc)\.")
HOW_THE_WORK_WENT = re.compile(
    r"\b(?:lent|borrowed|lease|device time|(?:next|same|other|our) session|thirty minutes|30 minutes"
    r"|when (?:the|its|our) time|time (?:ended|ran out|was over|is over)"
    r"|given back to|sub-?agents?|issue \d+)\b",
    re.IGNORECASE,
)


def plain(line: str) -> str:
    """Return the line with code and link targets replaced, so that their dots and words do not count."""
    line = re.sub(r"`[^`]*`", "`0`", line)
    line = re.sub(r'"[^"]*"', "`0`", line)
    line = re.sub(r"\]\([^)]*\)", "]", line)
    return ABBREVIATION.sub("0", line)


def prose(text: str) -> list[tuple[int, str, bool]]:
    """Return number and text of each line of prose, and whether it continues a paragraph."""
    found, before, fenced = [], False, False
    for number, line in enumerate(text.splitlines(), 1):
        bare = line.strip()
        if bare.startswith("```"):
            fenced, before = not fenced, False
        elif (
            fenced
            or not bare
            or bare.startswith(("|", "#", "<!--", "![", "---"))
            or re.match(r" {4,}(?![-*\d])\S", line)
        ):
            before = False
        else:
            item = re.match(r"(?:[-*]|\d+\.) +", bare)
            found.append((number, bare[item.end() :] if item else bare, before and not item))
            before = True
    return found


def sentences(line: str) -> list[str]:
    # a lead in bold is a label and no sentence: **When.** The log is full.
    text = re.sub(r"^\*\*[^*]+\*\* *(?=\S)", "", plain(line))
    return [part for part in SENTENCE_END.split(text) if part.strip()]


def words(sentence: str) -> int:
    return len(
        re.findall(
            r"[A-Za-z][A-Za-z'-]+", re.sub(r"`0`|\d[\w,.]*|\bMiB\b|\bms\b|\btokens/s\b", " ", sentence)
        )
    )


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_one_sentence_a_line(path: Path) -> None:
    lines = prose(path.read_text())
    several = [f"{number}: {text}" for number, text, _ in lines if len(sentences(text)) > 1]
    cut = [
        f"{number}: {text}"
        for (_, previous, _), (number, text, follows) in pairwise(lines)
        if follows and not re.search(r"[.:;!?…][)\"*`\]]*$", re.sub(r"\]\([^)]*\)", "]", previous))
    ]
    assert several == []
    assert cut == [], "a line that goes on the sentence of the line before"


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_a_sentence_is_short(path: Path) -> None:
    long = [
        f"{number}: {words(sentence)} words: {sentence}"
        for number, text, _ in prose(path.read_text())
        for sentence in sentences(text)
        if words(sentence) > MOST_WORDS
    ]
    assert long == []


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_no_sentence_begins_with_of(path: Path) -> None:
    assert [
        f"{number}: {text}" for number, text, _ in prose(path.read_text()) if text.startswith("Of ")
    ] == []


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_no_word_on_how_the_work_went(path: Path) -> None:
    text = re.sub(r"(?s)<!--.*?written by.*?<!-- end.*?-->", "", path.read_text())
    assert [line for line in text.splitlines() if HOW_THE_WORK_WENT.search(line)] == []
