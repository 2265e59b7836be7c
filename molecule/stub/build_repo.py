#!/usr/bin/env python3
"""Builds a signed STUB of NVIDIA's package repository and of a machine with cards: `build_repo.py OUT CACHE
KERNEL…`, a KERNEL being a release such as 6.1.0-99-amd64. What was built before from the same sources is
copied from CACHE.

OUT/compute/cuda/repos/{debian12,debian13,ubuntu2204,ubuntu2404}/x86_64/ holds packages with NVIDIA's names
and dependencies for that system and none of its content, signed by a key made here, and that key as
lowmem-stub.pub; OUT/fingerprint is its fingerprint, OUT/wrong.pub another key. OUT.tar is laid over a host's
root: that repository, the stub's programs and its units, switched on. Needs dpkg-deb, apt-ftparchive and gpg.
About 5 s.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
MARKER = "lowmem_root"
VERSIONS = {"580.95.05": "13.0", "580.159.04": "13.0", "590.48.01": "13.1"}
SUITES = {"Debian": ("debian12", "debian13"), "Ubuntu": ("ubuntu2204", "ubuntu2404")}


def sh(*command: str | Path, **options: object) -> str:
    done = subprocess.run([str(c) for c in command], check=True, text=True, capture_output=True, **options)  # type: ignore[call-overload]
    return str(done.stdout)


def kernel_module(fields: dict[str, str]) -> bytes:
    """A relocatable ELF file that holds a .modinfo section and nothing else: enough for the real depmod and
    modinfo.
    """
    modinfo = b"".join(f"{k}={v}".encode() + b"\0" for k, v in fields.items())
    names = b"\0.modinfo\0.symtab\0.strtab\0.shstrtab\0"
    blobs = [
        (1, 1, modinfo, 0, 0, 0),
        (10, 2, bytes(24), 3, 1, 24),
        (18, 3, b"\0", 0, 0, 0),
        (26, 3, names, 0, 0, 0),
    ]
    offset, body, headers = 64, b"", [bytes(64)]
    for name, kind, data, link, info, size in blobs:
        body += bytes(-(offset + len(body)) % 8)
        headers.append(
            struct.pack(
                "<IIQQQQIIQQ",
                name,
                kind,
                2 if kind == 1 else 0,
                0,
                offset + len(body),
                len(data),
                link,
                info,
                8,
                size,
            )
        )
        body += data
    body += bytes(-(offset + len(body)) % 8)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    file_header = struct.pack(
        "<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, offset + len(body), 0, 64, 0, 0, 64, len(headers), 4
    )
    return ident + file_header + body + b"".join(headers)


Files = dict[str, tuple[str | bytes, int]]


def package(
    out: Path,
    name: str,
    version: str,
    files: Files | None = None,
    scripts: dict[str, str] | None = None,
    **fields: str,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        for path, (content, mode) in (files or {}).items():
            target = root / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.encode() if isinstance(content, str) else content)
            target.chmod(mode)
        control = root / "DEBIAN"
        control.mkdir()
        lines = {
            "Package": name,
            "Version": version,
            "Architecture": "amd64",
            "Maintainer": "stub <stub@invalid>",
        }
        lines["Description"] = "STUB for tests"
        lines.update({k.replace("_", "-").title(): v for k, v in fields.items()})
        (control / "control").write_text("".join(f"{k}: {v}\n" for k, v in lines.items()))
        for script, text in (scripts or {}).items():
            (control / script).write_text(f"#!/bin/sh\nset -e\n{text}\n")
            (control / script).chmod(0o755)
        sh("dpkg-deb", "--root-owner-group", "-Znone", "-b", root, out / f"{name}_{version}_amd64.deb")


def daemon(description: str, process: str) -> str:
    return (
        "[Unit]\nDescription=STUB of"
        f" {description}\n[Service]\nExecStart=/usr/bin/{process}\n[Install]\nWantedBy=multi-user.target\n"
    )


# What dkms does when such a package is installed, less the compiling.
PLACE = """
for kernel in /usr/src/linux-headers-*; do
    release=${kernel##*/linux-headers-}; target=/lib/modules/$release/updates/dkms; mkdir -p $target
    for m in nvidia nvidia-uvm; do cp /usr/src/nvidia-stub/$m.ko $target/; done
    touch /lib/modules/$release/modules.order /lib/modules/$release/modules.builtin; depmod $release
done
"""


def names(system: str, branch: str) -> dict[str, str]:
    """What NVIDIA calls the parts: https://docs.nvidia.com/datacenter/tesla/driver-installation-guide,
    "Ubuntu 590 package renames".
    """
    if system == "Debian":
        return {
            "smi": "nvidia-driver-cuda",
            "libcuda": "libcuda1",
            "open": "nvidia-kernel-open-dkms",
            "proprietary": "nvidia-kernel-dkms",
        }
    suffix = f"-{branch}" if int(branch) < 590 else ""
    return {
        "smi": f"nvidia-utils{suffix}", "libcuda": f"libnvidia-compute{suffix}",
        "open": f"nvidia-dkms{suffix}-open" if suffix else "nvidia-dkms-open",
        "proprietary": f"nvidia-dkms{suffix}",
    }  # fmt: skip


def driver(out: Path, system: str, version: str, cuda: str) -> None:
    full = f"{version}-1" if system == "Debian" else f"{version}-1ubuntu1"
    branch = version.split(".")[0]
    name = names(system, branch)
    for suffix in (branch, version):
        pin = f"Package: *nvidia* *libcuda* *cuda-drivers*\nPin: version {suffix}*\nPin-Priority: 1000\n"
        package(out, f"nvidia-driver-pinning-{suffix}", full,
            {"/etc/apt/preferences.d/nvidia-driver-pinning": (pin, 0o644)},
                provides="nvidia-driver-pinning", conflicts="nvidia-driver-pinning",
                replaces="nvidia-driver-pinning")  # fmt: skip
    smi = (HERE / "files/nvidia-smi").read_text().replace("@VERSION@", version).replace("@CUDA@", cuda)
    modules = f"{name['open']} (= {full}) | {name['proprietary']} (= {full})"
    needs = {
        "Debian": f"{modules}, {name['libcuda']} (= {full}), nvidia-persistenced (= {full})",
        "Ubuntu": f"{name['libcuda']} (= {full})",
    }[system]
    package(
        out,
        name["smi"],
        full,
        {"/usr/bin/nvidia-smi": (smi, 0o755)},
        depends=needs,
        conflicts="stub-smi",
        replaces="stub-smi",
        provides="stub-smi",
    )
    package(
        out, name["libcuda"], full, conflicts="stub-libcuda", replaces="stub-libcuda", provides="stub-libcuda"
    )
    nodes = "#!/bin/sh\n# STUB: the node is an empty file\n[ \"$*\" = '-c=0 -u' ] && touch /dev/nvidia-uvm\n"
    package(out, "nvidia-modprobe", full, {"/usr/bin/nvidia-modprobe": (nodes, 0o755)})
    for kind, licence in (("open", "Dual MIT/GPL"), ("proprietary", "NVIDIA")):
        files: Files = {}
        for module in ("nvidia", "nvidia-uvm"):
            fields = {"version": version, "license": licence, "name": module.replace("-", "_")}
            files[f"/usr/src/nvidia-stub/{module}.ko"] = (kernel_module(fields), 0o644)
        package(
            out,
            name[kind],
            full,
            files,
            {"postinst": PLACE},
            conflicts="stub-dkms",
            replaces="stub-dkms",
            provides="stub-dkms",
            depends="kmod",
        )
    for service, process, what in (
        ("nvidia-persistenced", "nvidia-persistenced", "NVIDIA's persistence daemon"),
        ("nvidia-fabricmanager", "nv-fabricmanager", "NVIDIA's fabric manager"),
    ):
        unit = f"/usr/lib/systemd/system/{service}.service"
        files = {
            unit: (daemon(what, process), 0o644),
            f"/usr/bin/{process}": ("#!/bin/sh\nexec sleep infinity\n", 0o755),
        }
        # the fabric manager has the same version string on both systems
        package(out, service, f"{version}-1" if service == "nvidia-fabricmanager" else full, files)
    package(out, "nvidia-open", full, depends=f"{name['smi']} (= {full}), {name['open']} (= {full})")


def toolkit(out: Path) -> None:
    for dotted, patch in (("13-0", "13.0.88"), ("13-1", "13.1.80")):
        release = dotted.replace("-", ".")
        nvcc = f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{patch} (STUB)'\n"
        files: Files = {f"/usr/local/cuda-{release}/bin/nvcc": (nvcc, 0o755)}
        package(out, f"cuda-nvcc-{dotted}", f"{patch}-1", files, depends=f"cuda-cudart-dev-{dotted}")
        package(out, f"cuda-cudart-dev-{dotted}", f"{patch}-1")
        # The trap: NVIDIA's all-in-one package brings a driver of its own choosing.
        package(out, f"cuda-{dotted}", f"{release}.0-1", depends=f"cuda-nvcc-{dotted}, nvidia-open")


def keys(home: Path, name: str) -> tuple[str, str]:
    env = {**os.environ, "GNUPGHOME": str(home)}
    who = f"{name} <stub@invalid>"
    sh(
        "gpg",
        "--batch",
        "--quiet",
        "--passphrase",
        "",
        "--quick-generate-key",
        who,
        "rsa3072",
        "sign",
        "never",
        env=env,
    )
    listing = sh("gpg", "--with-colons", "--list-keys", name, env=env)
    fingerprint = next(line.split(":")[9] for line in listing.splitlines() if line.startswith("fpr:"))
    return fingerprint, sh("gpg", "--armor", "--export", fingerprint, env=env)


def packages(out: Path, system: str, releases: list[str]) -> None:
    out.mkdir(parents=True)
    (out / MARKER).touch()
    for version, cuda in VERSIONS.items():
        driver(out, system, version, cuda)
    toolkit(out)
    for release in releases:
        package(
            out,
            f"linux-headers-{release}",
            "1",
            {f"/usr/src/linux-headers-{release}/Makefile": ("# STUB\n", 0o644)},
        )
    (out / "Packages").write_text(sh("apt-ftparchive", "packages", ".", cwd=out))
    (out / "Release").write_text(
        sh("apt-ftparchive", "-o", "APT::FTPArchive::Release::Origin=lowmem-stub", "release", ".", cwd=out)
    )


def build(out: Path, releases: list[str]) -> None:
    repositories = out / "compute/cuda/repos"
    with tempfile.TemporaryDirectory() as home:
        env = {**os.environ, "GNUPGHOME": home}
        fingerprint, public = keys(Path(home), "lowmem stub repository")
        for system, (suite, *others) in SUITES.items():
            first = repositories / suite / "x86_64"
            packages(first, system, releases)
            sign = (
                "gpg",
                "--batch",
                "--yes",
                "--default-key",
                fingerprint,
                "--clearsign",
                "-o",
                first / "InRelease",
                first / "Release",
            )
            sh(*sign, env=env)
            (first / "lowmem-stub.pub").write_text(public)
            for other in others:
                shutil.copytree(first, repositories / other / "x86_64")
        (out / "fingerprint").write_text(fingerprint + "\n")
        (out / "wrong.pub").write_text(keys(Path(home), "somebody else")[1])
        sh("gpgconf", "--kill", "all", env=env)


def machine(out: Path, tar: Path) -> None:
    """What is laid over a host's root. Its modprobe comes before the real one on PATH; its units are enabled
    as systemctl does.
    """

    def mine(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = "root"
        entry.mode |= 0o755 if entry.isdir() else 0o644
        return entry

    links = {
        "usr/local/sbin/modprobe": "/opt/stub-gpu/stub-gpu",
        "etc/systemd/system/sysinit.target.wants/stub-gpu.service": "/etc/systemd/system/stub-gpu.service",
        "etc/systemd/system/multi-user.target.wants/stub-repo.service": (
            "/etc/systemd/system/stub-repo.service"
        ),
    }
    with tarfile.open(tar, "w") as archive:
        archive.add(out, "opt/stub-repo", filter=mine)
        archive.add(HERE / "files/stub-gpu", "opt/stub-gpu/stub-gpu", filter=mine)
        for unit in ("stub-gpu.service", "stub-repo.service"):
            archive.add(HERE / "files" / unit, f"etc/systemd/system/{unit}", filter=mine)
        for name, target in links.items():
            link = mine(tarfile.TarInfo(name))
            link.type, link.linkname = tarfile.SYMTYPE, target
            archive.addfile(link)


def made_here(folder: Path) -> bool:
    """Whether the folder is a repository of an earlier run, whole or not, and no link to one."""
    proofs = (folder / MARKER, folder / "compute/cuda/repos")
    return not folder.is_symlink() and any(proof.exists() for proof in proofs)


def main() -> None:
    out, cache, releases = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    sources = hashlib.sha256(
        "".join([*releases, *(p.read_text() for p in (Path(__file__), HERE / "files/nvidia-smi"))]).encode()
    )
    built = cache / f"stub-repo-{sources.hexdigest()[:12]}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".stub-repo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            for old in cache.glob("stub-repo-*"):
                if made_here(old):
                    shutil.rmtree(old)
            build(cache / "stub-repo-partial", releases)
            (cache / "stub-repo-partial").rename(built)
        if out.is_dir() and not made_here(out):
            raise SystemExit(f"{out} holds no stub repository, so it is not replaced: name another folder")
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(built, out)
    machine(out, out.with_suffix(".tar"))


if __name__ == "__main__":
    main()
