"""Draws bars, sparklines and time spans as text."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

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


SPARKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw the last `width` values, each as a column from zero to the highest of them."""
    shown = list(values)[-width:]
    top = max(shown, default=0) or 1
    return "".join(SPARKS[min(7, round(value / top * 7))] for value in shown)
