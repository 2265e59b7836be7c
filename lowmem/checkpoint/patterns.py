"""Matches names against the patterns that a quantization recipe brings, in bounded time.

A pattern of a config.json may come from anybody, and Python's own matcher needs exponential time for some.
This one walks the parsed pattern with sets of positions. Time is pattern times name squared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from re import _constants as code  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from lowmem.errors import BadInput

PATTERN_LIMIT = 2_000
"""Characters of a pattern; the longest of a published recipe has 300."""

NAME_LIMIT = 400

REPEAT_LIMIT = 1_000

_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    code.CATEGORY_DIGIT: str.isdigit,
    code.CATEGORY_NOT_DIGIT: lambda c: not c.isdigit(),
    code.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    code.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
    code.CATEGORY_SPACE: str.isspace,
    code.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
}

Positions = frozenset[int]


@lru_cache(maxsize=4096)
def _parsed(pattern: str) -> Any:
    """Parse a pattern. BadInput in one line where it is broken or too long."""
    if len(pattern) > PATTERN_LIMIT:
        raise BadInput(
            f"config.json: a pattern of the quantization has {len(pattern)} characters; the limit is"
            f" {PATTERN_LIMIT}"
        )
    try:
        return parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise BadInput(
            f"config.json: the quantization's pattern {pattern[:60]!r} is no regular expression"
            f" ({error}); vLLM refuses it: correct it"
        ) from None


@lru_cache(maxsize=200_000)
def matches(pattern: str, name: str, anywhere: bool = False) -> bool:
    """Tell whether a regular expression matches from the name's start, as `re.match`, or `anywhere`."""
    name = name[:NAME_LIMIT]
    starts = frozenset(range(len(name) + 1)) if anywhere else frozenset({0})
    try:
        return bool(_ends(_parsed(pattern), name, starts))
    except RecursionError:
        raise BadInput(
            f"config.json: the quantization's pattern {pattern[:60]!r} is nested too deep"
        ) from None


def matches_target(target: str, name: str) -> bool:
    """Tell whether a compressed-tensors target names a module: the name itself, or `re:` and a pattern."""
    return matches(target[3:], name) if target.startswith("re:") else target == name


def _ends(items: Iterable[Any], name: str, starts: Positions) -> Positions:
    """Return where a sequence of parsed items can end if it begins at one of `starts`."""
    for op, argument in items:
        if not starts:
            break
        starts = _step(op, argument, name, starts)
    return starts


def _step(op: Any, argument: Any, name: str, starts: Positions) -> Positions:
    test = _character_test(op, argument)
    if test is not None:
        return frozenset(p + 1 for p in starts if p < len(name) and test(name[p]))
    if op is code.BRANCH:
        return frozenset().union(*(_ends(branch, name, starts) for branch in argument[1]))
    if op is code.SUBPATTERN:
        return _ends(argument[3], name, starts)
    if op in (code.MAX_REPEAT, code.MIN_REPEAT, code.POSSESSIVE_REPEAT):
        return _repeated(argument, name, starts)
    if op is code.AT:
        return frozenset(p for p in starts if _stands(argument, name, p))
    if op in (code.ASSERT, code.ASSERT_NOT) and argument[0] == 1:
        wanted = op is code.ASSERT
        return frozenset(p for p in starts if bool(_ends(argument[1], name, frozenset({p}))) is wanted)
    raise BadInput(
        "config.json: a pattern of the quantization uses a back-reference or a look-behind, which are not"
        " followed here; write it without them"
    )


def _repeated(argument: Any, name: str, starts: Positions) -> Positions:
    least, most, body = argument
    if least > REPEAT_LIMIT:
        raise BadInput(f"config.json: a pattern of the quantization repeats {least} times; the limit is"
                       f" {REPEAT_LIMIT}")  # fmt: skip
    current = starts
    for _ in range(least):
        current = _ends(body, name, current)
    found = fresh = current
    for _ in range(min(int(most) - least, len(name) + 1)):
        fresh = _ends(body, name, fresh) - found
        if not fresh:
            break
        found |= fresh
    return found


def _stands(where: Any, name: str, position: int) -> bool:
    if where in (code.AT_BEGINNING, code.AT_BEGINNING_STRING):
        return position == 0
    if where in (code.AT_END, code.AT_END_STRING):
        return position == len(name)
    word = [0 <= p < len(name) and (name[p].isalnum() or name[p] == "_") for p in (position - 1, position)]
    return (word[0] != word[1]) is (where is code.AT_BOUNDARY)


def _character_test(op: Any, argument: Any) -> Callable[[str], bool] | None:
    """Return the test of an item that takes one character, or None for another item."""
    if op is code.LITERAL:
        return lambda c: ord(c) == argument
    if op is code.NOT_LITERAL:
        return lambda c: ord(c) != argument
    if op is code.ANY:
        return lambda c: c != "\n"
    if op is code.IN:
        return lambda c: _in_set(argument, c)
    return None


def _in_set(items: Any, character: str) -> bool:
    negated = bool(items) and items[0][0] is code.NEGATE
    for op, argument in items:
        if (
            (op is code.LITERAL and ord(character) == argument)
            or (op is code.RANGE and argument[0] <= ord(character) <= argument[1])
            or (op is code.CATEGORY and _CATEGORIES[argument](character))
        ):
            return not negated
    return negated
