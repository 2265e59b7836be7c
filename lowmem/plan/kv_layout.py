"""Lays out the KV cache of a model by vLLM's own rules: groups of layers, blocks, and what a request holds.

Source: vLLM 0.32.0, v1/core/kv_cache_utils.py. It is pure: config.json and settings in, bytes out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lowmem.errors import BadInput
from lowmem.plan.kv_layers import ATTENTION_RULES
from lowmem.plan.kv_specs import MOST_LAYERS, KvSettings, LayerCache, is_encoder, language_model
from lowmem.plan.kv_states import STATE_RULES
from lowmem.plan.kv_types import stored_kv_dtype

_RULES = {**ATTENTION_RULES, **STATE_RULES}

_ALL = range(MOST_LAYERS)

# Caches of a group, each with its position among those of the model.
_Group = list[tuple[LayerCache, int]]


@dataclass(frozen=True)
class KvGroup:
    """Caches that share one block table (kv_cache_utils.py, KVCacheGroupSpec).

    A request holds blocks of each group. `layers` are the decoder layers that the caches belong to.
    """

    caches: tuple[LayerCache, ...]
    layers: tuple[int, ...]

    @property
    def kind(self) -> str:
        return self.caches[0].kind

    @property
    def block_tokens(self) -> int:
        return self.caches[0].block_tokens

    def page_bytes(self, layers: range) -> int:
        """Return the bytes of one block over the given decoder layers on one GPU."""
        mine = zip(self.caches, self.layers, strict=True)
        return sum(cache.page_bytes for cache, layer in mine if layer in layers)

    def blocks_of(self, tokens: int, settings: KvSettings) -> int:
        """Count the blocks that a request of `tokens` tokens holds."""
        return max(_blocks_of(cache, tokens, settings) for cache in set(self.caches))


@dataclass(frozen=True)
class KvLayout:
    """KV cache of a model on one GPU. A model without a cache has no groups.

    Bytes are those of all layers, or of one pipeline stage's `layers`; blocks are the same on every stage.
    """

    groups: tuple[KvGroup, ...]
    settings: KvSettings

    def bytes_per_block(self, layers: range = _ALL) -> int:
        """Return the bytes of a block, which belongs to one group at a time, so the largest counts
        (kv_cache_utils.py, _get_kv_cache_bytes_per_block).
        """
        return max((group.page_bytes(layers) for group in self.groups), default=0)

    def bytes_per_request(self, layers: range = _ALL) -> int:
        """Return the bytes that one request of max_model_len holds (_max_memory_usage_bytes_from_groups)."""
        return self.blocks_per_request * self.bytes_per_block(layers)

    def bytes_read(self, tokens: int, layers: range = _ALL) -> int:
        """Return the bytes that one decode step moves for a request of `tokens` tokens.

        A layer reads no further back than its window. A state is read and written again.
        """
        return sum(
            _bytes_read(cache, tokens)
            for group in self.groups
            for cache, layer in zip(group.caches, group.layers, strict=True)
            if layer in layers
        )

    def tokens_met(self, tokens: float, layers: range = _ALL) -> float:
        """Return the tokens that one token attends to among the `tokens` before it, summed over layers.

        A layer with a window meets no more than that, and one with a state none.
        """
        met: dict[int, float] = {}
        for group in self.groups:
            for cache, layer in zip(group.caches, group.layers, strict=True):
                if layer in layers and cache.kind != "mamba":
                    met[layer] = max(met.get(layer, 0.0), min(tokens, cache.window or tokens))
        return sum(met.values())

    def layers_with(self, *kinds: str, layers: range = _ALL) -> int:
        """Count the layers that keep a cache of one of these kinds."""
        return len(
            {
                layer
                for group in self.groups
                for cache, layer in zip(group.caches, group.layers, strict=True)
                if layer in layers and cache.kind in kinds
            }
        )

    def latent_bytes(self, tokens: int, layers: range = _ALL) -> int:
        """Return the bytes of latent vectors that a decode step reads for a request of `tokens` tokens."""
        return sum(
            _bytes_read(cache, tokens)
            for group in self.groups
            for cache, layer in zip(group.caches, group.layers, strict=True)
            if layer in layers and cache.kind in ("mla", "sliding_mla")
        )

    @cached_property
    def blocks_per_request(self) -> int:
        """Count the blocks of one request of max_model_len."""
        return self.blocks_of(self.settings.max_model_len)

    def blocks_of(self, tokens: int) -> int:
        """Count the blocks that a request of `tokens` tokens holds at most."""
        return sum(group.blocks_of(tokens, self.settings) for group in self.groups)

    def tokens_of(self, pool_bytes: int) -> int:
        """Return the tokens of a pool as the engine's log has them (get_kv_cache_capacity)."""
        return self.tokens_of_blocks(max(0, pool_bytes) // self.bytes_per_block()) if self.groups else 0

    def tokens_of_blocks(self, blocks: int) -> int:
        """Return the tokens of so many blocks: the longest requests that they hold, times max_model_len."""
        return blocks * self.settings.max_model_len // self.blocks_per_request if self.groups else 0


def kv_layout(
    config: Mapping[str, Any], settings: KvSettings, hf_quant_config: Mapping[str, Any] | None = None
) -> KvLayout:
    """Lay out the KV cache of a checkpoint.

    `config` is its config.json, and `hf_quant_config` the file of that name beside it. Raises BadInput, one
    line, for a model whose cache is not known, or a config that is damaged.
    """
    fields = language_model(config)
    if is_encoder(config, fields):
        return KvLayout((), settings)
    if settings.kv_dtype == "auto":
        settings = replace(settings, kv_dtype=stored_kv_dtype(config, hf_quant_config))
    layers = _RULES[fields.family.get("rule", "attention")](fields, settings)
    caches = [cache for layer in layers for cache in layer]
    owners = [number for number, layer in enumerate(layers) for _ in layer]
    return KvLayout(
        tuple(
            KvGroup(tuple(cache for cache, _ in group), tuple(owners[position] for _, position in group))
            for group in _groups(caches, bool(fields.family.get("block_outermost")))
        ),
        settings,
    )


def _blocks_of(cache: LayerCache, tokens: int, settings: KvSettings) -> int:
    """Count the blocks that a request holds in one layer.

    Source: v1/kv_cache_interface.py, max_admission_blocks_per_request. A window may begin inside a block, so
    it takes one more. Blocks of tokens in flight are still held.
    """
    if cache.kind == "mamba":
        return cache.states
    held = tokens
    if cache.kind in ("sliding", "sliding_mla"):
        held = min(cache.window - 1 + settings.tokens_in_flight, tokens)
    elif cache.kind == "chunked":
        held = min(cache.window + settings.tokens_in_flight, tokens)
    return -(-held // cache.block_tokens) + (cache.kind in ("sliding", "sliding_mla"))


def _bytes_read(cache: LayerCache, tokens: int) -> int:
    if cache.kind == "mamba":
        return 2 * cache.page_bytes
    return min(tokens, cache.window or tokens) * cache.page_bytes // cache.block_tokens


def _same_type(cache: LayerCache) -> tuple[object, ...]:
    """Return what layers of one type share: they need the same number of blocks
    (kv_cache_interface.py, UniformTypeKVCacheSpecs.is_uniform_type).
    """
    if cache.kind in ("full", "mla"):
        return ("full", cache.block_tokens)
    if cache.kind == "mamba":
        return ("mamba", cache.block_tokens, cache.states, cache.page_bytes)
    return (cache.kind, cache.block_tokens, cache.window)


def _groups(caches: Sequence[LayerCache], block_outermost: bool) -> list[_Group]:
    """Divide caches into groups (kv_cache_utils.py, get_kv_cache_groups)."""
    if not caches:
        return []
    if len({_same_type(cache) for cache in caches}) == 1:
        return [[(cache, n) for n, cache in enumerate(caches)]]
    if block_outermost and len({cache.page_bytes for cache in caches}) > 1:
        return _packed_groups(caches)
    return _groups_of_one_page(_with_one_page(caches))


def _with_one_page(caches: Sequence[LayerCache]) -> list[LayerCache]:
    """Give every layer the largest page (unify_kv_cache_spec_page_size).

    A block gets more tokens if its page divides the largest, and is padded if not. Raises BadInput for a
    latent cache, which cannot be padded.
    """
    largest = max(cache.page_bytes for cache in caches)
    unified = []
    for cache in caches:
        ratio, rest = divmod(largest, cache.page_bytes)
        if cache.kind == "mamba" or rest:
            if cache.kind in ("mla", "sliding_mla"):
                raise BadInput(
                    f"config.json: pages of {cache.page_bytes} bytes of latent attention do not divide the"
                    f" largest page of {largest}; vLLM 0.32.0 does not start with them; check the"
                    " checkpoint's config.json"
                )
            unified.append(replace(cache, page_bytes=largest))
        else:
            unified.append(replace(cache, page_bytes=largest, block_tokens=cache.block_tokens * ratio))
    return unified


def _groups_of_one_page(caches: Sequence[LayerCache]) -> list[_Group]:
    """Divide layers with equal pages into groups of equal size (_get_kv_cache_groups_uniform_page_size).

    The rarest kind of layer gives the size, or the most frequent if it has less than half as many again.
    Layers of a kind are dealt to its groups in turn, so that pipeline stages get some of each.
    """
    kinds: defaultdict[LayerCache, list[int]] = defaultdict(list)
    for layer, cache in enumerate(caches):
        kinds[cache].append(layer)
    fewest, most = min(map(len, kinds.values())), max(map(len, kinds.values()))
    size = most if most < fewest * 1.5 else fewest
    groups = []
    for cache, layers in kinds.items():
        count = -(-len(layers) // size)
        groups += [[(cache, layer) for layer in layers[i::count]] for i in range(count)]
    return groups


@dataclass(frozen=True)
class _Bucket:
    """Caches of one type, by page size: positions among those of the model."""

    kind: str
    pages: Mapping[int, Sequence[int]]

    @property
    def size(self) -> int:
        return sum(map(len, self.pages.values()))

    @property
    def repeats(self) -> int:
        """Count how often the pattern repeats that has one cache of each page size."""
        return max(map(len, self.pages.values()))

    @property
    def balanced(self) -> bool:
        """Say whether there are as many caches of each page size, so that they are such a pattern."""
        return len(set(map(len, self.pages.values()))) == 1

    def widest(self, groups: int) -> int:
        """Return the bytes of a block of the largest of so many groups."""
        return sum(-(-len(caches) // groups) * page for page, caches in self.pages.items())


def _packed_groups(caches: Sequence[LayerCache]) -> list[_Group]:
    """Pack caches of several page sizes side by side into blocks (_get_packed_kv_cache_groups).

    A balanced bucket is split so that groups have about as many repeats as the largest pattern of several
    page sizes, which stays whole. Without such a pattern, windows are split to fit the block of the others.
    """
    found: defaultdict[tuple[object, ...], defaultdict[int, list[int]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for position, cache in enumerate(caches):
        found[_same_type(cache)][cache.page_bytes].append(position)
    buckets = [_Bucket(str(kind[0]), pages) for kind, pages in found.items()]
    whole = [b.repeats for b in buckets if b.balanced and len(b.pages) > 1]
    repeats = _least_padding([b.repeats for b in buckets if b.balanced], max(whole)) if whole else None

    def parts(bucket: _Bucket) -> int:
        return -(-bucket.repeats // repeats) if repeats and bucket.balanced else 1

    def shrinks(bucket: _Bucket) -> bool:
        return repeats is None and bucket.kind.startswith("sliding")

    block = max(b.widest(b.size if shrinks(b) else parts(b)) for b in buckets)
    groups: list[_Group] = []
    for bucket in buckets:
        count = parts(bucket)
        if shrinks(bucket):
            count = max(count, -(-bucket.size // max(block // next(iter(bucket.pages)), 1)))
        if count == 1:
            groups.append([(caches[n], n) for n in sorted(n for of in bucket.pages.values() for n in of)])
            continue
        pattern = list(zip(*bucket.pages.values(), strict=True))
        groups += [[(caches[n], n) for repeat in pattern[i::count] for n in repeat] for i in range(count)]
    return groups


def _least_padding(counts: Sequence[int], least: int) -> int:
    """Return the size that rounds `counts` up the least, the largest of several (_approximate_gcd)."""
    return min(range(least, max(least, *counts) + 1), key=lambda d: (sum(-n % d for n in counts), -d))


def group_rows(layout: KvLayout, layers: range = _ALL) -> list[dict[str, int | str]]:
    """Describe the groups for the plan; equal groups are one row with their number."""
    rows = Counter(
        (
            group.kind,
            sum(layer in layers for layer in group.layers),
            group.block_tokens,
            group.page_bytes(layers),
            group.blocks_of(layout.settings.max_model_len, layout.settings),
        )
        for group in layout.groups
    )
    names = ("kind", "layers", "block_tokens", "page_bytes", "blocks_per_request")
    return [{**dict(zip(names, row, strict=True)), "groups": count} for row, count in rows.items()]
