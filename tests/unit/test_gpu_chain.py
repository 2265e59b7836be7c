"""What benchmarks/gpu packs for a GPU machine, and how the steps of its chain end."""

import argparse
import json
import struct
import sys
import time
from pathlib import Path

import pytest

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"
MACHINE_CODE = 2


@pytest.fixture
def rig(monkeypatch):
    monkeypatch.syspath_prepend(str(GPU))
    import rig as module

    return module


@pytest.fixture
def chain(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(GPU))
    import chain as module

    options = argparse.Namespace(
        out=tmp_path / "out", root=tmp_path / "root", controller=Path(sys.prefix), deadline_s=60,
        inventory="inventory/lab", set=[],
    )  # fmt: skip
    return module.Chain(options)


def library(*architectures):
    """A fat binary: one container with 8 bytes of machine code for each architecture."""
    entries = b"".join(
        struct.pack("<HHIQ12xI32x", MACHINE_CODE, 0, 64, 8, architecture) + bytes([architecture] * 8)
        for architecture in architectures
    )
    return b"ELF" + struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries


def test_a_library_of_two_environments_is_stripped_and_packed_once(rig, tmp_path):
    for name in ("one", "two"):
        (tmp_path / "source" / name).mkdir(parents=True)
        (tmp_path / "source" / name / "libx.so.1").write_bytes(library(80, 90))
    site = tmp_path / "site"
    rig.copy(tmp_path / "source", site)
    assert rig.share(site, least_bytes=1) == 3 + 16 + 2 * 72
    rig.strip_all(site, 90, [])
    one, two = site / "one/libx.so.1", site / "two/libx.so.1"
    assert one.samefile(two)
    assert (bytes([80] * 8) in one.read_bytes(), bytes([90] * 8) in one.read_bytes()) == (False, True)
    assert (tmp_path / "source/one/libx.so.1").read_bytes() == library(80, 90)


def test_files_of_one_name_and_size_and_other_bytes_stay_two(rig, tmp_path):
    for name, byte in (("one", b"1"), ("two", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").write_bytes(byte * 100)
    assert rig.share(tmp_path, least_bytes=1) == 0
    assert (tmp_path / "two/data").read_bytes() == b"2" * 100


def test_what_is_left_out_is_gone_with_its_folder(rig, tmp_path):
    (tmp_path / "stage/deep").mkdir(parents=True)
    (tmp_path / "kept").write_text("kept")
    rig.leave_out(tmp_path, ["stage"])
    assert [path.name for path in tmp_path.rglob("*")] == ["kept"]


def test_a_failed_step_says_why_and_the_next_one_runs(chain):
    chain.step(
        "bad", 10, lambda log, limit: chain.run(["sh", "-c", "echo 'msg: no card'; exit 2"], log, limit)
    )
    chain.step("good", 10, lambda log, limit: chain.run(["echo", "hello"], log, limit).splitlines()[-1])
    seen = json.loads((chain.out / "chain.json").read_text())
    assert [(s["step"], s["verdict"], s["said"]) for s in seen] == [
        ("bad", "failed", "status 2: no card; see 00-bad.log"),
        ("good", "passed", "hello"),
    ]


def test_a_step_ends_at_its_limit(chain):
    began = time.monotonic()
    chain.step("slow", 5.1, lambda log, _: chain.run(["sleep", "60"], log, 0.2))
    assert (chain.steps[0]["verdict"], chain.steps[0]["said"]) == (
        "failed",
        "no end within 0 s; see 00-slow.log",
    )
    assert time.monotonic() - began < 10


def test_a_step_that_needs_the_service_is_left_out_without_one(chain):
    chain.step("again", 10, lambda *_: pytest.fail("it ran"), needs=True)
    assert chain.steps[0]["verdict"] == "left out"


def test_no_step_begins_after_the_deadline(chain):
    chain.until = time.monotonic()
    chain.step("late", 10, lambda *_: pytest.fail("it ran"))
    assert chain.steps[0]["said"] == "no time was left before the deadline"


def test_the_recap_adds_up_the_hosts(chain):
    said = (
        "PLAY RECAP ****\n"
        "lab   : ok=7    changed=2    unreachable=0    failed=0    skipped=1\n"
        "other : ok=3    changed=0    unreachable=1    failed=1    skipped=0\n"
    )
    assert chain.recap(said) == (10, 2, 1, 1)
