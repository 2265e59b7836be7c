"""Completes the names that options of several commands take."""

from __future__ import annotations

from collections.abc import Iterable

from lowmem.inputs import devices, model_cards, profiles


def _begun(word: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(word.lower())]


def complete_profile(incomplete: str) -> list[str]:
    """List the profiles that begin so."""
    return _begun(incomplete, profiles.names())


def complete_device(incomplete: str) -> list[str]:
    """List the devices that begin so."""
    return _begun(incomplete, ["auto", *devices.names()])


def complete_model(incomplete: str) -> list[str]:
    """List the built-in models that begin so."""
    return _begun(incomplete, model_cards.names())
