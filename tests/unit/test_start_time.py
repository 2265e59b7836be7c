"""A plan takes half a second because of what it does not import; modules are counted here, and no seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lowmem.data

PROGRAM = """
import sys
from lowmem.cli.main import app
try:
    app(["plan", "--profile", "low_mem", "--model", "llama-2-7b", "--device", "a100-80g", "--json"])
except SystemExit:
    pass
sys.stderr.write(" ".join(sys.modules))
"""

HEAVY = {
    "ansible", "asyncio", "concurrent", "http", "huggingface_hub", "jinja2", "matplotlib", "multiprocessing",
    "numpy", "psutil", "requests", "rich", "simpy", "ssl", "torch", "transformers", "urllib3", "vllm",
}  # fmt: skip


def test_a_plan_imports_nothing_heavy(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120
    )
    imported = {name.partition(".")[0] for name in done.stderr.split()}
    assert "pydantic" in imported, done.stderr
    assert imported & HEAVY == set()
    kept = {path.name.partition(".")[0] for path in tmp_path.rglob("*.table")}
    assert {"architectures", "calibration", "devices", "kv_families"} <= kept


@pytest.fixture
def one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tables with one file, whose parsed form Python may keep beside it."""
    monkeypatch.setattr(lowmem.data, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    source = tmp_path / "sizes.yml"
    source.write_text("a: [1, 2.5, true, null, {b: text}]\n")
    return source


def read(name: str = "sizes.yml") -> object:
    return lowmem.data.load_yaml.__wrapped__(name)


def test_a_kept_table_is_the_parsed_one_until_its_source_changes(one_table: Path) -> None:
    first = {"a": [1, 2.5, True, None, {"b": "text"}]}
    assert read() == first
    (kept,) = one_table.parent.glob("__pycache__/sizes.*.table")
    assert read() == first
    one_table.write_text("a: another, longer text\n")
    assert read() == {"a": "another, longer text"}
    assert kept.exists()


def test_a_kept_table_is_what_is_read(one_table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read()
    monkeypatch.setattr(lowmem.data, "parse_yaml", lambda text: pytest.fail("parsed again"))
    assert read() == {"a": [1, 2.5, True, None, {"b": "text"}]}


@pytest.mark.parametrize("content", [b"", b"no marshal", b"\xfb", b"i\x01\x00\x00\x00"])
def test_a_damaged_kept_table_is_parsed_again(one_table: Path, content: bytes) -> None:
    read()
    (kept,) = one_table.parent.glob("__pycache__/sizes.*.table")
    kept.write_bytes(content)
    assert read() == {"a": [1, 2.5, True, None, {"b": "text"}]}


def test_no_table_is_kept_where_python_may_write_no_bytecode(
    one_table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert read() == {"a": [1, 2.5, True, None, {"b": "text"}]}
    assert list(one_table.parent.iterdir()) == [one_table]
