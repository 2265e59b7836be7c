"""The status page and the page of receipts, as text; how they look is in test_browser.py."""

from __future__ import annotations

import re
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import escape
from typer.testing import CliRunner

from lowmem.cli.main import app
from lowmem.schema import Plan, Receipt
from lowmem.status.metrics import Sample, parse
from lowmem.status.page import SUMS, Live, page
from lowmem.status.plots import TERM_COLOURS, palette, plot, term_colour, term_name
from lowmem.status.status import Look

from .conftest import ROOT, StubServer, demo_plan, recorded

MIB = 2**20
AT = 1795534600.0
RECEIPTS = ROOT / "docs/measurements/2026-11-23-2xh200"


def receipts() -> list[tuple[str, Receipt]]:
    """Four real ones of an eventful night, oldest first; one failed."""
    found = [
        Receipt.model_validate_json((RECEIPTS / f"{name}.json").read_text())
        for name in ("low_mem-4-channels", "low_latency", "extreme_uncapped", "low_mem")
    ]
    return [(r.created_utc, r) for r in sorted(found, key=lambda r: r.created_utc)]


def serving(plan: Plan | None = None, memory: tuple[int, ...] = (2000 * MIB,), **changes: object) -> Live:
    sample = parse(recorded("probes"), AT).model_copy(
        update={"memory_bytes": memory, "running": 3, "waiting": 2, "kv_usage": 0.42}
    )
    # an hour of looks before this one; 60 tokens a minute
    earlier: list[Sample] = [
        sample.model_copy(
            update={
                "at": AT - 60 * age,
                "generation_tokens": sample.generation_tokens - age,
                "running": age % 8,
            }
        )
        for age in range(18, 0, -1)
    ]
    look = Look(
        at=AT,
        state="serving",
        started=sample.started,
        sample=sample,
        memory_bytes=memory,
        memory_source="PSS of the process tree",
    )
    values: dict[str, object] = {
        "plan": plan or demo_plan(),
        "look": look,
        "earlier": earlier,
        "release": "r-1",
        "place": "gpu-1",
        "every_s": 60,
    }
    return Live(**(values | {"versions": {"vllm": "0.32.0"}} | changes))  # type: ignore[arg-type]


def down(**changes: object) -> Live:
    look = Look(
        at=AT, state="down", trouble="http://127.0.0.1:8000: connection refused", memory_source="not seen"
    )
    return serving(**({"look": look} | changes))  # type: ignore[arg-type]


def text(html: str) -> str:
    """What the reader of a fresh page reads, with single blanks."""
    hidden = r"<(style|script|noscript)\b.*?</\1>|<p class=\"old.*?</p>|<span class=\"pill old.*?</span>"
    return " ".join(re.sub(r"<[^>]+>", " ", re.sub(hidden, "", html, flags=re.DOTALL)).split())


def pages() -> dict[str, str]:
    gpu = receipts()[-1][1].plan
    return {
        "serving": page([("2026-11-24 15:13:18", receipts()[0][1])], "", serving()),
        "gpus": page(receipts(), "", serving(gpu, (20_400 * MIB, 20_600 * MIB))),
        "down": page(receipts(), "", down()),
        "first": page([], "", down(earlier=(), every_s=0)),
        "receipts": page(receipts(), "2026-11-24 15:00 UTC"),
    }


@pytest.fixture(scope="module", params=["serving", "gpus", "down", "first", "receipts"])
def html(request: pytest.FixtureRequest) -> str:
    return pages()[request.param]


def test_the_live_figures_stand_beside_their_limits() -> None:
    said = text(pages()["serving"])
    assert "SmolLM2-135M-Instruct serving Up for 2 min 59 s, since 2026-11-24 15:33:40 UTC ." in said
    assert "This page was written at 2026-11-24 15:36:40 UTC . The host writes it again every 1 min." in said
    assert "Requests 3 running 2 waiting; up to 8 run at once" in said
    assert "KV cache 42 % in use 4,892 of 11,648 tokens" in said
    assert "Memory 2,000 MiB limit 3,072; planned peak 2,162" in said
    assert "limit 1,000 10,000" in said
    assert "Needs attention" not in said


def test_what_is_over_its_limit_is_said_first() -> None:
    said = text(pages()["gpus"])
    assert "Needs attention memory: GPU 1 uses 20,600 MiB, limit 20,480 MiB" in said
    assert said.index("Needs attention") < said.index("Requests 3 running")
    assert "Memory, fullest GPU 20,600 MiB 120 over the limit of 20,480; planned peak 20,452" in said


def test_memory_over_the_plan_and_within_the_limit_is_said_beside_the_figure() -> None:
    said = text(page([], "", serving(memory=(2200 * MIB,))))
    assert "Memory 2,200 MiB 38 over the planned peak of 2,162; limit 3,072" in said
    assert "Needs attention" not in said


def test_a_server_that_is_down_is_told_with_the_last_receipt() -> None:
    said = text(pages()["down"])
    assert "not running" in said
    assert (
        "Needs attention http://127.0.0.1:8000: connection refused what to do: docs/runbooks/service-down.md"
        in said
    )
    assert "Last seen 1 min before this page was written: 1 running and 2 waiting requests." in said
    assert "Requests 3 running" not in said
    # the receipt's own figures
    assert "receipt, 8 clients 32 16.9" in said
    assert "20,452 20,430 22" in said


def test_nothing_known_yet_is_said_and_not_drawn() -> None:
    said = text(pages()["first"])
    assert "This page has not seen the server answer yet." in said
    assert (
        "There is no receipt yet. ansible-playbook site.yml --tags verify measures this service"
        " and writes one." in said
    )
    assert "writes it again" not in said


def test_every_argument_stands_beside_its_reason() -> None:
    html = pages()["serving"]
    for argument in demo_plan().arguments:
        shown = escape(" ".join(part for part in (argument.flag, argument.value) if part))
        assert f"<dt><code>{shown}</code></dt><dd>{escape(argument.why)}</dd>" in html


def test_history_is_drawn_oldest_first_with_failures_told_apart() -> None:
    html = pages()["down"]
    labels = re.findall(r'<svg viewBox="-6 -6 312 108" role="img" aria-label="([^"]+)"', html)
    assert labels == [
        "Peak memory, MiB, oldest first: 20,466, 23,836, 39,702, 20,430; limit 20,480",
        "TPOT p99, ms, oldest first: 17.6, 27.9, 27.2, 17.7; limit 200",
        "Output tokens/s, oldest first: 420, 271, 275, 418",
    ]
    assert html.count("<circle ") == 12
    assert html.count('class="bad"><title>') == 3


@pytest.mark.parametrize("name", ["serving", "gpus", "down", "first", "receipts"])
def test_the_page_stands_alone(name: str) -> None:
    html = pages()[name]
    assert (
        re.findall(r"(?:src|href)=\"(?!#|data:)[^\"]*\"|<iframe|<link rel=\"style|@import|url\(", html) == []
    )
    assert "default-src 'none'" in html
    # one script, which tells the page's age, and the policy lets no other run
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL)
    hashes = [f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" for script in scripts]
    assert len(scripts) == (0 if name == "receipts" else 1)
    assert re.findall(r"script-src (\S+?)\"", html) == hashes


def test_a_folder_lists_one_run_once(tmp_path: Path) -> None:
    receipt = receipts()[0][1].model_dump_json()
    for name in ("2026-11-23T02:34:14Z.json", "receipt.json"):
        (tmp_path / name).write_text(receipt)
    out = tmp_path / "report.html"
    assert CliRunner().invoke(app, ["report", str(tmp_path), "--out", str(out)]).exit_code == 0
    assert out.read_text().count("<article ") == 1


def test_nothing_in_use_is_a_gauge_at_zero() -> None:
    assert 'class="meter zero"' not in pages()["serving"]
    idle = serving()
    assert idle.look.sample
    look = idle.look.model_copy(update={"sample": idle.look.sample.model_copy(update={"kv_usage": 0.0})})
    assert page([], "", replace(idle, look=look)).count('class="meter zero"') == 1


class Outline(HTMLParser):
    """Unclosed tags, headings, ids and header cells of a page."""

    VOID = ("meta", "link", "line", "polyline", "polygon")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.landmarks: list[str] = []
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.named_by: list[str] = []
        self.links: list[str] = []
        self.headers_without_scope = 0
        self.images_without_name = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("header", "main", "footer"):
            self.landmarks.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if given.get("id"):
            self.ids.append(str(given["id"]))
        if given.get("aria-labelledby"):
            self.named_by.append(str(given["aria-labelledby"]))
        if tag == "a" and (given.get("href") or "").startswith("#"):
            self.links.append(str(given["href"])[1:])
        self.headers_without_scope += tag == "th" and not given.get("scope")
        self.images_without_name += given.get("role") == "img" and not given.get("aria-label")
        if tag == "svg":
            assert given.get("role") == "img"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.VOID[2:]
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_it_is_well_formed_and_says_what_is_what(html: str) -> None:
    outline = Outline(html)
    assert outline.open == []
    assert outline.landmarks[:2] == ["header", "main"]
    assert outline.headings[0] == 1
    assert outline.headings.count(1) == 1
    assert all(
        deeper - before <= 2 for before, deeper in zip(outline.headings, outline.headings[1:], strict=False)
    )
    assert len(set(outline.ids)) == len(outline.ids)
    assert set(outline.named_by) | set(outline.links) <= set(outline.ids)
    assert outline.headers_without_scope == 0
    assert outline.images_without_name == 0
    assert '<html lang="en">' in html


def themes() -> dict[str, dict[str, str]]:
    """Name -> colour, for light and dark, from the template's own style."""
    return {theme: palette(theme) for theme in ("light", "dark")}


def grey(colour: str) -> str:
    """What CSS `grayscale(1)` makes of it."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + f"{round(0.2126 * red + 0.7152 * green + 0.0722 * blue):02x}" * 3


def contrast(one: str, other: str) -> float:
    """WCAG 2.2: ratio of relative luminances."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_drawings_stand_out(theme: str) -> None:
    colours = themes()[theme]
    assert contrast("#ffffff", "#000000") == 21
    for word in ("ink", "soft", "good", "bad", "warn", "accent"):
        for ground in ("paper", "card", *(["track"] if word == "ink" else [])):
            assert contrast(colours[word], colours[ground]) >= 4.5, (word, ground)
            # the figures of an old page are grey, and as legible
            assert contrast(grey(colours[word]), grey(colours[ground])) >= 4.5, (word, ground)
    for part in sorted(set(TERM_COLOURS.values())):
        for ground in ("card", "track"):
            assert contrast(colours[part], colours[ground]) >= 3 or (
                ground == "track" and contrast(colours[part], colours[ground]) >= 2.8
            ), (part, ground)


def test_what_is_not_measured_separately_is_grey_and_has_a_name() -> None:
    assert [
        (term_name(term), term_colour(term)) for term in ("rest", "all", "kv_cache", "offload_buffers")
    ] == [
        ("not measured separately", "other"),
        ("not measured separately", "other"),
        ("KV cache", "kv_cache"),
        ("offload buffers", "offload"),
    ]
    told = {
        *(name for _, r in receipts() for name in r.plan.per_gpu),
        *(t.name for _, r in receipts() for t in r.terms if t.name not in SUMS),
    }
    assert {name for name in told if name not in TERM_COLOURS} <= {"total", "host: offloaded weights"}
    for theme in themes().values():
        assert len({theme[name] for name in TERM_COLOURS.values()}) == len(set(TERM_COLOURS.values()))
        # a grey has equal parts, nearly; an alarm is another colour
        parts = [int(theme["other"][i : i + 2], 16) for i in (1, 3, 5)]
        assert max(parts) - min(parts) <= 32
    html = pages()["receipts"]
    assert html.count("</b>not measured separately</span>") == 4
    assert html.count('<span style="background:var(--other)') == 4


def test_a_lone_value_between_gaps_is_a_dot() -> None:
    live = serving()
    assert live.look.sample
    lone = [live.look.sample.model_copy(update={"at": AT - 60 * age, "memory_bytes": ()}) for age in (3, 1)]
    seen = live.look.sample.model_copy(update={"at": AT - 120})
    html = page([], "", replace(live, earlier=[lone[0], seen, lone[1]]))
    memory = html.split("<h3>Memory</h3>")[1].split("</svg>")[0]
    assert re.findall(r'<polyline points="([^"]+)"', memory) == [
        "100,15.9 100,15.9",
        "300,15.9 300,15.9",
    ]


def test_a_plot_begins_at_zero_and_breaks_where_nothing_is_known() -> None:
    drawn = plot([0, 1, 2, 3], [0, 5, None, 10], limits=[10] * 4, width=30, height=108)
    assert drawn.top == 10.8
    assert drawn.paths == ("0,108 10,58", "30,8")
    assert drawn.area == ("0,108 0,108 10,58 10,108", "30,108 30,8 30,108")
    assert drawn.limit == "0,8 10,8 20,8 30,8"
    assert drawn.dots == ((0, 108, 0), (10, 58, 1), (30, 8, 3))


def test_the_command_writes_the_page_and_keeps_the_look(
    server: StubServer, plan_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "receipts"
    folder.mkdir()
    (folder / "2026-11-24T151318Z.json").write_text(receipts()[-1][1].model_dump_json())
    (folder / "broken.json").write_text("{")
    command = [
        "report",
        str(folder),
        str(tmp_path / "missing.json"),
        "--live",
        "--plan",
        str(plan_file),
        "--every-s",
        "60",
    ]
    out, samples = tmp_path / "served/index.html", tmp_path / "samples.jsonl"
    for times in (1, 2):
        result = CliRunner().invoke(app, [*command, "--samples", str(samples), "--out", str(out)])
        assert (result.exit_code, result.output) == (0, f"{out}\n")
        assert len(samples.read_text().splitlines()) == times
    said = text(out.read_text())
    assert "SmolLM2-135M-Instruct serving" in said
    assert "release vllm-0.32.0-demo_cpu-0123456789ab" in said
    assert f"not shown: receipt {folder}/broken.json: the file: Invalid JSON" in said
    assert [path.name for path in out.parent.iterdir()] == ["index.html"]
    server.close()
    assert CliRunner().invoke(app, [*command, "--samples", str(samples), "--out", str(out)]).exit_code == 0
    assert "not running" in text(out.read_text())
    assert len(samples.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "lowmem: give a receipt, a folder of them, or --live\n"),
        (["--every-s", "60", "."], "lowmem: --samples and --every-s go with --live\n"),
        (
            ["--live", "--plan", "/nowhere/plan.json"],
            "lowmem: --plan /nowhere/plan.json: No such file or directory\n",
        ),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], line: str) -> None:
    result = CliRunner().invoke(app, ["report", *arguments])
    assert (result.exit_code, result.output) == (1, line)
