"""Keeps a draft model (draft, EAGLE or MTP) on the card while vLLM offloads the target's layers.

vLLM 0.32.0 has one offloader per process. The target's layers pass through it first and the draft's layers
second. The prefetch offloader stops at the second call with an assertion. The UVA offloader would stream the
draft's layers too. With this plugin only the first model of a worker is offloaded.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
from collections.abc import Callable, Iterable
from typing import Any

log = logging.getLogger(__name__)

KNOWN_SOURCES = {
    "PrefetchOffloader": {"2397aa62e9f8e77f8ad0cbd21c14871e71acce38d5f8a1ff3c8545fe3ea0a15d": "0.32.0"},
    "UVAOffloader": {"216e6160f708d42376434d67558838b739f5cad8471292271d6a2342402612af": "0.32.0"},
}
"""Class -> SHA-256 of the source of its `wrap_modules` -> the vLLM release that was read."""


def digest(function: Callable[..., Any]) -> str:
    """Return the SHA-256 of a function's source text, in hexadecimal digits."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()


def keep_later_models(offloader: type) -> None:
    """Make `offloader.wrap_modules` return the layers of a later model as they are.

    A model is told by its prefix: a call that names a prefix seen before, or one inside it, belongs to
    another model. The parts of one model (a vision tower, a decoder) have prefixes of their own.
    """
    original = offloader.wrap_modules  # type: ignore[attr-defined]
    if getattr(original, "keeps_later_models", False):
        return

    @functools.wraps(original)
    def wrap_modules(self: Any, modules_generator: Iterable[Any], prefix: str = "") -> list[Any]:
        seen: set[str] = self.__dict__.setdefault("wrapped_prefixes", set())
        if prefix in seen:
            layers = list(modules_generator)
            log.info("offload_drafts: %d layers of a draft model stay on the card", len(layers))
            return layers
        seen.add(prefix)
        return list(original(self, modules_generator, prefix))

    wrap_modules.keeps_later_models = True  # type: ignore[attr-defined]
    offloader.wrap_modules = wrap_modules  # type: ignore[attr-defined]


def refuse_unknown(offloader: type) -> None:
    """Raise RuntimeError when this release's offloader is not one whose source was read."""
    found = digest(offloader.wrap_modules)  # type: ignore[attr-defined]
    known = KNOWN_SOURCES[offloader.__name__]
    if found not in known:
        raise RuntimeError(
            f"vllm-offload-drafts: {offloader.__module__}.{offloader.__name__}.wrap_modules has source"
            f" {found[:12]}, known are those of vLLM {', '.join(sorted(set(known.values())))}: remove the"
            " plugin, or read the new source and add it to KNOWN_SOURCES"
        )


def register() -> None:
    """Register with vLLM: entry point of `vllm.general_plugins`, called once or more in every vLLM process.

    Raises RuntimeError for a release whose offloaders are not known.
    """
    from vllm.model_executor.offloader.prefetch import PrefetchOffloader
    from vllm.model_executor.offloader.uva import UVAOffloader

    for offloader in (PrefetchOffloader, UVAOffloader):
        if not getattr(offloader.wrap_modules, "keeps_later_models", False):
            refuse_unknown(offloader)
            keep_later_models(offloader)
