"""Whether a model can be fetched to here: `preflight.py SPEC`, the JSON object of fetch_model.py and
{need_bytes}. On stdin a token for the hub as the first line, then a JSON object {own_code, native}: the
source of lowmem/checkpoint/own_code.py and its table.

Says what is wrong in one line on stderr, with status 1. Changes nothing. Standard library only.
"""

import json
import os
import re
import shutil
import sys
import types
import urllib.error
import urllib.request
from pathlib import Path

TIMEOUT_S = 20
LIMIT_BYTES = 64 * 2**20
ASKED_FOR_CODE = ("config.json", "tokenizer_config.json")


class OwnCode:
    """Refuses a checkpoint that needs code of its own."""

    def __init__(self, given: dict) -> None:
        self.module = types.ModuleType("own_code")
        exec(compile(given["own_code"], "own_code.py", "exec"), self.module.__dict__)  # noqa: S102  the role's own
        self.native = given["native"]

    def of_folder(self, folder: Path) -> str | None:
        return next(self.module.refusals_of(folder, self.native), None)

    def of_objects(self, config: dict, tokenizer: dict) -> str | None:
        return next(self.module.refusals(config, tokenizer, self.native), None)


def remote_bytes(source: dict, endpoint: str, token: str, own_code: OwnCode) -> tuple[int, str | None]:
    """Size of the repository at the revision, and what is wrong with it or with asking for it."""

    def ask(path: str) -> dict:
        request = urllib.request.Request(  # noqa: S310  checked below
            f"{endpoint}/{path}", headers={"Authorization": f"Bearer {token}"} if token else {}
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
            value = json.loads(answer.read(LIMIT_BYTES))
        if not isinstance(value, dict):
            raise ValueError(f"{path} is no JSON object")
        return value

    if not endpoint.startswith(("http://", "https://")):
        return 0, f"HF_ENDPOINT {endpoint} is no http(s) address"
    repository, revision = source["repository"], source["revision"]
    try:
        files = ask(f"api/models/{repository}/revision/{revision}?blobs=true").get("siblings", [])
        names = {file.get("rfilename") for file in files}
        found = [ask(f"{repository}/resolve/{revision}/{n}") if n in names else {} for n in ASKED_FOR_CODE]
    except urllib.error.HTTPError as error:
        hint = {
            401: "set model_source_token",
            403: "the token lacks access to it",
            404: "no such repository or revision",
        }
        return (
            0,
            (
                f"{repository} at {revision}: {endpoint} says {error.code};"
                f" {hint.get(error.code, 'try later')}"
            ),
        )
    except (OSError, ValueError, RecursionError) as error:
        return 0, f"{endpoint} cannot be asked for {repository}: {error}"
    refused = own_code.of_objects(*found)
    return sum(file.get("size") or 0 for file in files), refused and f"{repository} at {revision}: {refused}"


def source_trouble(source: dict, need_bytes: int, token: str, own_code: OwnCode) -> tuple[int, str | None]:
    """Bytes that the source will bring, and what is wrong with it."""
    if source["type"] == "local":
        path = Path(source["path"])
        if not path.is_absolute():
            return 0, f"model_source_path {str(path)!r} is not an absolute path"
        if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
            return (
                0,
                f"model_source_path {path}: no checkpoint there (config.json and *.safetensors are needed)",
            )
        refused = own_code.of_folder(path)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return size, refused and f"model_source_path {path}: {refused}"
    if source["type"] == "huggingface":
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", source["repository"]):
            return 0, f"model_source_repository {source['repository']!r} is not of the form owner/name"
        if not re.fullmatch(r"[0-9a-f]{40}", source["revision"]):
            return (
                0,
                (
                    f"model_source_revision {source['revision']!r} is not a commit of 40 hexadecimal digits;"
                    " a branch can move"
                ),
            )
        return remote_bytes(
            source,
            os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/"),
            token,
            own_code,
        )
    if not re.fullmatch(r"[0-9a-f]{64}", source["sha256"]):
        return (
            0,
            f"model_source_package_sha256 {source['sha256']!r} is not a SHA-256 of 64 hexadecimal digits",
        )
    return need_bytes, None


def trouble(spec: dict, token: str, own_code: OwnCode) -> str | None:
    if not re.fullmatch(r"[\w][\w.-]*", spec["name"]):
        return f"model_source_name {spec['name']!r}: use letters, digits, '.', '_' and '-'"
    models = Path(spec["models"])
    try:
        if (
            json.loads((models / f"{spec['name']}.manifest.json").read_text())["recipe_sha256"]
            == spec["recipe_sha256"]
        ):
            return None
    except (OSError, ValueError, KeyError):
        pass
    size, problem = source_trouble(spec["source"], spec["need_bytes"], token, own_code)
    if problem:
        return problem
    folder = next(parent for parent in (models, *models.parents) if parent.exists())
    if not os.access(folder, os.W_OK):
        return f"model_source_root {models.parent}: {folder} is not writable"
    free, need = shutil.disk_usage(folder).free, max(size, spec["need_bytes"])
    if free < need:
        return (
            f"{folder} has {free / 2**30:.1f} GiB free, {spec['name']} needs {need / 2**30:.1f} GiB: "
            f"{(need - free) / 2**30:.1f} GiB are missing"
        )
    return None


first_line = sys.stdin.readline().strip()
if problem := trouble(json.loads(sys.argv[1]), first_line, OwnCode(json.load(sys.stdin))):
    sys.exit(problem)
