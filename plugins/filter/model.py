"""Filters on models: what the inventory's one variable means, and how a checkpoint differs from the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

DOCUMENTATION = r"""
name: chosen_model
short_description: What a model's name means, with its source, its name and whether the host quantizes it
description:
  - A name without a meaning gets an answer too; the plan refuses it.
options:
  _input:
    description: A built-in name, owner/name[@revision] of Hugging Face, or an absolute path; empty is the
      profile's own.
    type: str
    required: true
  profile: {description: Name or path of the profile., type: str, required: true}
"""


def chosen_model(model: Any, profile: Any) -> dict[str, Any]:
    """Return what `lowmem_model` means with this profile. A value of a wrong type is told elsewhere."""
    # a filter is loaded for every play, and the packages of these are needed for few tasks
    from lowmem.inputs.model_choice import chosen

    return chosen(*(value if isinstance(value, str) else "" for value in (model, profile)))


def model_difference(found: Mapping[str, Any], planned: Mapping[str, Any]) -> str:
    """Return how a checkpoint's JSON files differ from the planned figures; empty if they do not."""
    if not (found.get("config") and planned):
        return ""
    from lowmem.inputs.model_figures import difference

    return difference(planned, found)


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"chosen_model": chosen_model, "model_difference": model_difference}
