"""Whether a model can be fetched to here: `preflight.py SPEC`, the JSON object of fetch_model.py and
{need_bytes, controller_bytes}. On stdin a token for the hub as the first line, then a JSON object
{own_code, native}: the source of lowmem/checkpoint/own_code.py and its table.

Says what is wrong in one line on stderr, with status 1. Otherwise prints a JSON object of what can be known
before a shard is fetched: `config` and `hf_quant_config`, the files of these names, and `commit` of the hub.
Changes nothing. Standard library only.
"""

import json
import os
import re
import shutil
import sys
import types
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

TIMEOUT_S = 20
CONFIGS = ("config.json", "hf_quant_config.json", "tokenizer_config.json")
CONFIG_LIMIT_BYTES = 8 * 2**20


class OwnCode:
    """Refuses a checkpoint that needs code of its own."""

    def __init__(self, given: dict) -> None:
        self.module = types.ModuleType("own_code")
        exec(compile(given["own_code"], "own_code.py", "exec"), self.module.__dict__)  # noqa: S102  the role's own
        self.native = given["native"]

    def of_folder(self, folder: Path) -> str | None:
        return next(self.module.refusals_of(folder, self.native), None)

    def of_objects(self, config: object, tokenizer: object) -> str | None:
        objects = [value if isinstance(value, dict) else {} for value in (config, tokenizer)]
        return next(self.module.refusals(*objects, self.native), None)


def parsed(content: bytes) -> object:
    """The value of a small JSON file; None if it is none."""
    try:
        return json.loads(content) if len(content) <= CONFIG_LIMIT_BYTES else None
    except (ValueError, RecursionError):
        return None


def configs_in(folder: Path) -> dict:
    """The small JSON files of a folder by their names without the ending."""
    found = {}
    for name in CONFIGS:
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                found[Path(name).stem] = parsed(file.read(CONFIG_LIMIT_BYTES + 1))
    return found


def ask(url: str, token: str, limit: int = 64 * 2**20) -> bytes:
    request = urllib.request.Request(  # noqa: S310  of the role's endpoint, which is http(s)
        url, headers={"Authorization": f"Bearer {token}"} if token else {}
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
        return answer.read(limit)


HINTS = {
    401: "set model_source_token",
    403: "the token lacks access to it",
    404: "no such repository or revision",
}


def of_the_hub(source: dict, endpoint: str, token: str, own_code: OwnCode) -> tuple[int, str | None, dict]:
    """Size of the repository at the revision, what is wrong with asking, and what it says of itself."""
    if not endpoint.startswith(("http://", "https://")):
        return 0, f"HF_ENDPOINT {endpoint} is no http(s) address", {}
    repository, revision = source["repository"], source["revision"]
    at = f"/revision/{urllib.parse.quote(revision, safe='')}" if revision else ""
    try:
        info = json.loads(ask(f"{endpoint}/api/models/{repository}{at}?blobs=true", token))
        files = {file["rfilename"]: file.get("size") or 0 for file in info.get("siblings", [])}
        commit = str(info.get("sha") or revision)
        found = {
            Path(name).stem: parsed(
                ask(f"{endpoint}/{repository}/resolve/{commit}/{name}", token, CONFIG_LIMIT_BYTES + 1)
            )
            for name in CONFIGS
            if name in files
        }
    except urllib.error.HTTPError as error:
        said = f"{endpoint} says {error.code}; {HINTS.get(error.code, 'try later')}"
        return 0, f"{repository} at {revision or 'its newest commit'}: {said}", {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return 0, f"{endpoint} cannot be asked for {repository}: {error}", {}
    refused = own_code.of_objects(found.get("config"), found.get("tokenizer_config"))
    said = refused and f"{repository} at {revision or 'its newest commit'}: {refused}"
    return sum(files.values()), said, found | {"commit": commit}


def in_a_folder(source: dict, controller_bytes: int, own_code: OwnCode) -> tuple[int, str | None, dict]:
    """Size of a folder of the host, or else of the controller's, what is wrong with it, and its files."""
    path = Path(source["path"])
    if not path.is_absolute():
        return 0, f"model_source_path {str(path)!r} is not an absolute path", {}
    if (path / "config.json").is_file() and list(path.glob("*.safetensors")):
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        refused = own_code.of_folder(path)
        return size, refused and f"model_source_path {path}: {refused}", configs_in(path)
    if controller_bytes:
        return controller_bytes, None, {}
    return 0, f"model_source_path {path}: no checkpoint there (config.json and *.safetensors are needed)", {}


def look_at_source(spec: dict, token: str, own_code: OwnCode) -> tuple[int, str | None, dict]:
    """Bytes that the source will bring, what is wrong with it, and what it says of the model."""
    source = spec["source"]
    if source["type"] == "local":
        return in_a_folder(source, spec.get("controller_bytes", 0), own_code)
    if source["type"] == "huggingface":
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", source["repository"]):
            return 0, f"model_source_repository {source['repository']!r} is not of the form owner/name", {}
        return of_the_hub(
            source,
            os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/"),
            token,
            own_code,
        )
    if not re.fullmatch(r"[0-9a-f]{64}", source["sha256"]):
        said = f"model_source_package_sha256 {source['sha256']!r} is not a SHA-256 of 64 hexadecimal digits"
        return 0, said, {}
    return spec["need_bytes"], None, {}


def look(spec: dict, token: str, own_code: OwnCode) -> tuple[str | None, dict]:
    """What is wrong, and what the model says of itself."""
    if not re.fullmatch(r"[\w][\w.-]*", spec["name"]):
        return f"model_source_name {spec['name']!r}: use letters, digits, '.', '_' and '-'", {}
    models = Path(spec["models"])
    try:
        if (
            json.loads((models / f"{spec['name']}.manifest.json").read_text())["recipe_sha256"]
            == spec["recipe_sha256"]
        ):
            return None, configs_in(models / spec["name"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    size, problem, found = look_at_source(spec, token, own_code)
    if problem:
        return problem, {}
    folder = next(parent for parent in (models, *models.parents) if parent.exists())
    if not os.access(folder, os.W_OK):
        return f"model_source_root {models.parent}: {folder} is not writable", found
    free, need = shutil.disk_usage(folder).free, max(size, spec["need_bytes"])
    if free < need:
        return (
            f"{folder} has {free / 2**30:.1f} GiB free, {spec['name']} needs {need / 2**30:.1f} GiB: "
            f"{(need - free) / 2**30:.1f} GiB are missing"
        ), found
    return None, found


first_line = sys.stdin.readline().strip()
problem, found = look(json.loads(sys.argv[1]), first_line, OwnCode(json.load(sys.stdin)))
sys.stdout.write(json.dumps(found))
if problem:
    sys.exit(problem)
