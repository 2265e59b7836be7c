"""Builds the arguments and the environment of `vllm serve`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lowmem.plan import knobs
from lowmem.plan.engine_config import EngineConfig
from lowmem.plan.memory import CardMemory
from lowmem.plan.request import Inputs
from lowmem.plan.weights import stored_bytes
from lowmem.schema import (
    AdmissionLimits,
    Argument,
    Deploy,
    Device,
    EnvironmentVariable,
    Knob,
    Limits,
    Load,
    ModelCard,
    Node,
    ServiceLimits,
)
from lowmem.units import MIB


def arguments_of(
    inputs: Inputs, engine: EngineConfig, memory: CardMemory, pool_bytes: int
) -> tuple[Argument, ...]:
    """Build the arguments of `vllm serve` in the profile's order, each with its reason."""
    place, card = inputs.deploy, inputs.card
    made = f"{card.name}-{card.quantization.method}" if card.made else ""
    stored = card.source if "/" in card.source else card.name
    model = place.model_path if place else made or stored
    arguments = [Argument(flag="", value=model, why="the checkpoint")]
    if place:
        arguments += _server_arguments(inputs, place)
    for name, knob in inputs.knobs.items():
        value = knob.value
        if name == "kv_cache_memory_bytes" and value == "auto":
            value = pool_bytes
            if value <= 0:
                continue
        words = knobs.tokens_of(name, value)
        if not words:
            continue
        arguments.append(Argument(flag=words[0], value=words[1] if words[1:] else None, why=knob.why))
        if (
            name == "kv_cache_memory_bytes"
            and "gpu_memory_utilization" not in inputs.knobs
            and inputs.device.kind == "cuda"
        ):
            arguments.append(startup_check(inputs.device, memory))
        arguments += [Argument(flag="", value=w, why="") for w in words[2:]]
    return tuple(arguments)


def _server_arguments(inputs: Inputs, place: Deploy) -> list[Argument]:
    """Build the arguments of the API server: its name and address, its middleware, what it may fetch."""
    domains = place.media_domains or (NO_DOMAIN,)  # an empty list would allow every host
    arguments = [
        Argument(flag="--served-model-name", value=place.served_model_name, why="the name clients ask for"),
        Argument(flag="--host", value=place.host, why="the address the server listens on"),
        Argument(flag="--port", value=str(place.port), why="the port the server listens on"),
        Argument(
            flag="--middleware",
            value=ADMISSION,
            why="admits requests by the work that they ask for; stands inside the check of the keys",
        ),
        Argument(
            flag="--middleware",
            value=API_KEYS,
            why="asks for an API key of a file; a key comes and goes without a restart",
        ),
        Argument(
            flag="--allowed-media-domains",
            value=domains[0],
            why="hosts from which media URLs of requests are fetched (lowmem_media_domains)",
        ),
        *(Argument(flag="", value=domain, why="one more of these hosts") for domain in domains[1:]),
        Argument(
            flag="--structured-outputs-config",
            value='{"backend":"xgrammar"}',
            why="whose work Admission counts; by default what it refuses goes to compilers without a bound",
        ),
    ]
    if knobs.version(inputs.vllm_version) >= knobs.version(DRAINS_SINCE):
        arguments.append(
            Argument(
                flag="--shutdown-timeout",
                value=str(drain_s(inputs.load, inputs.limits)),
                why=(
                    "seconds that a stop waits for open requests, which end whole; by default they are"
                    " aborted at once"
                ),
            )
        )
    return arguments


def nodes_of(
    inputs: Inputs,
    arguments: tuple[Argument, ...],
    environment: tuple[EnvironmentVariable, ...],
    service: ServiceLimits,
) -> tuple[Node, ...]:
    """Build the start parameters of each host of a multi-host server, for vLLM's own multi-node mode.

    One host gives an empty tuple. The first host runs the API server, the scheduler and its own workers. The
    others run `--headless`, with the same engine settings. They meet at the first host's address and
    rendezvous port (0.32.0, cli/serve.py and multiproc_executor.py).
    """
    if inputs.hosts == 1:
        return ()
    place = inputs.deploy
    addresses = place.nodes if place and place.nodes else tuple(f"node-{n}" for n in range(inputs.hosts))
    port = place.master_port if place else Deploy.model_fields["master_port"].default
    server = _server_arguments(inputs, place) if place else []
    nodes = []
    for rank, address in enumerate(addresses):
        own = _joining_arguments(inputs.hosts, rank, addresses[0], port)
        names = (
            {"VLLM_HOST_IP": Knob(value=address, why="the address by which the other hosts reach this one")}
            if place and place.nodes
            else {}
        )
        if not rank:
            why = (
                "how long the API server waits for the engine, the other hosts' start in it (default 600): as"
                " long as the unit may take"
            )
            names["VLLM_ENGINE_READY_TIMEOUT_S"] = Knob(value=str(service.timeout_start_s), why=why)
        if place and place.interface:
            names["NCCL_SOCKET_IFNAME"] = Knob(
                value=place.interface, why="stages hand over through this network"
            )
            names["GLOO_SOCKET_IFNAME"] = Knob(value=place.interface, why="the same for what goes beside it")
        kept = arguments if not rank else tuple(a for a in arguments if a not in server)
        more = tuple(EnvironmentVariable(name=n, value=str(k.value), why=k.why) for n, k in names.items())
        nodes.append(
            Node(
                rank=rank,
                address=address,
                arguments=(*kept, *own),
                environment=(*environment, *more),
            )
        )
    return tuple(nodes)


def _joining_arguments(hosts: int, rank: int, first: str, port: int) -> list[Argument]:
    """Build the arguments by which a host joins the others of its server at the address of the first."""
    own = [
        Argument(
            flag="--distributed-executor-backend",
            value="mp",
            why="vLLM's own processes on each host, without Ray",
        ),
        Argument(flag="--nnodes", value=str(hosts), why="hosts of this server"),
        Argument(
            flag="--node-rank",
            value=str(rank),
            why="this host's place among them; stages are dealt in this order",
        ),
        Argument(flag="--master-addr", value=first, why="the first host, where the others meet it"),
        Argument(
            flag="--master-port",
            value=str(port),
            why="its port; it listens for as long as the server runs",
        ),
    ]
    if rank:
        own.append(
            Argument(
                flag="--headless", why="workers only: the first host has the API server and the scheduler"
            )
        )
    return own


def startup_check(device: Device, memory: CardMemory) -> Argument:
    """Build the flag that satisfies vLLM's start-up check.

    vLLM starts only if utilization x total is free, even with the pool set in bytes (v1/worker/utils.py,
    request_memory).
    """
    need = math.ceil(10_000 * (memory.peak - memory.before_start) / (device.torch_total_mib * MIB)) / 10_000
    return Argument(
        flag="--gpu-memory-utilization",
        value=f"{min(1.0, max(0.0001, need)):.4f}",
        why="only the start-up check: this share of the card must be free; the pool is set in bytes",
    )


API_KEYS = "lowmem.api_keys.ApiKeys"

ADMISSION = "lowmem.service.admission.Admission"

NO_DOMAIN = "media.invalid"
"""Name that no host has (RFC 6761)."""


def environment_of(inputs: Inputs, admission: AdmissionLimits) -> tuple[EnvironmentVariable, ...]:
    """Build the service's environment: the variables of every deployment, then the profile's."""
    always = {
        "HF_HUB_OFFLINE": Knob(
            value="1", why="serve the local checkpoint only; never download while starting"
        ),
        "VLLM_NO_USAGE_STATS": Knob(value="1", why="no usage report leaves the host"),
        "DO_NOT_TRACK": Knob(value="1", why="the same for libraries that heed it"),
        **(_admission_environment(admission) if inputs.deploy else {}),
    }
    return tuple(
        EnvironmentVariable(name=n, value=str(k.value), why=k.why)
        for n, k in {**always, **inputs.environment}.items()
    )


def _admission_environment(limits: AdmissionLimits) -> dict[str, Knob]:
    """Give the server its limits, and the engine its own of the same figures."""
    engine = "the engine's own limit, of the same figure"
    return {
        "LOWMEM_ADMISSION": Knob(value=limits.model_dump_json(), why="limits of work that Admission holds"),
        "VLLM_MAX_N_SEQUENCES": Knob(value=str(limits.sequences), why=engine),
        "VLLM_MAX_COMPLETION_PROMPTS": Knob(value=str(limits.sequences), why=engine),
        "VLLM_MAX_STOP_STRINGS": Knob(value=str(limits.stop_strings), why=engine),
        "VLLM_MAX_NUM_BAD_WORDS": Knob(value=str(limits.bad_words), why=engine),
        "VLLM_XGRAMMAR_CACHE_MB": Knob(
            value=str(limits.grammar_cache_bytes // MIB), why="of compiled grammars; the default is 512"
        ),
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": Knob(
            value="0", why="a named host cannot send the server to another one"
        ),
    }


DRAINS_SINCE = "0.32.0"
"""First version that is known to drain. Its API server and engine finish open requests and refuse new ones
(v1/engine/core.py).
"""

RELEASE_S = 30
"""Time for workers to end and free their memory after the last request; 3 to 4 s were seen."""


def drain_s(load: Load, limits: Limits) -> int:
    """Return the seconds in which a request of the plan's load ends, by the plan's own limits."""
    return math.ceil((limits.ttft_p99_ms + load.output_tokens * limits.tpot_p99_ms) / 1000)


def service_limits(
    engine: EngineConfig, device: Device, host: Mapping[str, int], card: ModelCard, load: Load, limits: Limits
) -> ServiceLimits:
    """Compute the limits for the service manager.

    The start timeout follows from the size of the checkpoint. RAM gets a quarter of headroom, and pinned
    buffers get a half.
    """
    read_s = stored_bytes(card) / 200e6  # a slow disk
    return ServiceLimits(
        timeout_start_s=int(
            300 + read_s + (0 if engine.eager else 300)
        ),  # seen: 50 s of compiling, 126 s of kernels made at first use
        timeout_stop_s=drain_s(load, limits) + RELEASE_S,
        drain_s=drain_s(load, limits),
        memory_max_bytes=math.ceil((sum(host.values()) * 1.25 + host.get("pinned_offload", 0) * 0.25) / MIB)
        * MIB,
        memlock=(
            "infinity"
            if engine.offload != "none" or engine.kv_offload_bytes or device.kind == "cuda"
            else "default"
        ),
    )
