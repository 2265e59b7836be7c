#!/usr/bin/python
"""The releases of a deployment: what is served lies whole in one folder, and one link says which folder that
is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import time
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: release
short_description: Lay out, switch, mark and prune the releases of a deployment
description:
  - A release is C(<root>/releases/<id>), never changed once it is there. The id ends in a digest of its
    content.
  - C(<root>/current) links to the one that is served. It is replaced by a rename, so it always names a whole
    release.
  - Which one runs is read from the environment of the server's process, not from what a play remembers.
  - Nothing is removed under a folder without the marker file C(lowmem_root), nor through a link.
options:
  root:
    description: Folder that holds the deployment.
    type: path
    required: true
  state:
    description:
      - V(read) changes nothing.
      - V(staged) makes the release of O(files) and O(private).
      - V(current) makes O(id) the one that is served from the next start on. Counts as changed too where
        another one runs.
      - V(proven) notes that O(id) has served as it should, and removes what is too old, down to O(keep)
        releases, with the environments and checkpoints that no kept release names. The current, the running
        and the last proven one always stay.
      - V(refuted) takes that note back.
      - V(left) is for a root whose releases are gone; it takes the root off the list of O(store), and removes
        there what no other root names.
    type: str
    choices: [read, staged, current, proven, refuted, left]
    required: true
  store:
    description:
      - Folder with the environments and checkpoints, where several deployments share one; O(root) is a folder
        of its own then.
      - Each deployment is written down in C(<store>/roots) before it names anything there, as a link to its
        root. With V(proven) and V(left) an environment or a kept checkpoint goes when no kept release of this
        root names it, no release at all of the others does, and it has been there for an hour, so that a play
        that makes it for its own release at this moment keeps it.
      - Nothing is removed there while one of these roots cannot be looked at.
    type: path
  id:
    description: A release.
    type: str
  name:
    description: With V(staged), what the id begins with.
    type: str
  files:
    description: With V(staged), file name to content. Names that end in C(.sh) are programs.
    type: dict
    default: {}
  private:
    description: The same for files with mode 0600, whose content is never shown.
    type: dict
    default: {}
  links:
    description: With V(staged), link name to the path that it names.
    type: dict
    default: {}
  validate:
    description: With V(staged), file name to a command that must end well, as a list in which C(%s) is the
      file.
    type: dict
    default: {}
  owner:
    description: User that the private files belong to.
    type: str
  group:
    description: Group that the private files belong to.
    type: str
  shown:
    description: With V(current), files of a release that C(<root>/etc) links to, through C(current).
    type: list
    elements: str
    default: []
  keep:
    description: With V(proven), how many releases stay; at least 2.
    type: int
    default: 3
  environments:
    description: With V(proven), what the names of this service's environments begin with.
    type: str
author: vllm-lowmem
"""

RETURN = r"""
id: {description: The release that was staged, returned: with V(staged), type: str}
path: {description: Its folder, returned: with V(staged), type: str}
mended: {description: Files of it that were missing or altered, returned: with V(staged), type: list}
current: {description: Id of the release that is served from the next start on; empty where there is none,
  returned: always, type: str}
running: {description: Ids of the releases that servers run from now, returned: always, type: list}
fallback: {description: "Id of the release other than O(id), or else than the current one, that was proven
    last; empty where there is none",
  returned: always, type: str}
releases: {description: "Every release by age of its proof, newest first: V(id), V(proven) in seconds since
    1970 (0: never), V(links)",
  returned: always, type: list}
removed: {description: What was removed, returned: with V(proven) and V(left), type: list}
unseen: {description: "Deployments of O(store) that cannot be looked at from here, for whose sake nothing was
    removed there",
  returned: with V(proven) and V(left), type: list}
"""

MARK = ".proven"
MARKER = "lowmem_root"
"""The file of each root that this project made, as in module owned_root."""
PLAIN_NAME = r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,199}"
"""A release, file or link: one part of a path, which no shell reads as anything else."""

YOUNG_S = 3600
PROC = Path("/proc")


class Store:
    """The releases under one root."""

    def __init__(self, root: str) -> None:
        self.root = Path(root)
        self.folder = self.root / "releases"
        self.link = self.root / "current"

    @property
    def current(self) -> str:
        try:
            return self.link.readlink().name
        except OSError:
            return ""

    def ids(self) -> list:
        if not self.folder.is_dir():
            return []
        return sorted(
            entry.name for entry in self.folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")
        )

    def proven(self, name: str) -> float:
        try:
            return (self.folder / name / MARK).stat().st_mtime
        except OSError:
            return 0

    def links(self, name: str) -> dict:
        return {
            entry.name: str(entry.readlink())
            for entry in sorted((self.folder / name).iterdir())
            if entry.is_symlink()
        }

    def newest_first(self) -> list:
        return sorted(
            self.ids(),
            key=lambda name: (self.proven(name), (self.folder / name).stat().st_mtime),
            reverse=True,
        )

    def fallback(self, other_than: str) -> str:
        return next((name for name in self.newest_first() if name != other_than and self.proven(name)), "")

    def running(self, proc: Path = PROC) -> list:
        """Of the servers' processes that this user may look at; a server is told by `serve` among its
        arguments.
        """
        prefix = f"LOWMEM_RELEASE={self.folder.resolve()}/".encode()
        found = set()
        for entry in proc.iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                if b"serve" not in (entry / "cmdline").read_bytes().split(b"\0"):
                    continue
                for variable in (entry / "environ").read_bytes().split(b"\0"):
                    if variable.startswith(prefix):
                        found.add(variable[len(prefix) :].decode())
        return sorted(found)

    def report(self, other_than: str) -> dict:
        releases = [
            {"id": name, "proven": self.proven(name), "links": self.links(name)}
            for name in self.newest_first()
        ]
        return {
            "current": self.current,
            "running": self.running(),
            "fallback": self.fallback(other_than),
            "releases": releases,
        }

    def switch(self, name: str) -> None:
        if self.link.is_dir() and not self.link.is_symlink():
            raise FileExistsError(
                f"{self.link} is a folder, and this project has a link there: move it away, and run this"
                " again"
            )
        point(self.link, f"releases/{name}")


def point(link: Path, target: str) -> None:
    """A link to `target`, whatever was there before; by a rename, so that there is always one
    or the other.
    """
    beside = link.with_name(f".{link.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        beside.unlink()
    beside.symlink_to(target)
    beside.replace(link)


def make_current(module: AnsibleModule, store: Store) -> dict:
    wanted = module.params
    result: dict = {"changed": store.running() != [wanted["id"]]}
    if store.current != wanted["id"]:
        result = {"changed": True, "diff": {"before": f"{store.current}\n", "after": f"{wanted['id']}\n"}}
        if not module.check_mode:
            store.switch(wanted["id"])
    for name in wanted["shown"]:
        link, target = store.root / "etc" / name, f"../current/{name}"
        if not link.is_symlink() or str(link.readlink()) != target:
            result["changed"] = True
            if not module.check_mode:
                point(link, target)
    return result


def digest(files: dict, links: dict) -> str:
    return hashlib.sha256(json.dumps([files, links], sort_keys=True).encode()).hexdigest()[:8]


def text_of(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def differences(store: Store, staged: Path, files: dict) -> list:
    """What an operator sees with --diff: the release beside the current one, file by file."""
    found = []
    for name, content in files.items():
        before = text_of(store.link / name)
        if before != content:
            found.append(
                {
                    "before": before,
                    "after": content,
                    "before_header": str(store.link / name),
                    "after_header": str(staged / name),
                }
            )
    return found


def stage(module: AnsibleModule, store: Store) -> dict:
    wanted = module.params
    every = {**wanted["files"], **wanted["private"]}
    name = f"{wanted['name']}-{digest(every, wanted['links'])}"
    place = store.folder / name
    damaged = [] if not place.is_dir() else damage(place, every, wanted["links"])
    changed = not place.is_dir() or store.current != name or bool(damaged)
    result = {"changed": changed, "id": name, "path": str(place), "mended": damaged}
    if result["changed"]:
        result["diff"] = differences(store, place, wanted["files"])
    if module.check_mode or (place.is_dir() and not damaged):
        return result
    gone = [target for target in wanted["links"].values() if not Path(target).exists()]
    if gone:
        module.fail_json(
            msg=f"{gone[0]} is not there any more: another play has removed it meanwhile; run this one again"
        )
    beside = store.folder / f".{name}.{os.getpid()}"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        lay_out(module, beside, every)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    for leftover in store.folder.glob(f".{name}.*"):
        if leftover != beside and own(leftover):
            shutil.rmtree(leftover, ignore_errors=True)
    if damaged:
        # one by one, since a server runs from this folder, and its marks stay
        for file in damaged:
            (beside / file).replace(place / file)
        shutil.rmtree(beside)
    else:
        beside.rename(place)
    return result


def damage(place: Path, files: dict, links: dict) -> list:
    """Names of what is not as the release was made."""

    def target(name: str) -> str:
        try:
            return str((place / name).readlink())
        except OSError:
            return ""

    altered = [name for name, text in files.items() if text_of(place / name) != text]
    return altered + [name for name, path in links.items() if target(name) != path]


def lay_out(module: AnsibleModule, beside: Path, every: dict) -> None:
    """Make the folder of a release, and check its files. OSError where the disk is full."""
    wanted = module.params
    beside.mkdir(parents=True)
    beside.chmod(0o755)
    for file, content in every.items():
        path = beside / file
        path.touch(mode=0o600)
        path.write_text(content)
        if file in wanted["private"]:
            (
                shutil.chown(path, wanted["owner"] or None, wanted["group"] or None)
                if wanted["owner"] or wanted["group"]
                else None
            )
        else:
            path.chmod(0o755 if file.endswith(".sh") else 0o644)
    for file, target in wanted["links"].items():
        (beside / file).symlink_to(target)
    for file, command in wanted["validate"].items():
        done = module.run_command([word.replace("%s", str(beside / file)) for word in command])
        if done[0]:
            shutil.rmtree(beside)
            module.fail_json(msg=f"{file} is not as it should be: {(done[2] or done[1]).strip()}", rc=done[0])


def mark(store: Store, name: str, good: bool, check_mode: bool) -> bool:
    """Whether there was something to note; the newest mark is the release that was proven last."""
    path = store.folder / name / MARK
    if good == path.exists() and not (good and store.newest_first()[0] != name):
        return False
    if not check_mode:
        path.touch() if good else path.unlink()
    return True


def own(path: Path) -> bool:
    """Whether it lies in this root by itself: what is reached by a link belongs to somebody else."""
    return path.is_dir() and not path.is_symlink() and not path.parent.is_symlink() and not path.is_mount()


def marked(root: Path) -> bool:
    """Whether this project made the folder."""
    marker = root / MARKER
    return marker.is_file() and not marker.is_symlink()


def is_kept_copy(path: Path) -> bool:
    """A checkpoint that was kept under its manifest's digest, and so no folder of anybody else's."""
    found = re.search(r"-([0-9a-f]{12})$", path.name)
    manifest = path.with_name(f"{path.name}.manifest.json")
    return bool(
        found
        and manifest.is_file()
        and hashlib.sha256(manifest.read_bytes()).hexdigest().startswith(found[1])
    )


def kept_releases(store: Store, keep: int) -> list:
    running = [name for name in store.running() if (store.folder / name).is_dir()]
    fallback = store.fallback(store.current)
    kept = list(
        dict.fromkeys(name for name in (store.current, *running, fallback, *store.newest_first()) if name)
    )
    return kept[: max(keep, len(set(running) | {store.current} | ({fallback} - {""})))]


def unnamed(place: Path, named: set, environments: str) -> list:
    """The environments and kept checkpoints of a folder that are nobody's."""
    found = [
        path for path in (place / "envs").glob(f"{environments}-*") if environments and path not in named
    ]
    return found + [
        path for path in (place / "models").glob("*-*") if path not in named and is_kept_copy(path)
    ]


def prune(store: Store, keep: int, environments: str, check_mode: bool) -> list:
    if not store.current:
        return []
    kept = kept_releases(store, keep)
    named = {Path(target) for name in kept for target in store.links(name).values()}
    old = [store.folder / name for name in store.ids() if name not in kept]
    return remove(store.root, old + unnamed(store.root, named, environments), check_mode)


class Shared:
    """A store that several deployments have their environments and checkpoints in; `roots` lists them."""

    def __init__(self, place: str, root: str) -> None:
        self.place = Path(place)
        self.roots = self.place / "roots"
        # a store may be a file system of several machines, on which the same path is another deployment
        self.here = f"{platform.node()}:"
        self.entry = self.roots / (self.here + root.strip("/").replace("/", "-"))
        self.root = root

    def enter(self, check_mode: bool) -> bool:
        """Whether it was not on the list yet."""
        if self.entry.is_symlink() and str(self.entry.readlink()) == self.root:
            return False
        if not check_mode:
            self.roots.mkdir(mode=0o755, parents=True, exist_ok=True)
            point(self.entry, self.root)
        return True

    def others(self) -> list:
        if not self.roots.is_dir():
            return []
        return sorted(
            entry for entry in self.roots.glob("[!.]*") if entry.is_symlink() and entry != self.entry
        )

    def prune(self, own_names: set, environments: str, check_mode: bool) -> tuple:
        """What was removed, and for whose sake nothing was."""
        stores = {entry: Store(str(entry.readlink())) for entry in self.others()}
        unseen = [
            entry.name
            for entry, store in stores.items()
            if not entry.name.startswith(self.here) or not store.folder.is_dir()
        ]
        if unseen:
            return [], unseen
        # all that the others have: what they keep is theirs to judge, and what they have staged is not served
        # yet
        named = own_names | {
            Path(target)
            for store in stores.values()
            for name in store.ids()
            for target in store.links(name).values()
        }
        old = [
            path
            for path in unnamed(self.place, named, environments)
            if time.time() - path.stat().st_ctime > YOUNG_S
        ]
        return remove(self.place, old, check_mode), []


def remove(place: Path, candidates: list, check_mode: bool) -> list:
    """Remove what lies in this place by itself. PermissionError if this project did not make the place."""
    removed = [path for path in candidates if own(path)]
    if check_mode:
        return [str(path) for path in removed]
    if not marked(place):
        if removed:
            raise PermissionError(
                f"{place} holds no {MARKER}, so it may not be this project's and nothing is removed there:"
                " deploy it once more with site.yml, which marks it"
            )
        return []
    for path in removed:
        # renamed first, so that a half-removed folder is never taken for a whole one
        beside = path.with_name(f".{path.name}.removed")
        if own(beside):
            shutil.rmtree(beside, ignore_errors=True)
        # of two deployments that share a store the other may have been quicker
        with contextlib.suppress(FileNotFoundError):
            path.rename(beside)
            shutil.rmtree(beside, ignore_errors=True)
        for extra in (f"{path.name}.manifest.json", f"{path.name}.seen.json", f".{path.name}.lock"):
            with contextlib.suppress(OSError):
                path.with_name(extra).unlink()
    for folder in ("envs", "models", "releases"):
        for leftover in filter(own, (place / folder).glob(".*.removed")):
            shutil.rmtree(leftover, ignore_errors=True)
    return [str(path) for path in removed]


def prune_all(module: AnsibleModule, store: Store, shared: Shared | None) -> dict:
    """This root's own, then what lies in the shared store."""
    keep, environments, check_mode = (
        max(2, module.params["keep"]),
        module.params["environments"],
        module.check_mode,
    )
    removed = prune(store, keep, environments, check_mode)
    if shared is None or not store.current:
        return {"removed": removed, "unseen": []}
    names = {Path(target) for name in kept_releases(store, keep) for target in store.links(name).values()}
    from_store, unseen = shared.prune(names, environments, check_mode)
    return {"removed": removed + from_store, "unseen": unseen}


def leave(module: AnsibleModule, store: Store, shared: Shared) -> dict:
    if store.ids() and not module.check_mode:
        module.fail_json(msg=f"{store.folder} still has releases: a root leaves its store when it has none")
    known = shared.entry.is_symlink()
    removed, unseen = (
        shared.prune(set(), module.params["environments"], module.check_mode) if known else ([], [])
    )
    if known and not module.check_mode:
        shared.entry.unlink()
        with contextlib.suppress(OSError):  # others are in it
            shared.roots.rmdir()
    return {"changed": known, "removed": removed, "unseen": unseen}


def bad_name(wanted: dict) -> str:
    """The first name of a release, file or link that is no plain name; empty where there is none."""
    names = [wanted["id"], wanted["name"], *wanted["shown"]]
    for kind in ("files", "private", "links", "validate"):
        names += wanted[kind]
    return next((repr(name) for name in names if name and not re.fullmatch(PLAIN_NAME, str(name))), "")


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "state": {
                "type": "str",
                "required": True,
                "choices": ["read", "staged", "current", "proven", "refuted", "left"],
            },
            "store": {"type": "path"},
            "id": {"type": "str"},
            "name": {"type": "str"},
            "files": {"type": "dict", "default": {}},
            "private": {"type": "dict", "default": {}, "no_log": True},
            "links": {"type": "dict", "default": {}},
            "validate": {"type": "dict", "default": {}},
            "owner": {"type": "str"},
            "group": {"type": "str"},
            "shown": {"type": "list", "elements": "str", "default": []},
            "keep": {"type": "int", "default": 3},
            "environments": {"type": "str"},
        },
        required_if=[
            ("state", "staged", ("name", "files")),
            ("state", "current", ("id",)),
            ("state", "proven", ("id", "environments")),
            ("state", "refuted", ("id",)),
            ("state", "left", ("store", "environments")),
        ],
        supports_check_mode=True,
    )
    wanted = module.params
    if name := bad_name(wanted):
        module.fail_json(
            msg=f"{name} is no name of a release or of its files: give letters, digits or . _ @ + -"
        )
    store = Store(wanted["root"])
    shared = (
        Shared(wanted["store"], wanted["root"])
        if wanted["store"] and wanted["store"] != wanted["root"]
        else None
    )
    result: dict = {"changed": False}
    if (
        wanted["state"] in ("current", "proven", "refuted")
        and wanted["id"] not in store.ids()
        and not module.check_mode
    ):
        module.fail_json(
            msg=(
                f"there is no release {wanted['id']} on this host; there are:"
                f" {', '.join(store.newest_first()) or 'none'}"
            )
        )
    try:
        if wanted["state"] == "staged":
            entered = shared is not None and shared.enter(module.check_mode)
            result = stage(module, store)
            result["changed"] = result["changed"] or entered
        elif wanted["state"] == "left":
            result = leave(module, store, shared) if shared else result
        elif wanted["state"] == "current":
            result = make_current(module, store)
        elif wanted["state"] in ("proven", "refuted") and wanted["id"] in store.ids():
            result["changed"] = mark(store, wanted["id"], wanted["state"] == "proven", module.check_mode)
            if wanted["state"] == "proven":
                result |= prune_all(module, store, shared)
                result["changed"] = result["changed"] or bool(result["removed"])
    except OSError as error:
        unnamed = error.errno and not error.filename
        module.fail_json(msg=f"{wanted['root']}: {error.strerror}" if unnamed else str(error))
    module.exit_json(**result, **store.report(wanted["id"] or result.get("id") or store.current))


if __name__ == "__main__":
    main()
