"""Draws bars, sparklines and time spans as text, and makes foreign text fit to print."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

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
