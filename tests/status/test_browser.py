"""The page in a real browser: no scrolling to the side on a phone, both themes, nothing asked of anybody.
Needs Chromium.
"""

from __future__ import annotations

import html as escape
import http.server
import json
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from .conftest import ROOT
from .test_page import pages, themes

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed (Debian package chromium; .ci/run installs it)"
)

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
PHONE, DESKTOP = 390, 1280

# In a frame as wide as a phone: a window of Chromium's own is never narrower than 500 pixels. The frame may
# run no script of its own.
PROBE = """<!doctype html><meta name="color-scheme" content="light dark">
<style>iframe {{ border: 0; width: {width}px; height: 900px }}</style>
<iframe sandbox="allow-same-origin" srcdoc="{page}"></iframe><pre></pre>
<script>
addEventListener("load", () => {{
  const view = document.querySelector("iframe").contentWindow, page = view.document;
  const style = (e) => view.getComputedStyle(e), tiles = page.querySelector(".tiles");
  const texts = [...page.querySelectorAll("h1,h2,h3,p,th,td,dt,dd,li,summary,strong")];
  const seen = texts.filter((e) => e.offsetParent !== null);
  const right = (e) => e.getBoundingClientRect().right;
  document.querySelector("pre").textContent = JSON.stringify({{
    width: page.documentElement.clientWidth,
    scrolls_to: page.documentElement.scrollWidth,
    outside: seen.filter((e) => !e.closest(".scroll") && right(e) > {width} + 0.5).map((e) => e.textContent),
    smallest_text: Math.min(...seen.map((e) => parseFloat(style(e).fontSize))),
    ink: style(page.body).color, paper: style(page.body).backgroundColor,
    columns: tiles ? style(tiles).gridTemplateColumns.split(" ").length : 0,
    resources: view.performance.getEntriesByType("resource").map((e) => e.name),
    reach: page.querySelectorAll(".scroll:not([tabindex])").length,
    shown: page.body.innerText.replace(/\\s+/g, " "),
    rings: [...page.querySelectorAll("a[href],summary,.scroll")].map((e) =>
      {{ e.focus(); return style(e).outlineStyle + " " + style(e).outlineWidth; }}),
    aside: [...page.querySelectorAll(".stack")].filter((e) => e.scrollWidth > e.clientWidth)
      .map((e) => e.getAttribute("aria-label")),
  }});
}});
</script>"""


def dump(tmp_path: Path, address: str, *more: str) -> str:
    """The document as the browser has it once its scripts have run."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *more, "--dump-dom", address],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "<html" in done.stdout, done.stderr[-2000:]
    return done.stdout


def browse(tmp_path: Path, html: str, width: int, dark: bool = False) -> dict:
    """What the browser makes of the page at this width."""
    file = tmp_path / "probe.html"
    file.write_text(PROBE.format(width=width, page=escape.escape(html)))
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    shown = dump(tmp_path, file.as_uri(), "--window-size=1400,1000", "--virtual-time-budget=5000", *theme)
    found = re.search(r"<pre>(\{.*?\})</pre>", shown, re.DOTALL)
    assert found, shown
    return json.loads(escape.unescape(found[1]))


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"


@pytest.mark.parametrize("name", ["serving", "gpus", "down", "first", "receipts"])
def test_a_phone_shows_it_without_scrolling_to_the_side(tmp_path: Path, name: str) -> None:
    seen = browse(tmp_path, pages()[name], PHONE)
    assert (seen["width"], seen["scrolls_to"], seen["outside"]) == (PHONE, PHONE, [])
    assert seen["smallest_text"] >= 14
    assert seen["columns"] == (2 if name in ("serving", "gpus") else 0)
    # what scrolls inside itself can be reached without a pointer
    assert (seen["resources"], seen["reach"]) == ([], 0)
    # whatever the keyboard reaches has a ring
    assert set(seen["rings"]) == {"solid 2px"}
    # tables of figures are read from top to bottom
    assert seen["aside"] == []


@pytest.mark.parametrize(("theme", "dark"), [("light", False), ("dark", True)])
def test_both_themes_on_a_desktop(tmp_path: Path, theme: str, dark: bool) -> None:
    seen = browse(tmp_path, pages()["gpus"], DESKTOP, dark)
    assert (seen["ink"], seen["paper"]) == (rgb(themes()[theme]["ink"]), rgb(themes()[theme]["paper"]))
    assert (seen["scrolls_to"], seen["columns"], seen["resources"]) == (DESKTOP, 3, [])


def test_an_old_page_claims_nothing_of_now(tmp_path: Path) -> None:
    html = pages()["serving"]
    # the frame runs no script, and the page says what that means
    alone = "Without scripts this page cannot tell its age. Compare the time below with your clock. "
    fresh = browse(tmp_path, html, PHONE)["shown"]
    assert f"SmolLM2-135M-Instruct serving {alone}Up for 2 min 59 s, since 2026-11-24 15:33:40 UTC." in fresh
    old = browse(tmp_path, html.replace("<body>", '<body class="is-old">'), PHONE)
    assert (
        "SmolLM2-135M-Instruct unknown: this page is old This page was written some time ago. The host"
        " writes it every 1 min: its timer has stopped, or this browser does not reach the host."
        " The figures below were true at that time."
    ) in old["shown"]
    assert f"{alone}This page was written at 2026-11-24 15:36:40 UTC. Requests 3 running" in old["shown"]
    assert "serving" not in old["shown"].split("Requests 3")[0]
    assert old["scrolls_to"] == PHONE


def test_a_name_without_a_blank_stays_on_the_phone(tmp_path: Path) -> None:
    html = pages()["serving"].replace("SmolLM2-135M-Instruct", "a-model-with-a-name-that-does-not-end-" * 4)
    assert browse(tmp_path, html, PHONE)["scrolls_to"] == PHONE


@pytest.mark.parametrize(
    ("age_s", "every_s", "old"),
    [
        (5, 60, False),
        (100, 60, False),
        (2400, 60, True),
        (500, 0, False),
        (2400, 0, True),
        (-3600, 60, False),
    ],
)
def test_a_page_that_is_old_says_so_itself(tmp_path: Path, age_s: int, every_s: int, old: bool) -> None:
    html = re.sub(r'data-at="[^"]*"', f'data-at="{time.time() - age_s}"', pages()["serving"])
    # the page would load itself anew while it is looked at
    html = re.sub(r'<meta http-equiv="refresh"[^>]*>', "", html)
    file = tmp_path / "page.html"
    file.write_text(re.sub(r'data-every-s="\d+"', f'data-every-s="{every_s}"', html))
    shown = dump(tmp_path, file.as_uri())
    assert ('class="is-old"' in shown) == old
    title = re.search(r"<title>(.*?)</title>", shown)
    assert title
    assert title[1] == f"{'old page' if old else 'serving'}: SmolLM2-135M-Instruct"
    assert ('id="age">40 min<' in shown) == old


def test_the_gateway_lets_the_page_tell_its_age(tmp_path: Path) -> None:
    template = (ROOT / "roles/gateway/templates/nginx.conf.j2").read_text()
    policies = re.findall(r'add_header Content-Security-Policy "([^"]+)"', template)
    assert len(policies) == 1
    html = re.sub(r'data-at="[^"]*"', f'data-at="{time.time() - 2400}"', pages()["serving"])
    html = re.sub(r'<meta http-equiv="refresh"[^>]*>', "", html)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Security-Policy", policies[0])
            self.end_headers()
            self.wfile.write(html.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            shown = dump(tmp_path, f"http://127.0.0.1:{server.server_address[1]}/")
        finally:
            server.shutdown()
            thread.join()
    assert 'class="is-old"' in shown
