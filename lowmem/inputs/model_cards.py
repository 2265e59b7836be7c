"""Turns config.json, and the safetensors headers if there are any, into a list of tensors with exact sizes.

A card is never a guess from a parameter count. The tensors of each known model type are listed as the
engine's loader names them, in its order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lowmem.checkpoint import own_code
from lowmem.checkpoint.architectures import Module, dimensions
from lowmem.checkpoint.headers import checkpoint_headers, read_config, tensor_bytes
from lowmem.checkpoint.inventory import Inventory, inventory_of, known_architecture
from lowmem.checkpoint.patterns import matches
from lowmem.checkpoint.storage import Scheme
from lowmem.data import load_yaml
from lowmem.errors import BadInput, EngineRefuses
from lowmem.schema import ModelCard, Published, Quantization, WeightGroup
from lowmem.text import did_you_mean

MODEL_TYPES = ("llama", "mistral", "mixtral", "qwen2", "qwen3")

BITS = (2, 3, 4, 8)

HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w-][\w.-]*")
"""Matches a repository of Hugging Face."""

_REVISION = re.compile(r"[A-Za-z0-9][\w./-]*")

DTYPE_BYTES = {"float16": 2, "half": 2, "bfloat16": 2, "float32": 4, "float": 4}


def _positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10**9:
        raise BadInput(
            f"config.json: {key} is {value!r}; it must be a whole number from 1 to 10**9; check the"
            " checkpoint's config.json"
        )
    return value


def quantization_of(config: Mapping[str, Any]) -> Quantization:
    """Read the `quantization_config` of a config.json.

    Raises BadInput for a method or a width that cannot be planned.
    """
    q = config.get("quantization_config")
    if not q:
        return Quantization()
    if not isinstance(q, Mapping):
        raise BadInput(
            "config.json: quantization_config is not an object; download the checkpoint's config.json again"
        )
    method = str(q.get("quant_method", "")).lower().replace("_", "-")
    if method == "compressed-tensors":
        listed = q.get("config_groups")
        groups = list(listed.values()) if isinstance(listed, Mapping) else []
        weights = groups[0].get("weights") if groups and isinstance(groups[0], Mapping) else None
        if not isinstance(weights, Mapping):
            raise BadInput(
                "config.json: quantization_config has no config_groups with weights; only weight-quantized"
                " checkpoints can be planned"
            )
        ignored = _names(q, "ignore")
        if weights.get("type") == "float" and weights.get("num_bits") == 8:
            return Quantization(method="fp8", bits=8, group_size=-1, zero_point=False, ignored=ignored)
        bits, group, zero = (
            weights.get("num_bits", 4),
            weights.get("group_size") or -1,
            not weights.get("symmetric", True),
        )
    elif method == "awq":
        bits, group, zero = (
            q.get("bits", q.get("w_bit", 4)),
            q.get("group_size", q.get("q_group_size", 128)),
            bool(q.get("zero_point", True)),
        )
        ignored = _names(q, "modules_to_not_convert")
    elif method in ("gptq", "auto-round", "intel/auto-round", "auto-gptq"):
        method = "gptq" if "gptq" in method else "auto-round"
        bits, group, zero = q.get("bits", 4), q.get("group_size", 128), not q.get("sym", True)
        ignored = _names(q, "modules_in_block_to_quantize_ignored")
    elif method == "fp8":
        return Quantization(
            method="fp8",
            bits=8,
            group_size=-1,
            zero_point=False,
            ignored=_names(q, "modules_to_not_convert"),
        )
    else:
        raise BadInput(
            f"config.json: quantization method {method!r} is not one of none, awq, compressed-tensors, gptq,"
            " auto-round, fp8"
        )
    if bits not in BITS:
        raise BadInput(
            f"config.json: quantization bits is {bits!r}; it must be one of {', '.join(map(str, BITS))}"
        )
    if not isinstance(group, int) or not (group == -1 or 1 <= group <= 65536):
        raise BadInput(f"config.json: quantization group_size is {group!r}; it must be -1 or from 1 to 65536")
    return Quantization(method=method, bits=bits, group_size=group, zero_point=zero, ignored=ignored)


def _names(q: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """Return the names of a list of a recipe; what is no list names none."""
    listed = q.get(key)
    return tuple(str(name) for name in listed) if isinstance(listed, list) else ()


def _ignored(name: str, patterns: Iterable[str]) -> bool:
    full = f"model.layers.0.{name}"
    for p in patterns:
        if p.startswith("re:"):
            if matches(p[3:], full, anywhere=True):
                return True
        elif p == name or p in full:
            return True
    return False


def _groups(c: Mapping[str, Any], q: Quantization) -> tuple[WeightGroup, ...]:
    hidden, inter, layers = (
        _positive(c, "hidden_size"),
        _positive(c, "intermediate_size"),
        _positive(c, "num_hidden_layers"),
    )
    heads = _positive(c, "num_attention_heads")
    kv_heads = _positive(c, "num_key_value_heads", heads)
    head_dim = _positive(c, "head_dim", hidden // heads)
    vocab = _positive(c, "vocab_size")
    kind = c["model_type"]
    experts = _positive(c, "num_local_experts", 8) if kind == "mixtral" else 0
    found: list[WeightGroup] = []

    def add(
        name: str, kind: str, out: int, inp: int, split: str, times: int = 1, layered: bool = True
    ) -> None:
        quantized = kind == "linear" and q.method != "none" and not _ignored(name, q.ignored)
        n = times * (layers if layered else 1)
        found.append(
            WeightGroup(
                name=name, kind=kind, count=n, out_features=out, in_features=inp, split=split,
                quantized=quantized, layered=layered
            )
        )  # fmt: skip

    add("embed_tokens", "embedding", vocab, hidden, "vocab", layered=False)
    qkv_bias = kind == "qwen2" or bool(c.get("attention_bias"))
    for name, out, split in (
        ("q_proj", heads, "column"),
        ("k_proj", kv_heads, "kv"),
        ("v_proj", kv_heads, "kv"),
    ):
        add(f"self_attn.{name}", "linear", out * head_dim, hidden, split)
        if qkv_bias:
            add(f"self_attn.{name}.bias", "bias", out * head_dim, 1, split)
    if kind == "qwen3":
        add("self_attn.q_norm", "norm", head_dim, 1, "none")
        add("self_attn.k_norm", "norm", head_dim, 1, "none")
    add("self_attn.o_proj", "linear", hidden, heads * head_dim, "row")
    if kind == "llama" and c.get("attention_bias"):
        add("self_attn.o_proj.bias", "bias", hidden, 1, "none")
    if experts:
        add("block_sparse_moe.gate", "router", experts, hidden, "none")
        for name, out, inp, split in (
            ("w1", inter, hidden, "column"),
            ("w3", inter, hidden, "column"),
            ("w2", hidden, inter, "row"),
        ):
            add(f"block_sparse_moe.experts.{name}", "linear", out, inp, split, times=experts)
    else:
        for name, out, inp, split in (
            ("gate_proj", inter, hidden, "column"),
            ("up_proj", inter, hidden, "column"),
            ("down_proj", hidden, inter, "row"),
        ):
            add(f"mlp.{name}", "linear", out, inp, split)
            if c.get("mlp_bias"):
                add(f"mlp.{name}.bias", "bias", out, 1, split if split == "column" else "none")
    add("input_layernorm", "norm", hidden, 1, "none")
    add("post_attention_layernorm", "norm", hidden, 1, "none")
    add("norm", "norm", hidden, 1, "none", layered=False)
    if not c.get("tie_word_embeddings", False):
        add("lm_head", "lm_head", vocab, hidden, "vocab", layered=False)
    return tuple(found)


def _refused_card(published: Published, name: str, source: str, refusal: BadInput) -> ModelCard:
    """Return a card whose plan says why the engine refuses it.

    Raises what the engine says of a recipe that no card can hold.
    """
    try:
        return _named_card(published, name, source)
    except BadInput:
        if isinstance(refusal, EngineRefuses):
            raise refusal from None
        raise


def card_from_config(
    config: Mapping[str, Any],
    name: str,
    source: str,
    header: Mapping[str, Any] | None = None,
    hf_quant_config: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
) -> ModelCard:
    """Make a card from the fields of config.json and, if they lie beside it, hf_quant_config.json and
    tokenizer_config.json.

    `header` holds {dtype, shape} of the safetensors headers by tensor name. Raises BadInput for anything
    unknown.
    """
    published = Published(config, hf_quant_config, header)
    for line in own_code.refusals(config, tokenizer or {}, own_code.table()):
        raise BadInput(f"{source}: {line}")
    kind = config.get("model_type")
    named = config.get("architectures")
    plain = not named or (isinstance(named, list) and named[0] == _CLASSES.get(str(kind)))
    try:
        inventory = inventory_of(config, 1, "auto", hf_quant_config, header)
    except BadInput as refusal:
        if kind not in MODEL_TYPES or not plain:
            raise
        return _refused_card(published, name, source, refusal)
    published.inventories[1, inventory.dtype, ""] = inventory
    if kind not in MODEL_TYPES or not plain:
        return _counted_card(published, inventory, name, source)
    if _is_uniform(inventory) and _is_named_recipe(config):
        card = _named_card(published, name, source)
        if _agrees(card, inventory):
            return card
    return _counted_card(published, inventory, name, source)


def _is_named_recipe(config: Mapping[str, Any]) -> bool:
    """Tell whether the groups can say the recipe; one without a method the engine leaves aside."""
    try:
        quantization_of(config)
    except BadInput:
        return False
    return True


def _is_uniform(inventory: Inventory) -> bool:
    """Tell whether every layer stores its weights alike and in one format that `_groups` can say."""
    formats = {s for found in inventory.schemes.values() for s in found if s is not None}
    alike = all(len(found) == 1 for found in inventory.schemes.values())
    head = inventory.schemes.get("lm_head", frozenset({None}))
    simple = all(s.layout in ("gptq", "awq", "packed") or (s.layout == "fp8" and s.strategy == "tensor")
                 for s in formats)  # fmt: skip
    known = inventory.method.split()[0] in ("none", "awq", "gptq", "auto-round", "compressed-tensors", "fp8")
    return alike and len(formats) <= 1 and simple and known and head == frozenset({None})


_ENGINE_NAMES = {
    "self_attn.q_proj": "self_attn.qkv_proj", "self_attn.k_proj": "self_attn.qkv_proj",
    "self_attn.v_proj": "self_attn.qkv_proj", "mlp.gate_proj": "mlp.gate_up_proj",
    "mlp.up_proj": "mlp.gate_up_proj", "block_sparse_moe.experts.w1": "block_sparse_moe.experts",
    "block_sparse_moe.experts.w2": "block_sparse_moe.experts",
    "block_sparse_moe.experts.w3": "block_sparse_moe.experts",
}  # fmt: skip


def _agrees(card: ModelCard, inventory: Inventory) -> bool:
    """Tell whether the groups of a card are quantized where the engine's modules are."""
    stored = {name.split(".*.", 1)[-1]: None not in found for name, found in inventory.schemes.items()}
    return all(
        stored.get(_ENGINE_NAMES.get(g.name, g.name), False) == g.quantized
        for g in card.groups
        if g.kind == "linear"
    )


_CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM",
            "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}  # fmt: skip


def _counted_card(published: Published, inventory: Inventory, name: str, source: str) -> ModelCard:
    """Make the card of any architecture of the table; its groups are the table's modules on one GPU."""
    config, header = published.config, published.headers
    architecture = known_architecture(config, header)
    size = dimensions(architecture, config)
    found: dict[tuple[Any, ...], WeightGroup] = {}
    for module in inventory.modules:
        for group in _groups_of(module, inventory):
            key = (group.name, group.out_features, group.in_features)
            count = group.count + (found[key].count if key in found else 0)
            found[key] = group.model_copy(update={"count": count})
    most = max(inventory.experts, key=lambda e: e.bytes, default=None)
    return ModelCard(
        name=name,
        source=source,
        model_type=str(config.get("model_type") or architecture.name),
        layers=size["layers"],
        hidden_size=size["hidden"],
        intermediate_size=size["inner"],
        heads=size["heads"],
        kv_heads=size["kv_heads"],
        head_dim=size["head"],
        vocab_size=size["vocab"],
        max_position_embeddings=size["positions"],
        experts=most.count if most else 0,
        experts_per_token=most.per_token if most else 0,
        tied=not any(g.kind == "lm_head" for g in found.values()),
        dtype=inventory.dtype,
        quantization=_quantization_said(inventory),
        groups=tuple(found.values()),
        header_bytes=sum(tensor_bytes(t, n) for n, t in header.items()) if header else None,
        config=_as_read(published),
        published=published,
        counted=True,
    )


def _as_read(published: Published) -> dict[str, Any]:
    """Return config.json as the engine reads it: with the quantization of the file beside it, if any."""
    config: dict[str, Any] = dict(published.config)
    beside = published.hf_quant_config
    return config if beside is None else {"quantization_config": dict(beside), **config}


_KINDS = {"embedding": "embedding", "lm_head": "lm_head", "norm": "norm", "tensor": "norm"}

_SPLITS = {"column": "column", "row": "row", "embedding": "vocab", "lm_head": "vocab"}


def _groups_of(module: Module, inventory: Inventory) -> Iterable[WeightGroup]:
    """Say a module as weight groups. A card of such groups takes its bytes from the inventory."""
    name = re.sub(r"\.\d+\.", ".*.", module.name)
    quantized = any(scheme is not None for scheme in inventory.schemes.get(name, ()))
    short, layered = name.split(".*.", 1)[-1], module.layer >= 0
    if module.kind == "experts":
        for part, out, inp, split in (("w13", sum(module.out), module.inp, "column"),
                                      ("w2", module.inp, module.out[0], "row")):  # fmt: skip
            yield WeightGroup(name=f"{short.removesuffix('.experts')}.experts.{part}", kind="linear",
                              count=module.experts, out_features=out, in_features=inp, split=split,
                              quantized=quantized, layered=layered)  # fmt: skip
    elif module.kind in ("norm", "tensor"):
        size = 1
        for n in module.shape:
            size *= n
        yield WeightGroup(name=short, kind="norm", count=1, out_features=max(1, size), in_features=1,
                          split="none", layered=layered)  # fmt: skip
    elif module.out:
        kind = _KINDS.get(module.kind, "router" if module.use == "router" else "linear")
        kind = "vision" if module.use == "vision" else kind
        yield WeightGroup(name=short, kind=kind, count=1, out_features=sum(module.out),
                          in_features=module.inp, split=_SPLITS.get(module.kind, "none"),
                          quantized=quantized, layered=layered)  # fmt: skip


def _quantization_said(inventory: Inventory) -> Quantization:
    """Say the format of most linear modules; the bytes are the inventory's, module by module."""
    formats: dict[Scheme, int] = {}
    for found in inventory.schemes.values():
        for scheme in found:
            if scheme is not None:
                formats[scheme] = formats.get(scheme, 0) + 1
    if not formats:
        return Quantization()
    most = max(formats, key=lambda scheme: formats[scheme])
    return Quantization(method=inventory.method.split()[0], bits=most.bits, group_size=most.group,
                        zero_point=most.zeros)  # fmt: skip


def _named_card(published: Published, name: str, source: str) -> ModelCard:
    """Make the card of one of MODEL_TYPES whose layers are all stored alike."""
    config, header = published.config, published.headers
    kind = config["model_type"]
    quantization = quantization_of(config)
    groups = _groups(config, quantization)
    heads, hidden = _positive(config, "num_attention_heads"), _positive(config, "hidden_size")
    kv_heads = _positive(config, "num_key_value_heads", heads)
    if "head_dim" not in config and hidden % heads:
        raise BadInput(
            f"{source}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}; the"
            " config.json is damaged"
        )
    if heads % kv_heads:
        raise BadInput(
            f"{source}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}; the"
            " config.json is damaged"
        )
    dtype = str(config.get("torch_dtype") or config.get("dtype") or "float16")
    if dtype not in DTYPE_BYTES:
        raise BadInput(f"{source}: torch_dtype {dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
    header_bytes = None
    if header:
        groups = _refined(groups, header, config)
        header_bytes = sum(tensor_bytes(t, n) for n, t in header.items())
    return ModelCard(
        name=name,
        source=source,
        model_type=kind,
        layers=_positive(config, "num_hidden_layers"),
        hidden_size=hidden,
        intermediate_size=_positive(config, "intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_positive(config, "head_dim", hidden // heads),
        vocab_size=_positive(config, "vocab_size"),
        max_position_embeddings=_positive(config, "max_position_embeddings", 2048),
        experts=_positive(config, "num_local_experts", 8) if kind == "mixtral" else 0,
        experts_per_token=_positive(config, "num_experts_per_tok", 2) if kind == "mixtral" else 0,
        tied=bool(config.get("tie_word_embeddings", False)),
        dtype=dtype,
        quantization=quantization,
        groups=groups,
        config=dict(config),
        header_bytes=header_bytes,
        published=published,
    )


def _refined(
    groups: tuple[WeightGroup, ...], header: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[WeightGroup, ...]:
    """Correct the groups by the headers: which linear layers are quantized, and whether lm_head exists.

    A recipe may leave more than it says.
    """
    packed = (".qweight", ".weight_packed")
    out = []
    for g in groups:
        if g.kind != "linear":
            if g.kind == "lm_head" and not any(n.startswith("lm_head.") for n in header):
                raise BadInput(
                    "safetensors headers: no lm_head though config.json says tie_word_embeddings false; the"
                    " checkpoint is incomplete"
                )
            out.append(g)
            continue
        stem = g.name.rsplit(".", 1)
        mine = [n for n in header if f".{stem[0]}." in n and f".{stem[-1]}." in n]
        if not mine:
            raise BadInput(
                f"safetensors headers: no tensor of {g.name} though config.json has"
                f" {config['num_hidden_layers']} layers; the checkpoint is incomplete"
            )
        out.append(g.model_copy(update={"quantized": any(n.endswith(packed) for n in mine)}))
    return tuple(out)


def quantized(card: ModelCard, quantization: Quantization) -> ModelCard:
    """Return the card of the checkpoint that a quantization makes of an unquantized one.

    lm_head, embeddings and norms stay at 16 bits.
    """
    if card.quantization.method != "none" or quantization.method == "none":
        return card
    for g in card.groups:
        if g.kind == "linear" and quantization.group_size > 0 and g.in_features % quantization.group_size:
            raise BadInput(
                f"quantization group_size {quantization.group_size} does not divide the {g.in_features}"
                f" inputs of {g.name} in {card.name}; use 32 or 64"
            )
    groups = tuple(
        g.model_copy(update={"quantized": g.kind == "linear" and not _ignored(g.name, quantization.ignored)})
        for g in card.groups
    )
    published = card.published and Published({**card.published.config, **_recipe(quantization)})
    return card.model_copy(
        update={
            "quantization": quantization,
            "groups": groups,
            "header_bytes": None,
            "published": published,
            "made": True,
        }
    )


def served_files(card: ModelCard) -> dict[str, dict[str, Any]]:
    """Return the JSON files of the checkpoint that is served, by name, with a recipe that is still to come.

    They are what the engine decides by. A card without its config.json gives none.
    """
    published = card.published
    if published is None:
        return {}
    named = {"architectures": [known_architecture(published.config, published.headers).name]}
    files = {"config.json": {**named, **published.config}}
    if published.hf_quant_config is not None:
        files["hf_quant_config.json"] = dict(published.hf_quant_config)
    return files


def _recipe(q: Quantization) -> dict[str, Any]:
    """Write the quantization_config that a checkpoint to be made will have."""
    ignored = [*q.ignored]
    if q.method == "compressed-tensors":
        strategy = "channel" if q.group_size == -1 else "group"
        weights = {"type": "int", "num_bits": q.bits, "symmetric": not q.zero_point,
                   "group_size": q.group_size, "strategy": strategy}  # fmt: skip
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        recipe = {"quant_method": q.method, "format": "pack-quantized", "config_groups": groups,
                  "ignore": ["lm_head", *ignored]}  # fmt: skip
        return {"quantization_config": recipe}
    if q.method == "fp8":
        return {"quantization_config": {"quant_method": "fp8", "modules_to_not_convert": ignored}}
    return {
        "quantization_config": {
            "quant_method": q.method,
            "bits": q.bits,
            "group_size": q.group_size,
            "sym": q.method != "gptq" or not q.zero_point,
            "zero_point": q.zero_point,
            "modules_to_not_convert": ignored,
        }
    }


@cache
def builtin() -> dict[str, dict[str, Any]]:
    """Return the entries of data/models.yml by name, alias, and Hugging Face id with or without its owner."""
    table: dict[str, dict[str, Any]] = {}
    for name, entry in load_yaml("models.yml").items():
        for key in (name, *entry.get("aliases", ())):
            table[key] = {"name": name, **entry}
        for key in (entry["id"].lower(), entry["id"].lower().rsplit("/", 1)[-1]):
            table.setdefault(key, {"name": name, **entry})
    return table


def names() -> list[str]:
    """List the built-in cards, without aliases."""
    return list(load_yaml("models.yml"))


def published_formats(model: str) -> tuple[str, ...]:
    """List the built-in cards of quantized checkpoints that were published of a built-in model."""
    entry = builtin().get(model.lower())
    if entry is None:
        return ()
    return tuple(
        name for name, other in load_yaml("models.yml").items() if other.get("base") == entry["name"]
    )


def card_from_directory(folder: Path) -> ModelCard:
    """Make the card of a checkpoint directory.

    config.json is enough; the headers of `*.safetensors` refine it. No weight is read.
    """
    config = read_config(folder / "config.json")
    header = checkpoint_headers(folder)
    beside = folder / "hf_quant_config.json"
    hf_quant_config = read_config(beside) if beside.exists() else None
    listed = folder / "tokenizer_config.json"
    tokenizer = read_config(listed) if listed.exists() else None
    name = folder.resolve().name
    return card_from_config(config, name, str(folder), header or None, hf_quant_config, tokenizer)


def card_from_hub(repo: str, revision: str | None = None) -> ModelCard:
    """Make the card of a Hugging Face id from its config.json and safetensors headers.

    `revision` is a commit, a tag or a branch; None is the hub's default. Raises BadInput if the hub cannot be
    reached or has no such model.
    """
    try:
        import logging
        import socket
        from urllib.parse import urlsplit

        from huggingface_hub import HfApi, constants, hf_hub_download

        logging.getLogger("huggingface_hub").setLevel(
            logging.CRITICAL
        )  # its retries would be more lines on stderr than the one we print
        place = urlsplit(constants.ENDPOINT)
        try:
            socket.getaddrinfo(place.hostname, place.port or 443)
            offline = False
        except OSError:
            offline = True  # the local cache may still have it, without seconds of retries
        path = hf_hub_download(repo, "config.json", revision=revision, local_files_only=offline)
        config = read_config(Path(path))
        recipe = "hf_quant_config.json"
        beside = None if config.get("quantization_config") else _beside(repo, revision, recipe, offline)
        tokenizer = _beside(repo, revision, "tokenizer_config.json", offline)
        try:
            if offline:
                raise OSError("offline")
            meta = HfApi().get_safetensors_metadata(repo, revision=revision)
            header = {
                n: {"dtype": t.dtype, "shape": t.shape}
                for f in meta.files_metadata.values()
                for n, t in f.tensors.items()
            }
        except (
            Exception
        ):  # config.json alone is enough: a repository without safetensors, or a cached config while offline
            header = {}
    except BadInput:
        raise
    except ImportError:
        raise BadInput(
            f"model {repo!r} looks like a Hugging Face id, and huggingface_hub is not installed; use a"
            " built-in name or a directory"
        ) from None
    except Exception as e:
        raise BadInput(
            f"model {repo!r} is no built-in card or directory, and Hugging Face gave no config.json for it"
            f" ({type(e).__name__}); built-in: {', '.join(names())}{did_you_mean(repo, builtin())}"
        ) from None
    return card_from_config(config, repo.rsplit("/", 1)[-1], repo, header or None, beside, tokenizer)


def _beside(repo: str, revision: str | None, name: str, offline: bool) -> dict[str, Any] | None:
    """Return a JSON file of a Hugging Face id, such as the hf_quant_config.json in which older ModelOpt keeps
    its recipe; None if there is none.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        path = hf_hub_download(repo, name, revision=revision, local_files_only=offline)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        return None
    return read_config(Path(path))


def split_revision(model: str) -> tuple[str, str]:
    """Split `name@revision`; the revision is empty if there is none."""
    name, at, revision = model.rpartition("@")
    return (name, revision) if at and _REVISION.fullmatch(revision) else (model, "")


def is_builtin(model: str) -> bool:
    """Tell whether a name, an alias or an id, with or without a revision, is in the table of models."""
    return split_revision(model)[0].lower() in builtin()


def load_card(model: str) -> ModelCard:
    """Load a card by a built-in name in any case, a directory, or a Hugging Face id.

    A built-in name and an id may end in `@revision`: a commit, a tag or a branch. Raises BadInput for
    anything else.
    """
    name, revision = split_revision(model)
    entry = builtin().get(name.lower())
    if entry:
        return card_from_config(entry["config"], entry["name"], entry["id"])
    path = Path(model)
    if path.is_dir():
        return card_from_directory(path)
    if path.name == "config.json" and path.exists():
        return card_from_directory(path.parent)
    if HUB_ID.fullmatch(name):
        return card_from_hub(name, revision or None)
    raise BadInput(
        f"model {model!r} is no built-in card, directory or Hugging Face id; built-in:"
        f" {', '.join(names())}{did_you_mean(model, builtin())}"
    )
