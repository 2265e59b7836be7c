"""Draw docs/status.png: a status page on a desktop in light and on a phone in dark. Needs Chromium.

.lowmem/venv/bin/python scripts/status_picture.py .lowmem/host/status/index.html
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path

from PIL import Image

PICTURE = Path(__file__).resolve().parents[1] / "docs/status.png"
DESKTOP_WIDTH, PHONE_WIDTH, HEIGHT, GAP = 960, 390, 1130, 16
LIGHT, DARK = 1, 0
"""Chromium's numbers of the themes."""


def shoot(chromium: str, page: str, width: int, theme: int, folder: Path) -> Image.Image:
    """Show the page in a frame of this width: a window of Chromium is never narrower than 500 pixels."""
    frame = folder / f"{width}.html"
    frame.write_text(
        '<meta name="color-scheme" content="light dark"><body style="margin:0">'
        f'<iframe style="border:0;width:{width}px;height:{HEIGHT}px" sandbox="allow-same-origin"'
        f' srcdoc="{escape(page)}"></iframe>',
        encoding="utf-8",
    )
    file = folder / f"{width}.png"
    flags = (
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={theme}",
        f"--window-size={max(width, 500)},{HEIGHT}", f"--screenshot={file}",
    )  # fmt: skip
    subprocess.run([chromium, *flags, frame.as_uri()], check=True, capture_output=True, timeout=120)
    return Image.open(file).convert("RGB").crop((0, 0, width, HEIGHT))


def main() -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("chromium is not installed (Debian package chromium)")
    if len(sys.argv) != 2:
        sys.exit("give the status page to draw, as `lowmem report --live` wrote it")
    page = Path(sys.argv[1]).read_text(encoding="utf-8")
    # the picture shows a fresh page: the frame runs no script, and nothing loads the page again
    page = re.sub(r'<meta http-equiv="refresh"[^>]*>|<noscript>.*?</noscript>', "", page, flags=re.DOTALL)
    with tempfile.TemporaryDirectory() as name:
        desktop = shoot(chromium, page, DESKTOP_WIDTH, LIGHT, Path(name))
        phone = shoot(chromium, page, PHONE_WIDTH, DARK, Path(name))
    picture = Image.new("RGB", (DESKTOP_WIDTH + GAP + PHONE_WIDTH, HEIGHT), "#8c959f")
    picture.paste(desktop, (0, 0))
    picture.paste(phone, (DESKTOP_WIDTH + GAP, 0))
    # of all ways this one keeps small coloured parts, such as the word "serving"
    picture.quantize(256, Image.Quantize.MAXCOVERAGE).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
