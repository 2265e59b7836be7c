"""The receipt as it is joined, printed and drawn."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lowmem.cli.main import app
from lowmem.measure.receipt import merge, read_checks
from lowmem.schema import Receipt, Term
from lowmem.status.page import bars, page

from .conftest import MIB, make_plan

XML = """<testsuites><testsuite>
<testcase classname="checks.test_memory" name="test_peak[local]" time="0.1"><properties><property name="check" value="memory: peak"/></properties></testcase>
<testcase classname="checks.test_service" name="test_modes[local]" time="0.2"><properties><property name="check" value="service: modes"/></properties>
<failure message="AssertionError: 0o644&#10;second line">text</failure></testcase>
<testcase classname="checks.test_host" name="test_gpus[local]" time="0"><properties><property name="check" value="host: gpus"/></properties>
<skipped message="the plan uses no GPU"/></testcase>
</testsuite></testsuites>"""  # noqa: E501


def make_receipt(**changes: object) -> Receipt:
    terms = (
        Term(name="weights", planned_bytes=120 * MIB, measured_bytes=118 * MIB, source="log"),
        Term(name="runtime", planned_bytes=900 * MIB, measured_bytes=None, source="in `rest`"),
        Term(
            name="rest",
            planned_bytes=900 * MIB,
            measured_bytes=1000 * MIB,
            source="idle less the terms above",
        ),
        Term(name="total", planned_bytes=1020 * MIB, measured_bytes=1118 * MIB, source="idle"),
        Term(name="load_growth", planned_bytes=30 * MIB, measured_bytes=20 * MIB, source="load less idle"),
        Term(name="peak", planned_bytes=1050 * MIB, measured_bytes=1138 * MIB, source="highest under load"),
    )
    values: dict[str, object] = {
        "created_utc": "2026-11-22T20:00:00Z", "plan": make_plan(), "versions": {"vllm": "0.32.0"},
        "hardware": {"cpu": "a <CPU>"},
        "argv": (), "terms": terms, "memory_before_bytes": (100 * MIB,), "memory_idle_bytes": (1218 * MIB,),
        "memory_peak_bytes": (1238 * MIB,), "ready_s": 30.0, "loads": (), "verdict": "passed",
    }  # fmt: skip
    return Receipt.model_validate(values | changes)


@pytest.fixture
def xml(tmp_path: Path) -> Path:
    path = tmp_path / "checks.xml"
    path.write_text(XML)
    return path


def test_checks_are_read_with_their_outcome(xml: Path) -> None:
    assert read_checks(xml) == {
        "memory: peak": {"outcome": "passed", "seconds": 0.1},
        "service: modes": {"outcome": "failed", "seconds": 0.2, "message": "AssertionError: 0o644"},
        "host: gpus": {"outcome": "skipped", "seconds": 0.0, "message": "the plan uses no GPU"},
    }


def test_a_failed_check_fails_the_receipt(xml: Path) -> None:
    joined = merge(make_receipt(), read_checks(xml))
    assert joined.verdict == "failed"
    assert joined.findings == ("check service: modes: AssertionError: 0o644",)


def test_joining_twice_says_it_once(xml: Path) -> None:
    checks = read_checks(xml)
    assert merge(merge(make_receipt(), checks), checks).findings == (
        "check service: modes: AssertionError: 0o644",
    )


def test_a_limit_that_the_measurement_names_is_not_told_twice() -> None:
    checks = {"memory: peak": {"outcome": "failed", "seconds": 0.0, "message": "over"}}
    receipt = make_receipt(
        findings=("memory: GPU 0 used 2,050 MiB at its peak, limit 2,048 MiB, 2 MiB over",), verdict="failed"
    )
    assert merge(receipt, checks).findings == (
        "memory: GPU 0 used 2,050 MiB at its peak, limit 2,048 MiB, 2 MiB over",
    )


def test_what_others_held_before_is_not_the_services() -> None:
    assert make_receipt().service_peak_bytes == (1138 * MIB,)


def test_a_receipt_survives_being_written_and_read() -> None:
    receipt = make_receipt()
    assert Receipt.model_validate_json(receipt.model_dump_json()) == receipt


def test_the_command_prints_writes_and_exits_by_the_verdict(tmp_path: Path, xml: Path) -> None:
    measured = tmp_path / "measured.json"
    measured.write_text(make_receipt().model_dump_json())
    assert CliRunner().invoke(app, ["receipt", str(measured)]).exit_code == 0
    result = CliRunner().invoke(
        app, ["receipt", str(measured), "--checks", str(xml), "--out", str(tmp_path / "joined.json")]
    )
    assert result.exit_code == 2
    assert "Checks: 1 passed, 1 failed, 1 skipped" in result.output
    assert "check service: modes: AssertionError: 0o644" in result.output
    assert Receipt.model_validate_json((tmp_path / "joined.json").read_text()).verdict == "failed"


@pytest.mark.parametrize(
    ("text", "line"), [(None, "No such file or directory"), ("{}", "Field required"), ("[", "Invalid JSON")]
)
def test_what_is_no_receipt_is_one_line(tmp_path: Path, text: str | None, line: str) -> None:
    path = tmp_path / "receipt.json"
    if text is not None:
        path.write_text(text)
    result = CliRunner().invoke(app, ["receipt", str(path)])
    assert result.exit_code == 1
    assert result.output.startswith(f"lowmem: receipt {path}: ")
    assert line in result.output
    assert len(result.output.splitlines()) == 1


def test_the_bars_add_up_to_plan_and_measurement() -> None:
    planned, measured = bars(make_receipt())
    assert [(p["name"], p["total_mib"]) for p in (planned, measured)] == [
        ("plan", 1050.0),
        ("measured", 1138.0),
    ]
    assert [(term, mib) for term, mib, _ in measured["parts"]] == [
        ("weights", 118.0),
        ("rest", 1000.0),
        ("under load", 20.0),
    ]
    assert planned["limit_percent"] == 100.0


def test_the_page_stands_alone() -> None:
    html = page(
        [("one", make_receipt()), ("two", make_receipt(verdict="failed", findings=("memory: over",)))],
        "2026-11-22 20:00 UTC",
    )
    assert re.findall(r"(?:src|href)=\"(?!#|data:)[^\"]*\"|https?://|<script|@import", html) == []
    assert "a &lt;CPU&gt;" in html
    assert "a <CPU>" not in html
    assert html.count("<article") == 2
    assert "memory: over" in html
