"""Small line plots as SVG coordinates, which the page's template draws. All functions are pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

HEADROOM = 1.08


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
