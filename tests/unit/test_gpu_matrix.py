"""How benchmarks/gpu/matrix.py deals runs to cards, with commands that need none."""

import sys
import time
from pathlib import Path

import pytest
import yaml

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"
# fails where another holds one of its cards at the same time
HOLD = """
import os, pathlib, sys, time
cards = [pathlib.Path(sys.argv[1]) / f"card-{n}" for n in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
for card in cards:
    card.mkdir()
time.sleep(0.2)
for card in cards:
    card.rmdir()
with (pathlib.Path(sys.argv[1]) / "order").open("a") as stream:
    stream.write(sys.argv[2] + "\\n")
"""


@pytest.fixture
def matrix(monkeypatch):
    monkeypatch.syspath_prepend(str(GPU))
    import matrix as module

    yield module
    for name in ("matrix", "servers"):
        sys.modules.pop(name, None)


def job(tmp_path, name, gpus, **more):
    script = tmp_path / "hold.py"
    script.write_text(HOLD)
    return {
        "name": name,
        "gpus": gpus,
        "guess_s": 1,
        "command": f"{sys.executable} {script} {{out}} {name}",
        **more,
    }


def test_no_card_has_two_runs_at_once(matrix, tmp_path, capsys):
    cards = {"a": "0,1", "b": "2,3", "c": "2", "d": "3", "e": "1,2", "f": "0"}
    matrix.run_all(
        [job(tmp_path, name, gpus) for name, gpus in cards.items()],
        tmp_path,
        tmp_path,
        time.monotonic() + 120,
    )
    said = capsys.readouterr().out
    assert [f"=== {name} on GPU {gpus}: exit 0 " in said for name, gpus in cards.items()] == [True] * 6, said
    assert sorted((tmp_path / "order").read_text().split()) == list("abcdef")


def test_a_run_that_cannot_end_in_time_is_not_begun(matrix, tmp_path, capsys):
    matrix.run_all(
        [job(tmp_path, "long", "0", guess_s=1000), job(tmp_path, "short", "0")],
        tmp_path,
        tmp_path,
        time.monotonic() + 120,
    )
    assert "=== long: not begun, the deadline is near" in capsys.readouterr().out
    assert (tmp_path / "order").read_text() == "short\n"


def test_a_command_past_its_time_ends_with_what_it_started(matrix, tmp_path, capsys):
    script = tmp_path / "parent.sh"
    script.write_text("#!/bin/sh\nsleep 1000 &\necho $! > $1/child\nwait\n")
    script.chmod(0o755)
    child = tmp_path / "child"

    class Clock:
        """A deadline that comes once the child is there."""

        def __rsub__(self, _):
            return self

        def __sub__(self, _):
            deadline = time.monotonic() + 60
            while not (child.exists() and child.read_text()) and time.monotonic() < deadline:
                time.sleep(0.02)
            return 0.0

    matrix.run_command({"name": "over", "command": f"{script} {{out}}"}, tmp_path, "0", Clock())
    assert "=== over on GPU 0: exit -15" in capsys.readouterr().out
    status, deadline = Path(f"/proc/{child.read_text().strip()}/stat"), time.monotonic() + 60
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_each_run_of_the_file_is_a_plan_or_names_its_cards_and_script():
    spec = yaml.safe_load((GPU / "runs.yml").read_text())
    commands = [run for run in spec["runs"] if "command" in run]
    assert [run["name"] for run in commands] == ["sglang", "same-client-low_latency", "awq", "fleet"]
    for run in commands:
        assert run["gpus"]
        assert (GPU.parents[1] / run["command"].split()[1]).is_file()
    assert all({"profile", "count"} <= set(run) for run in spec["runs"] if "command" not in run)
