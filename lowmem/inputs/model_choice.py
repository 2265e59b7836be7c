"""Tells what an inventory's one variable for the model means: where it comes from, its name, its weights.

A registry name, `owner/name[@revision]` of Hugging Face, or an absolute path. Nothing is read but tables, so
the answer is the same on any controller.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from lowmem.errors import BadInput
from lowmem.files import read_yaml
from lowmem.inputs import model_cards, profiles

MADE_ON_HOSTS = ("awq", "compressed-tensors")
"""Formats that role awq_quantize writes, in four bits."""


@dataclass(frozen=True)
class ModelChoice:
    """Meaning of the name of a model; an inventory may say each part otherwise."""

    name: str  # of its folder on the host, and what clients call it
    quantize: bool  # on the host, as the profile says
    type: str  # of role model_source
    repository: str = ""
    revision: str = ""
    path: str = ""


def choose(model: str, profile: str) -> ModelChoice:
    """Return what a model's name means; an empty one is the model that the profile is written for.

    A name that means nothing gets an answer too: the plan refuses it, in one line.
    """
    recipe = _profile(profile)
    named = model or str(recipe.get("model", ""))
    if named.startswith("/"):
        return ModelChoice(_folder_name(named), quantize=False, type="local", path=named)
    name, revision = model_cards.split_revision(named)
    if entry := model_cards.builtin().get(name.lower()):
        return _of_the_registry(name, revision, entry, _is_made(recipe))
    if model_cards.HUB_ID.fullmatch(name):
        return ModelChoice(
            _plain(name.rsplit("/", 1)[-1]),
            quantize=False,
            type="huggingface",
            repository=name,
            revision=revision,
        )
    return ModelChoice(_plain(named), quantize=False, type="pypi")


@cache
def chosen(model: str, profile: str) -> dict[str, Any]:
    """Return `choose` as a dictionary."""
    return asdict(choose(model, profile))


def _of_the_registry(name: str, revision: str, entry: dict[str, Any], quantize: bool) -> ModelChoice:
    """Return what a name or an id of the table of models means. An id or a revision asks for the hub."""
    repository = entry.get("sources", {}).get(name.lower(), entry["id"])
    return ModelChoice(
        repository.rsplit("/", 1)[-1],
        quantize=quantize,
        type="huggingface" if "/" in name or revision else entry.get("source", "huggingface"),
        repository=repository,
        revision=revision,
    )


@cache
def _profile(name: str) -> dict[str, Any]:
    """Return the fields of a profile; none of one that cannot be read, which the plan refuses."""
    try:
        return dict(read_yaml(profiles.path_of(name)))
    except (BadInput, OSError, TypeError, ValueError):
        return {}


def _is_made(recipe: dict[str, Any]) -> bool:
    """Tell whether role awq_quantize makes the checkpoint that a profile asks for."""
    wanted = recipe.get("quantization")
    return isinstance(wanted, dict) and wanted.get("method") in MADE_ON_HOSTS and wanted.get("bits", 4) == 4


def _folder_name(path: str) -> str:
    """Return the last part of a path; of a snapshot in Hugging Face's cache the model's own name."""
    parts = PurePosixPath(path).parts
    if len(parts) > 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return _plain(parts[-3].rsplit("--", 1)[-1])
    return _plain(parts[-1])


def _plain(text: str) -> str:
    """Return a name of the characters that a folder's name may have."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).lstrip("-._+")[:120] or "model"
