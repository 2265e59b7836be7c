"""What a deployment does with the answer of vLLM's classes, by a stand-in for the environment's Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PLAY = Path(__file__).parent / "files/ask_engine.yml"
DIFFERS = "oracle: checkpoint.parameter_bytes is 100 in the plan and 120 in vLLM's own classes, 16.7% apart"


def play(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [
        Path(sys.executable).parent / "ansible-playbook",
        "-i",
        "localhost,",
        PLAY,
        "-e",
        f"root={root}",
    ]
    return subprocess.run([*command, *words], cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """An environment whose Python keeps what it is given, and answers as `says` and `status` have it."""
    python = tmp_path / "env/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f"""#!/bin/sh
printf '%s\\n' "$@" > {tmp_path}/arguments
cat > {tmp_path}/stdin
cat {tmp_path}/says >&2
exit "$(cat {tmp_path}/status)"
"""
    )
    python.chmod(0o755)
    (tmp_path / "says").write_text("")
    (tmp_path / "status").write_text("0")
    return tmp_path


def test_the_engine_gets_plan_and_config_and_keeps_its_answer(engine: Path) -> None:
    done = play(engine)
    assert done.returncode == 0, done.stdout
    record = f"{engine}/cache/oracle/main.json"
    assert (engine / "arguments").read_text().split() == [
        *("-m", "lowmem", "oracle", "-"),
        *("--record", record, "--reuse"),
    ]
    assert json.loads((engine / "stdin").read_text()) == {
        "config.json": {"model_type": "llama"},
        "plan.json": {"device_kind": "cpu", "vllm_version": "0.32.0"},
    }


def test_a_difference_stops_the_run_with_both_numbers(engine: Path) -> None:
    (engine / "says").write_text(DIFFERS)
    (engine / "status").write_text("2")
    done = play(engine)
    assert done.returncode == 2
    said = " ".join(done.stdout.split())
    assert f"{DIFFERS} Nothing was fetched." in said
    assert "vllm_service_oracle=false deploys without this comparison." in said


def test_a_dry_run_asks_and_leaves_nothing(engine: Path) -> None:
    done = play(engine, "--check")
    assert done.returncode == 0, done.stdout
    assert (engine / "arguments").read_text().split() == ["-m", "lowmem", "oracle", "-"]
    assert not (engine / "cache").exists()


def test_a_dry_run_without_an_environment_says_that_nobody_was_asked(tmp_path: Path) -> None:
    done = play(tmp_path, "--check")
    assert done.returncode == 0, done.stdout
    assert "is not built yet, so vLLM's own classes were not asked" in " ".join(done.stdout.split())
