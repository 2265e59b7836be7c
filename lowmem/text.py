"""Draws bars, sparklines and time spans, makes foreign text fit to print, and matches foreign patterns."""

from __future__ import annotations

import datetime as dt
import difflib
import importlib
import re
import shlex
import shutil
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lowmem.errors import BadInput

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

_BAR = 30


def bar(value: float, whole: float, width: int = _BAR) -> str:
    """Draw a bar of `value` out of `whole`; anything above zero shows at least a sliver."""
    if value <= 0 or whole <= 0:
        return ""
    eighths = max(1, round(min(value / whole, 1.0) * width * 8))
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]


def utc(at: float) -> str:
    """Format seconds since 1970 as the receipts write a time."""
    return dt.datetime.fromtimestamp(at, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def span(seconds: float) -> str:
    """Format seconds as the two largest units that are not zero, such as `2 h 13 min`."""
    left, parts = round(seconds), []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {unit}")
        elif parts:
            break
    return " ".join(parts[:2]) or "0 s"


_LONGEST_WORD = 100
"""Characters; the comparison of two words takes the product of their lengths."""


def nearest_words(word: str, known: Iterable[str], most: int = 3) -> list[str]:
    """Find the known words that a mistyped one may mean, the nearest first.

    A word that begins with the given one, or the reverse, counts before similar letters.
    """
    words = {w.lower().replace("_", "-"): w for w in known}
    wanted = word.lower().replace("_", "-")[:_LONGEST_WORD]
    if not wanted:
        return []
    near = [w for w in words if len(wanted) > 1 and w.startswith(wanted)]
    near += [w for w in sorted(words, key=len, reverse=True) if len(w) > 1 and wanted.startswith(w)]
    near = near or difflib.get_close_matches(wanted, words, n=most, cutoff=0.6)
    if not near:
        return []
    # of similar words, those that are nearly as near as the nearest
    least = difflib.SequenceMatcher(None, near[0], wanted).ratio() - 0.1
    alike = [w for w in near if difflib.SequenceMatcher(None, w, wanted).ratio() >= least]
    return [words[w] for w in dict.fromkeys(alike)][:most]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Ask for the known words that a mistyped one may mean, as the end of a sentence; empty if none does."""
    near = nearest_words(word, known)
    return f"; did you mean {' or '.join(near)}?" if near else ""


_UNPRINTABLE = re.compile(
    # control characters but tab and newline, soft hyphen, marks of direction and of no width, separators of
    # lines and paragraphs, halves of a UTF-16 pair, interlinear marks, tags
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\xad\\u061c\\u180e\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ud800-\\udfff\\ufeff"
    "\\ufff9-\\ufffb\\U000e0000-\\U000e007f]"
)


def visible(text: str) -> str:
    """Escape what would steer a terminal or hide text, as `\\x1b` or `\\u202e`; all else stays as it is."""
    return _UNPRINTABLE.sub(_escaped, text)


def visible_json(text: str) -> str:
    """Do the same to a JSON text, which stays the same JSON."""
    return _UNPRINTABLE.sub(_json_escaped, text)


def _json_escaped(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def shell_lines(words: Sequence[str], width: int = 80, before: Sequence[str] = ()) -> list[str]:
    """Write a command as lines that a shell reads as one, an option and its value together.

    `before` are NAME=value, one a line. A line is longer than `width` only if a word of it is.
    """
    named = (variable.partition("=") for variable in before)
    parts = [f"{name}={shlex.quote(value)}" for name, _, value in named]
    line, at = "", 0
    while at < len(words):
        paired = words[at].startswith("-") and at + 1 < len(words) and not words[at + 1].startswith("-")
        piece = shlex.join(words[at : at + 1 + paired])
        at += 1 + paired
        if line and len(line) + 1 + len(piece) > width - 2:
            parts.append(line)
            line = "  " + piece
        else:
            line = f"{line} {piece}" if line else piece
    return [f"{part} \\" for part in parts] + [line]


SPARKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw the last `width` values, each as a column from zero to the highest of them."""
    shown = list(values)[-width:]
    top = max(shown, default=0) or 1
    return "".join(SPARKS[min(7, round(value / top * 7))] for value in shown)


def terminal(**options: Any) -> Console:
    """Return a console for a person, whose only escape sequences are its own.

    The text of a file or a server can neither steer the terminal nor style what follows.
    """
    # here, since most commands print nothing with rich
    from rich.console import Console

    class Terminal(Console):
        def render(
            self, renderable: RenderableType, options: ConsoleOptions | None = None
        ) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=visible(segment.text))

    return Terminal(highlight=False, **options)


def terminal_columns() -> int:
    """Return the columns of the terminal, or what COLUMNS says; 0 in a pipe, where lines stay whole."""
    return shutil.get_terminal_size((0, 0)).columns


def say(console: Console, markup: str, indent: int = 0) -> None:
    """Print a sentence: broken at the terminal's width and indented on each line, in a pipe on one line."""
    from rich.padding import Padding

    if terminal_columns():
        console.print(Padding(markup, (0, 0, 0, indent), expand=False))
    else:
        console.print(" " * indent + markup, soft_wrap=True)


PATTERN_LIMIT = 500
"""Characters of a pattern, and of the text that it is held against."""

STEPS_LIMIT = 200_000
"""Places that one match may look at: about a tenth of a second."""


def matches(pattern: str, text: str, anywhere: bool = False) -> bool:
    """Tell whether a pattern from a file matches the text's beginning, as `re.match`, or `anywhere` in it.

    Its time is bounded, whatever the pattern. Each part maps the set of places where it may begin to the set
    where it may end, so nothing is tried twice. Raises BadInput, one line, for a pattern that is broken,
    looks back, or passes a limit.
    """
    shown = f"pattern {visible(pattern[:80])!r}"
    if len(pattern) > PATTERN_LIMIT or len(text) > PATTERN_LIMIT:
        raise BadInput(f"{shown}: it or its text is longer than {PATTERN_LIMIT} characters; shorten it")
    try:
        parsed = _parsed(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise BadInput(f"{shown} is no regular expression: {visible(str(error))}; correct it") from None
    if parsed.state.flags & ~re.UNICODE:
        raise BadInput(f"{shown} sets flags; write it without")
    starts = set(range(len(text) + 1)) if anywhere else {0}
    try:
        return bool(_Match(text, shown).ends(parsed, starts))
    except RecursionError:
        raise BadInput(f"{shown} is nested too deep; write it flat") from None


_parser: Any = getattr(re, "_parser", None) or importlib.import_module("sre_parse")
"""Python's own parser of patterns, so that no pattern means another thing here than to the engine."""


@lru_cache(maxsize=4096)
def _parsed(pattern: str) -> Any:
    """Parse once a pattern that is held against each name of a checkpoint."""
    return _parser.parse(pattern)


_AT: dict[str, str] = {
    "AT_BEGINNING": r"\A", "AT_BEGINNING_STRING": r"\A", "AT_END": r"\Z|(?=\n\Z)", "AT_END_STRING": r"\Z",
    "AT_BOUNDARY": r"\b", "AT_NON_BOUNDARY": r"\B",
}  # fmt: skip

_CATEGORY: dict[str, str] = {
    "CATEGORY_DIGIT": r"\d", "CATEGORY_NOT_DIGIT": r"\D", "CATEGORY_SPACE": r"\s",
    "CATEGORY_NOT_SPACE": r"\S", "CATEGORY_WORD": r"\w", "CATEGORY_NOT_WORD": r"\W",
}  # fmt: skip


class _Match:
    """One match of a parsed pattern, which counts its steps."""

    def __init__(self, text: str, shown: str) -> None:
        self.text = text
        self.shown = shown
        self.left = STEPS_LIMIT

    def ends(self, parts: Any, places: set[int]) -> set[int]:
        """Return where these parts may end that begin at one of the places."""
        for operation, argument in parts:
            self._count(places)
            places = self._step(str(operation), argument, places)
        return places

    def _count(self, places: set[int]) -> None:
        self.left -= len(places) + 1
        if self.left < 0:
            raise BadInput(f"{self.shown} takes too long; write it simpler")

    def _step(self, operation: str, argument: Any, places: set[int]) -> set[int]:
        if operation == "BRANCH":
            return set().union(*(self.ends(branch, places) for branch in argument[1]))
        if operation == "SUBPATTERN":
            return self.ends(argument[3], places)
        if operation in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, part = argument
            return self._repeated(least, most, part, places)
        if operation in ("ASSERT", "ASSERT_NOT") and argument[0] == 1:
            return {at for at in places if bool(self.ends(argument[1], {at})) == (operation == "ASSERT")}
        if operation == "AT" and str(argument) in _AT:
            here = re.compile(_AT[str(argument)])
            return {at for at in places if here.match(self.text, at)}
        inside = (at for at in places if at < len(self.text))
        return {at + 1 for at in inside if self._is(operation, argument, self.text[at])}

    def _repeated(self, least: int, most: int, part: Any, places: set[int]) -> set[int]:
        for _ in range(least):
            self._count(places)
            places = self.ends(part, places)
            if not places:
                return places
        found, new = set(places), places
        for _ in range(min(most, len(self.text)) - least):
            new = self.ends(part, new) - found
            if not new:
                break
            found |= new
        return found

    def _is(self, operation: str, argument: Any, character: str) -> bool:
        if operation == "LITERAL":
            return bool(ord(character) == argument)
        if operation == "NOT_LITERAL":
            return bool(ord(character) != argument)
        if operation == "ANY":
            return character != "\n"
        if operation == "RANGE":
            return bool(argument[0] <= ord(character) <= argument[1])
        if operation == "CATEGORY" and str(argument) in _CATEGORY:
            return bool(re.match(_CATEGORY[str(argument)], character))
        if operation == "IN":
            negated = str(argument[0][0]) == "NEGATE"
            return any(self._is(str(kind), inner, character) for kind, inner in argument[negated:]) != negated
        raise BadInput(f"{self.shown} holds {operation.lower()}, which is not supported; write it without")
