"""Holds what all drawings share: line plots as SVG coordinates, colours and names of memory terms."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby

HEADROOM = 1.08

TERM_COLOURS = {
    "weights": "weights",
    "kv_cache": "kv_cache",
    "activations": "activations",
    "cuda_context": "context",
    "runtime": "context",
    "nccl": "nccl",
    "cuda_graphs": "graphs",
    "offload_buffers": "offload",
    "pipeline_buffers": "pipeline",
    "under load": "under",
    "in use": "accent",
    "rest": "other",
    "all": "other",
}
"""Names the colour of each memory term, see `palette`."""

_TERM_NAMES = {
    "kv_cache": "KV cache",
    "cuda_context": "CUDA context",
    "cuda_graphs": "CUDA graphs",
    "nccl": "NCCL",
    "rest": "not measured separately",
    "all": "not measured separately",
}


def term_name(term: str) -> str:
    """Name a memory term as a reader knows it."""
    return _TERM_NAMES.get(term, term.replace("_", " "))


def term_colour(term: str) -> str:
    """Name the colour of a memory term, see `palette`."""
    return TERM_COLOURS.get(term, "other")


def palette(theme: str = "light") -> dict[str, str]:
    """Read the colours of a theme, `light` or `dark`, from the style of the page's template."""
    style = (files("lowmem") / "data" / "report.html.j2").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", dark if theme == "dark" else light))


@dataclass(frozen=True)
class Plot:
    """Coordinates of a drawing of `width` x `height` units, y downwards.

    `paths` has one polyline for each unbroken run of values.
    """

    width: float
    height: float
    top: float
    paths: tuple[str, ...]
    dots: tuple[tuple[float, float, int], ...]
    limit: str

    @property
    def area(self) -> tuple[str, ...]:
        """Return the runs as closed shapes down to the zero line."""
        shapes = []
        for path in self.paths:
            points = path.split(" ")
            first, last = points[0].split(",")[0], points[-1].split(",")[0]
            shapes.append(f"{first},{self.height:g} {path} {last},{self.height:g}")
        return tuple(shapes)


def plot(
    xs: Sequence[float],
    values: Sequence[float | None],
    limits: Sequence[float] = (),
    width: float = 300,
    height: float = 96,
    least: float = 0,
) -> Plot:
    """Plot values over increasing xs, from zero to the highest of values, limits and `least`.

    None breaks the line. `limits` has none, or one for each x. The dots are (x, y, index of the value).
    """
    known = [value for value in values if value is not None]
    top = max([*known, *limits, least]) * HEADROOM or 1.0
    left, wide = (xs[0], xs[-1] - xs[0]) if xs else (0.0, 0.0)

    def at(x: float, value: float) -> tuple[float, float]:
        return round((x - left) / wide * width if wide else width / 2, 1), round(
            height - value / top * height, 1
        )

    def line(points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{x:g},{y:g}" for x, y in points)

    runs = [
        list(run)
        for known_run, run in groupby(zip(xs, values, strict=True), key=lambda pair: pair[1] is not None)
        if known_run
    ]
    return Plot(
        width=width,
        height=height,
        top=top,
        paths=tuple(line([at(x, value) for x, value in run if value is not None]) for run in runs),
        dots=tuple(
            (*at(x, value), index)
            for index, (x, value) in enumerate(zip(xs, values, strict=True))
            if value is not None
        ),
        limit=line(
            [at(x, value) for x, value in zip(xs, limits, strict=True)]
            if len(limits) > 1
            else [(0, at(0, limits[0])[1]), (width, at(0, limits[0])[1])]
            if limits
            else []
        ),
    )
