"""Hold the package's docstrings to plain English, as far as a program can tell.

A docstring begins with a verb, or a class with the noun that it is; ruff's D401 asks for the verb's mood.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "lowmem"
MODULES = sorted(PACKAGE.rglob("*.py"))
IDS = [str(path.relative_to(PACKAGE)) for path in MODULES]

# The aim is 25 words; see test_docs_language.py.
MOST_WORDS = 30

# An article, a pronoun or a preposition in front makes the reader wait for what the thing does.
NO_BEGINNINGS = re.compile(
    r"A|An|The|This|That|These|Those|It|Its|They|Their|He|She|We|You|I|Who|Whose|What|Which|Where|When|Why"
    r"|How|Whether|One|Each|Every|All|Some|Any|None|No|Of|As|At|By|For|From|In|On|To|With|Without|Per|If|Not"
)

SENTENCE_END = re.compile(r"(?<=[.!?])[)\"*`]* +(?=[A-Z*`\[(\"])|(?<=[.!?:])\n\n")
ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|vs|etc)\.")

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstrings(path: Path) -> Iterator[tuple[str, bool, str]]:
    """Yield place, whether it is public, and text of each docstring of a file."""

    def of(node: ast.AST, name: str, public: bool) -> Iterator[tuple[str, bool, str]]:
        if isinstance(node, Documented) and (text := ast.get_docstring(node)):
            yield name or "module", public, text
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                inner = public and not child.name.startswith("_") and not isinstance(node, ast.FunctionDef)
                yield from of(child, f"{name}.{child.name}".strip("."), inner)

    yield from of(ast.parse(path.read_text()), "", True)


def sentences(text: str) -> list[str]:
    text = ABBREVIATION.sub("0", re.sub(r"`[^`]*`", "`0`", text))
    text = re.sub(r"(?<!\n)\n(?!\n)", " ", text)
    return [" ".join(part.split()) for part in SENTENCE_END.split(text) if part.strip()]


def words(sentence: str) -> int:
    return len(re.findall(r"[A-Za-z][A-Za-z'-]+", re.sub(r"\d[\w,.]*", " ", sentence)))


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_a_public_docstring_begins_with_what_it_does(path: Path) -> None:
    first = [
        (name, text.split()[0].strip("`,.:;"), text) for name, public, text in docstrings(path) if public
    ]
    assert [
        f"{name}: {text}"
        for name, word, text in first
        if NO_BEGINNINGS.fullmatch(word) or not word[:1].isupper() or not word.replace("-", "").isalpha()
    ] == []


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_a_sentence_of_a_docstring_is_short(path: Path) -> None:
    assert [
        f"{name}: {words(sentence)} words: {sentence}"
        for name, _, text in docstrings(path)
        for sentence in sentences(text)
        if words(sentence) > MOST_WORDS
    ] == []
