"""Defines the data that flows through the package.

Profile, model card and device become a plan; the plan becomes a service and a receipt. Every quantity carries
its unit in its name. `_bytes` are bytes, `_gib` are GiB and `_ms` are milliseconds. `_mib` are MiB (2**20
bytes), which NVML and nvidia-smi print. `_gb_per_s` are 10**9 bytes per second, which datasheets print.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, computed_field, model_validator

from lowmem.units import local_url
from lowmem.values import kinds

Bytes = Annotated[int, Field(description="bytes")]

Scalar = bool | int | float | str

Verdict = Literal["fits", "slow", "impossible"]

VLLM_VERSION = "0.32.0"

ONE_LINE = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]+$"
"""Pattern of a value that stands in a comment, a unit and a script: it ends no line of theirs."""


DOMAIN = r"^[a-z0-9][a-z0-9.-]{0,252}$"
"""Pattern of a host's name in lower case, as it stands in a URL, without a port."""


def _plain_number(value: Any) -> Any:
    # Python counts True as 1 and reads 1_0 as 10; an inventory's `true` would be port 1.
    if isinstance(value, bool) or (isinstance(value, str) and not (value.isascii() and value.isdecimal())):
        raise ValueError("a number is wanted")
    return value


Port = Annotated[int, BeforeValidator(_plain_number), Field(ge=1, le=65535)]


class Strict(BaseModel):
    """Refuses unknown keys, so that a mistyped name is never a silent default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_computed(cls, data: Any) -> Any:
        # Computed fields are written for other readers; this one computes them again.
        return (
            {k: v for k, v in data.items() if k not in cls.model_computed_fields}
            if isinstance(data, dict)
            else data
        )


class Quantization(Strict):
    """Storage format of the linear layers of a checkpoint."""

    method: Literal[
        "none", "awq", "compressed-tensors", "gptq", "auto-round", "fp8", "modelopt", "quark", "mxfp4"
    ] = "none"
    bits: int = Field(16, ge=1, le=16)
    group_size: int = Field(128, description="weights sharing one scale; -1: a whole input row")
    zero_point: bool = True
    ignored: tuple[str, ...] = Field((), description="module names or patterns left at 16 bits")


class Load(Strict):
    """Closed-loop load that latency and `max_requests` refer to. The defaults are the source article's."""

    clients: int = Field(8, ge=1, le=100_000)
    input_tokens: int = Field(1024, ge=1)
    output_tokens: int = Field(256, ge=1)
    accepted_tokens: float | None = Field(
        None,
        ge=1,
        le=65,
        allow_inf_nan=False,
        description="with speculative decoding: mean tokens that a step gives a request, its own included",
    )
    accepted_source: str = Field("", description="where accepted_tokens comes from")


class Limits(Strict):
    """Limits that the deployed service must keep."""

    memory_bytes: Bytes = Field(
        gt=0, description="per GPU as NVML shows it under load; on a CPU: resident set of the service"
    )
    tpot_p99_ms: float = Field(gt=0)
    ttft_p99_ms: float = Field(gt=0)


class Knob(Strict):
    """Start parameter of a profile, with the reason for its value."""

    value: Scalar
    why: str


class Profile(Strict):
    """Named set of start parameters; see `profiles/*.yml`. Knobs carry vLLM's flag names in snake_case."""

    name: str
    summary: str
    device: str = Field(description="device the profile is written for; a name of the device table")
    device_count: int = Field(1, ge=1, description="cards of one host")
    hosts: int = Field(1, ge=1, description="hosts that one server spans")
    network: str | None = Field(None, description="link between the hosts; a name of the link table")
    model: str = Field(description="model card the profile is written for; a built-in name")
    quantization: Quantization
    limits: Limits
    load: Load = Load()
    knobs: dict[str, Knob]
    environment: dict[str, Knob] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()


class WeightGroup(Strict):
    """Group of `count` equal tensors of a checkpoint with `out_features` x `in_features` weights each.

    A norm or a bias is out_features x 1. `split` says how tensor parallelism splits the group. `column` cuts
    out_features, `row` cuts in_features, and `vocab` cuts the padded vocabulary. `kv` cuts key/value heads,
    and repeats them once there are more cards than heads. `none` copies the group to every card.
    """

    name: str
    kind: Literal["linear", "embedding", "lm_head", "norm", "bias", "router"]
    count: int = Field(ge=1)
    out_features: int = Field(ge=1)
    in_features: int = Field(ge=1)
    split: Literal["column", "row", "kv", "vocab", "none"]
    quantized: bool = False
    layered: bool = Field(
        True, description="part of a decoder layer (what weight offload can move), not of the ends"
    )

    @property
    def parameters(self) -> int:
        return self.count * self.out_features * self.in_features


@dataclass(frozen=True)
class Published:
    """Files of a checkpoint as published: config.json, hf_quant_config.json and the headers' dtypes."""

    config: Mapping[str, Any]
    hf_quant_config: Mapping[str, Any] | None = None
    headers: Mapping[str, Mapping[str, Any]] | None = None
    inventories: dict[tuple[int, str], Any] = field(default_factory=dict, compare=False, repr=False)
    """Counted once for a number of GPUs and a dtype; a search asks many times."""


class ModelCard(Strict):
    """Description of a checkpoint by its config.json and safetensors headers.

    Groups inside a layer stand in the engine's loading order.
    """

    name: str
    source: str = Field(description="where the card comes from: built-in, a directory, a Hugging Face id")
    model_type: str
    layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    max_position_embeddings: int = Field(ge=1)
    experts: int = Field(0, ge=0)
    experts_per_token: int = Field(0, ge=0)
    tied: bool = False
    dtype: str = "float16"
    quantization: Quantization = Quantization()
    groups: tuple[WeightGroup, ...]
    config: dict[str, Any] = Field(description="config.json, which decides the layout of the KV cache")
    header_bytes: Bytes | None = Field(
        None, description="sum of the tensors as the safetensors headers give it; None: not read"
    )
    published: Published | None = Field(None, exclude=True, repr=False)
    made: bool = Field(False, description="a deployment quantizes it first; no such checkpoint is published")
    counted: bool = Field(
        False, description="the groups are those of the table of architectures, and bytes are its inventory"
    )

    @property
    def parameters(self) -> int:
        return sum(g.parameters for g in self.groups)


_Rate = Annotated[float, Field(gt=0, le=1e7, allow_inf_nan=False)]


class Device(Strict):
    """Accelerator (or the CPU) as its maker or the driver describes it.

    `source` names the source of each figure. Rates are dense; one that is None does not exist on the card.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,127}$")
    title: str = Field(pattern=ONE_LINE, max_length=400)
    kind: Literal["cuda", "cpu"] = "cuda"
    capability: str = Field(
        "", pattern=r"^(1?[0-9]\.[0-9])?$", description="CUDA compute capability, e.g. 8.0"
    )
    nvml_total_mib: int = Field(
        gt=0, le=2**24, description="memory.total of nvidia-smi; on a CPU the machine's RAM"
    )
    torch_total_mib: int = Field(
        gt=0, le=2**24, description="what cudaMemGetInfo reports: the base of --gpu-memory-utilization"
    )
    hbm_gb_per_s: _Rate
    link_gb_per_s: _Rate = Field(description="host to device, pinned copy")
    fp16_tflops: _Rate = Field(description="dense, tensor cores, FP32 accumulate")
    bf16_tflops: _Rate | None = None
    fp8_tflops: _Rate | None = None
    fp4_tflops: _Rate | None = None
    int8_tops: _Rate | None = None
    peer_gb_per_s: _Rate = Field(
        description="card to card, one direction: NVLink where there is one, else the host link"
    )
    sm_count: int = Field(ge=0, le=100_000, description="0: not known")
    pcie_generation: int | None = Field(None, ge=1, le=8, description="None: no PCIe slot")
    pcie_lanes: int | None = Field(None, ge=1, le=32)
    nvlink: bool = Field(False, description="cards of this kind come joined by NVLink")
    peer_access: bool = Field(True, description="cards read one another's memory")
    unified: bool = Field(False, description="its memory is the CPU's too")
    arm_host: bool = Field(False, description="its host has an ARM CPU")
    slice_of: str | None = Field(None, description="of a MIG slice: the card that it is a part of")
    estimate: str = Field(
        "", description="why the figures are estimates and which they are; empty: each one has a source"
    )
    source: dict[str, str]


class SiteConstant(Strict):
    """Constant of a site, its value in the package, and the receipts that it comes from."""

    value: float = Field(ge=0, le=1e7, allow_inf_nan=False)
    before: float = Field(allow_inf_nan=False, description="value of the package")
    source: str


class Calibration(Strict):
    """Constants of one site that replace those of the package, as `lowmem calibrate` writes them.

    `constants` has a value by section and name of calibration.yml, such as `latency.hbm_efficiency.marlin`.
    """

    schema_version: Literal[1] = 1
    created_utc: str
    device: str = Field(description="the cards that were measured, a name of the device table")
    vllm_version: str
    constants: dict[str, SiteConstant] = Field(min_length=1)
    receipts: tuple[str, ...] = Field(min_length=1, description="name and SHA-256 of each receipt")


class Link(Strict):
    """Network link between the hosts of one server. `source` names the source of each figure."""

    name: str
    title: str
    gb_per_s: float = Field(gt=0, description="one direction, what is left for data")
    round_trip_us: float = Field(gt=0)
    rdma: bool = Field(description="data moves without the kernel's TCP")
    source: dict[str, str]


class Argument(Strict):
    """Argument of `vllm serve`. `value` None is a bare flag; a flag of "" is the positional model."""

    flag: str
    value: str | None = None
    why: str

    def tokens(self) -> list[str]:
        return [t for t in (self.flag, self.value) if t]


class EnvironmentVariable(Strict):
    name: str
    value: str
    why: str


class Latency(Strict):
    """Latency of a load in milliseconds.

    Floors are physics: bytes over bandwidth, operations over rate. Expectations add calibration.
    """

    decode_floor: float
    decode_expected: float
    prefill_floor: float
    prefill_expected: float
    terms: dict[str, float] = Field(default_factory=dict, description="each floor by name, in ms")


class ServiceLimits(Strict):
    """Limits that the service manager enforces."""

    timeout_start_s: int
    timeout_stop_s: int
    drain_s: int = Field(
        0, description="how long a server that is told to stop goes on with the requests it has"
    )
    memory_max_bytes: Bytes = Field(description="cgroup limit: host RAM of the plan with headroom")
    memlock: Literal["infinity", "default"]


class AdmissionLimits(Strict):
    """Limits of the work that one request, one key and all clients together may ask of the server.

    The plan derives them and the server's middleware holds them (`lowmem.service.admission`).
    """

    places: int = Field(ge=1, description="sequences that the engine serves together")
    max_model_len: int = Field(ge=1, description="tokens of the longest sequence")
    body_bytes: Bytes = Field(ge=1, description="of one request's body")
    held_bytes: Bytes = Field(ge=1, description="of all open bodies; one key may hold half of it")
    open_requests: int = Field(ge=1, description="of one key, waiting and running")
    sequences: int = Field(ge=1, description="of one request: its prompts x its answers to each")
    request_tokens: int = Field(ge=1, description="of one request: all its prompts and answers")
    prompt_bytes: Bytes = Field(ge=1, description="of one prompt's text, before any truncation")
    json_depth: int = Field(64, ge=1, description="levels of one body's objects and lists")
    json_objects: int = Field(4096, ge=1, description="of one body: messages, parts and schemas")
    grammar_items: int = Field(ge=1, description="properties, enum values, choices and rules of one request")
    grammar_bytes: Bytes = Field(ge=1, description="of one request's schemas, grammars and patterns")
    grammar_depth: int = Field(32, ge=1, description="levels of one schema")
    grammar_repeats: int = Field(ge=1, description="repetitions of one request's patterns, unrolled")
    grammar_at_once: int = Field(ge=1, description="grammar items of the requests whose answer has not begun")
    grammar_cache_bytes: Bytes = Field(ge=1, description="of the engine's cache of compiled grammars")
    stop_strings: int = Field(4, ge=1)
    bad_words: int = Field(128, ge=1)
    token_ids: int = Field(1024, ge=1, description="of each list of token ids that is no prompt")
    logit_bias: int = Field(300, ge=1, description="tokens of one request's logit_bias")
    logprobs: int = Field(20, ge=0, description="log probabilities at one token")
    logprob_values: int = Field(ge=1, description="log probabilities of one whole answer")
    media_domains: tuple[str, ...] = Field((), description="hosts from which media URLs may be fetched")
    memory_bytes: Bytes = Field(ge=1, description="what open requests within these limits cost the host")


class Deploy(Strict):
    """Address at which this deployment's server listens, and the path of its model."""

    model_path: str = Field(pattern=ONE_LINE)
    served_model_name: str = Field(pattern=ONE_LINE)
    host: str = Field("127.0.0.1", pattern=f"^{kinds.HOST}$")
    port: Port = 8000
    media_domains: tuple[Annotated[str, Field(pattern=DOMAIN)], ...] = Field(
        (), description="hosts from which media URLs of requests may be fetched; empty: from none"
    )
    nodes: tuple[str, ...] = Field(
        (),
        description=(
            "addresses of the hosts of one server in the network that joins them, the one that serves first"
        ),
    )
    interface: str = Field(
        "",
        pattern=f"^({kinds.INTERFACE})?$",
        description="network interface that joins them, the same on each; empty: NCCL and Gloo choose",
    )
    master_port: Port = Field(29501, description="port of the first host where the others meet it")
    rank: int = Field(
        0,
        ge=0,
        description="this host's place among `nodes`; arguments and environment of the plan are its own",
    )

    @computed_field  # type: ignore[prop-decorator]
    @property
    def local_url(self) -> str:
        """Return the URL at which this host reaches its own server."""
        return local_url(self.host, self.port)


class Stage(Strict):
    """Layers of one pipeline stage and the memory of one of its cards.

    Fields have the same names as in the plan.
    """

    node: int = Field(description="host it runs on, from 0")
    first_layer: int
    layers: int
    per_gpu: dict[str, Bytes]
    load_growth: dict[str, Bytes]
    weight_terms: dict[str, Bytes]
    peak_bytes: Bytes
    start_peak_bytes: Bytes


class Pipeline(Strict):
    """Traffic between the pipeline stages, and the link that it needs. No figure here was measured."""

    network: Link | None = Field(None, description="None: all stages are on one host")
    bytes_per_token: Bytes = Field(description="over each boundary of two stages, for each token of a step")
    bytes_per_decode_step: Bytes = Field(description="the same for a decode step of the whole load")
    bytes_per_prefill_step: Bytes = Field(description="the same for the largest step")
    hop_floor_ms: float = Field(
        description=(
            "a decode step's way through the network and the sampled tokens' way back, as physics has it"
        )
    )
    hop_ms: float = Field(description="the same as expected, with what NCCL and Gloo add")
    idle_share_one_client: float = Field(
        description="of each card's time, while one client decodes: the pipeline's bubble"
    )
    idle_share: float = Field(
        description="the same at the load, all of it in one batch: the engine does not split batches evenly"
    )
    least_gb_per_s: float | None = Field(
        None,
        description=(
            "bandwidth below which a latency limit is missed at this round trip; None: no link is enough"
        ),
    )
    most_round_trip_us: float | None = Field(
        None, description="round trip above which a latency limit is missed at this bandwidth"
    )


class KvCacheGroup(Strict):
    """Layers whose caches share a block table, on one GPU. A request holds blocks of each group."""

    kind: Literal["full", "mla", "sliding", "sliding_mla", "chunked", "mamba"]
    layers: int = Field(description="caches of the group; a layer may have several")
    block_tokens: int
    page_bytes: Bytes = Field(description="one block over these layers")
    blocks_per_request: int = Field(description="of a request of max_model_len")
    groups: int = Field(description="how many groups are alike")


class KvCache(Strict):
    """Layout of the KV cache on one GPU, as vLLM makes it from config.json; of several stages the fullest."""

    bytes_per_request: Bytes = Field(description="what one request of max_model_len holds; 0: no cache")
    blocks_per_request: int
    bytes_per_block: Bytes = Field(description="a block belongs to one group at a time: the largest counts")
    groups: tuple[KvCacheGroup, ...]


class SpeculationPlan(Strict):
    """Yield of speculative decoding at an acceptance, and the acceptance that it needs."""

    method: str = Field(description="where the drafts come from; ngram: the request's own text")
    drafts: int = Field(description="draft tokens that a step verifies for each request")
    accepted_tokens: float = Field(description="mean tokens that a step gives a request, its own included")
    accepted_source: str = Field(description="where accepted_tokens comes from; a plan measures no text")
    break_even_tokens: float = Field(description="accepted_tokens below which the engine is faster without")
    needed_tokens: float | None = Field(
        None, description="accepted_tokens that meet the limit of a token; None: no acceptance does"
    )


class Node(Strict):
    """Start parameters of one host of a multi-host server."""

    rank: int
    address: str
    arguments: tuple[Argument, ...]
    environment: tuple[EnvironmentVariable, ...]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def argv(self) -> list[str]:
        return [t for a in self.arguments for t in a.tokens()]


class Checkpoint(Strict):
    """Tensors of the served checkpoint on one GPU, as the engine registers them before a kernel repacks."""

    architecture: str
    dtype: str = Field(description="the engine computes in it")
    format: str = Field(description="quantization method, or none")
    parameter_bytes: Bytes
    buffer_bytes: Bytes = Field(description="rotary caches and other buffers")
    bytes_by_use: dict[str, Bytes] = Field(description="parameter_bytes in parts: embedding, attention, …")
    active_bytes: Bytes = Field(description="parameters that one token reads: all but the idle experts")


class Plan(Strict):
    """Everything that is known before a host is touched.

    `lowmem plan --json` writes it, and it is the only input of the templates.
    """

    schema_version: Literal[1] = 1
    vllm_version: str = VLLM_VERSION
    profile: str
    model: str
    parameters: int
    weight_bytes: Bytes = Field(description="all tensors of the checkpoint as stored")
    quantization: Quantization
    checkpoint: Checkpoint | None = Field(None, description="None: the engine refuses it, or not counted")
    device: str
    device_kind: Literal["cuda", "cpu"]
    device_figures: Device | None = Field(None, description="with their sources; None: an older release")
    device_notes: tuple[str, ...] = Field((), description="what the card decides, and what is an estimate")
    calibration: Calibration | None = Field(None, description="of the site; None: the package's constants")
    device_count: int = Field(description="cards of one host")
    hosts: int = 1
    tensor_parallel_size: int
    pipeline_parallel_size: int = 1
    max_model_len: int = Field(0, description="tokens of the longest request, prompt and answer")
    max_num_seqs: int = Field(0, description="requests that one step of the engine serves together")
    max_num_batched_tokens: int = Field(0, description="tokens of the largest step")
    async_scheduling: bool = Field(False, description="the engine schedules a step while the last one runs")
    dummy_weights: bool = Field(False, description="the engine makes up its weights instead of reading them")
    load: Load
    limits: Limits
    verdict: Verdict
    reasons: tuple[str, ...]
    limit_bytes: Bytes
    per_gpu: dict[str, Bytes] = Field(
        description=(
            "term -> bytes, with 'total'; on a CPU the 'GPU' is the engine's resident set; of several stages"
            " the fullest"
        )
    )
    weight_terms: dict[str, Bytes] = Field(
        default_factory=dict,
        description="per_gpu['weights'] in parts: sharded, replicated, padding, repacking, less offloaded",
    )
    load_growth: dict[str, Bytes] = Field(
        default_factory=dict, description="per GPU, what a full load adds to per_gpu['total'], term -> bytes"
    )
    peak_bytes: Bytes = Field(
        0,
        description=(
            "per GPU under load: per_gpu['total'] + load_growth; this is what the limit is held against"
        ),
    )
    before_start_bytes: Bytes = Field(
        0, description="per GPU, the part of per_gpu that is there when the engine first reads free memory"
    )
    start_peak_bytes: Bytes = Field(
        0, description="per GPU, bound of what NVML may show while the engine loads (the allocator's cache)"
    )
    host_ram: dict[str, Bytes]
    stage_ram: dict[str, Bytes] = Field(
        default_factory=dict, description="RAM of the stages before the service runs, stage -> bytes"
    )
    kv_available_bytes: int = Field(
        0, description="what the engine's budget leaves for KV; negative: it does not start"
    )
    kv_tokens: int
    kv_cache: KvCache | None = Field(None, description="layout of the pool; None: a plan of an older release")
    max_requests: int
    latency_ms: Latency
    arguments: tuple[Argument, ...]
    environment: tuple[EnvironmentVariable, ...]
    service: ServiceLimits
    admission: AdmissionLimits | None = Field(
        None, description="what the server admits; None: plan of a release without such limits"
    )
    deploy: Deploy | None = None
    nearest: str | None = None
    stages: tuple[Stage, ...] = Field((), description="pipeline stages in order; empty: one")
    pipeline: Pipeline | None = None
    speculation: SpeculationPlan | None = Field(None, description="None: a step gives a request one token")
    nodes: tuple[Node, ...] = Field(
        (),
        description=(
            "how each host is started; empty: one host, as `arguments` say, which are the first node's"
        ),
    )

    @computed_field  # type: ignore[prop-decorator]
    @property
    def argv(self) -> list[str]:
        """Return the arguments as `vllm serve` gets them."""
        return [t for a in self.arguments for t in a.tokens()]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def host_ram_bytes(self) -> int:
        return sum(self.host_ram.values())

    @model_validator(mode="before")
    @classmethod
    def _of_an_older_release(cls, data: Any) -> Any:
        """Take the engine's settings from the arguments: plans of 0.1.0 have them nowhere else."""
        if not isinstance(data, dict) or "max_num_seqs" in data:
            return data
        arguments = data.get("arguments")
        known = [a for a in arguments if isinstance(a, dict)] if isinstance(arguments, list | tuple) else []
        flags = {a["flag"]: a.get("value") for a in known if isinstance(a.get("flag"), str)}
        numbers = ("max_model_len", "max_num_seqs", "max_num_batched_tokens")
        given = {name: flags.get(f"--{name.replace('_', '-')}") for name in numbers}
        return {
            **{name: value for name, value in given.items() if str(value).isdecimal()},
            "async_scheduling": data.get("device_kind") == "cuda" and "--no-async-scheduling" not in flags,
            "dummy_weights": flags.get("--load-format") == "dummy",
            **data,
        }


class DeployedPlan(Plan):
    """Plan that says where its server listens and which model it serves."""

    deploy: Deploy


class Percentiles(Strict):
    """Milliseconds over the requests (TTFT, TPOT, E2E) or the pooled gaps (ITL) of one load run."""

    mean: float
    p50: float
    p90: float
    p99: float


class LoadResult(Strict):
    """Result of one closed-loop run of `vllm bench serve`."""

    load: Load
    requests: int
    failed: int
    duration_s: float
    request_throughput_per_s: float
    output_tokens_per_s: float
    ttft_ms: Percentiles
    tpot_ms: Percentiles
    itl_ms: Percentiles
    e2e_ms: Percentiles
    memory_peak_bytes: tuple[Bytes, ...] = Field(
        (), description="highest samples while this load ran, as in Receipt"
    )


class Term(Strict):
    """Planned quantity beside its measurement. `measured_bytes` is None if the engine did not report it."""

    name: str
    planned_bytes: Bytes | None
    measured_bytes: Bytes | None
    source: str = Field(description="where the measured value comes from, e.g. the engine's log line")


class Receipt(Strict):
    """Measurement of the deployed service, the plan beside it, and the verdict.

    Memory is per GPU as NVML shows it, for all processes together. On a CPU it is one figure, that of the
    engine's processes. `memory_before_bytes` was in use before the engine started, for example by others. The
    limits hold for what came on top of it, `service_peak_bytes`.
    """

    schema_version: Literal[1] = 1
    created_utc: str
    plan: Plan
    mode: Literal["start", "attach"] = Field(
        "start", description="started for this measurement, or found running"
    )
    versions: dict[str, str]
    hardware: dict[str, str]
    argv: tuple[str, ...] = Field(description="of the running process; of the launcher where none ran")
    environment: dict[str, str] = Field(
        default_factory=dict, description="variables of the engine that bear on the result; no secrets"
    )
    terms: tuple[Term, ...]
    memory_source: str = ""
    memory_before_bytes: tuple[Bytes, ...]
    memory_idle_bytes: tuple[Bytes, ...]
    memory_peak_bytes: tuple[Bytes, ...] = Field(description="highest sample over loading, start and load")
    memory_peak_start_bytes: tuple[Bytes, ...] = Field(
        (), description="the part of the peak seen before the service was ready"
    )
    memory_phases_bytes: dict[str, tuple[Bytes, ...]] = Field(
        default_factory=dict, description="highest sample of each phase"
    )
    host_memory_bytes: dict[str, Bytes] = Field(
        default_factory=dict, description="peak of the process tree, and of RAM taken from the machine"
    )
    sample_interval_ms: float = 0
    ready_s: float | None = Field(
        description="start to first completion; None: did not start, or was running already"
    )
    loads: tuple[LoadResult, ...]
    engine_values: dict[str, tuple[float, ...]] = Field(
        default_factory=dict, description="see lowmem.measure.engine_log"
    )
    engine_words: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    engine_log: tuple[str, ...] = Field((), description="the lines that the terms were read from")
    error: str | None = Field(None, description="the engine's own words, where it did not start or died")
    advice: str | None = None
    findings: tuple[str, ...] = Field(
        (), description="limits missed, each with its term; physics broken; empty when all is well"
    )
    notes: tuple[str, ...] = Field((), description="what a reader must know and what is no failure")
    checks: dict[str, Any] = Field(
        default_factory=dict, description="outcome of the pytest-testinfra suites by name"
    )
    verdict: Literal["passed", "failed"]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def service_peak_bytes(self) -> tuple[int, ...]:
        """Return the peak per GPU above what was in use before. The memory limit holds for this figure."""
        before = self.memory_before_bytes or (0,) * len(self.memory_peak_bytes)
        return tuple(peak - base for peak, base in zip(self.memory_peak_bytes, before, strict=True))
