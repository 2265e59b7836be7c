"""Draw docs/host.svg: what runs on a GPU host, who asks whom, and which file each part reads.

.lowmem/venv/bin/python scripts/host_picture.py
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

PICTURE = Path(__file__).resolve().parents[1] / "docs/host.svg"
WIDTH, HEIGHT = 960, 470

STYLE = """
  svg { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
  .page { fill: #ffffff; }
  .host { fill: #f6f8fa; stroke: #8c959f; stroke-dasharray: 6 4; }
  .box { fill: #ffffff; stroke: #57606a; stroke-width: 1.5; }
  .engine { fill: #ddf4ff; stroke: #0969da; }
  .file { fill: #fff8c5; stroke: #9a6700; }
  .name { fill: #1f2328; font-size: 15px; font-weight: 600; }
  .note { fill: #59636e; font-size: 12px; }
  .arrow { fill: none; stroke: #57606a; stroke-width: 1.5; }
  .head { fill: #57606a; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117; }
    .host { fill: #151b23; stroke: #656c76; }
    .box { fill: #0d1117; stroke: #9198a1; }
    .engine { fill: #0c2d6b; stroke: #58a6ff; }
    .file { fill: #3b2300; stroke: #d29922; }
    .name { fill: #f0f6fc; }
    .note { fill: #b1bac4; }
    .arrow { stroke: #9198a1; }
    .head { fill: #9198a1; }
  }
"""


def words(kind: str, x: int, y: int, text: str) -> str:
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="middle">{escape(text)}</text>'


@dataclass(frozen=True)
class Box:
    """Holds the place and the words of one part; lengths are in pixels of the picture."""

    x: int
    y: int
    width: int
    name: str
    notes: tuple[str, ...]
    kind: str = ""
    height: int = 84

    def svg(self) -> str:
        middle = self.x + self.width // 2
        place = f'x="{self.x}" y="{self.y}" width="{self.width}" height="{self.height}"'
        lines = [
            f'<rect class="box {self.kind}" {place} rx="8"/>',
            words("name", middle, self.y + 28, self.name),
        ]
        lines += [
            words("note", middle, self.y + 50 + 18 * number, note) for number, note in enumerate(self.notes)
        ]
        return "\n".join(lines)


BOXES = (
    Box(20, 76, 120, "Client", ("OpenAI API,", "its own key")),
    Box(230, 76, 190, "nginx gateway", ("TLS, keys, limits;", "optional, port 443")),
    Box(520, 76, 200, "vLLM", ("vllm@main.service,", "127.0.0.1:8000"), "engine"),
    Box(800, 76, 110, "GPUs", ("weights,", "KV cache")),
    Box(230, 216, 190, "Status page", ("lowmem report --live,", "written by a timer")),
    Box(520, 216, 200, "Watchdog", ("ends a server that hangs;", "systemd starts it again")),
    Box(740, 216, 170, "Prometheus", ("alerts with plan limits;", "optional")),
    Box(230, 358, 190, "receipt.json", ("what was measured,", "beside the plan"), "file"),
    Box(520, 358, 200, "plan.json", ("memory, limits,", "arguments and reasons"), "file"),
    Box(20, 358, 120, "Controller", ("Ansible,", "lowmem plan")),
)

# Each is a path of points and a label with its place.
ARROWS: tuple[tuple[str, tuple[tuple[int, int], ...], tuple[str, int, int] | None], ...] = (
    ("request", ((140, 118), (230, 118)), ("HTTPS", 172, 110)),
    ("forward", ((420, 118), (520, 118)), ("HTTP", 470, 110)),
    ("compute", ((720, 118), (800, 118)), None),
    ("look", ((420, 240), (470, 240), (470, 146), (520, 146)), ("/metrics", 438, 196)),
    ("watch", ((620, 216), (620, 160)), ("health, progress", 672, 194)),
    ("scrape", ((780, 216), (780, 188), (760, 188), (760, 146), (720, 146)), ("/metrics", 812, 204)),
    ("serve page", ((300, 160), (300, 216)), ("/status/", 328, 194)),
    ("plan for the watchdog", ((620, 358), (620, 300)), None),
    ("plan for alerts", ((720, 400), (825, 400), (825, 300)), None),
    ("plan for the page", ((520, 380), (460, 380), (460, 270), (420, 270)), None),
    ("receipt for the page", ((325, 358), (325, 300)), None),
    ("compare", ((520, 416), (420, 416)), ("compared", 470, 434)),
)
# The way of the plan from the controller runs below the files.
DEPLOY = ((80, 442), (80, 456), (620, 456), (620, 442))


def arrow(points: tuple[tuple[int, int], ...]) -> str:
    way = " ".join(f"{'M' if number == 0 else 'L'}{x} {y}" for number, (x, y) in enumerate(points))
    return f'<path class="arrow" marker-end="url(#head)" d="{way}"/>'


def picture() -> str:
    """Return the SVG; the same text each time."""
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
            f' width="{WIDTH}" height="{HEIGHT}" role="img" aria-labelledby="title">'
        ),
        (
            '<title id="title">A client asks the gateway, which asks vLLM;'
            " watchdog, status page and Prometheus watch vLLM by the plan.</title>"
        ),
        f"<style>{STYLE}</style>",
        (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4"'
            ' markerWidth="8" markerHeight="8" orient="auto">'
            '<path class="head" d="M0 0L8 4L0 8z"/></marker></defs>'
        ),
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}"/>',
        '<rect class="host" x="200" y="30" width="740" height="436" rx="12"/>',
        '<text class="name" x="216" y="56">GPU host</text>',
    ]
    for _, points, label in ARROWS:
        parts.append(arrow(points))
        if label:
            text, x, y = label
            parts.append(words("note", x, y, text))
    parts.append(arrow(DEPLOY))
    parts.append(words("note", 170, 450, "SSH"))
    parts += [box.svg() for box in BOXES]
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
