r"""Packs wheels for a GPU machine that reaches no registry, without the machine code of other cards.

    python benchmarks/gpu/rig.py pack WHEELS .carry [--name rig] [--compute-capability 9.0] \
        [--empty '*_vllm_fa3_C*'] [--without GLOB]
    python benchmarks/gpu/rig.py unpack /tmp/rig /tmp/site --try torch --try torchvision \
        --try vllm.model_executor.warmup.kernel_warmup

`pack` writes .carry/NAME-00/part-00 …, none over 60 MB; `unpack` joins them there. Three quarters of torch
and vLLM is machine code for other cards. Its bytes become zeros, so every library keeps its layout and loads,
and zstd shrinks them to nothing. If a kernel has no machine code for the card, its PTX stays and the driver
compiles it. WHEELS may also be a folder that is installed already.

NVIDIA does not document the fat binary's layout (section .nv_fatbin). The layout used here was read off these
packages' own files. It is a container of magic 0xBA55ED50 with entries of (kind, header size, payload size,
…, architecture at byte 28).
"""

from __future__ import annotations

import argparse
import filecmp
import fnmatch
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

MAGIC = struct.pack("<I", 0xBA55ED50)
PTX, MACHINE_CODE = 1, 2
PART_BYTES = 60_000_000  # what one call may carry, with the repository beside it


def entries(data: bytearray, at: int) -> list[tuple[int, int, int, int]]:
    """Return (kind, architecture as 90, offset, size) of each payload of the container at `at`.

    The list is empty if the bytes are no container.
    """
    _, version, header, size = struct.unpack_from("<IHHQ", data, at)
    if version != 1 or header != 16 or at + header + size > len(data):
        return []
    found, offset, end = [], at + header, at + header + size
    while offset + 64 <= end:
        kind, _, header, size = struct.unpack_from("<HHIQ", data, offset)
        (architecture,) = struct.unpack_from("<I", data, offset + 28)
        if header < 32 or offset + header + size > end:
            break
        found.append((kind, architecture, offset + header, size))
        offset += header + size
    return found


def strip(file: Path, architecture: int, nothing: bool) -> int:
    """Zeros what a card of that architecture cannot run (everything with `nothing`); how many bytes."""
    data = bytearray(file.read_bytes())
    zeroed, at = 0, data.find(MAGIC)
    while at >= 0:
        found = entries(data, at)
        native = any(kind == MACHINE_CODE and a == architecture for kind, a, _, _ in found)
        usable = max((a for kind, a, _, _ in found if kind == PTX and a <= architecture), default=0)
        for kind, a, offset, size in found:
            keep = a == architecture if kind == MACHINE_CODE else kind == PTX and a == usable and not native
            if nothing or not keep:
                data[offset : offset + size] = bytes(size)
                zeroed += size
        at = data.find(MAGIC, at + 4)
    if zeroed:
        # beside, then moved: in a copy of hard links the source keeps its bytes
        beside = file.with_name(f".{file.name}.stripped")
        beside.write_bytes(data)
        beside.chmod(file.stat().st_mode & 0o7777)
        beside.replace(file)
    return zeroed


def copy(source: Path, site: Path) -> None:
    """Copy a folder, as hard links if both lie on one file system."""
    for how in ("-al", "-a"):
        shutil.rmtree(site, ignore_errors=True)
        site.mkdir()
        command = ["cp", how, f"{source}/.", str(site)]
        if subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0:
            return
    raise SystemExit(f"rig: {source} cannot be copied to {site}")


def share(site: Path, least_bytes: int = 1 << 20) -> int:
    """Make large files of the same content one file with several names. Return the bytes that this saves.

    Environments of one torch share most of their bytes, and tar packs such a file once.
    """
    saved = 0
    alike: dict[tuple[str, int], list[Path]] = {}
    for file in sorted(site.rglob("*")):
        if file.is_file() and not file.is_symlink() and file.stat().st_size >= least_bytes:
            firsts = alike.setdefault((file.name, file.stat().st_size), [])
            for first in firsts:
                if first.samefile(file):
                    break
                if filecmp.cmp(first, file, shallow=False):
                    file.unlink()
                    os.link(first, file)
                    saved += first.stat().st_size
                    break
            else:
                firsts.append(file)
    return saved


def leave_out(site: Path, patterns: list[str]) -> None:
    for path in sorted(site.rglob("*")):
        inside = str(path.relative_to(site))
        if any(fnmatch.fnmatch(inside, pattern) for pattern in patterns):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def strip_all(site: Path, architecture: int, empty: list[str]) -> None:
    """Strip every library once, whatever number of names it has."""
    done: dict[int, Path] = {}
    for file in sorted(site.rglob("*.so*")):
        if not file.is_file() or file.is_symlink():
            continue
        inode, inside = file.stat().st_ino, str(file.relative_to(site))
        if first := done.get(inode):
            file.unlink()
            os.link(first, file)
            continue
        done[inode] = file
        zeroed = strip(file, architecture, any(fnmatch.fnmatch(inside, pattern) for pattern in empty))
        if zeroed > 10_000_000:
            size = file.stat().st_size
            print(f"{inside}: {zeroed / 1e6:,.0f} of {size / 1e6:,.0f} MB are for other cards", flush=True)


def pack(options: argparse.Namespace) -> None:
    carry, name = options.folder, options.name
    architecture = round(float(options.compute_capability) * 10)
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        site = Path(work) / "site"
        if wheels := sorted(options.source.glob("*.whl")):
            command = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "-q",
                "--no-index",
                "--no-deps",
                "--no-compile",
                "--target",
                str(site),
            ]
            subprocess.run([*command, *map(str, wheels)], check=True)
        else:
            copy(options.source, site)
        leave_out(site, options.without)
        if saved := share(site):
            print(f"{name}: {saved / 1e6:,.0f} MB lie in more than one place and are packed once", flush=True)
        strip_all(site, architecture, options.empty)
        for old in carry.glob(f"{name}-[0-9][0-9]"):
            shutil.rmtree(old)
        archive = Path(work) / "archive"
        subprocess.run(
            ["tar", "-C", str(site), "-I", f"zstd -{options.level} -T0 --long=27", "-cf", str(archive), "."],
            check=True,
        )
        with archive.open("rb") as stream:
            number = 0
            while piece := stream.read(PART_BYTES):
                part = carry / f"{name}-{number:02}" / f"part-{number:02}"
                part.parent.mkdir(parents=True)
                part.write_bytes(piece)
                number += 1
        print(f"{name}: {number} parts, {archive.stat().st_size / 1e6:,.0f} MB", flush=True)


def unpack(options: argparse.Namespace) -> None:
    """Join and unpack the parts.

    Without the command zstd, this script's Python needs the package zstandard.
    """
    options.target.mkdir(parents=True, exist_ok=True)
    parts = sorted(options.source.glob("part-*"))
    tar = subprocess.Popen(["tar", "-x", "-C", str(options.target)], stdin=subprocess.PIPE)
    if shutil.which("zstd"):
        zstd = subprocess.Popen(["zstd", "-d", "-q", "--long=27"], stdin=subprocess.PIPE, stdout=tar.stdin)
        assert zstd.stdin is not None
        for part in parts:
            with part.open("rb") as stream:
                shutil.copyfileobj(stream, zstd.stdin, 1 << 22)
        zstd.stdin.close()
        failed = zstd.wait()
    else:
        import zstandard

        assert tar.stdin is not None
        writer = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_writer(tar.stdin, closefd=False)
        for part in parts:
            with part.open("rb") as stream:
                shutil.copyfileobj(stream, writer, 1 << 22)
        failed = 0
    assert tar.stdin is not None
    tar.stdin.close()
    if failed or tar.wait():
        raise SystemExit(f"rig: {len(parts)} parts of {options.source} did not unpack")
    # minutes of a start end at a package that was left out: here it takes seconds to know
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    path = os.pathsep.join(filter(None, [str(options.target), os.environ.get("PYTHONPATH")]))
    if (
        options.tried
        and subprocess.run(
            [sys.executable, "-c", code, *options.tried], env={**os.environ, "PYTHONPATH": path}
        ).returncode
    ):
        raise SystemExit(
            f"rig: {options.target} lacks what {' '.join(options.tried)} need: pack it again with that"
            " package"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("pack")
    first.add_argument("source", type=Path, help="a folder of wheels, or of installed packages")
    first.add_argument("folder", type=Path)
    first.add_argument("--name", default="rig", help="of the folders of parts")
    first.add_argument("--compute-capability", default="9.0")
    first.add_argument(
        "--empty",
        action="append",
        default=[],
        metavar="GLOB",
        help="libraries that must load and are not called",
    )
    first.add_argument("--without", action="append", default=[], metavar="GLOB", help="what is left out")
    first.add_argument("--level", type=int, default=15, help="of zstd; 5 takes a tenth of the time")
    first.add_argument("--work", type=Path, default=Path("/tmp"))
    first.set_defaults(do=pack)
    second = commands.add_parser("unpack")
    second.add_argument("source", type=Path)
    second.add_argument("target", type=Path)
    second.add_argument(
        "--try",
        dest="tried",
        action="append",
        default=[],
        metavar="MODULE",
        help="must be importable then; repeatable",
    )
    second.set_defaults(do=unpack)
    options = parser.parse_args()
    options.do(options)


if __name__ == "__main__":
    main()
