"""`make clean` removes what make made in this checkout and leaves its neighbours whole, whatever the path."""

import os
import shutil
import subprocess

import pytest

from .conftest import ROOT

NEIGHBOURS = ("a", "checkout", "a/other", "checkout/.lowmem", "elsewhere")


@pytest.fixture
def copy(tmp_path):
    """Copy what make needs to a path of that name, beside folders that a path split in two would hit."""

    def make_copy(name):
        for neighbour in NEIGHBOURS:
            (tmp_path / neighbour).mkdir(parents=True, exist_ok=True)
            (tmp_path / neighbour / "kept").write_text("kept")
        checkout = tmp_path / name
        checkout.mkdir(parents=True, exist_ok=True)
        for file in ("Makefile", "requirements.txt", "requirements-dev.txt", "pyproject.toml"):
            shutil.copy(ROOT / file, checkout)
        shutil.copytree(ROOT / "scripts", checkout / "scripts")
        (checkout / ".lowmem").mkdir(exist_ok=True)
        (checkout / ".lowmem" / "made").write_text("made")
        return checkout

    yield make_copy
    for neighbour in NEIGHBOURS:
        assert (tmp_path / neighbour / "kept").read_text() == "kept"


def make(checkout, *words):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    return subprocess.run(
        ["make", *words],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=environment,
    )


@pytest.mark.parametrize("name", ["a checkout", "elsewhere;touch x", "a$(id)", "a'b", "a#b", "a:b", "a%b"])
@pytest.mark.parametrize("target", ["clean", "setup", "demo", "stop"])
def test_an_odd_path_is_refused_in_one_line_and_nothing_is_removed(copy, name, target):
    checkout = copy(name)
    done = make(checkout, target, "--dry-run") if target != "clean" else make(checkout, target)
    assert done.returncode == 2
    assert "the path of this checkout holds a space or another character" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert (checkout / ".lowmem" / "made").exists()


@pytest.mark.parametrize("marker", ["lowmem_root", "requirements.0123456789ab.stamp"])
def test_clean_removes_a_folder_that_make_marked(copy, marker):
    checkout = copy("mine")
    (checkout / ".lowmem" / marker).touch()
    (checkout / ".lowmem" / "link").symlink_to(checkout.parent / "elsewhere")
    done = make(checkout, "clean")
    assert (done.returncode, done.stdout) == (0, f"removed {checkout}/.lowmem\n")
    assert not (checkout / ".lowmem").exists()
    assert (checkout / "scripts").is_dir()


def test_clean_refuses_a_folder_without_the_marker(copy):
    checkout = copy("mine")
    done = make(checkout, "clean")
    assert done.returncode == 2
    assert "has no marker file lowmem_root" in done.stderr
    assert (checkout / ".lowmem" / "made").exists()


def test_clean_refuses_a_link(copy):
    checkout = copy("mine")
    shutil.rmtree(checkout / ".lowmem")
    (checkout.parent / "elsewhere" / "lowmem_root").touch()
    (checkout / ".lowmem").symlink_to(checkout.parent / "elsewhere")
    assert make(checkout, "clean").returncode == 2


def test_clean_removes_no_folder_that_is_named_from_outside(copy):
    checkout = copy("mine")
    (checkout / ".lowmem" / "lowmem_root").touch()
    elsewhere = checkout.parent / "elsewhere"
    (elsewhere / "lowmem_root").touch()
    assert make(checkout, "clean", f"STATE={elsewhere}").returncode == 0


def test_setup_has_no_circular_dependency(copy):
    done = make(copy("mine"), "setup", "--dry-run")
    assert done.returncode == 0
    assert "Circular" not in done.stderr
