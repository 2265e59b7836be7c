"""Scenarios side by side: what holds the same thing takes turns, a failure is shown and does not stop the
others, all in one table.
"""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import yaml

from .conftest import ROOT, load


@pytest.fixture
def runner(tmp_path, monkeypatch):
    module = load("molecule/run")
    monkeypatch.setattr(module, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(module, "TOOK", tmp_path / "logs/took.json")
    monkeypatch.setattr(module, "TESTHOSTS", "/bin/true")
    monkeypatch.setattr(module, "LOCKS", tmp_path)
    monkeypatch.setattr(module, "hosts_used", lambda name: 100.0)
    monkeypatch.setattr(sys, "argv", ["run"])
    # what it sets itself is as before afterwards
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setenv("MOLECULE_QUICK", "")
    monkeypatch.setenv("NO_COLOR", "")
    return module


def play(runner, monkeypatch, scripts, holds):
    """Runs `scripts` (name -> shell) in place of Molecule."""
    monkeypatch.setattr(runner, "command", lambda name: ["bash", "-c", scripts[name]])
    monkeypatch.setattr(
        runner,
        "known",
        lambda: {n: runner.Scenario(n, Counter(holds.get(n, [])), runner.LOGS / f"{n}.log") for n in scripts},
    )
    return runner.main()


def test_what_holds_the_same_thing_takes_turns(runner, monkeypatch, tmp_path, capsys):
    alone = f"mkdir {tmp_path}/held && sleep 0.3 && rmdir {tmp_path}/held"
    status = play(
        runner,
        monkeypatch,
        {"a": alone, "b": alone, "c": alone, "d": "true"},
        {n: ["vm settings"] for n in "abc"},
    )
    assert status == 0, capsys.readouterr().out


def test_what_another_checkout_holds_is_left_to_it(runner, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "THERE_ARE", {"engine": 1})
    first, second = (
        runner.Scenario("a", Counter(["engine", "vm settings"]), tmp_path / "a.log") for _ in range(2)
    )
    other = runner.Scenario("b", Counter(["engine"]), tmp_path / "b.log")
    assert other.take()
    assert not first.take()
    other.release()
    assert first.take()  # which it does only if the one that failed left nothing taken
    assert not second.take()
    first.release()
    assert second.take()


def test_as_many_engines_at_once_as_there_are_cores(runner, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "THERE_ARE", {"engine": 2})
    hosts = [
        {"name": "x-one", "holds": ["engine", "vm settings"]},
        {"name": "x-two", "holds": ["engine", "vm settings"]},
        {"name": "x-three"},
    ]
    assert runner.count(hosts) == {"engine": 2, "vm settings": 1}
    one, other, two = (runner.Scenario("a", Counter(engine=n), tmp_path / "a.log") for n in (1, 1, 2))
    assert one.take()
    assert not two.take()
    assert other.take()
    one.release()
    assert not two.take()
    other.release()
    assert two.take()


def test_two_that_hold_nothing_run_at_once(runner, monkeypatch, tmp_path):
    """Each waits for the other's file."""
    script = "touch {0}/{1}; for _ in $(seq 600); do [ -e {0}/{2} ] && exit; sleep 0.1; done; exit 1"
    assert (
        play(
            runner,
            monkeypatch,
            {"a": script.format(tmp_path, "a", "b"), "b": script.format(tmp_path, "b", "a")},
            {},
        )
        == 0
    )


def test_a_failure_is_shown_and_the_others_run_all_the_same(runner, monkeypatch, capsys):
    scripts = {
        "bad": "echo 'INFO     [bad > converge] Executing'; seq 100; echo 'the reason'; exit 3",
        "good": "echo 'INFO     [good > verify] Executing'",
        "last": "true",
    }
    monkeypatch.setenv("MOLECULE_LANES", "1")
    assert play(runner, monkeypatch, scripts, {}) == 1
    out = capsys.readouterr().out
    assert "bad: converge\n" in out
    assert "good: verify\n" in out
    assert "the reason\n" in out
    assert "\n41\n" not in out  # the end of the log, not all of it
    assert (runner.LOGS / "bad.log").read_text().count("\n") == 102
    table = [line.split() for line in out.splitlines()[-5:]]
    assert table[0] == ["scenario", "result", "took", "processor", "time"]
    assert [row[:2] for row in table[1:4]] == [["bad", "FAILED"], ["good", "passed"], ["last", "passed"]]
    # it ended early, and is not taken for a short one the next time
    assert sorted(json.loads(runner.TOOK.read_text())) == ["good", "last"]
    assert table[4][0] == "all"
    assert table[4][-4:] == [
        "5",
        "min",
        "0",
        "s",
    ]  # three times the 100 s of its hosts, and next to nothing of its own


def test_the_longest_of_the_last_time_begins(runner, monkeypatch, tmp_path):
    runner.LOGS.mkdir()
    runner.TOOK.write_text('{"short": 10, "long": 500, "gone": 9}')
    monkeypatch.setenv("MOLECULE_LANES", "1")
    # in what is said of them one may overtake another: each is read by a thread of its own
    assert (
        play(runner, monkeypatch, {n: f"echo {n} >>{tmp_path}/begun" for n in ("short", "long", "new")}, {})
        == 0
    )
    assert (tmp_path / "begun").read_text().split() == ["new", "long", "short"]


def test_what_takes_long_is_left_out_of_all_and_in_by_name(runner, monkeypatch, tmp_path):
    scripts = {n: f"echo ${{MOLECULE_QUICK:-whole}} $NO_COLOR >{tmp_path}/{n}" for n in "ab"}
    assert play(runner, monkeypatch, scripts, {}) == 0
    assert [(tmp_path / n).read_text() for n in "ab"] == ["1 1\n", "1 1\n"]
    monkeypatch.delenv("MOLECULE_QUICK")
    monkeypatch.setattr(sys, "argv", ["run", "a", "b"])
    assert play(runner, monkeypatch, scripts, {}) == 0
    assert [(tmp_path / n).read_text() for n in "ab"] == ["whole 1\n", "whole 1\n"]
    steps = {
        path
        for path in (ROOT / "molecule").rglob("*.*")
        if path.suffix in (".yml", ".py") and "MOLECULE_QUICK" in path.read_text()
    }
    assert {str(path.relative_to(ROOT)) for path in steps} == {
        "molecule/service/faults.yml", "molecule/edge/fuzz.yml", "molecule/edge/tests/conftest.py",
    }  # fmt: skip


def test_a_name_that_is_none_is_one_line():
    done = subprocess.run(
        [sys.executable, ROOT / "molecule/run", "gpu_drivers"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("no scenario gpu_drivers: there are cluster, cuda_toolkit, ")


def test_slow_ones_are_run_by_name_only():
    module = load("molecule/run")
    assert set(module.known()) > module.BY_NAME_ONLY


def test_scenarios_that_set_vm_parameters_say_so():
    """They are the machine's, whichever host sets them."""
    holding = set()
    for path in (ROOT / "molecule").glob("*/molecule.yml"):
        scenario = yaml.safe_load(path.read_text())
        if any("vm settings" in p.get("holds", []) for p in scenario["platforms"]):
            holding.add(path.parent.name)
    setting = {
        path.parent.name
        for path in (ROOT / "molecule").glob("*/converge.yml")
        if "name: host_memory" in path.read_text()
        and yaml.safe_load((path.parent / "molecule.yml").read_text())["platforms"][0].get("kind") != "vm"
    }
    assert setting == holding


def test_scenarios_with_the_real_engine_say_so():
    """It is as fast as there are cores; more of them at once would only make each other time out."""
    for path in (ROOT / "molecule").glob("*/molecule.yml"):
        for platform in yaml.safe_load(path.read_text())["platforms"]:
            shares = any(
                folder.endswith(".lowmem/host/models") for folder in platform.get("shared_folders", [])
            )
            assert ("engine" in platform.get("holds", [])) == shares, platform["name"]
