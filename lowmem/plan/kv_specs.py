"""Describes the cache of one layer, and reads the fields of config.json that decide it.

Source: vLLM 0.32.0, v1/kv_cache_interface.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lowmem.data import load_yaml
from lowmem.errors import BadInput

# What a layer keeps: every token, a latent vector of every token, the tokens of a window or of a chunk, or
# one state a request.
Kind = Literal["full", "mla", "sliding", "sliding_mla", "chunked", "mamba"]

MOST_LAYERS = 4096
_MOST = 10**9

# Depth to which a language model is looked for inside the configs of other models.
_NESTED = 4
_TEXT_KEYS = ("text_config", "llm_config", "language_config", "thinker_config")


@dataclass(frozen=True)
class LayerCache:
    """Cache of one layer, as KVCacheSpec has it."""

    kind: Kind
    block_tokens: int
    page_bytes: int  # one block of this layer on one GPU, padding included
    window: int = 0  # tokens of the window or chunk
    states: int = 0  # blocks of a request whose layer keeps a state
    shape: tuple[int | str, ...] = ()  # what else keeps two specs from being one: heads, head sizes, role


# The caches of each decoder layer, in order. A layer may have none, or several.
Layers = Sequence[tuple[LayerCache, ...]]


@dataclass(frozen=True)
class KvHeads:
    """KV heads of a layer of the whole model, and the numbers of a key and of a value in one of them."""

    count: int
    key: int
    value: int = 0  # 0: as many as of a key


@dataclass(frozen=True)
class KvSettings:
    """Settings of the engine that decide the layout of its KV cache."""

    max_model_len: int
    max_num_batched_tokens: int
    tp: int = 1
    dtype_bytes: int = 2  # of activations
    kv_dtype: str = "auto"
    block_tokens: int | None = None  # --block-size; None: what the attention back end asks for
    batches_in_flight: int = 2  # steps that run at once: one more than the stages with async scheduling
    prefix_caching: bool = True

    @property
    def tokens_in_flight(self) -> int:
        """Count the tokens that are scheduled and not yet settled (config/vllm.py, max_in_flight_tokens)."""
        return self.batches_in_flight * self.max_num_batched_tokens


class Fields:
    """Fields of a language model's config, with the defaults of its config class."""

    def __init__(self, values: Mapping[str, Any], family: Mapping[str, Any], model_type: str) -> None:
        self.values, self.family, self.model_type = values, family, model_type

    def get(self, name: str) -> Any:
        """Return a field under any of its names, or its default.

        Raises no error: None says that neither config.json nor the class has it.
        """
        if name in self.family.get("drops", ()):
            return None
        for key in (name, *self.family.get("names", {}).get(name, ())):
            if self.values.get(key) is not None:
                return self.values[key]
        # A null in config.json stays one: the class fills in only what is left out.
        return None if name in self.values else self.family.get("defaults", {}).get(name)

    def whole(self, name: str, default: int | None = None, least: int = 1) -> int:
        """Return a whole number. Raises BadInput for anything else, or for a number out of bounds."""
        value = self.get(name)
        return checked(name, default if value is None else value, least)

    def words(self, name: str) -> list[Any] | None:
        """Return a list that has one entry for each layer; None if the config has none.

        Raises BadInput for a list that is shorter than the layers, or no list.
        """
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) < self.layers:
            raise BadInput(
                f"config.json: {name} is not a list with one entry for each of the {self.layers} layers;"
                " download the checkpoint's config.json again"
            )
        return list(value[: self.layers])

    @property
    def layers(self) -> int:
        """Count the layers. Raises BadInput if the number is not in the config or is out of bounds."""
        return checked("num_hidden_layers", self.get("num_hidden_layers"), 1, MOST_LAYERS)

    @property
    def heads(self) -> int:
        """Count the query heads."""
        return self.whole("num_attention_heads")

    @property
    def kv_heads(self) -> int:
        """Count the KV heads of the whole model (transformers_utils/model_arch_config_convertor.py,
        get_total_num_kv_heads).
        """
        for name in ("n_head_kv", "num_kv_heads", "num_key_value_heads"):
            if self.get(name) is not None:
                return self.whole(name)
        return self.heads

    @property
    def head_dim(self) -> int:
        """Return the size of a head (model_arch_config_convertor.py, get_head_size)."""
        if isinstance(self.get("head_dim"), int) and self.get("head_dim") > 0:
            return self.whole("head_dim")
        return max(1, self.whole("hidden_size") // self.heads)

    @property
    def kv(self) -> KvHeads:
        """Return the KV heads of a layer that is like all others."""
        return KvHeads(self.kv_heads, self.head_dim)

    @property
    def window(self) -> int:
        """Return the tokens of the sliding window; 0: there is none, as vLLM reads null and 0."""
        return 0 if self.get("sliding_window") is None else self.whole("sliding_window", least=0)


def checked(name: str, value: Any, least: int = 1, most: int = _MOST) -> int:
    """Return a whole number of config.json. Raises BadInput for anything else, or a number out of bounds."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        shown = repr(value) if not isinstance(value, int) or abs(value) < 10**20 else "a very long number"
        raise BadInput(
            f"config.json: {name} is {shown[:60]}; it must be a whole number from {least} to {most}; check"
            " the checkpoint's config.json"
        )
    return value


def language_model(config: Mapping[str, Any]) -> Fields:
    """Find the language model in a config.json, and the family that its type belongs to.

    Raises BadInput for a type whose layout is not known.
    """
    families = load_yaml("kv_families.yml")
    outer, values = config.get("model_type"), config
    for _ in range(_NESTED):
        inner = next((values[k] for k in _TEXT_KEYS if isinstance(values.get(k), Mapping)), None)
        if inner is None:
            break
        values = inner
    own = values.get("model_type")
    for name in (own, f"{outer}_text", outer) if own is None else (own,):
        known = families["aliases"].get(name, name) if isinstance(name, str) else None
        if known is not None and known in families["types"]:
            return Fields(values, families["types"][known], known)
    shown = repr(own or outer)[:60]
    raise BadInput(
        f"config.json: the KV cache of model_type {shown} is not known for vLLM 0.32.0; plan a model of a"
        " known type, or add its rule to lowmem/data/kv_families.yml"
    )


def is_encoder(config: Mapping[str, Any], fields: Fields) -> bool:
    """Say whether the model attends in both directions, so that no layer keeps anything between steps."""
    architectures = config.get("architectures")
    names = [a for a in architectures if isinstance(a, str)] if isinstance(architectures, list) else []
    return (
        fields.family.get("rule") == "none"
        or config.get("is_causal") is False
        or fields.values.get("is_causal") is False
        or any(name in load_yaml("kv_families.yml")["encoders"] for name in names)
        or ("Gemma3TextModel" in names and bool(fields.get("use_bidirectional_attention")))
        or ("JinaEmbeddingsV5Model" in names and config.get("is_decoder") is False)
    )
