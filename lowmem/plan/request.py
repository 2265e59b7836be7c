"""Turns names and overrides into the validated input of a plan."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field

from pydantic import ValidationError

from lowmem.checkpoint.quantization import ONLINE, ONLINE_ALIASES
from lowmem.errors import BadInput
from lowmem.inputs import devices, links, model_cards, options, profiles
from lowmem.plan import engine_config, knobs
from lowmem.plan.speculation import KNOB, MOST_DRAFTS
from lowmem.schema import (
    VLLM_VERSION,
    Calibration,
    Deploy,
    Device,
    Knob,
    Limits,
    Link,
    Load,
    ModelCard,
    Profile,
    Quantization,
)
from lowmem.units import MIB
from lowmem.values import kinds

# Only one knob may set the pool's size, so an override removes the profile's other ones.
_POOL_KNOBS = ("kv_cache_memory_bytes", "gpu_memory_utilization", "num_gpu_blocks_override")


@dataclass(frozen=True)
class PlanRequest:
    """Request for a plan; None takes the profile's own value."""

    profile: str | Profile
    model: str | ModelCard | None = None
    device: str | Device | None = None
    count: int | None = None  # cards of each host
    overrides: Mapping[str, options.Given] = field(default_factory=dict)  # knob -> value, as `--set`
    deploy: Deploy | Mapping[str, object] | None = None
    _: KW_ONLY
    clients: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    accepted_tokens: float | None = None  # that a step with drafts gives a request
    memory_limit_bytes: int | None = None
    tpot_p99_ms: float | None = None
    ttft_p99_ms: float | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    vllm_version: str = VLLM_VERSION
    hosts: int | None = None
    network: str | Link | None = None
    search: bool = True  # for the nearest profile that does better
    weights: str | None = None  # see wanted_weights and WEIGHT_FORMATS
    calibration: Calibration | None = None  # constants of the site; None: the package's


@dataclass(frozen=True)
class Inputs:
    """Complete input of a plan, validated."""

    profile: Profile
    base: ModelCard  # the model as named, before the profile's quantization
    card: ModelCard
    device: Device
    count: int
    knobs: Mapping[str, Knob]
    environment: Mapping[str, Knob]
    load: Load
    limits: Limits
    vllm_version: str
    deploy: Deploy | None = None
    hosts: int = 1
    link: Link | None = None  # between the hosts; None: there is one host
    weights: str = "profile"  # how the checkpoint is planned: see wanted_weights
    remarks: tuple[str, ...] = ()  # what was changed beyond the request

    @property
    def to_be_quantized(self) -> bool:
        """Tell whether this deployment quantizes the checkpoint before it serves it."""
        return self.card.quantization != self.base.quantization


def gather(request: PlanRequest) -> Inputs:
    """Load the named data and check the overrides. Raises BadInput for anything that cannot be planned."""
    p = profiles.load_profile(request.profile) if isinstance(request.profile, str) else request.profile
    wanted_device, wanted_model = request.device or p.device, request.model or p.model
    d = devices.load_device(wanted_device) if isinstance(wanted_device, str) else wanted_device
    c = model_cards.load_card(wanted_model) if isinstance(wanted_model, str) else wanted_model
    n = count_of(request, p, d)
    given = _knobs(request, p)
    if request.count is not None and "tensor_parallel_size" not in request.overrides:
        given = _split_over(n, given, p, c, request)
    environment = _environment(request.environment)
    _refuse_acceptance(request.accepted_tokens, given)
    load, limits = load_of(request, p), limits_of(request, p)
    quantized = c
    how = wanted_weights(request, c)
    if how != "stored":
        refuse_requantizing(c, how)
        wanted = WEIGHT_FORMATS[how] if how in WEIGHT_FORMATS else wanted_quantization(p, given)
        quantized = model_cards.quantized(c, fitting_group(c, wanted, given))
    place = _place(request.deploy) if isinstance(request.deploy, Mapping) else request.deploy
    hosts, link = _hosts(request, p)
    if place:
        refuse_place(place, hosts)
    return Inputs(
        profile=p,
        base=c,
        card=quantized,
        device=d,
        count=n,
        knobs=given,
        environment={**p.environment, **environment},
        load=load,
        limits=limits,
        vllm_version=request.vllm_version,
        deploy=place,
        hosts=hosts,
        link=link,
        weights=how,
        remarks=_remarks(request, p, given),
    )


def _place(deploy: Mapping[str, object]) -> Deploy:
    try:
        return Deploy.model_validate(deploy)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise BadInput(f"{name}={first['input']!r} of the deployment: {first['msg']}") from None


def _environment(given: Mapping[str, str]) -> dict[str, Knob]:
    """Return the request's variables of the service's environment."""
    if refused := kinds.refusal("environment", "environment_name to text", given):
        raise BadInput(refused)
    return {name: Knob(value=value, why="set by the operator") for name, value in given.items()}


def count_of(request: PlanRequest, profile: Profile, device: Device) -> int:
    """Return the cards of one host."""
    n = profile.device_count if request.count is None else request.count
    if not 1 <= n <= 64:
        raise BadInput(f"count={n} is not from 1 to 64; give the number of cards of one host")
    if device.kind == "cpu" and n != 1:
        raise BadInput(f"count={n} with device {device.name}: a CPU is one device; use --count 1")
    return n


def _knobs(request: PlanRequest, profile: Profile) -> dict[str, Knob]:
    """Return the profile's knobs, overridden by those of the request."""
    merged = {name: Knob(value=knobs.checked(name, k.value), why=k.why) for name, k in profile.knobs.items()}
    given = knobs.checked_all(request.overrides)
    if any(name in given for name in _POOL_KNOBS):
        merged = {name: k for name, k in merged.items() if name not in _POOL_KNOBS}
    for name, value in given.items():
        why = f"set by the operator (profile {profile.name}: {_before(profile, name)})"
        merged[name] = Knob(value=value, why=why)
    return merged


def _split_over(
    count: int, given: dict[str, Knob], profile: Profile, card: ModelCard, request: PlanRequest
) -> dict[str, Knob]:
    """Let tensor parallelism follow a number of cards other than the profile's.

    It is the largest number of cards that can share the model's layers. A profile that leaves cards idle on
    its own host keeps its split.
    """
    stages = given["pipeline_parallel_size"].value if "pipeline_parallel_size" in given else 1
    before = given["tensor_parallel_size"].value if "tensor_parallel_size" in given else 1
    hosts = profile.hosts if request.hosts is None else request.hosts
    if not isinstance(stages, int) or not isinstance(before, int):
        return given
    if count == profile.device_count or before * stages != profile.device_count * profile.hosts:
        return given
    most = max(1, count * hosts // stages)
    split = next(n for n in range(most, 0, -1) if card.heads % n == 0 and _shares_kv_heads(card, n))
    idle = f", of which it can use {split * stages // hosts}" if split * stages < count * hosts else ""
    why = f"{_FOLLOWS} {count} card(s) of the host{idle} (profile {profile.name}: {before})"
    return {**given, "tensor_parallel_size": Knob(value=split, why=why)}


def _remarks(request: PlanRequest, profile: Profile, given: Mapping[str, Knob]) -> tuple[str, ...]:
    """Say what follows from the request and was not asked for."""
    said = []
    split = given.get("tensor_parallel_size")
    if split is not None and split.why.startswith(_FOLLOWS):
        said.append(f"tensor_parallel_size={split.value} {split.why}")
    if shorter := _shortened(request, profile):
        said.append(
            f"the load follows max_model_len: {shorter['input_tokens']} + {shorter['output_tokens']} tokens a"
            f" request (profile {profile.name}: {profile.load.input_tokens} + {profile.load.output_tokens})"
        )
    return tuple(said)


_FOLLOWS = "follows the"


def _shares_kv_heads(card: ModelCard, n: int) -> bool:
    return card.kv_heads % n == 0 or n % card.kv_heads == 0


def load_of(request: PlanRequest, profile: Profile) -> Load:
    """Return the profile's load with the request's changes."""
    asked = {
        "clients": request.clients,
        "input_tokens": request.input_tokens,
        "output_tokens": request.output_tokens,
    }
    for name, value in asked.items():
        if value is not None and not 1 <= value <= 10_000_000:
            raise BadInput(f"{name}={value} is not from 1 to 10,000,000; correct it")
    if request.clients is not None and request.clients > 100_000:
        raise BadInput(f"clients={request.clients} is more than 100,000; correct it")
    changed: dict[str, object] = _shortened(request, profile)
    changed |= {k: v for k, v in asked.items() if v is not None}
    if request.accepted_tokens is not None:
        _refuse_odd_acceptance(request.accepted_tokens)
        changed |= {"accepted_tokens": request.accepted_tokens, "accepted_source": "given by the operator"}
    return profile.load.model_copy(update=changed)


def _shortened(request: PlanRequest, profile: Profile) -> dict[str, object]:
    """Return a shorter prompt where the operator gave a max_model_len below the profile's own requests.

    A request of which the operator gave a part is left as it is.
    """
    given = knobs.checked("max_model_len", request.overrides.get("max_model_len", "auto"))
    if request.input_tokens is not None or request.output_tokens is not None:
        return {}
    return fitting_tokens(profile.load, given)


def fitting_tokens(load: Load, most: object) -> dict[str, object]:
    """Return the tokens of a request as short as this max_model_len; nothing if the load's are no longer."""
    if not isinstance(most, int) or most < 2 or load.input_tokens + load.output_tokens <= most:
        return {}
    answer = min(load.output_tokens, most // 2)
    return {"input_tokens": most - answer, "output_tokens": answer}


def _refuse_odd_acceptance(accepted: float) -> None:
    """Raise BadInput for an acceptance that no step can give."""
    if not 1 <= accepted <= MOST_DRAFTS + 1:
        raise BadInput(f"accepted_tokens={accepted:g} is not from 1 to {MOST_DRAFTS + 1}; correct it")


def _refuse_acceptance(accepted: float | None, given: Mapping[str, Knob]) -> None:
    """Raise BadInput for an acceptance that no step can give, or that no drafts are there for."""
    if accepted is None:
        return
    _refuse_odd_acceptance(accepted)
    if KNOB not in given:
        raise BadInput(
            f"accepted_tokens={accepted:g} without {KNOB}: a step gives a request one token; set {KNOB} or"
            " leave accepted_tokens out"
        )


def limits_of(request: PlanRequest, profile: Profile) -> Limits:
    """Return the profile's limits with those of the request."""
    for name in ("tpot_p99_ms", "ttft_p99_ms"):
        value = getattr(request, name)
        if value is not None and not 0.001 <= value <= NO_LIMIT_MS:
            raise BadInput(f"{name}={value:g} is not from 0.001 to {NO_LIMIT_MS:,.0f}; correct it")
    if request.memory_limit_bytes is not None and request.memory_limit_bytes < MIB:
        raise BadInput(
            f"memory limit {request.memory_limit_bytes} bytes is less than 1 MiB; give it with its unit, e.g."
            " 20GiB"
        )
    asked = {
        "memory_bytes": request.memory_limit_bytes,
        "tpot_p99_ms": request.tpot_p99_ms,
        "ttft_p99_ms": request.ttft_p99_ms,
    }
    return profile.limits.model_copy(update={k: v for k, v in asked.items() if v is not None})


def hosts_of(request: PlanRequest, profile: Profile) -> int:
    """Return the number of hosts that one server spans."""
    hosts = profile.hosts if request.hosts is None else request.hosts
    if not 1 <= hosts <= 64:
        raise BadInput(f"hosts={hosts} is not from 1 to 64; give the number of hosts that one server spans")
    return hosts


def _hosts(request: PlanRequest, profile: Profile) -> tuple[int, Link | None]:
    """Return the number of hosts that one server spans, and the link between them; None for one host."""
    hosts = hosts_of(request, profile)
    if hosts == 1:
        return hosts, None
    joined = request.network or profile.network
    link = links.load_link(joined) if isinstance(joined, str) else joined
    if link is None:
        raise BadInput(
            f"hosts={hosts} needs a network between the hosts: name one of {', '.join(links.names())}"
        )
    return hosts, link


class BadPlace(BadInput):
    """Raised for an invalid multi-host placement.

    The message starts with the name of the offending `Deploy` field.
    """


def refuse_place(place: Deploy, hosts: int) -> None:
    """Raise BadPlace if the hosts of one server could not meet."""
    if place.nodes and len(place.nodes) != hosts:
        raise BadPlace(
            f"nodes has {len(place.nodes)} addresses and the server spans {hosts} host(s); give one per host,"
            " the API server's host first"
        )
    if place.rank >= hosts:
        raise BadPlace(
            f"rank={place.rank} is not a rank of the {hosts} host(s) of the server; count from 0, the API"
            " server's host"
        )
    for node in place.nodes:
        try:
            address = ipaddress.ip_address(node)
        except ValueError:
            raise BadPlace(
                f"nodes has {node!r}, which is not an IP address; the engine and its firewall rules need"
                " addresses"
            ) from None
        if address.is_loopback or address.is_unspecified or address.is_multicast:
            raise BadPlace(
                f"nodes has {node}, which no other host can reach; give its address in the network that joins"
                " the hosts"
            )
    twice = sorted({node for node in place.nodes if place.nodes.count(node) > 1})
    if twice:
        raise BadPlace(f"nodes has {twice[0]} more than once; give each host its own address")
    if place.nodes and place.port == place.master_port:
        raise BadPlace(f"port={place.port} and master_port are the same; choose another for one of them")


NO_LIMIT_MS = 1e9
"""A latency limit that nothing misses."""

WEIGHT_FORMATS: dict[str, Quantization] = {
    "gptq-8bit": Quantization(method="gptq", bits=8, group_size=128, zero_point=False),
    "compressed-tensors-4bit": Quantization(method="compressed-tensors", bits=4, group_size=128),
    "awq-4bit": Quantization(method="awq", bits=4, group_size=128),
    "gptq-4bit": Quantization(method="gptq", bits=4, group_size=128, zero_point=False),
    "auto-round-3bit": Quantization(method="auto-round", bits=3, group_size=128, zero_point=False),
    "auto-round-2bit": Quantization(method="auto-round", bits=2, group_size=128, zero_point=False),
}
"""Formats that a 16-bit checkpoint may be quantized to before it is served, by the name of `--weights`."""

WEIGHTS = ("stored", "profile", *WEIGHT_FORMATS)


def wanted_weights(request: PlanRequest, card: ModelCard) -> str:
    """Tell whether the checkpoint is planned as it is stored, or quantized first: as the profile says, or so.

    A directory or a Hugging Face id that is named is what the operator has, and is planned as it is stored. A
    built-in card is a model to be deployed by the profile.
    """
    if request.weights is not None:
        if request.weights not in WEIGHTS:
            raise BadInput(f"weights={request.weights!r} is not one of {', '.join(WEIGHTS)}")
        return request.weights
    named = isinstance(request.model, str) and not model_cards.is_builtin(request.model)
    knob = str(request.overrides.get("quantization", ""))
    online = knob in ONLINE or knob in ONLINE_ALIASES
    return "stored" if named or card.counted or online else "profile"


def refuse_requantizing(card: ModelCard, how: str) -> None:
    """Raise BadInput if a format is asked for that an already quantized checkpoint cannot get."""
    if how in WEIGHT_FORMATS and card.quantization.method != "none":
        raise BadInput(
            f"weights={how}: {card.name} is {card.quantization.method} {card.quantization.bits}-bit already;"
            " name the 16-bit model, or leave --weights out"
        )


def wanted_quantization(profile: Profile, given: Mapping[str, Knob]) -> Quantization:
    """Return the quantization of a checkpoint to be made.

    It is the profile's, in the format that a `quantization` knob names.
    """
    method = engine_config.FORMATS.get(str(given["quantization"].value)) if "quantization" in given else None
    if method is None or profile.quantization.method == "none":
        return profile.quantization
    return Quantization.model_validate({**profile.quantization.model_dump(), "method": method})


def fitting_group(card: ModelCard, quantization: Quantization, given: Mapping[str, Knob]) -> Quantization:
    """Choose a group size that divides every layer's inputs on each card.

    It is the largest from the profile's down to 32, or the profile's if none does. This applies to a
    checkpoint to be made; an existing one is left as it is.
    """
    cards_per_layer = given["tensor_parallel_size"].value if "tensor_parallel_size" in given else 1
    if (
        card.quantization.method != "none"
        or quantization.group_size <= 0
        or not isinstance(cards_per_layer, int)
    ):
        return quantization
    linears = [g for g in card.groups if g.kind == "linear"]
    for size in (quantization.group_size, 64, 32):
        if size <= quantization.group_size and not any(
            g.in_features % (size * (cards_per_layer if g.split == "row" else 1)) for g in linears
        ):
            return quantization.model_copy(update={"group_size": size})
    return quantization


def _before(profile: Profile, name: str) -> str:
    return f"{profile.knobs[name].value}" if name in profile.knobs else "not set"
