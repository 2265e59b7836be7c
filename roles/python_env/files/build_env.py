"""Build a virtual environment from locks with hashes, or bring a broken one back.

build_env.py ENV SPEC: the folder to make, and a JSON object {stamp, lock, torch_lock, torch_index, wheels}.
Run it with the Python that the environment is to have. Progress goes to stdout, the noise of pip to stderr.
Standard library only. build_env.py ENV: the stamp of a complete environment, or null; changes nothing.

An environment is never changed once it is complete: other wheels are another folder, so that whoever runs in
the old one keeps it. The new one is then made of hard links to an old one with the same lock, in seconds and
without room of its own.

The environment counts as complete when its `.complete` file exists, which is written last, and all its files
are as they were then (seal.py): an interrupted build leaves no such file and is begun again. A damaged
environment is made anew beside it, and takes its place in seconds, since a server may run in it. Two runs at
once are kept apart by a lock; the second finds the work done.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# beside this file on the host; both come along where a stamp is only read
import lock
import seal

SHOWN = 3
BUILD_TOOLS = ("setuptools", "wheel")  # what the few packages without a wheel are built with


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def select(lock: str, names: tuple[str, ...]) -> str:
    """The requirements of these names, with their hashes, out of the text of a lock."""
    blocks = re.split(r"\n(?=[A-Za-z0-9])", lock)
    return "".join(
        block.rstrip() + "\n"
        for block in blocks
        if re.split(r"[=\s;\[]", block, maxsplit=1)[0].lower() in names
    )


def pip(env: Path, *arguments: str) -> None:
    command = [
        str(env / "bin/python"),
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--no-input",
        "install",
        "--no-deps",
        "--quiet",
        *arguments,
    ]
    subprocess.run(command, check=True, stdout=sys.stderr)


def build(env: Path, spec: dict[str, Any]) -> None:
    """subprocess.CalledProcessError when a step fails; pip has then said why on stderr."""
    started = time.monotonic()
    shutil.rmtree(env, ignore_errors=True)
    say(f"{env.name}: new virtual environment from {sys.executable}")
    subprocess.run([sys.executable, "-m", "venv", str(env)], check=True, stdout=sys.stderr)
    lock = Path(spec["lock"])
    if spec["torch_lock"]:
        say(f"{env.name}: installing torch")
        pip(
            env,
            "--require-hashes",
            "--only-binary",
            ":all:",
            "--index-url",
            spec["torch_index"],
            "-r",
            spec["torch_lock"],
        )
    text = lock.read_text(encoding="utf-8")
    say(f"{env.name}: installing {len(re.findall(r'^[A-Za-z0-9].*==', text, re.M))} locked packages")
    if tools := select(text, BUILD_TOOLS):
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write(tools)
            file.flush()
            pip(env, "--require-hashes", "--only-binary", ":all:", "-r", file.name)
    pip(env, "--require-hashes", "--no-build-isolation", "-r", str(lock))
    install_wheels(env, spec["wheels"])
    say(f"{env.name}: complete after {time.monotonic() - started:.0f} s")


def install_wheels(env: Path, wheels: list[str]) -> None:
    for wheel in wheels:
        say(f"{env.name}: installing {Path(wheel).name}")
        pip(env, "--no-index", "--force-reinstall", wheel)


def home(env: Path) -> Path | None:
    """The folder that its scripts start their Python from: not `env` where that was reached by a link when it
    was built, or moved since.
    """
    try:
        start = (env / "bin/pip").read_bytes()[:1000]
    except OSError:
        return None
    # a path too long for a first line stands in the second
    found = re.search(rb"^(?:#!|'''exec' )(/.+?)/bin/python", start, re.M)
    return Path(os.fsdecode(found[1])) if found else None


def works(env: Path) -> bool:
    """Whether its Python starts, which it does not when the system's own was upgraded away, and whether its
    scripts start that one.
    """
    named = home(env)
    if named is None or named.resolve() != env.resolve():
        return False
    return (
        subprocess.run(
            [str(env / "bin/python"), "-c", "import pip"], capture_output=True, check=False
        ).returncode
        == 0
    )


def stamp_of(env: Path) -> dict[str, Any] | None:
    """What a complete environment was built from; None where it is not complete or is damaged, or its Python
    does not start.
    """
    mark = env / ".complete"
    if not mark.exists() or not works(env) or next(seal.troubles(env), None):
        return None
    stamp: dict[str, Any] = json.loads(mark.read_text(encoding="utf-8"))
    return stamp


def donor(env: Path, wanted: dict[str, Any]) -> Path | None:
    """A complete environment beside this one that differs in local wheels only, and has no package that the
    new one is not to have.
    """
    for other in sorted(env.parent.glob("*/.complete")):
        stamp = stamp_of(other.parent) if other.parent != env else None
        if (
            stamp
            and {**stamp, "wheels": []} == {**wanted, "wheels": []}
            and packages(stamp) <= packages(wanted)
        ):
            return other.parent
    return None


def packages(stamp: dict[str, Any]) -> set[str]:
    return {Path(wheel).name.split("-")[0] for wheel in stamp["wheels"]}


def link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links, or another user's file
        shutil.copy2(source, target)


def clone(old: Path, env: Path) -> None:
    """`env` as `old` is, the files hard links; scripts and settings that name the folder are written anew."""
    say(f"{env.name}: made of {old.name}")
    shutil.rmtree(env, ignore_errors=True)
    # where the old folder is reached by a link, its scripts name either path
    names = b"|".join(re.escape(os.fsencode(path)) for path in (home(old) or old, old, old.resolve()))
    named = re.compile(rb"(?:" + names + rb")(?![\w.-])")
    shutil.copytree(
        old.resolve(), env, symlinks=True, copy_function=link,
        ignore=shutil.ignore_patterns(".complete", seal.NAME),
    )  # fmt: skip
    for path in [env / "pyvenv.cfg", *(env / "bin").iterdir()]:
        content = b"" if path.is_symlink() or not path.is_file() else path.read_bytes()
        if named.search(content):
            content = named.sub(lambda _: os.fsencode(env), content)
            beside = path.with_name(f".{path.name}.new")
            beside.write_bytes(content)
            beside.chmod(path.stat().st_mode & 0o7777)
            beside.replace(path)


class Foreign(Exception):
    """A folder in the environment's place that no build made."""


def ensure(env: Path, spec: dict[str, Any]) -> None:
    """Build the environment unless it is complete. Foreign for a folder of somebody else in its place."""
    env.parent.mkdir(parents=True, exist_ok=True)
    if foreign := lock.refusal_to_replace(env, env / ".complete"):
        raise Foreign(foreign)
    waiting = f"{env.name}: waiting for another run that is building it"
    with lock.held(lock.beside(env), lambda: say(waiting)):
        if stamp_of(env) == spec["stamp"]:
            return
        mark = env / ".complete"
        for trouble in itertools.islice(seal.troubles(env) if mark.exists() else (), SHOWN):
            say(f"{env.name}: {trouble}")
        fresh = env.with_name(f".{env.name}.new")
        place = fresh if mark.exists() else env
        try:
            if old := donor(env, spec["stamp"]):
                clone(old, place)
                install_wheels(place, spec["wheels"])
            else:
                build(place, spec)
            if place == fresh:
                clone(fresh, env)
            seal.write(env)
            beside = env / ".complete.new"
            beside.write_text(json.dumps(spec["stamp"]), encoding="utf-8")
            beside.replace(mark)
        except (subprocess.CalledProcessError, OSError):
            # half of one is of no use, and whoever serves from this disk needs the room
            if not mark.exists():
                shutil.rmtree(env, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def main() -> int:
    if len(sys.argv) == 2:
        say(json.dumps(stamp_of(Path(sys.argv[1]))))
        return 0
    try:
        # by its real path, which its scripts then name: a link on the way to it may go
        ensure(Path(sys.argv[1]).resolve(), json.loads(sys.argv[2]))
    except Foreign as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except subprocess.CalledProcessError as error:
        sys.stderr.write(
            f"cannot build {sys.argv[1]}: step '{' '.join(error.cmd[:8])} …' ended with status"
            f" {error.returncode}\n"
        )
        return 1
    except shutil.Error as error:  # of a whole tree: one file stands for all
        sys.stderr.write(f"cannot build {sys.argv[1]}: {error.args[0][0][2]}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"cannot build {sys.argv[1]}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
